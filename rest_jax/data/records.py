"""The step record: one assistant turn to be produced, with everything the policy sees before it.

`decompose` makes K records of a dialogue of K assistant turns: record k holds the tools, the history up to turn k and turn k's
own calls and response as the target. `from_json` / `to_json` convert to and from plain JSON objects;
`data.files` reads and writes files of them. Every fault is a `RecordError` naming the record and the field.
"""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence, Set
from typing import Any

from rest_jax.data import fields
from rest_jax.data.fields import RecordError, mapping, text
from rest_jax.rewards.gold import read_turn
from rest_jax.templates import TEMPLATES, Template
from rest_jax.templates.rendering import leading_system, signature
from rest_jax.tool_calls import Call, Target

VERSION = 1  # of the JSON form; a record without one is of version 1
ROLES = ("system", "user", "assistant", "tool")
FIELDS = ("version", "id", "source", "tools", "history", "target", "messages", "extra")


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """One training or evaluation instance."""

    id: str
    source: str  # the name of the data set it comes from
    # {"name", "description", "parameters": JSON schema or flat ToolRL form}
    tools: tuple[dict[str, Any], ...]
    # {"role", "content", optional "calls": [{"name", "arguments"}], "think"}
    history: tuple[dict[str, Any], ...]
    target: Target
    # the prompt verbatim, where the source has it in a form that tools and history do not give again
    messages: tuple[dict[str, str], ...] | None = None
    # what else is known of it; never seen by a policy
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    def prompt_messages(self, template: Template, brief: bool = False) -> list[dict[str, str]]:
        """The chat messages of the prompt: `messages` as they are, or tools and history through the template.

        Rendered prompts are of the toolrl template; the other templates, and the brief form, go by the history if there is one.
        """
        if self._is_verbatim(template, brief):
            return [dict(m) for m in self.messages or ()]
        return template.render_prompt(list(self.tools), list(self.history), brief=brief)

    def native_prompt(
        self, template: Template
    ) -> tuple[list[dict[str, str]], list[dict[str, Any]]] | None:
        """(chat messages, tools) for a chat template that lists the tools itself. None where there are none to list, and where
        the user does not begin: Llama's writes the tools into the first message, whoever says it.
        """
        _, turns = leading_system(self.history)
        begins = bool(turns) and turns[0]["role"] == "user"
        if self._is_verbatim(template) or not self.tools or not begins:
            return None
        messages = template.render_prompt([], list(self.history))
        return messages, [signature(tool) for tool in self.tools]

    def _is_verbatim(self, template: Template, brief: bool = False) -> bool:
        return self.messages is not None and (
            not self.history or (template.name == "toolrl" and not brief)
        )


def structured(record: StepRecord) -> bool:
    """Whether tools and history say the prompt, so that it can be written anew from them."""
    return record.messages is None or bool(record.tools and record.history)


def not_offered(record: StepRecord) -> set[str]:
    """Names that the record calls, in its history or its target, and does not offer; none where the tools are not known."""
    if not structured(record):
        return set()
    calls = {*called(record), *(call.name for call in record.target.calls)}
    return calls - {tool["name"] for tool in record.tools}


def said_not_offered(names: Set[str]) -> str:
    """Why a record that calls these is set aside."""
    return f"calls {', '.join(map(fields.shown, sorted(names)))}, which is not among its tools"


def called(record: StepRecord) -> list[str]:
    """Names of the tools called in the history."""
    return [call["name"] for turn in record.history for call in turn.get("calls") or ()]


