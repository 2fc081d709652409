"""Chats as servers log them and people train on them: {"messages", "tools"}.

Calls stand in `tool_calls`, or in the content as text; results in messages of role "tool" with the id of their call. The older
`functions`, `function_call` and role "function", the items of the Responses API under `input`, Anthropic's blocks of calls and
results, and ShareGPT's {"conversations": [{"from", "value"}]} are read too. A record has no ids: results are put in the order
of their calls, and a call without a result is refused where the dialogue continues, unless it is text. Assistant messages of
weight 0 are history, not targets. How fields are read, and what the default is, is said in `data.fields`.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rest_jax.data import fields
from rest_jax.data.fields import RecordError
from rest_jax.data.records import StepRecord, decompose
from rest_jax.rewards.gold import read_turn

_MESSAGES = ("messages", "conversations", "conversation", "input")
_TOOLS = ("tools", "functions")
READ = (*_MESSAGES, *_TOOLS, "output", "system", "instructions")
_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "ai", "chatgpt"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "environment"), "tool"),
    **dict.fromkeys(("function_response", "tool_response", "tool_result"), "tool"),
}


# Of a text that holds all results: blocks with no such tag in them.
_block = r"<tool_response>((?:(?!</?tool_response>).)*+)</tool_response>\s*+"
_blocks_only = re.compile(rf"\s*+(?:{_block})++", re.DOTALL).fullmatch
_blocks_of = re.compile(_block, re.DOTALL).findall


class _Waiting(NamedTuple):
    """A call of the last action."""

    name: str
    id: str | None
    where: str
    as_text: bool = False  # its result may be text, too


class _Result(NamedTuple):
    """What a tool has answered."""

    turn: dict[str, Any]
    id: str | None
    name: str | None
    where: str


def convert(raw: Any, name: str, where: str) -> list[StepRecord]:
    """A record for each assistant message, or sequence of messages with calls, that is to be learned."""
    item = fields.item(raw, where)
    key, value = fields.first_given(item, _MESSAGES)
    place = f"{where}: {key}"
    if key == "input" and isinstance(value, str) and not value.lstrip().startswith("["):
        value = [{"role": "user", "content": value}]
    messages = fields.sequence(fields.parsed(value, place), place)
    if key == "input":  # of a request of the Responses API; the response has the same items
        messages += fields.listed(item.get("output"), f"{where}: output")
    messages = [fields.parsed(message, f"{place}[{i}]") for i, message in enumerate(messages)]
    listed = next((key for key in _TOOLS if item.get(key)), _TOOLS[0])
    tools = fields.tools(item.get(listed), f"{where}: {listed}")
    turns, weights = _turns(messages, {tool["name"] for tool in tools}, place)
    key, system = fields.first_given(item, ("system", "instructions"))
    if fields.is_given(system) and not (turns and turns[0]["role"] == "system"):
        turns.insert(0, {"role": "system", "content": fields.content(system, f"{where}: {key}")})
        weights.insert(0, False)
    records = decompose(name, "openai", tools, turns)
    learned = _to_learn(turns, weights)
    records = [record for record, learn in zip(records, learned, strict=True) if learn]
    if not records:
        raise RecordError(f"{place}: no assistant message to learn from")
    return records


def history(
    messages: Sequence[Any], tools: Sequence[Mapping[str, Any]], where: str
) -> tuple[dict[str, Any], ...]:
    """A dialogue before its next turn, as `StepRecord.history` has it. `tools`: those on offer, as `fields.tools` reads them.
    Turns that say nothing are left out.
    """
    following = {"role": "assistant", "content": "next"}
    turns, _ = _turns([*messages, following], {tool["name"] for tool in tools}, where)
    return tuple(turns[:-1])


def _turns(
    messages: Sequence[Any], tools: Collection[str], where: str
) -> tuple[list[dict[str, Any]], list[bool]]:
    """(the turns, of each whether it may be learned). `tools`: the names of those on offer."""
    turns: list[dict[str, Any]] = []
    weights: list[bool] = []
    calls: list[_Waiting] = []  # of the last action
    results: list[_Result] = []
    thought = None  # of a message that says no more, before another
    last = max((i for i, m in enumerate(messages) if _role(m) == "assistant"), default=-1)

    def close_action() -> None:
        turns.extend(_in_order(calls, results))
        weights.extend([False] * len(results))
        calls.clear()
        results.clear()

    for i, raw in _without_blocks(messages):
        place = f"{where}[{i}]"
        message = _message(raw, place)
        role = _ROLES[message["role"]]
        if role == "tool":
            if not calls:
                raise RecordError(f"{place}: a tool result without a call before it")
            results += _results(message, any(call.id is not None for call in calls), place)
            continue
        if role != "assistant":
            thought = None
            close_action()
            if role == "system" and message.get("content") is None:
                continue
            content = fields.text(
                fields.content(message.get("content"), f"{place}: content"), f"{place}: content"
            )
            turns.append({"role": role, "content": content})
            weights.append(False)
            continue
        turn, more = _assistant(message, tools, place)
        if turn["content"] is None and not more:
            if i == last:
                raise RecordError(f"{place}: neither content nor calls")
            thought = turn.get("think")
            continue  # a turn that says nothing, before others
        if thought is not None:
            turn.setdefault("think", thought)
        if results or not more:
            close_action()
        calls += more
        turns.append(turn)
        thought = None
        weights.append(message.get("weight") not in (0, "0"))
    if results and len(results) >= len(calls):
        close_action()
    return turns, weights


def _without_blocks(messages: Sequence[Any]) -> Iterator[tuple[int, Any]]:
    """(number, message) of the messages, Anthropic's with blocks of calls and results among their parts as several."""
    for i, raw in enumerate(messages):
        parts = raw.get("content") if isinstance(raw, Mapping) else None
        blocks: dict[Any, list[Any]] = {"tool_use": [], "tool_result": [], None: []}
        for part in parts if isinstance(parts, list) else ():
            kind = part.get("type") if isinstance(part, Mapping) else None
            blocks[kind if kind in ("tool_use", "tool_result") else None].append(part)
        yield from ((i, {**part, "role": "tool"}) for part in blocks["tool_result"])
        if blocks["tool_use"]:
            yield i, {**raw, "content": blocks[None], "tool_calls": blocks["tool_use"]}
        elif blocks[None] or not blocks["tool_result"]:
            yield i, {**raw, "content": blocks[None]} if blocks["tool_result"] else raw


