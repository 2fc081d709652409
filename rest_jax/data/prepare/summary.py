"""What became of the items that were prepared, and what a set of step records holds: kinds of targets, calls, lengths.

In: one record after the other. Out: tables for the terminal, or plain JSON. Memory does not grow with the records: every
measure is a counter of whole numbers, from which means and percentiles are exact.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rest_jax import config
from rest_jax.data.files import iter_records
from rest_jax.data.prepare.settings import SETTABLE, Settings, check_settings
from rest_jax.data.records import StepRecord
from rest_jax.data.tokenize import Encoder, is_world, load_split
from rest_jax.errors import UserError
from rest_jax.models.tokenizer import Tokenizer
from rest_jax.run.metrics import summary_table
from rest_jax.templates import TEMPLATES
from rest_jax.tool_calls import Target

TokenCounter = Callable[[StepRecord], tuple[int, int]]  # (prompt tokens, target tokens)
PERCENTILES = (0, 50, 90, 95, 99, 100)


@dataclasses.dataclass(frozen=True)
class Tally:
    """The counts so far."""

    kinds: Counter[str] = dataclasses.field(default_factory=Counter)
    sources: Counter[str] = dataclasses.field(default_factory=Counter)
    values: Counter[str] = dataclasses.field(default_factory=Counter)  # argument values by kind
    measures: dict[str, Counter[int]] = dataclasses.field(default_factory=dict)  # a record

    @property
    def records(self) -> int:
        """How many records were counted."""
        return self.kinds.total()

    def add(self, record: StepRecord, tokens: tuple[int, int] | None = None) -> None:
        """Counts a record; `tokens` are those of its prompt and of its target."""
        self.kinds[kind(record.target)] += 1
        self.sources[record.source or "(none)"] += 1
        for call in record.target.calls:
            nested = sum(isinstance(value, dict | list) for value in call.arguments.values())
            self.values["nested"] += nested
            self.values["plain"] += len(call.arguments) - nested
        self._measure("calls", len(record.target.calls))
        self._measure("messages before", len(record.history or record.messages or ()))
        if record.tools or record.messages is None:  # else the prompt lists them as text
            self._measure("tools", len(record.tools))
        for name, count in zip(("prompt tokens", "target tokens"), tokens or (), strict=False):
            self._measure(name, count)

    def _measure(self, name: str, value: int) -> None:
        self.measures.setdefault(name, Counter())[value] += 1


@dataclasses.dataclass
class Summary:
    """What became of the items of one preparation."""

    settings: Settings
    items: int = 0
    converted: int = 0  # step records
    rejected: Counter[str] = dataclasses.field(default_factory=Counter)  # items, by reason
    dropped: Counter[str] = dataclasses.field(default_factory=Counter)  # records, by reason
    changed: Counter[str] = dataclasses.field(default_factory=Counter)  # records, by what was done
    unchanged: Counter[str] = dataclasses.field(default_factory=Counter)  # drawn, but not possible
    parts: dict[str, Tally] = dataclasses.field(default_factory=dict)  # train, eval

    @property
    def kept(self) -> int:
        """Records written."""
        return sum(tally.records for tally in self.parts.values())

    def to_json(self) -> dict[str, Any]:
        """The content of OUT.summary.json."""
        settings = dataclasses.asdict(self.settings)
        del settings["overwrite"]
        counts = {
            name: dict(getattr(self, name).most_common())
            for name in ("rejected", "dropped", "changed", "unchanged")
        }
        parts = {name: to_json(tally) for name, tally in self.parts.items()}
        return {
            "settings": settings,
            "items": self.items,
            "converted": self.converted,
            **counts,
            **parts,
        }

    def to_text(self) -> str:
        """Tables for the terminal."""
        rows: list[list[Any]] = [["what", "count"], ["items read", self.items]]
        rows += _reasons("rejected", self.rejected)
        rows += [["records made of them", self.converted]]
        rows += _reasons("dropped", self.dropped) + _reasons("changed", self.changed)
        rows += _reasons("drawn for a change that was not possible", self.unchanged)
        texts = [summary_table(rows)]
        for name, tally in self.parts.items():
            texts.append(f"{name}: {self.settings.paths[name]}\n{to_text(tally)}")
        return "\n\n".join(texts)


def inspect(file: str, tokenizer: str | None, limit: int | None, overrides: Sequence[str]) -> str:
    """Tables of the first `limit` records of a file or a synthetic world, with token counts where a tokenizer is given: the
    command `rest-jax data inspect`. UserError when there are none.
    """
    world = [f"data.{key}" for key in config.DataConfig.model_fields if key.startswith("synthetic")]
    check_settings(overrides, [*SETTABLE, *world])
    data = config.from_overrides({"name": "data", "model": {"source": "none"}}, overrides).data
    count = token_counter(tokenizer, data.template, data.brief_prompt)
    tally = Tally()
    for record in load_split(file, data, limit) if is_world(file) else iter_records(file, limit):
        tally.add(record, count and count(record))
    if not tally.records:
        raise UserError(f"data {file}: no records")
    return to_text(tally)


def encoder(tokenizer: str, template: str, brief: bool) -> Encoder:
    """Encodes prompts and targets as supervised training does."""
    loaded = Tokenizer.load(config.locate(tokenizer))
    return Encoder(loaded, TEMPLATES[template], brief, supervised=True)


def token_counter(tokenizer: str | None, template: str, brief: bool) -> TokenCounter | None:
    """Counts the tokens of a record's prompt and target as training sees them; None without a tokenizer."""
    if tokenizer is None:
        return None
    return functools.partial(count_tokens, encoder(tokenizer, template, brief))