def decompose(
    name: str, source: str, tools: tuple[dict[str, Any], ...], turns: Sequence[dict[str, Any]]
) -> list[StepRecord]:
    """A dialogue as training instances (docs/method.md section 1): one record for each assistant turn, in order.

    The k-th sees every turn before the k-th assistant turn and is supervised by that turn's own calls and response; tool results
    are never a target, and turns after the last assistant turn are in no record. `turns` are as in `StepRecord.history`. Ids are
    `<name>/<k>`, k from 0, and `name` itself when there is only one. Assistant turns with calls that follow each other with
    nothing between are one action. A thought and calls that the content of a turn holds as text are read.
    """
    names = {tool["name"] for tool in tools}
    merged = tuple(
        read_turn(turn, names) if turn["role"] == "assistant" else turn
        for turn in _merge_actions(turns)
    )
    ends = [i for i, turn in enumerate(merged) if turn["role"] == "assistant"]
    return [
        StepRecord(
            id=f"{name}/{k}" if len(ends) > 1 else name,
            source=source,
            tools=tools,
            history=merged[:end],
            target=_target_of(merged[end]),
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


def _target_of(turn: dict[str, Any]) -> Target:
    calls = tuple(Call(c["name"], c["arguments"]) for c in turn.get("calls") or ())
    return Target(calls=calls, response=turn.get("content"), think=turn.get("think"))


def from_json(raw: Any, where: str = "record") -> StepRecord:
    """A record from its JSON object; fields that it does not know go to `extra`, unless they are nearly the name of one that it
    knows. `where` (file and line) opens the message of the RecordError raised on any fault.
    """
    name = mapping(raw, where).get("id")
    where = f"{where}: record {name!r}" if name is not None else where
    others = fields.others(raw, FIELDS)
    for key in others:
        if close := difflib.get_close_matches(key.lower(), FIELDS, n=1, cutoff=0.8):
            raise RecordError(f"{where}: unknown field {key!r} (is {close[0]!r} meant?)")
    _check_version(raw, where)
    messages, extra = raw.get("messages"), raw.get("extra")
    extra = mapping(extra, f"{where}: extra") if fields.is_given(extra) else {}
    return StepRecord(
        id=_text(raw, "id", where),
        source=_text(raw, "source", where, default=""),
        tools=fields.tools(raw.get("tools"), f"{where}: tools"),
        history=_history(raw, where),
        target=target_from_json(raw.get("target"), f"{where}: target"),
        messages=_messages(messages, where) if fields.is_given(messages) else None,
        extra={**others, **fields.finite(dict(extra))},
    )


def gold(target: Target) -> dict[str, Any]:
    """What a completion is scored against, as plain JSON: {"calls": [{"name", "arguments"}], "response"}."""
    calls = [{"name": call.name, "arguments": call.arguments} for call in target.calls]
    return {"calls": calls, "response": target.response}


def to_json(record: StepRecord) -> dict[str, Any]:
    """The plain JSON object of a record; `from_json` of it gives an equal record."""
    target: dict[str, Any] = {
        **gold(record.target),
    }
    for field in ("think", "text"):
        if (value := getattr(record.target, field)) is not None:
            target[field] = value
    raw: dict[str, Any] = {
        "version": VERSION,
        "id": record.id,
        "source": record.source,
        "tools": list(record.tools),
        "history": list(record.history),
        "target": target,
    }
    if record.messages is not None:
        raw["messages"] = list(record.messages)
    if record.extra:
        raw["extra"] = record.extra
    return raw


def restored(raw: Mapping[str, Any]) -> StepRecord:
    """The record that `to_json` made this object of; nothing is checked."""
    target = raw["target"]
    return StepRecord(
        id=raw["id"],
        source=raw["source"],
        tools=tuple(raw["tools"]),
        history=tuple(raw["history"]),
        target=Target(
            calls=tuple(Call(**call) for call in target["calls"]),
            response=target["response"],
            think=target.get("think"),
            text=target.get("text"),
        ),
        messages=tuple(raw["messages"]) if "messages" in raw else None,
        extra=raw.get("extra", {}),
    )


def target_from_json(raw: Any, where: str) -> Target:
    """A gold answer from {"calls": [...], "response", "think", "text"}."""
    _check_keys(mapping(raw, where), ("calls", "response", "think", "text"), where)
    calls = tuple(Call(**call) for call in _calls(raw, where))
    return Target(
        calls=calls,
        response=_said(_optional_text(raw, "response", where), calls),
        think=_optional_text(raw, "think", where) or None,
        text=_optional_text(raw, "text", where) or None,
    )


def target_from_text(text: str, where: str) -> Target:
    """A gold answer from its text in the toolrl template, kept verbatim in `Target.text`.

    RecordError when a call in it cannot be read, or when it holds neither calls, nor a response, nor a thought.
    """
    fields.check_storable(text, where)
    gold = TEMPLATES["toolrl"].parse(text.encode())
    if gold.broken_calls:
        raise RecordError(f"{where}: the gold answer has {gold.broken_calls} unreadable call(s)")
    if not gold.calls and gold.response is None and gold.think is None:
        raise RecordError(
            f"{where}: the gold answer has no call, no response and no thought: {text[:60]!r}"
        )
    return Target(calls=gold.calls, response=gold.response, think=gold.think, text=text)


def _check_keys(raw: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    if unknown := [key for key in raw if key not in known]:
        raise RecordError(f"{where}: unknown field {unknown[0]!r} (known: {', '.join(known)})")


def _check_version(raw: Mapping[str, Any], where: str) -> None:
    version = raw.get("version")
    known = isinstance(version, int) and version in range(1, VERSION + 1)
    if fields.is_given(version) and (isinstance(version, bool) or not known):
        raise RecordError(
            f"{where}: version: {fields.shown(version)} is not known here, {VERSION} is the newest; update rest_jax"
        )


def _history(raw: Mapping[str, Any], where: str) -> tuple[dict[str, Any], ...]:
    turns = []
    for i, item in enumerate(fields.listed(raw.get("history"), f"{where}: history")):
        place = f"{where}: history[{i}]"
        turn = dict(mapping(item, place))
        fields.one_of(turn.get("role"), ROLES, f"{place}: role")
        calls = _calls(turn, place)
        content = _optional_text(turn, "content", place)
        if content is None and not calls:
            raise RecordError(f"{place}: neither content nor calls")
        if content is None and turn["role"] != "assistant":
            raise RecordError(f"{place}: content: text is needed, found nothing")
        think = _optional_text(turn, "think", place) or None
        read = {"calls": calls, "content": _said(content, calls), "think": think}
        turn |= {key: value for key, value in read.items() if turn.get(key) is not None}
        turns.append(turn)
    return tuple(turns)


def _messages(raw: Any, where: str) -> tuple[dict[str, str], ...]:
    if not isinstance(raw, Sequence) or isinstance(raw, str) or not raw:
        raise RecordError(
            f"{where}: messages: a list of role and content is needed, found {fields.kind(raw)}"
        )
    for i, message in enumerate(raw):
        place = f"{where}: messages[{i}]"
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            raise RecordError(f"{place}: an object with a role of {', '.join(ROLES)} is needed")
        _text(message, "content", place)
    return tuple({"role": m["role"], "content": m["content"]} for m in raw)


def _calls(raw: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    listed = fields.listed(raw.get("calls"), f"{where}: calls")
    return [fields.call(call, f"{where}: calls[{i}]") for i, call in enumerate(listed)]


def _text(raw: Mapping[str, Any], key: str, where: str, default: str | None = None) -> str:
    value = raw.get(key)
    return text(default if value is None else value, f"{where}: {key}")


def _optional_text(raw: Mapping[str, Any], key: str, where: str) -> str | None:
    return None if raw.get(key) is None else _text(raw, key, where)


def _said(text: str | None, calls: Sequence[Any]) -> str | None:
    """What an answer says to the user: beside calls, an empty text is nothing."""
    return None if calls and not text else text
