"""What a set of step records holds: kinds of gold answers, calls, tools; with a tokenizer, lengths in tokens."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from rest_jax.answer import Target
from rest_jax.data.prepare import tokenize_supervised
from rest_jax.data.records import StepRecord
from rest_jax.metrics import summary_table
from rest_jax.templates import Template
from rest_jax.tokenizer import Tokenizer

PERCENTILES = (0, 50, 90, 95, 99, 100)


def describe(
    records: Sequence[StepRecord], tokenizer: Tokenizer | None, template: Template, brief: bool
) -> str:
    """Text for the terminal; prompts and answers are counted as training would see them."""
    kinds = Counter(kind(record.target) for record in records)
    counts = [["records", len(records)], *([f"  {name}", n] for name, n in sorted(kinds.items()))]
    for source, n in sorted(Counter(record.source or "(none)" for record in records).items()):
        counts.append([f"  source {source}", n])
    text = summary_table([["what", "count"], *counts])
    if not records:
        return text
    measured = {
        "calls": [len(record.target.calls) for record in records],
        "messages before": [len(record.messages or record.history) for record in records],
    }
    if structured := [
        record for record in records if record.messages is None
    ]:  # else the prompt lists them
        measured["tools"] = [len(record.tools) for record in structured]
    if tokenizer is not None:
        both = [tokenize_supervised(record, tokenizer, template, brief) for record in records]
        measured["prompt tokens"] = [len(prompt) for prompt, _ in both]
        measured["answer tokens"] = [len(answer) for _, answer in both]
    return f"{text}\n\n{summary_table(_percentiles(measured))}"


def kind(target: Target) -> str:
    """Which parts the gold answer has."""
    calls, response = bool(target.calls), target.response is not None
    if calls and response:
        return "calls and response"
    return "calls" if calls else "response" if response else "think only"


def _percentiles(measured: dict[str, list[int]]) -> list[list[object]]:
    header: list[object] = [
        "a record",
        "mean",
        *("least" if p == 0 else "most" if p == 100 else f"{p} %" for p in PERCENTILES),
    ]
    rows: list[list[object]] = [header]
    for name, values in measured.items():
        found = np.percentile(values, PERCENTILES, method="higher")
        rows.append([name, float(np.mean(values)), *(int(value) for value in found)])
    return rows
