"""From a data spec to token ids: load the records of a split, check their gold answers, render their prompts, tokenise
everything once.

`load_split` understands the `synthetic:` worlds and paths; `prepare` makes prompts for reinforcement,
`prepare_supervised` prompts and targets; `data.cache` keeps those of large files. Records that are too long are dropped
and counted, never cut: a cut prompt loses its tool list. Records whose gold answer the template cannot say are set aside.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jinja2
import numpy as np

from rest_jax.config import DataConfig
from rest_jax.data.convert import rlla
from rest_jax.data.files import MAX_SAID, read_records
from rest_jax.data.ragged import Ragged, take_records
from rest_jax.data.records import RecordError, StepRecord
from rest_jax.data.synthetic import world as synthetic
from rest_jax.errors import UserError
from rest_jax.models.tokenizer import Tokenizer
from rest_jax.rewards.gold import GoldError, reachable
from rest_jax.templates import TAGS, Template
from rest_jax.tool_calls import Call, Target

SYNTHETIC_EVAL_SIZE = 256  # records of `synthetic:eval` when no limit is given

_NEARLY_ALL = 0.95  # share of the records below which what drops the others is worth a word

SetAside = Mapping[str, Sequence[str]]  # reason -> ids of the records that were set aside for it


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Records that fit, tokenised; all in the order of the data."""

    records: Sequence[StepRecord]
    prompts: Ragged  # int32 rows
    targets: Ragged  # int32 rows, end-of-turn included; none for reinforcement
    dropped: int  # records that were too long
    limit: int  # tokens a record may have
    remedy: str = ""  # the value of the limit that keeps nearly all; "" where they are kept
    set_aside: SetAside = dataclasses.field(default_factory=dict)

    @property
    def size(self) -> int:
        """Number of records kept."""
        return len(self.records)

    def summary(self, first: int | None = None, key: str = "") -> str:
        """One line: how many records, how many dropped and why, how long the prompts are. `key` is what had the first so many
        records read, which is said where they may not have been all.
        """
        read = self.size + self.dropped + sum(map(len, self.set_aside.values()))
        limited = f" of the first {first} ({key})" if first is not None and read >= first else ""
        p50, p95, most = np.percentile(self.prompts.lengths, [50, 95, 100], method="higher")
        remedy = f"; {self.remedy}" if self.remedy else ""
        longer = f"longer than {self.limit} tokens{remedy}"
        dropped = f", {self.dropped} dropped ({longer})" if self.dropped else ""
        aside = f", {said}" if (said := said_aside(self.set_aside)) else ""
        return f"{self.size} records{limited}{dropped}{aside}; prompt tokens: median {p50}, 95 % {p95}, most {most}"


