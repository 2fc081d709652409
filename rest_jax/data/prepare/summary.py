"""What a set of step records holds, counted record by record: kinds of answers, calls, argument values, lengths in tokens.

Memory does not grow with the records: every measure is a counter of whole numbers, from which means and percentiles are exact.
"""

import dataclasses
from collections import Counter
from typing import Any

import numpy as np

from rest_jax.data.records import StepRecord
from rest_jax.data.tokenize import tokenize_supervised
from rest_jax.models.tokenizer import Tokenizer
from rest_jax.run.metrics import summary_table
from rest_jax.templates import Template
from rest_jax.tool_calls import Target

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
        """Counts a record; `tokens` are those of prompt and answer."""
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
        if tokens is not None:
            self._measure("prompt tokens", tokens[0])
            self._measure("answer tokens", tokens[1])

    def _measure(self, name: str, value: int) -> None:
        self.measures.setdefault(name, Counter())[value] += 1


@dataclasses.dataclass(frozen=True)
class TokenCounter:
    """Counts tokens as training sees a record."""

    tokenizer: Tokenizer
    template: Template
    brief: bool

    def __call__(self, record: StepRecord) -> tuple[int, int]:
        """(prompt tokens, answer tokens with the end-of-turn token)."""
        prompt, answer = tokenize_supervised(record, self.tokenizer, self.template, self.brief)
        return len(prompt), len(answer)


def kind(target: Target) -> str:
    """Which parts the gold answer has."""
    calls, response = bool(target.calls), target.response is not None
    if calls and response:
        return "calls and response"
    return "calls" if calls else "response" if response else "think only"


def percentiles(counts: Counter[int], wanted: tuple[float, ...] = PERCENTILES) -> list[int]:
    """Exact percentiles of the counted values, numpy's method "higher". ValueError when nothing was counted."""
    if not counts:
        raise ValueError("percentiles of nothing")
    values = np.array(sorted(counts))
    ends = np.cumsum([counts[value] for value in values.tolist()])
    ranks = np.ceil(np.asarray(wanted) / 100 * (ends[-1] - 1)).astype(np.int64)
    return values[np.searchsorted(ends, ranks, side="right")].tolist()


def mean(counts: Counter[int]) -> float:
    """The mean of the counted values."""
    return sum(value * count for value, count in counts.items()) / counts.total()


def to_text(tally: Tally) -> str:
    """Two tables for the terminal: the counts, and what a record has."""
    rows = [
        ["records", tally.records],
        *_indented(tally.kinds),
        *_indented(tally.sources, "source "),
    ]
    rows += [["argument values", tally.values.total()]]
    rows += [["  nested (lists, objects)", tally.values["nested"]]]
    text = summary_table([["what", "count"], *rows])
    if not tally.records:
        return text
    calls = [[f"  {value}", count] for value, count in sorted(tally.measures["calls"].items())]
    text += "\n\n" + summary_table([["calls an answer", "records"], *calls])
    names = ["least" if p == 0 else "most" if p == 100 else f"{p} %" for p in PERCENTILES]
    measured = [[name, mean(c), *percentiles(c)] for name, c in tally.measures.items()]
    return f"{text}\n\n{summary_table([['a record', 'mean', *names], *measured])}"


def to_json(tally: Tally) -> dict[str, Any]:
    """The same as a plain object."""
    return {
        "records": tally.records,
        "kinds": dict(sorted(tally.kinds.items())),
        "sources": dict(sorted(tally.sources.items())),
        "calls_per_answer": {
            str(value): n for value, n in sorted(tally.measures.get("calls", Counter()).items())
        },
        "argument_values": {
            "total": tally.values.total(),
            "nested": tally.values["nested"],
        },
        "measures": {
            name: {"mean": mean(counts)}
            | {f"p{p}": v for p, v in zip(PERCENTILES, percentiles(counts), strict=True)}
            for name, counts in tally.measures.items()
        },
    }


def _indented(counts: Counter[str], prefix: str = "") -> list[list[Any]]:
    return [[f"  {prefix}{name}", count] for name, count in sorted(counts.items())]