def _role(raw: Any) -> str | None:
    """The role of a message that may be anything, as `_ROLES` has it."""
    if not isinstance(raw, Mapping):
        return None
    _, said = fields.first_given(raw, ("role", "from"))
    if said is None and raw.get("type") in ("function_call", "reasoning"):
        return "assistant"
    return _ROLES.get(said.strip().lower()) if isinstance(said, str) else None


def _message(raw: Any, where: str) -> dict[str, Any]:
    """The message in the words of chat completions: ShareGPT's and the Responses API's become those."""
    message = dict(fields.mapping(raw, where))
    key, speaker = fields.first_given(message, ("role", "from"))
    message.pop("role", None)
    if speaker is not None:
        speaker = speaker.strip().lower() if isinstance(speaker, str) else speaker
        message["role"] = fields.one_of(speaker, _ROLES, f"{where}: {key}")
        message.setdefault("content", message.get("value"))
        if speaker in ("function_call", "tool_call"):
            said = fields.parsed(message["content"], f"{where}: value")
            message |= {"tool_calls": said if isinstance(said, list) else [said], "content": None}
    elif message.get("type") == "reasoning":
        said = next(filter(None, (message.get("content"), message.get("summary"))), None)
        message = {"role": "assistant", "reasoning": said}
    elif message.get("type") == "function_call":
        message = {"role": "assistant", "tool_calls": [message]}
    elif message.get("type") == "function_call_output":
        message |= {"role": "tool", "content": message.get("output")}
    elif fields.is_given(message.get("type")):
        raise RecordError(f"{where}: type: {fields.shown(message['type'])} is not known")
    else:
        fields.one_of(None, _ROLES, f"{where}: role")
    return message


def _results(message: Mapping[str, Any], by_id: bool, where: str) -> list[_Result]:
    """The result of a message; of one that is nothing but `<tool_response>` blocks, as Hermes writes results, one a block. A
    message with an id is one result where the calls have ids (`by_id`), whatever its text.
    """
    key, said = fields.first_given(message, ("content", "output", "result"))
    texts = [fields.result(said, f"{where}: {key}")]
    number = fields.call_id(message, where, ("tool_call_id", "tool_use_id", "call_id", "id"))
    if not (by_id and number is not None) and _blocks_only(texts[0]):
        texts = [text.strip() for text in _blocks_of(texts[0])]
    name = message.get("name")
    name = fields.text(name, f"{where}: name") if fields.is_given(name) else None
    return [_Result({"role": "tool", "content": text}, number, name, where) for text in texts]


