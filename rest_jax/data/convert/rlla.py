"""The data sets that ToolRL has rendered: its own rlla, whose gold answers are text, and API-Bank, whose calls are structured.

rlla has two layouts: the JSON list for supervised runs (instruction, input, output) and the Parquet files for reinforcement
(prompt, reward_model.ground_truth). The Parquet ground truth has a placeholder as its thought (one constant sentence or
another); only its calls and response are rewarded, so the target has them alone. The prompt is read back into tools and history
by the inverse of `templates.toolrl.render_prompt`; `structure` keeps the text too where rendering what was read does not give
it again.
API-Bank (system, user, answer, other) is rendered much as in the template, but with Python literals for JSON and other spaces.
Reading is lenient about spaces, Python literals for JSON and the order of blocks, and linear in the text.
"""

import ast
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rest_jax.data import fields
from rest_jax.data.fields import RecordError
from rest_jax.data.records import ROLES, StepRecord, target_from_text
from rest_jax.templates import toolrl
from rest_jax.tool_calls import Call, Target

SUPERVISED = ("instruction", "input", "output")
PARQUET = ("prompt", "reward_model")
READ = (*SUPERVISED, *PARQUET, "data_source")
READ_API_BANK = ("system", "user", "answer")
MAX_LITERAL = 64 * 1024  # characters of one tool's parameters or of one line of calls

_HEADER = re.compile(r"\*{2,3}Dialogue Records History\*\*\n").match
_OPEN = re.compile(r"(\s*+)<(user|system|think|tool_call|response|obs)>").match
_NUMBER = re.compile(r"(\d+)\. ").match

Parsed = tuple[tuple[dict[str, Any], ...], tuple[dict[str, Any], ...]]


def convert(raw: Any, name: str, where: str) -> list[StepRecord]:
    """The record of one item of either layout."""
    item = fields.item(raw, where)
    from_item = _from_parquet if item.keys() >= set(PARQUET) else _from_supervised
    return [from_item(item, name, where)]


def convert_api_bank(raw: Any, name: str, where: str) -> list[StepRecord]:
    """The record of one item; `answer` may be one call or a list of calls."""
    item = fields.item(raw, where)
    system, user = (fields.text(item.get(f), f"{where}: {f}") for f in ("system", "user"))
    expected = fields.parsed(item.get("answer"), f"{where}: answer")
    calls = expected if isinstance(expected, list) else [expected]
    if not calls:
        raise RecordError(f"{where}: answer: empty, at least one call is needed")
    messages = ({"role": "system", "content": system}, {"role": "user", "content": user})
    target = Target(
        tuple(Call(**fields.call(c, f"{where}: answer[{i}]")) for i, c in enumerate(calls))
    )
    prompt = structure(messages)
    return [StepRecord(id=name, source="api_bank", target=target, **prompt)]


def is_reward_only(record: StepRecord) -> bool:
    """Whether a record is a row of the Parquet files, as it was read: there is no thought to imitate in it."""
    return record.extra.get("layout") == "parquet"