def count_tokens(encoder: Encoder, record: StepRecord) -> tuple[int, int]:
    """(prompt tokens, target tokens) of a record."""
    (prompt,), (target,) = encoder([record])
    return len(prompt), len(target)


def kind(target: Target) -> str:
    """Which parts a target has."""
    calls, response = bool(target.calls), target.response is not None
    if calls and response:
        return "calls and response"
    return "calls" if calls else "response" if response else "think only"


def to_text(tally: Tally) -> str:
    """Tables for the terminal: the counts, and what a record has."""
    raw = to_json(tally)
    rows = [["what", "count"], ["records", raw["records"]]]
    rows += [[f"  {name}", count] for name, count in raw["kinds"].items()]
    rows += [[f"  source {name}", count] for name, count in raw["sources"].items()]
    rows += [["argument values", raw["argument_values"]["total"]]]
    rows += [["  nested (lists, objects)", raw["argument_values"]["nested"]]]
    tables = [rows]
    if tally.records:
        calls = [[f"  {calls}", count] for calls, count in raw["calls_per_target"].items()]
        names = ["least" if p == 0 else "most" if p == 100 else f"{p} %" for p in PERCENTILES]
        measured = [[name, *values.values()] for name, values in raw["measures"].items()]
        tables += [
            [["calls a target", "records"], *calls],
            [["a record", "mean", *names], *measured],
        ]
    return "\n\n".join(map(summary_table, tables))


def to_json(tally: Tally) -> dict[str, Any]:
    """The same as a plain object."""
    return {
        "records": tally.records,
        "kinds": dict(sorted(tally.kinds.items())),
        "sources": dict(sorted(tally.sources.items())),
        "calls_per_target": {
            str(value): n for value, n in sorted(tally.measures.get("calls", Counter()).items())
        },
        "argument_values": {
            "total": tally.values.total(),
            "nested": tally.values["nested"],
        },
        "measures": {name: _statistics(counts) for name, counts in tally.measures.items()},
    }


def _statistics(counts: Counter[int]) -> dict[str, float]:
    """Mean and percentiles of the counted values."""
    values = np.fromiter(counts.elements(), np.int64)
    ranks = np.percentile(values, PERCENTILES, method="higher").tolist()
    return {"mean": float(values.mean())} | {
        f"p{p}": rank for p, rank in zip(PERCENTILES, ranks, strict=True)
    }


def _reasons(title: str, counts: Counter[str]) -> list[list[Any]]:
    if not counts:
        return []
    return [[title, counts.total()], *([f"  {name}", n] for name, n in counts.most_common())]
