"""The step record: one assistant turn to be produced, with everything the policy sees before it.

`decompose` makes K records of a dialogue of K assistant turns: record k holds the tools, the history up to turn k and turn k's
own calls and response as the target. `from_json` / `to_json` convert to and from plain JSON objects;
`data.files` reads and writes files of them. Every fault is a `RecordError` naming the record and the field.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rest_jax.errors import UserError
from rest_jax.rewards.gold import read_turn
from rest_jax.templates import TEMPLATES, Template
from rest_jax.templates.rendering import is_schema
from rest_jax.tool_calls import Call, Target

VERSION = 1  # of the JSON form; a record without one is of version 1
ROLES = ("system", "user", "assistant", "tool")
FIELDS = ("version", "id", "source", "tools", "history", "target", "messages", "extra")


class RecordError(UserError):
    """A record that cannot be read; the text names the record, the field and what is wrong with it."""


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
        if self.messages is not None and (
            not self.history or (template.name == "toolrl" and not brief)
        ):
            return [dict(m) for m in self.messages]
        return template.render_prompt(list(self.tools), list(self.history), brief=brief)


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
    """A record from its JSON object. `where` (file and line) opens the message of the RecordError raised on any fault."""
    name = mapping(raw, where).get("id")
    where = f"{where}: record {name!r}" if name is not None else where
    _check_keys(raw, FIELDS, where)
    _check_version(raw, where)
    messages, extra = raw.get("messages"), raw.get("extra")
    return StepRecord(
        id=_text(raw, "id", where),
        source=_text(raw, "source", where, default=""),
        tools=tuple(
            check_tool(t, f"{where}: tools[{i}]") for i, t in enumerate(_list(raw, "tools", where))
        ),
        history=_history(raw, where),
        target=target_from_json(raw.get("target"), f"{where}: target"),
        messages=None if messages is None else _messages(messages, where),
        extra={} if extra is None else dict(mapping(extra, f"{where}: extra")),
    )


def to_json(record: StepRecord) -> dict[str, Any]:
    """The plain JSON object of a record; `from_json` of it gives an equal record."""
    target: dict[str, Any] = {
        "calls": [{"name": c.name, "arguments": c.arguments} for c in record.target.calls],
        "response": record.target.response,
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


def target_from_json(raw: Any, where: str) -> Target:
    """A gold answer from {"calls": [...], "response", "think", "text"}."""
    _check_keys(mapping(raw, where), ("calls", "response", "think", "text"), where)
    calls = _list(raw, "calls", where)
    return Target(
        calls=tuple(call_from_json(c, f"{where}: calls[{i}]") for i, c in enumerate(calls)),
        response=_optional_text(raw, "response", where),
        think=_optional_text(raw, "think", where),
        text=_optional_text(raw, "text", where),
    )


def call_from_json(raw: Any, where: str) -> Call:
    """A call from {"name", "arguments"} (or "parameters")."""
    arguments = mapping(raw, where).get("arguments", raw.get("parameters"))
    return Call(_text(raw, "name", where), dict(mapping(arguments, f"{where}: arguments")))


def target_from_text(text: str, where: str) -> Target:
    """A gold answer from its text in the toolrl template, kept verbatim in `Target.text`.

    RecordError when a call in it cannot be read, or when it holds neither calls, nor a response, nor a thought.
    """
    gold = TEMPLATES["toolrl"].parse(text.encode())
    if gold.broken_calls:
        raise RecordError(f"{where}: the gold answer has {gold.broken_calls} unreadable call(s)")
    if not gold.calls and gold.response is None and gold.think is None:
        raise RecordError(
            f"{where}: the gold answer has no call, no response and no thought: {text[:60]!r}"
        )
    return Target(calls=gold.calls, response=gold.response, think=gold.think, text=text)


def text(value: Any, where: str) -> str:
    """The value if it is text."""
    if not isinstance(value, str):
        raise RecordError(f"{where}: text is needed, found {kind(value)}")
    return value


def mapping(value: Any, where: str) -> Mapping[str, Any]:
    """The value if it is an object."""
    if not isinstance(value, Mapping):
        raise RecordError(f"{where}: an object is needed, found {kind(value)}")
    return value


def sequence(value: Any, where: str) -> list[Any]:
    """The value if it is a list."""
    if not isinstance(value, (list, tuple)):
        raise RecordError(f"{where}: a list is needed, found {kind(value)}")
    return list(value)


def kind(value: Any) -> str:
    """What a value is, for a message."""
    return "nothing" if value is None else type(value).__name__


def _check_keys(raw: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    if unknown := [key for key in raw if key not in known]:
        raise RecordError(f"{where}: unknown field {unknown[0]!r} (known: {', '.join(known)})")


def _check_version(raw: Mapping[str, Any], where: str) -> None:
    version = raw.get("version")
    if version is not None and (isinstance(version, bool) or version not in range(1, VERSION + 1)):
        raise RecordError(
            f"{where}: version: {version!r} is not known here, {VERSION} is the newest; update rest_jax"
        )


def _history(raw: Mapping[str, Any], where: str) -> tuple[dict[str, Any], ...]:
    turns = []
    for i, item in enumerate(_list(raw, "history", where)):
        place = f"{where}: history[{i}]"
        turn = dict(mapping(item, place))
        if turn.get("role") not in ROLES:
            raise RecordError(
                f"{place}: role: {turn.get('role')!r} is not one of {', '.join(ROLES)}"
            )
        calls = [
            dataclasses.asdict(call_from_json(c, f"{place}: calls[{j}]"))
            for j, c in enumerate(_list(turn, "calls", place))
        ]
        if _optional_text(turn, "content", place) is None and not calls:
            raise RecordError(f"{place}: neither content nor calls")
        _optional_text(turn, "think", place)
        turns.append({**turn, "calls": calls} if calls else turn)
    return tuple(turns)


def _messages(raw: Any, where: str) -> tuple[dict[str, str], ...]:
    if not isinstance(raw, Sequence) or isinstance(raw, str) or not raw:
        raise RecordError(
            f"{where}: messages: a list of role and content is needed, found {kind(raw)}"
        )
    for i, message in enumerate(raw):
        place = f"{where}: messages[{i}]"
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            raise RecordError(f"{place}: an object with a role of {', '.join(ROLES)} is needed")
        _text(message, "content", place)
    return tuple({"role": m["role"], "content": m["content"]} for m in raw)


def check_tool(raw: Any, where: str) -> dict[str, Any]:
    """The tool if it can be rendered: a name, and parameters in one of the two forms. RecordError names what is wrong."""
    _text(mapping(raw, where), "name", where)
    place = f"{where}: parameters"
    parameters = mapping(raw.get("parameters", {}), place)
    if is_schema(parameters):
        required = parameters.get("required")
        if required is not None:
            sequence(required, f"{place}: required")
        place = f"{place}: properties"
        parameters = mapping(parameters.get("properties", {}), place)
    for name, described in parameters.items():
        mapping(described, f"{place}: {name}")
    return dict(raw)


def _text(raw: Mapping[str, Any], key: str, where: str, default: str | None = None) -> str:
    return text(raw.get(key, default), f"{where}: {key}")


def _optional_text(raw: Mapping[str, Any], key: str, where: str) -> str | None:
    return None if raw.get(key) is None else _text(raw, key, where)


def _list(raw: Mapping[str, Any], key: str, where: str) -> list[Any]:
    return [] if raw.get(key) is None else sequence(raw[key], f"{where}: {key}")