def structure(messages: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """The fields of a `StepRecord` that say this prompt: tools and history, and `messages` where those two do not give it
    again byte for byte (all of it where it cannot be read at all).
    """
    kept = tuple({"role": m["role"], "content": m["content"]} for m in messages)
    parsed = None
    if [m["role"] for m in kept] == ["system", "user"]:
        parsed = read_prompt(kept[0]["content"], kept[1]["content"])
    if parsed is None:
        return {"tools": (), "history": (), "messages": kept}
    tools, history = parsed
    same = toolrl.render_prompt(tools, history) == list(kept)
    return {"tools": tools, "history": history, "messages": None if same else kept}


def read_prompt(system: str, user: str) -> Parsed | None:
    """(tools, history) of a rendered prompt, None where it cannot be read."""
    start, end = len(toolrl.INTRODUCTION), system.find(toolrl.RULES)
    header = _HEADER(user)
    if not system.startswith(toolrl.INTRODUCTION) or end < 0 or header is None:
        return None
    rest = system[end + len(toolrl.RULES) :]
    if rest and not rest.startswith("\n\n"):
        return None
    history = [{"role": "system", "content": rest[2:]}] if rest else []
    try:
        return _tools(system[start:end]), (*history, *_dialogue(user, header.end()))
    except (ValueError, SyntaxError, RecursionError, MemoryError, RecordError):
        return None


def _from_supervised(item: Mapping[str, Any], name: str, where: str) -> StepRecord:
    instruction, user, output = (fields.text(item.get(f), f"{where}: {f}") for f in SUPERVISED)
    messages = ({"role": "system", "content": instruction}, {"role": "user", "content": user})
    target = target_from_text(output, f"{where}: output")
    return StepRecord(id=name, source="rlla", target=target, **structure(messages))


def _from_parquet(item: Mapping[str, Any], name: str, where: str) -> StepRecord:
    place = f"{where}: prompt"
    prompt = fields.sequence(fields.parsed(item["prompt"], place), place)
    reward = fields.parsed(item["reward_model"], f"{where}: reward_model")
    if not prompt:
        raise RecordError(f"{where}: prompt: empty, at least one message is needed")
    for i, message in enumerate(prompt):
        said = message if isinstance(message, Mapping) else {}
        fields.one_of(said.get("role"), ROLES, f"{where}: prompt[{i}].role")
        fields.text(said.get("content"), f"{where}: prompt[{i}].content")
    place = f"{where}: reward_model.ground_truth"
    gold = reward.get("ground_truth") if isinstance(reward, Mapping) else None
    target = target_from_text(fields.text(gold, place), place)
    return StepRecord(
        id=name,
        source=str(item.get("data_source") or "rlla"),
        target=Target(target.calls, target.response),
        extra={"layout": "parquet"},
        **structure(prompt),
    )


def _tools(text: str) -> tuple[dict[str, Any], ...]:
    """Tools from a numbered list; the next item begins at a line with the next number."""
    tools: list[dict[str, Any]] = []
    at = 0
    while at < len(text):
        number = _NUMBER(text, at)
        if number is None or int(number[1]) != len(tools) + 1:
            raise ValueError("no numbered tool")
        following = text.find(f"\n{len(tools) + 2}. ", at)
        end = len(text) if following < 0 else following
        tools.append(_tool(text[number.end() : end]))
        at = end + 1
    return tuple(tools)


def _tool(text: str) -> dict[str, Any]:
    """One tool, "Name: N", "Description: D", "Parameters: P" by the line, or "N: D", "Parameters: P"."""
    head, found, parameters = text.rpartition("\nParameters: ")
    if head.startswith("Name: "):
        name, described, description = head.removeprefix("Name: ").partition("\nDescription: ")
    else:
        name, described, description = head.partition(": ")
    if not (name and described and found):
        raise ValueError("a tool lacks name, description or parameters")
    tool = {"name": name, "description": description, "parameters": _object(parameters)}
    return fields.tool(tool, "tool")


def _object(text: str) -> dict[str, Any]:
    """A JSON object, or the Python literal of one."""
    if len(text) > MAX_LITERAL:
        raise ValueError("too long")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = ast.literal_eval(text)
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value


def _dialogue(text: str, at: int) -> list[dict[str, Any]]:
    """Turns from blocks. Blocks of one assistant turn stand on lines of their own; an empty line ends the turn."""
    history: list[dict[str, Any]] = []
    text = text.rstrip()
    while at < len(text):
        opened = _OPEN(text, at)
        if opened is None:
            raise ValueError("text outside the blocks")
        tag, close = opened[2], f"</{opened[2]}>"
        end = text.find(close, opened.end())
        if end < 0:
            raise ValueError("an unclosed block")
        body, at = text[opened.end() : end], end + len(close)
        if tag in ("user", "system"):
            history.append({"role": tag, "content": _unspaced(body)})
        elif tag == "obs":
            history.append({"role": "tool", "content": _unspaced(body)})
        else:
            field = {"think": "think", "tool_call": "calls", "response": "content"}[tag]
            turn: dict[str, Any] = history[-1] if history else {"role": ""}
            again = turn["role"] != "assistant" or "\n\n" in opened[1] or tag == "think"
            if again or turn.get(field) is not None:
                turn = {"role": "assistant", "content": None}
                history.append(turn)
            turn[field] = _calls(body) if tag == "tool_call" else _unspaced(body)
    return history


def _calls(body: str) -> list[dict[str, Any]]:
    calls = []
    for line in body.strip("\n").split("\n"):
        call = _object(line)
        if call.keys() != {"name", "parameters"} or not isinstance(call["parameters"], dict):
            raise ValueError("not a call")
        calls.append({"name": call["name"], "arguments": call["parameters"]})
    return calls


def _unspaced(body: str) -> str:
    """The text without the one space that the template sets on either side."""
    return body.removeprefix(" ").removesuffix(" ")
