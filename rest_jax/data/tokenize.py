"""From a data spec to token ids: load the records of a split, render their prompts, tokenise everything once.

`load_split` understands the `synthetic:` worlds and paths; `prepare` makes prompts for reinforcement,
`prepare_supervised` prompts and targets. Records that are too long are dropped and counted, never cut: a cut prompt
loses its tool list.
"""

import dataclasses
from collections.abc import Sequence

import jinja2
import numpy as np

from rest_jax.config import DataConfig
from rest_jax.data.convert import rlla
from rest_jax.data.files import read_records
from rest_jax.data.records import RecordError, StepRecord
from rest_jax.data.synthetic import world as synthetic
from rest_jax.errors import UserError
from rest_jax.models.tokenizer import Tokenizer
from rest_jax.templates import Template

SYNTHETIC_EVAL_SIZE = 256  # records of `synthetic:eval` when no limit is given


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Records that fit, tokenised. `targets` is empty for reinforcement; all lists are in the order of the data."""

    records: list[StepRecord]
    prompts: list[np.ndarray]  # int32 [T_i]
    targets: list[np.ndarray]  # int32 [T_i], end-of-turn included
    dropped: int  # records that were too long
    limit: int  # tokens a record may have

    @property
    def size(self) -> int:
        """Number of records kept."""
        return len(self.records)

    def summary(self) -> str:
        """One line: how many records, how many dropped and why, how long the prompts are."""
        lengths = list(map(len, self.prompts))
        p50, p95, most = np.percentile(lengths, [50, 95, 100], method="higher")
        dropped = (
            f", {self.dropped} dropped (longer than {self.limit} tokens)" if self.dropped else ""
        )
        return f"{self.size} records{dropped}; prompt tokens: median {p50}, 95 % {p95}, most {most}"


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
    prompts = [_tokenize_prompt(r, tokenizer, template, cfg.brief_prompt) for r in records]
    return _fitting(records, prompts, [], cfg.max_prompt_tokens, "data.max_prompt_tokens")


def prepare_supervised(
    records: Sequence[StepRecord],
    tokenizer: Tokenizer,
    template: Template,
    cfg: DataConfig,
    max_tokens: int,
) -> Prepared:
    """Tokenises prompts and targets; drops records of more than `max_tokens` in all.

    UserError when nothing is left, or when a record is a row of rlla's Parquet files, which say no thought to imitate.
    """
    if any(map(rlla.is_reward_only, records)):
        raise UserError(
            "data.train: rows of rlla's Parquet files, whose thoughts are placeholders, are no supervised data; "
            "use rlla_sft.json"
        )
    both = [tokenize_supervised(r, tokenizer, template, cfg.brief_prompt) for r in records]
    prompts, targets = [prompt for prompt, _ in both], [target for _, target in both]
    return _fitting(records, prompts, targets, max_tokens, "sft.max_tokens")


def tokenize_supervised(
    record: StepRecord, tokenizer: Tokenizer, template: Template, brief: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """(prompt ids, target ids): int32 each; the target is the gold text followed by the end-of-turn id.

    RecordError when the tokenizer's chat template refuses the prompt.
    """
    prompt = _tokenize_prompt(record, tokenizer, template, brief)
    target = tokenizer.encode(template.render_answer(record.target))
    return prompt, np.append(target, np.int32(tokenizer.end_id)).astype(np.int32)


def _tokenize_prompt(
    record: StepRecord, tokenizer: Tokenizer, template: Template, brief: bool
) -> np.ndarray:
    try:
        return tokenizer.encode_prompt(record.prompt_messages(template, brief))
    except jinja2.TemplateError as error:  # say, of roles that do not alternate
        said = " ".join(str(error).split())
        raise RecordError(
            f"record {record.id!r}: the chat template of the tokenizer refuses it: {said}"
        ) from error


def _fitting(
    records: Sequence[StepRecord],
    prompts: list[np.ndarray],
    targets: list[np.ndarray],
    limit: int,
    key: str,
) -> Prepared:
    """The records of at most `limit` tokens in all; `key` is the config value that says so."""
    if not records:
        raise UserError("data: no records")
    totals = [
        sum(map(len, both)) for both in zip(prompts, *([targets] if targets else ()), strict=True)
    ]
    fits = [i for i, total in enumerate(totals) if total <= limit]
    if not fits:
        raise UserError(
            f"{key} {limit}: every one of the {len(records)} records is longer (shortest: {min(totals)} tokens); raise it"
        )
    return Prepared(
        records=[records[i] for i in fits],
        prompts=[prompts[i] for i in fits],
        targets=[targets[i] for i in fits] if targets else [],
        dropped=len(records) - len(fits),
        limit=limit,
    )
