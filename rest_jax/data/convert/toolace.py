"""ToolACE: {"system", "conversations": [{"from", "value"}]}; the tools are a JSON list inside the system text.

Assistant turns are text, or calls written `[Name(a=1), other(b="x")]` (`call_syntax`). The system text around the list tells how
calls are to be written, which the template does here; its other sentences (say, the date) become a system turn.
"""

import json
import re
from typing import Any

from rest_jax.data import fields
from rest_jax.data.convert import call_syntax
from rest_jax.data.fields import RecordError
from rest_jax.data.records import StepRecord, decompose

_ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function"), "tool"),
}
_INSTRUCTION = re.compile(
    r"composing functions|set of possible functions|function/tool calls|can be used, point it out|lacks the parameters"
    r"|also point it out|tools? call sections|list of functions in json|return the function call|in the format of \["
    r"|no other text must",
    re.IGNORECASE,
).search
_SENTENCE_END = re.compile(r"(?<=[.!?:])\s+|\n+")
_list_open = re.compile(r"\[\s*+[{\]]").finditer
READ = ("system", "conversations")
_MAX_LISTS = 4  # brackets at which the list of tools is looked for


def convert(raw: Any, name: str, where: str) -> list[StepRecord]:
    """A record for each assistant turn."""
    item = fields.item(raw, where)
    system = fields.text(item.get("system"), f"{where}: system")
    start, end, listed = _tool_list(system, f"{where}: system")
    tools = fields.tools(listed, f"{where}: system: tools")
    turns = _turns(item.get("conversations"), {t["name"] for t in tools}, where)
    if other := _other_text(system[:start], system[end:]):
        turns.insert(0, {"role": "system", "content": other})
    records = decompose(name, "toolace", tools, turns)
    if not records:
        raise RecordError(f"{where}: conversations: no assistant turn to learn from")
    return records


def _tool_list(system: str, where: str) -> tuple[int, int, list[Any]]:
    """(start, end, value) of the JSON list in the text. It is found by its brackets and then read strictly, so that no list
    within one that cannot be read is taken for it.
    """
    for count, found in enumerate(_list_open(system)):
        if count == _MAX_LISTS:
            break
        try:
            _, end = json.JSONDecoder().raw_decode(system, found.start())
        except (ValueError, RecursionError):
            continue
        return found.start(), end, fields.json_text(system[found.start() : end], f"{where}: tools")
    raise RecordError(f"{where}: no JSON list of tools")


def _turns(value: Any, names: set[str], where: str) -> list[dict[str, Any]]:
    turns: list[dict[str, Any]] = []
    place = f"{where}: conversations"
    for i, message in enumerate(fields.sequence(fields.parsed(value, place), place)):
        place = f"{where}: conversations[{i}]"
        speaker = fields.one_of(
            fields.mapping(message, place).get("from"), _ROLES, f"{place}: from"
        )
        said = fields.text(message.get("value"), f"{place}: value")
        if _ROLES[speaker] == "assistant":
            turns.append(_assistant(said, names, f"{place}: value"))
        else:
            turns.append({"role": _ROLES[speaker], "content": said})
    return turns


def _assistant(said: str, names: set[str], where: str) -> dict[str, Any]:
    if not said.strip():
        raise RecordError(f"{where}: an empty turn")
    if not call_syntax.looks_like_calls(said):
        if name := call_syntax.mentions_call(said, names):
            raise RecordError(f"{where}: has a call of {name!r} but is no list of calls")
        return {"role": "assistant", "content": said}
    try:
        calls = call_syntax.parse(said)
    except call_syntax.SyntaxFault as error:
        raise RecordError(f"{where}: unreadable calls: {error}") from error
    for call in calls:
        if call["name"] not in names:
            raise RecordError(f"{where}: calls {call['name']!r}, which is not among the tools")
    return {"role": "assistant", "content": None, "calls": calls}


def _other_text(before: str, after: str) -> str:
    """The sentences around the list that are no instruction on calls."""
    pieces = [*_SENTENCE_END.split(before), *_SENTENCE_END.split(after)]
    return " ".join(p for p in pieces if p.strip(" .") and not _INSTRUCTION(p)).strip()