def _in_order(calls: Sequence[_Waiting], results: Sequence[_Result]) -> list[dict[str, Any]]:
    """The results in the order of the calls that they answer: bound by id, else by the name of the tool, else by their order;
    so are those of calls that share an id.

    RecordError for a call without a result, unless it was written as text, and for a result without a call.
    """
    answers: dict[int, dict[str, Any]] = {}
    by_id = [result for result in results if result.id is not None]
    by_name = [result for result in results if result.id is None and result.name is not None]
    rest = [result for result in results if result.id is None and result.name is None]
    known = any(call.id is not None for call in calls)
    for result in (*by_id, *by_name, *rest):
        free = [i for i in range(len(calls)) if i not in answers]
        if result.id is not None and known:
            same = [i for i in free if calls[i].id == result.id]
            fitting = [i for i in same if calls[i].name == result.name] or same
            if not fitting:
                again = any(call.id == result.id for call in calls)
                why = "has a result already" if again else "is no call of the message before"
                raise RecordError(f"{result.where}: tool_call_id: {fields.shown(result.id)} {why}")
        else:
            named = [i for i in free if calls[i].name == result.name]
            fitting = named or free
        if not fitting:
            raise RecordError(f"{result.where}: a tool result without a call before it")
        answers[fitting[0]] = result.turn
    for i, call in enumerate(calls):
        if i not in answers and not call.as_text:
            said = f" (id {fields.shown(call.id)})" if call.id is not None else ""
            raise RecordError(
                f"{call.where}: the call of {fields.shown(call.name)}{said} has no result"
            )
    return [answers[i] for i in sorted(answers)]


def _assistant(
    message: Mapping[str, Any], tools: Collection[str], where: str
) -> tuple[dict[str, Any], list[_Waiting]]:
    """(turn, its calls), those that its content holds as text among them."""
    calls, waiting = _calls(message, where)
    content = fields.content(message.get("content"), f"{where}: content")
    if not fields.is_given(content):
        refusal = message.get("refusal")
        content = fields.text(refusal, f"{where}: refusal") if fields.is_given(refusal) else None
    turn: dict[str, Any] = {"role": "assistant", "content": content}
    if calls:
        turn["calls"] = calls
    if (think := fields.thought(message, where)) is not None:
        turn["think"] = think
    turn = read_turn(turn, tools)
    if not waiting:
        place = f"{where}: content"
        waiting = [_Waiting(call["name"], None, place, True) for call in turn.get("calls") or ()]
    return turn, waiting


def _calls(message: Mapping[str, Any], where: str) -> tuple[list[dict[str, Any]], list[_Waiting]]:
    """The calls of a message; `function_call` says nothing more where `tool_calls` are."""
    place = f"{where}: tool_calls"
    raw = fields.parsed(message.get("tool_calls") or None, place)
    raw = [raw] if isinstance(raw, Mapping) else fields.listed(raw, place)
    places = [f"{place}[{i}]" for i in range(len(raw))]
    place = f"{where}: function_call"
    single = None if raw else fields.parsed(message.get("function_call"), place)
    if isinstance(single, Mapping) and not any(map(fields.is_given, single.values())):
        single = None  # servers write all fields of a call that is none
    if single:
        raw, places = [single], [place]
    calls, waiting = [], []
    for value, place in zip(raw, places, strict=True):
        value = fields.mapping(fields.parsed(value, place), place)
        calls.append(fields.call(value, place))
        name = fields.call_id(value, place, ("call_id", "id"))
        waiting.append(_Waiting(calls[-1]["name"], name, place))
    return calls, waiting


def _to_learn(turns: Sequence[dict[str, Any]], weights: Sequence[bool]) -> list[bool]:
    """For each action, whether it is to be learned: a message of it may be."""
    learn: list[bool] = []
    in_action = False
    for turn, weight in zip(turns, weights, strict=True):
        if turn["role"] != "assistant":
            in_action = False
            continue
        calls = bool(turn.get("calls"))
        if calls and in_action:
            learn[-1] = learn[-1] or weight
        else:
            learn.append(weight)
        in_action = calls
    return learn
