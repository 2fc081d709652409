"""The Llama 3.1 template: JSON tool calling. A call is a bare JSON object with "parameters"; all
else is text.

The tools open the first user message, written as Llama's own chat template does; they are a user message of
their own where the dialogue does not begin with the user.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rest_jax.templates import parser
from rest_jax.templates.rendering import (
    call_lines,
    leading_system,
    prose_turn,
    signature,
    verbatim,
)
from rest_jax.tool_calls import Answer, Target

REQUEST = (
    'Respond in the format {"name": function name, "parameters": dictionary of argument name and '
    "its value}.Do not use variables."
)
BEFORE_TOOLS = (
    "Given the following functions, please respond with a JSON for a function call with its proper "
    f"arguments that best answers the given prompt.\n\n{REQUEST}\n\n"
)


def render_prompt(
    tools: Sequence[Mapping[str, Any]], history: Sequence[Mapping[str, Any]], brief: bool = False
) -> list[dict[str, str]]:
    """Chat messages; tool results keep the role "tool". `brief` changes nothing: the format is the
    model's own.
    """
    del brief
    request = ""
    if tools:
        request = BEFORE_TOOLS + "".join(
            json.dumps(signature(tool), indent=4, ensure_ascii=False) + "\n\n" for tool in tools
        )
        start = len(leading_system(history)[0])
        if start == len(history) or history[start]["role"] != "user":
            history = [*history[:start], {"role": "user", "content": ""}, *history[start:]]
    messages: list[dict[str, str]] = []
    for message in history:
        role, content = message["role"], message.get("content") or ""
        if role == "assistant":
            content = _turn(message.get("think"), message.get("calls") or (), content or None)
        elif role == "user" and request:
            content, request = request + content, ""
        messages.append({"role": role, "content": content})
    return messages


def render_answer(target: Target) -> str:
    """The gold answer: `target.text` when it is written in this template, else from its parts."""
    text = verbatim(target, parse)
    return _turn(target.think, target.calls, target.response) if text is None else text


def parse(data: bytes, thought_open: bool = False) -> Answer:
    """Parses one generation (see `parser`)."""
    return parser.parse_bare(data, thought_open)


def _turn(think: str | None, calls: Sequence[Any], response: str | None) -> str:
    return prose_turn(think, response, call_lines(calls, "parameters"))
