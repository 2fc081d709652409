"""A dialogue of K assistant turns as K training instances (docs/method.md section 1).

In: turns as in `StepRecord.history`. Out: K `StepRecord`s; the k-th sees every turn before the k-th assistant turn (earlier
assistant turns and tool results included) and is supervised by that turn's own calls and response. Tool results are never a
target.
"""

from collections.abc import Sequence
from typing import Any

from rest_jax.data.records import StepRecord
from rest_jax.tool_calls import Call, Target

Tools = tuple[dict[str, Any], ...]


def decompose(
    name: str, source: str, tools: Tools, turns: Sequence[dict[str, Any]]
) -> list[StepRecord]:
    """One record for each assistant turn, in order; none for a dialogue without one.

    Ids are `<name>/<k>`, k from 0, and `name` itself when there is only one. Assistant turns with calls that follow each other
    with nothing between are one action. Turns after the last assistant turn are in no record.
    """
    merged = _merge_actions(turns)
    ends = [i for i, turn in enumerate(merged) if turn["role"] == "assistant"]
    return [
        StepRecord(
            id=f"{name}/{k}" if len(ends) > 1 else name,
            source=source,
            tools=tools,
            history=merged[:end],
            target=_target(merged[end]),
        )
        for k, end in enumerate(ends)
    ]


def _merge_actions(turns: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """The turns, each sequence of assistant turns with calls merged into one; texts and thoughts are joined by a line end."""
    merged: list[dict[str, Any]] = []
    for turn in turns:
        if turn.get("calls") and merged and merged[-1].get("calls"):
            turn = _merge(merged.pop(), turn)
        merged.append(turn)
    return tuple(merged)


def _merge(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    both = {**first, "calls": [*first["calls"], *second["calls"]]}
    for field in ("content", "think"):
        texts = [turn[field] for turn in (first, second) if turn.get(field) is not None]
        if texts:
            both[field] = "\n".join(texts)
    return both


def _target(turn: dict[str, Any]) -> Target:
    calls = tuple(Call(c["name"], c["arguments"]) for c in turn.get("calls") or ())
    return Target(calls=calls, response=turn.get("content"), think=turn.get("think"))