@dataclasses.dataclass(frozen=True)
class Encoder:
    """What becomes token ids of a record: its prompt, and in supervised training its target. What the data says is plain text:
    only what the templates write is a control token.
    """

    tokenizer: Tokenizer
    template: Template
    brief: bool = False
    supervised: bool = False

    def __post_init__(self):
        # targets continue where the prompts of the chat template end
        opened = self.template.behind(self.tokenizer.thought_open)
        object.__setattr__(self, "template", opened)

    def usable(
        self, records: Sequence[StepRecord]
    ) -> tuple[Sequence[StepRecord], dict[str, list[str]]]:
        """(the records whose gold answer the template can say, those set aside)."""
        kept, aside = [], {}
        for record in records:
            try:
                target = reachable(record.target, self.template, {t["name"] for t in record.tools})
            except GoldError as error:
                aside.setdefault(str(error), []).append(record.id)
            else:
                same = target == record.target
                kept.append(record if same else dataclasses.replace(record, target=target))
        return kept, aside

    def __call__(self, records: Sequence[StepRecord]) -> tuple[list[np.ndarray], ...]:
        """(prompts,) or (prompts, targets): int32 rows; a target is the gold text followed by the end-of-turn id.

        RecordError when the tokenizer's chat template refuses a prompt.
        """
        records = [self._masked(record) for record in records]
        prompts = self.tokenizer.encode_all([self._prompt(record) for record in records])
        if not self.supervised:
            return (prompts,)
        answers = [self.template.render_answer(record.target) for record in records]
        end = np.int32(self.tokenizer.end_id)
        return prompts, [np.append(ids, end) for ids in self.tokenizer.encode_all(answers)]

    def prompt(self, record: StepRecord) -> str:
        """The prompt for the tokenizer's `encode_all`: as text, with marks for the control tokens that the data quotes.

        RecordError when the chat template refuses it.
        """
        return self._prompt(self._masked(record))

    @functools.cached_property
    def _lists_tools(self) -> bool:
        """Whether the tokenizer's chat template lists tools as the template does."""
        return self.tokenizer.lists_tools(self.template.request)

    def _masked(self, record: StepRecord) -> StepRecord:
        """The record with marks for the control tokens that its texts quote; rendered text keeps the templates' tags."""
        mask, gold = self.tokenizer.mask, record.target
        target = Target(
            calls=tuple(Call(mask(c.name), mask(c.arguments)) for c in gold.calls),
            response=mask(gold.response),
            think=mask(gold.think),
            text=mask(gold.text, TAGS),
        )
        return dataclasses.replace(
            record,
            tools=mask(record.tools),
            history=mask(record.history),
            messages=mask(record.messages, TAGS),
            target=target,
        )

    def _prompt(self, record: StepRecord) -> str:
        try:
            if self._lists_tools and (native := record.native_prompt(self.template)) is not None:
                return self.tokenizer.render_prompt(*native)
            messages = record.prompt_messages(self.template, self.brief)
            return self.tokenizer.render_prompt(messages)
        except jinja2.TemplateError as error:  # say, of roles that do not alternate
            said = " ".join(self.tokenizer.unmask(str(error)).split())
            raise RecordError(
                f"record {record.id!r}: the chat template of the tokenizer refuses it: {said}"
            ) from error


def load_split(spec: str, cfg: DataConfig, limit: int | None = None) -> list[StepRecord]:
    """The records of `synthetic:train`, `synthetic:eval`, `synthetic:demonstrations` or of a file, at most `limit`.

    Training worlds have `cfg.synthetic_size` records, `synthetic:eval` has `limit` or 256. UserError for an unknown spec.
    """
    if not is_world(spec):
        return read_records(spec, limit)
    name = spec.partition(":")[2]
    seed, level = cfg.synthetic_seed, cfg.synthetic_level
    size = min(cfg.synthetic_size, limit or cfg.synthetic_size)
    if name == "train":
        return synthetic.world("train", seed, size, level)
    if name == "eval":
        return synthetic.world("eval", seed, limit or SYNTHETIC_EVAL_SIZE, level)
    if name == "demonstrations":
        return synthetic.demonstrations("train", seed, size, level)
    raise UserError(
        f"data {spec!r}: unknown world (known: synthetic:train, synthetic:eval, synthetic:demonstrations)"
    )


def is_world(spec: str) -> bool:
    """Whether a spec names a synthetic world, not a file."""
    return spec.startswith("synthetic:")


def prepare(
    records: Sequence[StepRecord], tokenizer: Tokenizer, template: Template, cfg: DataConfig
) -> Prepared:
    """Tokenises every prompt once; drops those above `cfg.max_prompt_tokens`. UserError when nothing is left."""
    encoder = Encoder(tokenizer, template, cfg.brief_prompt)
    return tokenise(records, encoder, cfg.max_prompt_tokens)


def prepare_supervised(
    records: Sequence[StepRecord],
    tokenizer: Tokenizer,
    template: Template,
    cfg: DataConfig,
    max_tokens: int,
) -> Prepared:
    """Tokenises prompts and targets; drops records of more than `max_tokens` in all. UserError when nothing is left, and
    for records without a thought to imitate.
    """
    encoder = Encoder(tokenizer, template, cfg.brief_prompt, supervised=True)
    return tokenise(records, encoder, max_tokens)


