"""The OpenAI chat format: {"messages", "tools"}, as fine-tuning files and request logs have it.

Calls stand in `tool_calls` (arguments are a string of JSON), results in messages of role "tool" with the id of their call; the
older `functions`, `function_call` and role "function" are read too. Results are put in the order of their calls, since a record
has no ids. A thought is taken from `reasoning_content`. Assistant messages of weight 0 are history, not targets. The lists may
also be strings of JSON, as in many Parquet files, and an empty string is none.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from rest_jax.data.convert import fields, remainder
from rest_jax.data.prepare.dialogue import Dialogue, compose, decompose
from rest_jax.data.records import RecordError, StepRecord

_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_LISTS = ("messages", "tools", "functions")


def convert(raw: Any, name: str, where: str) -> list[StepRecord]:
    """A record for each assistant message, or run of messages with calls, that is to be learned."""
    given = fields.mapping(raw, where)
    texts = {key: given[key] for key in _LISTS if isinstance(given.get(key), str)}
    lists = {k: fields.json_text(t.strip() or "[]", f"{where}: {k}") for k, t in texts.items()}
    item = {**given, **lists}
    messages = fields.sequence(item.get("messages"), f"{where}: messages")
    legacy = item.get("functions") is not None or any(
        isinstance(m, Mapping) and m.get("function_call") is not None for m in messages
    )
    turns = _turns(messages, f"{where}: messages")
    records = decompose(Dialogue(name, "openai", _tools(item, where), turns))
    records = [r for r, learn in zip(records, _to_learn(messages), strict=True) if learn]
    if not records:
        raise RecordError(f"{where}: messages: no assistant message to learn from")
    rebuild = _rebuild_legacy if legacy else _rebuild
    extra = {"legacy": True} if legacy else {}
    records = remainder.keep(records, item, rebuild, where, extra)
    return _keep_texts(records, texts, rebuild) if texts else records


def restore(records: Sequence[StepRecord]) -> dict[str, Any]:
    """The item that `convert` made these records of."""
    extra = records[-1].extra
    item = remainder.restored(records, _rebuild_legacy if extra.get("legacy") else _rebuild)
    for key, how in extra.get("texts", {}).items():
        item[key] = how if isinstance(how, str) else remainder.written(item[key], how)
    return item


def _keep_texts(
    records: list[StepRecord], texts: Mapping[str, str], rebuild: remainder.Rebuild
) -> list[StepRecord]:
    """The records, the last with the way of writing that gives each text again from its list, or the text where none does."""
    item = remainder.restored(records, rebuild)
    styles = {key: remainder.style_of(item[key], text) for key, text in texts.items()}
    ways = {key: texts[key] if style is None else style for key, style in styles.items()}
    last = dataclasses.replace(records[-1], extra={**records[-1].extra, "texts": ways})
    return [*records[:-1], last]


def _tools(item: Mapping[str, Any], where: str) -> tuple[dict[str, Any], ...]:
    key = "functions" if item.get("functions") is not None else "tools"
    tools = []
    for i, tool in enumerate(fields.sequence(item.get(key) or [], f"{where}: {key}")):
        place = f"{where}: {key}[{i}]"
        if key == "tools":
            kind = fields.mapping(tool, place).get("type")
            if kind != "function":
                raise RecordError(f"{place}: type: {kind!r} is not 'function'")
            tool, place = tool.get("function"), f"{place}: function"
        tools.append(fields.tool(tool, place))
    return tuple(tools)


def _turns(messages: list[Any], where: str) -> tuple[dict[str, Any], ...]:
    turns: list[dict[str, Any]] = []
    waiting: list[str | None] = []  # ids of the calls of the last action, in order
    results: list[tuple[int, dict[str, Any]]] = []  # (place of its call, result)
    for i, message in enumerate(messages):
        place = f"{where}[{i}]"
        role = fields.one_of(fields.mapping(message, place).get("role"), _ROLES, f"{place}: role")
        if role in ("tool", "function"):
            results.append((_answered(message, waiting, place), _result(message, place)))
            continue
        turns.extend(_in_order(results))
        if results or role != "assistant":
            waiting = []
        results = []
        if role != "assistant":
            content = fields.text(_content(message, place), f"{place}: content")
            turns.append({"role": "user" if role == "user" else "system", "content": content})
            continue
        turn, ids = _assistant(message, place)
        waiting = waiting + ids
        turns.append(turn)
    return (*turns, *_in_order(results))


def _in_order(results: list[tuple[int, dict[str, Any]]]) -> list[dict[str, Any]]:
    return [turn for _, turn in sorted(results, key=lambda pair: pair[0])]


def _answered(message: Mapping[str, Any], waiting: list[str | None], where: str) -> int:
    """The place of the call that a result answers; results without an id stay where they are."""
    if not waiting:
        raise RecordError(f"{where}: a tool result without a call before it")
    name = message.get("tool_call_id")
    if name is None:
        return len(waiting)
    if name not in waiting:
        raise RecordError(f"{where}: tool_call_id: {name!r} is no call of the message before")
    return waiting.index(name)


def _result(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    return {"role": "tool", "content": _content(message, where) or ""}


def _assistant(message: Mapping[str, Any], where: str) -> tuple[dict[str, Any], list[str | None]]:
    """(turn, ids of its calls)."""
    calls, ids = _calls(message, where)
    content = _content(message, where) or None
    if content is None and message.get("refusal") is not None:
        content = fields.text(message["refusal"], f"{where}: refusal")
    think = message.get("reasoning_content")
    if content is None and not calls:
        raise RecordError(f"{where}: neither content nor calls")
    turn: dict[str, Any] = {"role": "assistant", "content": content}
    if calls:
        turn["calls"] = calls
    if think is not None:
        turn["think"] = fields.text(think, f"{where}: reasoning_content")
    return turn, ids


def _calls(message: Mapping[str, Any], where: str) -> tuple[list[dict[str, Any]], list[str | None]]:
    calls, ids = [], []
    for i, item in enumerate(
        fields.sequence(message.get("tool_calls") or [], f"{where}: tool_calls")
    ):
        place = f"{where}: tool_calls[{i}]"
        kind = fields.mapping(item, place).get("type", "function")
        if kind != "function":
            raise RecordError(f"{place}: type: {kind!r} is not 'function'")
        calls.append(_call(item.get("function"), f"{place}: function"))
        name = item.get("id")
        ids.append(None if name is None else fields.text(name, f"{place}: id"))
    if message.get("function_call") is not None:
        calls.append(_call(message["function_call"], f"{where}: function_call"))
        ids.append(None)
    named = [name for name in ids if name is not None]
    if len(set(named)) != len(named):
        raise RecordError(f"{where}: tool_calls: two calls share an id")
    return calls, ids


def _call(value: Any, where: str) -> dict[str, Any]:
    """A call whose arguments are a string of JSON, or already an object; an empty string is no arguments."""
    raw = dict(fields.mapping(value, where))
    if isinstance(raw.get("arguments"), str):
        place = f"{where}: arguments"
        raw["arguments"] = fields.json_text(raw["arguments"].strip() or "{}", place)
    return fields.call(raw, where)


def _content(message: Mapping[str, Any], where: str) -> str | None:
    """Text of a message, the parts of a list joined."""
    content = message.get("content")
    if content is None or isinstance(content, str):
        return content
    texts = []
    for i, part in enumerate(fields.sequence(content, f"{where}: content")):
        place = f"{where}: content[{i}]"
        if (kind := fields.mapping(part, place).get("type")) != "text":
            raise RecordError(f"{place}: type: {kind!r} is not 'text'")
        texts.append(fields.text(part.get("text"), f"{place}: text"))
    return "".join(texts)


def _to_learn(messages: list[Any]) -> list[bool]:
    """For each action, whether it is to be learned: a message of it has a weight other than 0."""
    learn: list[bool] = []
    open_run = False
    for message in messages:
        if message["role"] != "assistant":
            open_run = False
            continue
        calls = bool(message.get("tool_calls") or message.get("function_call"))
        weight = message.get("weight") != 0
        if calls and open_run:
            learn[-1] = learn[-1] or weight
        else:
            learn.append(weight)
        open_run = calls
    return learn


def _rebuild(records: Sequence[StepRecord]) -> dict[str, Any]:
    dialogue = compose(records)
    messages: list[dict[str, Any]] = []
    made = 0
    waiting: list[str] = []
    for turn in dialogue.turns:
        message = {"role": turn["role"], "content": turn["content"]}
        if turn["role"] == "tool":
            name = waiting.pop(0) if waiting else f"call_{made - 1}"
            message = {"role": "tool", "tool_call_id": name, "content": turn["content"]}
        if turn.get("think") is not None:
            message["reasoning_content"] = turn["think"]
        if calls := turn.get("calls"):
            waiting = [f"call_{made + i}" for i in range(len(calls))]
            made += len(calls)
            message["tool_calls"] = [
                {"id": name, "type": "function", "function": _written(call)}
                for name, call in zip(waiting, calls, strict=True)
            ]
        messages.append(message)
    raw: dict[str, Any] = {"messages": messages}
    if dialogue.tools:
        raw["tools"] = [{"type": "function", "function": tool} for tool in dialogue.tools]
    return raw


def _rebuild_legacy(records: Sequence[StepRecord]) -> dict[str, Any]:
    dialogue = compose(records)
    messages: list[dict[str, Any]] = []
    name = ""
    for turn in dialogue.turns:
        message = {"role": turn["role"], "content": turn["content"]}
        if turn["role"] == "tool":
            message = {"role": "function", "name": name, "content": turn["content"]}
        for call in turn.get("calls") or ():
            name = call["name"]
            message["function_call"] = _written(call)
        messages.append(message)
    raw: dict[str, Any] = {"messages": messages}
    if dialogue.tools:
        raw["functions"] = list(dialogue.tools)
    return raw


def _written(call: Mapping[str, Any]) -> dict[str, Any]:
    arguments = json.dumps(call["arguments"], ensure_ascii=False)
    return {"name": call["name"], "arguments": arguments}
