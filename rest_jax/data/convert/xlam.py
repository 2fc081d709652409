"""xLAM function calling: {"query", "tools", "answers"}, the last two as strings of JSON; one question, one action.

Tools come in the flat form that the rlla data has too: {parameter: {"description", "type", "default"}}.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rest_jax.data.convert import fields, remainder
from rest_jax.data.prepare.dialogue import Dialogue, compose, decompose
from rest_jax.data.records import RecordError, StepRecord

_USUAL = 1  # of `remainder.written`: letters beyond ASCII are escaped


def convert(raw: Any, name: str, where: str) -> list[StepRecord]:
    """The record of one item; at least one answer is needed."""
    return convert_as("xlam", None, raw, name, where)


def restore(records: Sequence[StepRecord]) -> dict[str, Any]:
    """The item that `convert` made the record of."""
    return remainder.restored(records, _rebuild)


def convert_as(
    source: str, no_call: str | None, raw: Any, name: str, where: str
) -> list[StepRecord]:
    """The record of an item of this shape. Where `answers` is empty the target is the response `no_call`; None refuses that."""
    item = fields.mapping(raw, where)
    query = fields.text(item.get("query"), f"{where}: query")
    listed, tool_style = _json(item, "tools", where)
    answers, answer_style = _json(item, "answers", where)
    tools = tuple(fields.tool(t, f"{where}: tools[{i}]") for i, t in enumerate(listed))
    calls = [fields.call(c, f"{where}: answers[{i}]") for i, c in enumerate(answers)]
    if not calls and no_call is None:
        raise RecordError(f"{where}: answers: empty, at least one call is needed")
    answer = {"role": "assistant", "content": None, "calls": calls}
    if not calls:
        answer = {"role": "assistant", "content": no_call}
    turns = ({"role": "user", "content": query}, answer)
    styles = {"tools": tool_style, "answers": answer_style}
    extra = {} if set(styles.values()) == {_USUAL} else {"styles": styles}
    records = decompose(Dialogue(name, source, tools, turns))
    return remainder.keep(records, raw, _rebuild, where, extra)


def _json(item: Mapping[str, Any], field: str, where: str) -> tuple[list[Any], int | None]:
    """(list, style of its text); the list may also be there as such, which is style None."""
    value, place = item.get(field), f"{where}: {field}"
    if isinstance(value, str):
        listed = fields.sequence(fields.json_text(value, place), place)
        style = remainder.style_of(listed, value, _USUAL)
        return listed, _USUAL if style is None else style
    return fields.sequence(value, place), None


def _rebuild(records: Sequence[StepRecord]) -> dict[str, Any]:
    dialogue, styles = compose(records), records[-1].extra.get("styles", {})
    query, answer = dialogue.turns
    lists = {"answers": answer.get("calls", []), "tools": list(dialogue.tools)}
    raw: dict[str, Any] = {"query": query["content"]}
    for field, value in lists.items():
        style = styles.get(field, _USUAL)
        raw[field] = value if style is None else remainder.written(value, style)
    return raw
