"""Sets tools apart for evaluation: which part a record belongs to, such that no held-out tool ever occurs in training.

A tool is held out when the hash of (seed, its name in small letters and digits) falls below the fraction; of a name with dots
what is before the last one counts, so that the tools of a service (`Hotels_1.Reserve`) are held out together. Tools with the same
description are one tool under two names (masked data sets have those): they go by the first name seen with it, and a tool
whose name says otherwise belongs to neither part. So a held-out tool is in training under no name and no description.

| a record | goes |
| --- | --- |
| calls tools, in its history or target, all of them held out | to evaluation, as it is |
| calls held-out tools and others | nowhere |
| calls none, and all tools it offers are held out | to evaluation, as it is |
| any other | to training, without the held-out tools it offers |

`in_held_out_dialogue` splits by dialogues instead, for data whose tools are few or always offered together.
"""

import dataclasses
import re
from typing import Any, Literal

from rest_jax.data.prepare.transforms import TEXT_ONLY, digest, draw, rewritten
from rest_jax.data.records import StepRecord, called, structured

Part = Literal["train", "eval"]
Described = dict[int, bool]  # digest of a description -> whether its first name is held out


@dataclasses.dataclass(frozen=True)
class Placement:
    """The part a record belongs to. `part` None: none, for `reason`."""

    part: Part | None
    record: StepRecord
    removed: int = 0  # held-out tools taken from what it offers
    reason: str = ""


def canonical(text: str) -> str:
    """Letters and digits in small letters: `Get_Weather` and `getWeather` are one name. The text itself if it has none."""
    return "".join(filter(str.isalnum, text.casefold())) or text


def canonical_name(name: str) -> str:
    """`canonical` of a tool's name, whose dots are kept: they part it from its service."""
    return ".".join(map(canonical, name.split(".")))


def is_held_out(name: str, fraction: float, seed: int) -> bool:
    """Whether a tool of that name is for evaluation."""
    service = name.rpartition(".")[0]
    return draw(seed, "tool", canonical_name(service or name)) < fraction


def place(record: StepRecord, fraction: float, seed: int, described: Described) -> Placement:
    """The part a record belongs to. `described` is the memory of descriptions, which it adds to (some 100 bytes each)."""
    if not structured(record):
        return Placement(None, record, reason=f"its tools are not known: {TEXT_ONLY}")
    held: dict[str, bool | None] = {}  # by canonical name; None: neither part
    for tool in record.tools:
        name, side = (
            canonical_name(tool["name"]),
            _is_held_out_tool(tool, fraction, seed, described),
        )
        held[name] = side if held.get(name, side) == side else None
    names = {*called(record), *(call.name for call in record.target.calls)}
    calls = {held.get(canonical_name(n), is_held_out(n, fraction, seed)) for n in names}
    deciding = calls or set(held.values())
    if deciding == {True}:
        return Placement("eval", record)
    if None in calls:
        return Placement(None, record, reason="it calls a tool known under names of both parts")
    if True in calls:
        return Placement(None, record, reason="it calls held-out tools and others")
    kept = tuple(tool for tool in record.tools if held[canonical_name(tool["name"])] is False)
    if record.tools and not kept:
        return Placement(None, record, reason="no tool that it offers is for training")
    removed = len(record.tools) - len(kept)
    return Placement("train", rewritten(record, tools=kept) if removed else record, removed)


def in_held_out_dialogue(name: str, fraction: float, seed: int) -> bool:
    """Whether the record of that id is of a dialogue that is for evaluation: all its steps are."""
    dialogue = re.sub(r"/\d+(#\d+)?$", "", name)
    return draw(seed, "dialogue", dialogue) < fraction


def offers_held_out(record: StepRecord, fraction: float, seed: int, described: Described) -> bool:
    """Whether one of the tools on offer is for evaluation alone; `described` as for `place`."""
    return any(_is_held_out_tool(tool, fraction, seed, described) is True for tool in record.tools)


def _is_held_out_tool(
    tool: dict[str, Any], fraction: float, seed: int, described: Described
) -> bool | None:
    """Whether a tool is held out; None where name and description disagree."""
    held = is_held_out(tool["name"], fraction, seed)
    description = tool.get("description")
    if not isinstance(description, str) or not description.strip():
        return held
    same = described.setdefault(digest(canonical(description)), held) == held
    return held if same else None
