"""The OpenAI chat format: {"messages", "tools"}, as fine-tuning files and request logs have it.

Calls stand in `tool_calls` (arguments are a string of JSON), results in messages of role "tool" with the id of their call; the
older `functions`, `function_call` and role "function" are read too. Results are put in the order of their calls, since a record
has no ids. A thought is taken from `reasoning_content`, `reasoning`, `thinking` or the content. Assistant messages of weight 0
are history, not targets. The lists may also be strings of JSON, as in many Parquet files, and an empty string is none.
"""

from collections.abc import Mapping
from typing import Any

from rest_jax.data.convert import fields
from rest_jax.data.records import RecordError, StepRecord, decompose, sequence

_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_ROLES = ("system", "developer", "user", "assistant", "tool", "function")


def convert(raw: Any, name: str, where: str) -> list[StepRecord]:
    """A record for each assistant message, or sequence of messages with calls, that is to be learned."""
    item = fields.item(raw, where)
    messages = sequence(_parsed(item, "messages", where), f"{where}: messages")
    turns = _turns(messages, f"{where}: messages")
    records = decompose(name, "openai", _tools(item, where), turns)
    records = [r for r, learn in zip(records, _to_learn(messages), strict=True) if learn]
    if not records:
        raise RecordError(f"{where}: messages: no assistant message to learn from")
    return records


def _parsed(item: Mapping[str, Any], key: str, where: str) -> Any:
    """A field of the item; a string of JSON is read, an empty one is an empty list."""
    value = item.get(key)
    if isinstance(value, str):
        value = fields.json_text(value.strip() or "[]", f"{where}: {key}")
    return value


def _tools(item: Mapping[str, Any], where: str) -> tuple[dict[str, Any], ...]:
    key = "functions" if item.get("functions") is not None else "tools"
    tools = []
    for i, tool in enumerate(sequence(_parsed(item, key, where) or [], f"{where}: {key}")):
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
    results: list[tuple[int, dict[str, Any]]] = []  # (position of its call, result)
    for i, message in enumerate(messages):
        place = f"{where}[{i}]"
        role = fields.one_of(fields.mapping(message, place).get("role"), _ROLES, f"{place}: role")
        if role in ("tool", "function"):
            turn = {"role": "tool", "content": _content(message, place) or ""}
            results.append((_answered(message, waiting, place), turn))
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
    """The position of the call that a result answers; results without an id stay where they are."""
    if not waiting:
        raise RecordError(f"{where}: a tool result without a call before it")
    name = message.get("tool_call_id")
    if name is None:
        return len(waiting)
    if name not in waiting:
        raise RecordError(f"{where}: tool_call_id: {name!r} is no call of the message before")
    return waiting.index(name)


def _assistant(message: Mapping[str, Any], where: str) -> tuple[dict[str, Any], list[str | None]]:
    """(turn, ids of its calls)."""
    calls, ids = _calls(message, where)
    content = _content(message, where) or None
    if content is None and message.get("refusal") is not None:
        content = fields.text(message["refusal"], f"{where}: refusal")
    key = next((key for key in _THOUGHTS if message.get(key)), _THOUGHTS[0])
    think = message.get(key)
    if content is None and not calls:
        raise RecordError(f"{where}: neither content nor calls")
    turn: dict[str, Any] = {"role": "assistant", "content": content}
    if calls:
        turn["calls"] = calls
    if think is not None:
        turn["think"] = fields.text(think, f"{where}: {key}")
    return turn, ids


def _calls(message: Mapping[str, Any], where: str) -> tuple[list[dict[str, Any]], list[str | None]]:
    calls, ids = [], []
    for i, item in enumerate(sequence(message.get("tool_calls") or [], f"{where}: tool_calls")):
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
    for i, part in enumerate(sequence(content, f"{where}: content")):
        place = f"{where}: content[{i}]"
        if (kind := fields.mapping(part, place).get("type")) != "text":
            raise RecordError(f"{place}: type: {kind!r} is not 'text'")
        texts.append(fields.text(part.get("text"), f"{place}: text"))
    return "".join(texts)


def _to_learn(messages: list[Any]) -> list[bool]:
    """For each action, whether it is to be learned: a message of it has a weight other than 0."""
    learn: list[bool] = []
    in_action = False
    for message in messages:
        if message["role"] != "assistant":
            in_action = False
            continue
        calls = bool(message.get("tool_calls") or message.get("function_call"))
        weight = message.get("weight") != 0
        if calls and in_action:
            learn[-1] = learn[-1] or weight
        else:
            learn.append(weight)
        in_action = calls
    return learn
