"""API-Bank (Li et al. 2023, arXiv:2304.08244) as ToolRL renders it: 399, 67 and 131 records of levels 1 to 3, one gold call each.

A prompt is the system and the user text of its record, as they are. `soft` is the published rule, which is lenient and
sometimes odd; `strict` asks for one call, written as the prompt says. Some gold calls cannot be known from their prompts:
`report` lists them, since they bound what a model can reach. Host code without jax.
"""

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from rest_jax.data.convert.rlla import convert_api_bank
from rest_jax.data.fields import RecordError
from rest_jax.data.items import read_items
from rest_jax.errors import UserError
from rest_jax.files import Location, as_path, store_errors
from rest_jax.rewards.tool_call import same_calls
from rest_jax.templates import TEMPLATES
from rest_jax.tool_calls import Block, Call

FILES = {f"level {level}": f"level-{level}-api_processed.json" for level in (1, 2, 3)}
SCORES = ("soft", "strict")


@dataclasses.dataclass(frozen=True)
class Item:
    """One record. `doubts` says why its gold call cannot be known from its prompt."""

    id: str
    group: str  # the level
    messages: tuple[dict[str, str], ...]
    gold: Call
    doubts: tuple[str, ...]


def load(folder: Location, limit: int | None = None) -> list[Item]:
    """The records of all levels, of each the first `limit`. UserError for a folder that is not API-Bank's."""
    place = as_path(folder)
    with store_errors(place):
        missing = [name for name in FILES.values() if not (place / name).is_file()]
    if missing:
        lacks = "is no folder" if not place.is_dir() else f"lacks {', '.join(missing)}"
        raise UserError(f"--data {folder}: {lacks}; api_bank needs {', '.join(FILES.values())}")
    items: list[Item] = []
    for group, name in FILES.items():
        found = list(itertools.islice(read_items(place / name), limit))
        if not found:
            raise RecordError(f"data {place / name}: no records")
        for i, one in enumerate(found):
            if one.fault is not None:
                raise RecordError(f"{one.where}: {one.fault}")
            items.append(_item(one.raw, f"{group}/{i}", group, one.where))
    return items


def score(item: Item, text: str) -> dict[str, bool]:
    """Both scores of a completion."""
    return {"soft": soft(item.gold, text), "strict": strict(item.gold, text)}


def soft(gold: Call, text: str) -> bool:
    """The published rule: whether a line behind the last opening tag, up to a closing one, is the gold call or its bare
    parameters. Equality is Python's. A line that is a number, true, false, null or a quotation of no JSON ends the search.
    """
    expected = {"name": gold.name, "parameters": gold.arguments}
    for line in text.split("<tool_call>")[-1].split("</tool_call>")[0].split("\n"):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                return False
        if value is None or isinstance(value, bool | int | float):
            return False
        named = isinstance(value, dict) and value.keys() >= expected.keys()
        if value == (expected if named else gold.arguments):
            return True
    return False


def strict(gold: Call, text: str) -> bool:
    """Whether the completion makes one call, in a closed block, with the two keys and no others, and it is the gold one (what is
    strict is soft, too). Text around the block is free.
    """
    answer = TEMPLATES["toolrl"].parse(text.encode("utf-8", "replace"))
    readable = answer.executable and not answer.broken_calls and Block.CALLS in answer.blocks
    return readable and same_calls((gold,), answer.calls) and soft(gold, text)


def report(items: Sequence[Item]) -> dict[str, Any]:
    """The known ceiling: how many of the items have gold calls beyond doubt, and for each doubt the ids of its items."""
    doubts: dict[str, list[str]] = {}
    for item in items:
        for doubt in item.doubts:
            doubts.setdefault(doubt, []).append(item.id)
    return {"beyond_doubt": sum(not item.doubts for item in items), "doubts": doubts}


def describe(result: Mapping[str, Any]) -> list[str]:
    """A line on the known ceiling."""
    known = result["known"]
    doubts = "; ".join(f"{doubt}: {len(ids)}" for doubt, ids in known["doubts"].items())
    said = f"{known['beyond_doubt']} of {len(result['items'])} items ({doubts or 'no doubts'})"
    return [f"gold beyond doubt in {said}"]


def _item(raw: Any, name: str, group: str, where: str) -> Item:
    (record,) = convert_api_bank(raw, name, where)
    if len(record.target.calls) != 1:
        raise RecordError(
            f"{where}: answer: {len(record.target.calls)} calls, api_bank has one a record"
        )
    (gold,) = record.target.calls
    messages = tuple({"role": role, "content": raw[role]} for role in ("system", "user"))
    prompt = f"{raw['system']}\n{raw['user']}"
    return Item(name, group, messages, gold, _doubts(gold, record.tools, prompt))


def _doubts(gold: Call, tools: Sequence[Mapping[str, Any]], prompt: str) -> tuple[str, ...]:
    """Why a gold call cannot be known from its prompt; the tools are empty where the prompt has no readable list."""
    found = []
    offered = {tool["name"]: tool["parameters"] for tool in tools}
    if tools and gold.name not in offered:
        found.append("the tool is not offered")
    elif tools:
        declared = offered[gold.name]
        if not gold.arguments.keys() <= declared.keys():
            found.append("a parameter is not in the tool list")
        kinds = (declared[key].get("type") for key in gold.arguments if key in declared)
        if all(isinstance(v, str) for v in gold.arguments.values()) and set(kinds) - {"str"}:
            found.append("the tool list declares another type than text")
    if any(text not in prompt for text in _texts(gold.arguments)):
        found.append("a value is not in the prompt word for word")
    return tuple(found)


def _texts(value: Any) -> list[str]:
    """Every value that is not a container, as it would be written."""
    if isinstance(value, Mapping | list):
        inner = value.values() if isinstance(value, Mapping) else value
        return [text for each in inner for text in _texts(each)]
    return [value if isinstance(value, str) else json.dumps(value)]