def tokenise(records: Sequence[StepRecord], encoder: Encoder, max_tokens: int) -> Prepared:
    """What the encoder makes of the usable records, of at most `max_tokens` in all; errors of `prepare` and
    `prepare_supervised`.
    """
    if encoder.supervised:
        check_demonstrations(records)
    kept, aside = encoder.usable(records)
    kept, columns, refused = encode(kept, encoder)
    return fitting(kept, [Ragged.of(column) for column in columns], max_tokens, aside | refused)


def encode(
    records: Sequence[StepRecord], encoder: Encoder
) -> tuple[Sequence[StepRecord], tuple[list[np.ndarray], ...], dict[str, list[str]]]:
    """(the records that can be encoded, what the encoder makes of them, those whose prompt the chat template refuses)."""
    try:
        return records, encoder(records), {}
    except RecordError:
        kept, refused = [], {}
    for record in records:
        try:
            encoder([record])
            kept.append(record)
        except RecordError as error:
            reason = str(error).removeprefix(f"record {record.id!r}: ")
            refused.setdefault(reason, []).append(record.id)
    return kept, encoder(kept), refused


def check_demonstrations(records: Sequence[StepRecord]) -> None:
    """UserError for rows of rlla's Parquet files, which say no thought to imitate."""
    if any(map(rlla.is_reward_only, records)):
        raise UserError(
            "data.train: rows of rlla's Parquet files, whose thoughts are placeholders, are no supervised data; "
            "use rlla_sft.json"
        )


def fitting(
    records: Sequence[StepRecord], columns: Sequence[Ragged], max_tokens: int, aside: SetAside
) -> Prepared:
    """The records of at most `max_tokens` tokens in all columns, which are those of `Encoder`. UserError when there are none."""
    if not len(records):
        raise UserError(f"data: no records; {said_aside(aside)}" if aside else "data: no records")
    totals = np.sum([column.lengths for column in columns], axis=0)
    fits = np.flatnonzero(totals <= max_tokens)
    key = "data.max_prompt_tokens" if len(columns) == 1 else "sft.max_tokens"
    remedy = _remedy(key, totals)
    if not len(fits):
        raise UserError(
            f"{key} {max_tokens}: every one of the {len(records)} records is longer (shortest: {totals.min()} tokens); raise it: "
            f"{remedy}"
        )
    prompts, *targets = (column.take(fits) for column in columns)
    return Prepared(
        records=take_records(records, fits),
        prompts=prompts,
        targets=targets[0] if targets else Ragged.of([]),
        dropped=len(records) - len(fits),
        limit=max_tokens,
        remedy=remedy if len(fits) < _NEARLY_ALL * len(totals) else "",
        set_aside=aside,
    )


def _remedy(key: str, totals: np.ndarray) -> str:
    """The least multiple of 64 tokens, to which lengths are padded anyway, that keeps nearly all records of these lengths."""
    least = int(np.quantile(totals, _NEARLY_ALL, method="higher"))
    value = -(-least // 64) * 64
    return f"{key}={value} keeps {100 * np.sum(totals <= value) // len(totals)}%"


def said_aside(aside: SetAside) -> str:
    """How many records were set aside, and the most frequent reasons, each with one of its records."""
    reasons = sorted(aside.items(), key=lambda pair: -len(pair[1]))
    said = [f"{len(ids)}: {reason}, as in {ids[0]!r}" for reason, ids in reasons[:MAX_SAID]]
    if others := reasons[MAX_SAID:]:
        said.append(f"{sum(len(ids) for _, ids in others)}: other reasons")
    return f"{sum(map(len, aside.values()))} set aside ({'; '.join(said)})" if said else ""
