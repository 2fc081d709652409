"""Reads a prompt in the toolrl template back into tools and history: the inverse of `templates.toolrl.render_prompt`.

In: the system and the user message, as in the rlla records and in API-Bank's processed form. Out: (tools, history), or None
where the text is not of that form. Lenient about spaces, Python literals for JSON and the order of blocks; `structure` renders
what was read, compares, and keeps the text where the two differ. Time is linear in the text.
"""

import ast
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rest_jax.data.records import RecordError, check_tool
from rest_jax.templates import toolrl

MAX_LITERAL = 64 * 1024  # characters of one tool's parameters or of one line of calls

_HEADER = re.compile(r"\*{2,3}Dialogue Records History\*\*\n").match
_OPEN = re.compile(r"(\s*+)<(user|think|tool_call|response|obs)>").match
_NUMBER = re.compile(r"(\d+)\. ").match

Parsed = tuple[tuple[dict[str, Any], ...], tuple[dict[str, Any], ...]]


def read(system: str, user: str) -> Parsed | None:
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


def structure(messages: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """The fields of a `StepRecord` that say this prompt: tools and history, and `messages` where those two do not give it
    again byte for byte (all of it where it cannot be read at all).
    """
    kept = tuple({"role": m["role"], "content": m["content"]} for m in messages)
    roles = [m["role"] for m in kept]
    read_back = (
        read(kept[0]["content"], kept[1]["content"]) if roles == ["system", "user"] else None
    )
    if read_back is None:
        return {"tools": (), "history": (), "messages": kept}
    tools, history = read_back
    same = toolrl.render_prompt(tools, history) == list(kept)
    return {"tools": tools, "history": history, "messages": None if same else kept}


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
    return check_tool(tool, "tool")


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
        if tag == "user":
            history.append({"role": "user", "content": _unspaced(body)})
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
