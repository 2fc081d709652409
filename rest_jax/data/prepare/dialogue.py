"""Dialogues and their steps: a dialogue of K assistant turns is K training instances (METHOD section 1, as described for ResT).

In: a `Dialogue`, turns as in `StepRecord.history`. Out: K `StepRecord`s; the k-th sees every turn before the k-th assistant turn
(earlier assistant turns and tool results included) and is supervised by that turn's own calls and response. Tool results are
never a target. `compose` is the inverse.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from rest_jax.data.records import RecordError, StepRecord
from rest_jax.tool_calls import Call, Target


@dataclasses.dataclass(frozen=True)
class Dialogue:
    """One conversation with one list of tools."""

    id: str
    source: str
    tools: tuple[dict[str, Any], ...]
    turns: tuple[
        dict[str, Any], ...
    ]  # {"role", "content", optional "calls": [{"name", "arguments"}], "think"}


def decompose(dialogue: Dialogue) -> list[StepRecord]:
    """One record for each assistant turn, in order; none for a dialogue without one.

    Ids are `<dialogue id>/<k>`, k from 0, and the dialogue's own when there is only one. Assistant turns with calls that follow
    each other with nothing between are one action. Turns after the last assistant turn are in no record.
    """
    turns = one_action(dialogue.turns)
    places = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    return [
        StepRecord(
            id=f"{dialogue.id}/{k}" if len(places) > 1 else dialogue.id,
            source=dialogue.source,
            tools=dialogue.tools,
            history=turns[:place],
            target=_target(turns[place]),
        )
        for k, place in enumerate(places)
    ]


def compose(records: Sequence[StepRecord]) -> Dialogue:
    """The dialogue whose steps these are, in their order, up to the last target.

    `decompose` of it gives the records again when they are all its steps and have neither a verbatim prompt, nor a verbatim
    answer, nor `extra`. RecordError when the records are not steps of one dialogue.
    """
    if not records:
        raise RecordError("compose: no records")
    last = records[-1]
    turns = (*last.history, turn_of(last.target))
    for record in records[:-1]:
        steps = (*record.history, turn_of(record.target))
        if record.tools != last.tools or steps != turns[: len(steps)] or steps == turns:
            raise RecordError(f"compose: record {record.id!r} is no earlier step of {last.id!r}")
    stem, slash, number = last.id.rpartition("/")
    several = slash and number.isdecimal() and _assistant_turns(turns) > 1
    return Dialogue(stem if several else last.id, last.source, last.tools, turns)


def one_action(turns: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """The turns, each run of assistant turns with calls merged into one; texts and thoughts are joined by a line end."""
    merged: list[dict[str, Any]] = []
    for turn in turns:
        if turn["role"] != "assistant":
            merged.append(turn)
        elif turn.get("calls") and merged and merged[-1].get("calls"):
            merged[-1] = _merge(merged[-1], turn)
        else:
            merged.append(turn_of(_target(turn)))
    return tuple(merged)


def turn_of(target: Target) -> dict[str, Any]:
    """The assistant turn that a target is: `content` always, `calls` and `think` where there are any."""
    turn: dict[str, Any] = {"role": "assistant", "content": target.response}
    if target.calls:
        turn["calls"] = [{"name": c.name, "arguments": c.arguments} for c in target.calls]
    if target.think is not None:
        turn["think"] = target.think
    return turn


def _target(turn: dict[str, Any]) -> Target:
    calls = tuple(Call(c["name"], c["arguments"]) for c in turn.get("calls") or ())
    return Target(calls=calls, response=turn.get("content"), think=turn.get("think"))


def _merge(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    a, b = _target(first), _target(second)
    return turn_of(
        Target(a.calls + b.calls, _joined(a.response, b.response), _joined(a.think, b.think))
    )


def _joined(first: str | None, second: str | None) -> str | None:
    texts = [text for text in (first, second) if text is not None]
    return "\n".join(texts) if texts else None


def _assistant_turns(turns: Sequence[dict[str, Any]]) -> int:
    return sum(turn["role"] == "assistant" for turn in turns)
