"""ToolACE: {"system", "conversations": [{"from", "value"}]}; the tools are a JSON list inside the system text.

Assistant turns are text, or calls written `[Name(a=1), other(b="x")]` (`call_syntax`). The system text around the list tells how
calls are to be written, which the template does here; its other sentences (say, the date) become a system turn.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rest_jax.data.convert import call_syntax, fields, gorilla, remainder
from rest_jax.data.prepare.dialogue import Dialogue, compose, decompose
from rest_jax.data.records import RecordError, StepRecord

_ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
}
# The usual text around the list. A record with another one keeps its own.
_BEFORE = (
    "You are an expert in composing functions. You are given a question and a set of possible functions. \n"
    "Based on the question, you will need to make one or more function/tool calls to achieve the purpose. \n"
    "If none of the function can be used, point it out. If the given question lacks the parameters required by "
    "the function,\nalso point it out. You should only return the function call in tools call sections.\n"
    "Here is a list of functions in JSON format that you can invoke:\n"
)
_AFTER = (
    ". \nShould you decide to return the function call(s). \n"
    "Put it in the format of [func1(params_name=params_value, params_name2=params_value2...), func2(params)]\n\n"
    "NO other text MUST be included. \n"
)
_INSTRUCTION = re.compile(
    r"composing functions|set of possible functions|function/tool calls|can be used, point it out|lacks the parameters"
    r"|also point it out|tools? call sections|list of functions in json|return the function call|in the format of \["
    r"|no other text must",
    re.IGNORECASE,
).search
_SENTENCE_END = re.compile(r"(?<=[.!?:])\s+|\n+")
_list_open = re.compile(r"\[\s*+[{\]]").finditer
_MAX_LISTS = 4  # places at which the list of tools is looked for


def convert(raw: Any, name: str, where: str) -> list[StepRecord]:
    """A record for each assistant turn."""
    item = fields.mapping(raw, where)
    system = fields.text(item.get("system"), f"{where}: system")
    start, end, listed = _tool_list(system, f"{where}: system")
    tools = tuple(
        gorilla.tool_from(t, f"{where}: system: tools[{i}]") for i, t in enumerate(listed)
    )
    turns = _turns(item.get("conversations"), {t["name"] for t in tools}, where)
    before, after = system[:start], system[end:]
    if other := _other_text(before, after):
        turns.insert(0, {"role": "system", "content": other})
    records = decompose(Dialogue(name, "toolace", tools, tuple(turns)))
    if not records:
        raise RecordError(f"{where}: conversations: no assistant turn to learn from")
    extra: dict[str, Any] = {}
    if (before, after) != (_BEFORE, _AFTER):
        extra["around"] = [before, after]
    if style := remainder.style_of(listed, system[start:end]):
        extra["style"] = style
    if edits := remainder.difference(list(map(gorilla.tool_to, tools)), listed):
        extra["tools"] = edits
    return remainder.keep(records, raw, _rebuild, where, extra)


def restore(records: Sequence[StepRecord]) -> dict[str, Any]:
    """The item that `convert` made these records of."""
    return remainder.restored(records, _rebuild)


def _tool_list(system: str, where: str) -> tuple[int, int, list[Any]]:
    """(start, end, value) of the JSON list in the text."""
    for count, found in enumerate(_list_open(system)):
        if count == _MAX_LISTS:
            break
        try:
            value, end = json.JSONDecoder().raw_decode(system, found.start())
        except (ValueError, RecursionError):
            continue
        fields.check_depth(value, where)
        return found.start(), end, value
    raise RecordError(f"{where}: no JSON list of tools")


def _turns(value: Any, names: set[str], where: str) -> list[dict[str, Any]]:
    turns: list[dict[str, Any]] = []
    for i, message in enumerate(fields.sequence(value, f"{where}: conversations")):
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
        raise RecordError(f"{where}: an empty answer")
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


def _rebuild(records: Sequence[StepRecord]) -> dict[str, Any]:
    dialogue, extra = compose(records), records[-1].extra
    before, after = extra.get("around", (_BEFORE, _AFTER))
    tools = remainder.apply(list(map(gorilla.tool_to, dialogue.tools)), extra.get("tools", []))
    return {
        "system": before + remainder.written(tools, extra.get("style", 0)) + after,
        "conversations": [_message(t) for t in dialogue.turns if t["role"] != "system"],
    }


def _message(turn: Mapping[str, Any]) -> dict[str, Any]:
    calls = turn.get("calls")
    return {
        "from": turn["role"],
        "value": call_syntax.render(calls) if calls else turn["content"],
    }
