"""From a data spec to token ids: load the records of a split, render their prompts, tokenise everything once.

`load_split` understands the `synthetic:` worlds and paths; `prepare` makes prompts for reinforcement,
`prepare_supervised` prompts and targets; `data.cache` keeps those of large files. Records that are too long are dropped
and counted, never cut: a cut prompt loses its tool list.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jinja2
import numpy as np

from rest_jax.config import DataConfig
from rest_jax.data.convert import rlla
from rest_jax.data.files import Aside, read_records
from rest_jax.data.ragged import Ragged, take_records
from rest_jax.data.records import RecordError, StepRecord
from rest_jax.data.synthetic import world as synthetic
from rest_jax.errors import UserError
from rest_jax.models.tokenizer import Tokenizer
from rest_jax.templates import Template

SYNTHETIC_EVAL_SIZE = 256  # records of `synthetic:eval` when no limit is given


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Records that fit, tokenised; all in the order of the data."""

    records: Sequence[StepRecord]
    prompts: Ragged  # int32 rows
    targets: Ragged  # int32 rows, end-of-turn included; none for reinforcement
    dropped: int  # records that were too long
    limit: int  # tokens a record may have

    @property
    def size(self) -> int:
        """Number of records kept."""
        return len(self.records)

    def summary(self) -> str:
        """One line: how many records, how many dropped and why, how long the prompts are."""
        p50, p95, most = np.percentile(self.prompts.lengths, [50, 95, 100], method="higher")
        dropped = (
            f", {self.dropped} dropped (longer than {self.limit} tokens)" if self.dropped else ""
        )
        return f"{self.size} records{dropped}; prompt tokens: median {p50}, 95 % {p95}, most {most}"


@dataclasses.dataclass(frozen=True)
class Encoder:
    """What becomes token ids of a record: its prompt, and in supervised training its target."""

    tokenizer: Tokenizer
    template: Template
    brief: bool = False
    supervised: bool = False

    def __call__(self, records: Sequence[StepRecord]) -> tuple[list[np.ndarray], ...]:
        """(prompts,) or (prompts, targets): int32 rows; a target is the gold text followed by the end-of-turn id.

        RecordError when the tokenizer's chat template refuses a prompt.
        """
        prompts = self.tokenizer.encode_all([self._prompt(record) for record in records])
        if not self.supervised:
            return (prompts,)
        answers = [self.template.render_answer(record.target) for record in records]
        end = np.int32(self.tokenizer.end_id)
        return prompts, [np.append(ids, end) for ids in self.tokenizer.encode_all(answers)]

    @functools.cached_property
    def _lists_tools(self) -> bool:
        """Whether the tokenizer's chat template lists tools as the template does."""
        return self.tokenizer.lists_tools(self.template.request)

    def _prompt(self, record: StepRecord) -> str:
        try:
            if self._lists_tools and (native := record.native_prompt(self.template)) is not None:
                return self.tokenizer.render_prompt(*native)
            messages = record.prompt_messages(self.template, self.brief)
            return self.tokenizer.render_prompt(messages)
        except jinja2.TemplateError as error:  # say, of roles that do not alternate
            said = " ".join(str(error).split())
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
    return tokenise(records, Encoder(tokenizer, template, cfg.brief_prompt), cfg.max_prompt_tokens)


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
    return tokenise(
        records, Encoder(tokenizer, template, cfg.brief_prompt, supervised=True), max_tokens
    )


def tokenise(records: Sequence[StepRecord], encoder: Encoder, max_tokens: int) -> Prepared:
    """What the encoder makes of the records, of at most `max_tokens` in all; errors of `prepare` and `prepare_supervised`."""
    if encoder.supervised:
        check_demonstrations(records)
    aside = Aside()
    kept, columns = encode(records, encoder, aside)
    if records:
        aside.check_left("data", len(kept))
    return fitting(kept, [Ragged.of(column) for column in columns], max_tokens)


def encode(
    records: Sequence[StepRecord], encoder: Encoder, aside: Aside
) -> tuple[Sequence[StepRecord], tuple[list[np.ndarray], ...]]:
    """(the records that can be encoded, what the encoder makes of them); the others are said to `aside`."""
    try:
        return records, encoder(records)
    except RecordError:
        kept = []
    for record in records:
        try:
            encoder([record])
            kept.append(record)
        except RecordError as error:
            aside.add(str(error))
    return kept, encoder(kept)


def check_demonstrations(records: Sequence[StepRecord]) -> None:
    """UserError for rows of rlla's Parquet files, which say no thought to imitate."""
    if any(map(rlla.is_reward_only, records)):
        raise UserError(
            "data.train: rows of rlla's Parquet files, whose thoughts are placeholders, are no supervised data; "
            "use rlla_sft.json"
        )


def fitting(records: Sequence[StepRecord], columns: Sequence[Ragged], max_tokens: int) -> Prepared:
    """The records of at most `max_tokens` tokens in all columns, which are those of `Encoder`. UserError when there are none."""
    if not records:
        raise UserError("data: no records")
    totals = np.sum([column.lengths for column in columns], axis=0)
    fits = np.flatnonzero(totals <= max_tokens)
    if not len(fits):
        key = "data.max_prompt_tokens" if len(columns) == 1 else "sft.max_tokens"
        raise UserError(
            f"{key} {max_tokens}: every one of the {len(records)} records is longer (shortest: {totals.min()} tokens); raise it"
        )
    prompts, *targets = (column.take(fits) for column in columns)
    return Prepared(
        records=take_records(records, fits),
        prompts=prompts,
        targets=targets[0] if targets else Ragged.of([]),
        dropped=len(records) - len(fits),
        limit=max_tokens,
    )
