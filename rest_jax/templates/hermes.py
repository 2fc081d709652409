"""The Hermes template, Qwen3's own: think, free text, then one <tool_call> block a call, with
"arguments".

The prompt is what Qwen's chat template makes of tools, written out for chat templates that do not
list tools in this form themselves.
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

BEFORE_TOOLS = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
"""
REQUEST = """\
For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>"""
AFTER_TOOLS = "\n</tools>\n\n" + REQUEST


def render_prompt(
    tools: Sequence[Mapping[str, Any]], history: Sequence[Mapping[str, Any]], brief: bool = False
) -> list[dict[str, str]]:
    """Chat messages: tools in the system message, tool results as user messages in <tool_response>
    tags.

    `brief` changes nothing: the format is the model's own and has no shorter form.
    """
    del brief
    system, turns = leading_system(history)
    if tools:
        lines = "\n".join(json.dumps(signature(tool), ensure_ascii=False) for tool in tools)
        system.append(BEFORE_TOOLS + lines + AFTER_TOOLS)
    messages = [{"role": "system", "content": "\n\n".join(system)}] if system else []
    previous = None
    for message in turns:
        role = message["role"]
        if role in ("user", "system"):
            messages.append({"role": role, "content": message["content"]})
        elif role == "assistant":
            turn = _turn(message.get("think"), message.get("calls") or (), message.get("content"))
            messages.append({"role": "assistant", "content": turn})
        elif role == "tool":
            result = f"<tool_response>\n{message['content']}\n</tool_response>"
            if previous == "tool":
                messages[-1]["content"] += "\n" + result
            else:
                messages.append({"role": "user", "content": result})
        previous = role
    return messages


def render_answer(target: Target) -> str:
    """The gold answer: `target.text` when it is written in this template, else from its parts."""
    text = verbatim(target, parse)
    return _turn(target.think, target.calls, target.response) if text is None else text


def parse(data: bytes, thought_open: bool = False) -> Answer:
    """Parses one generation (see `parser`)."""
    return parser.parse_tagged(data, parser.HERMES, thought_open)


def _turn(think: str | None, calls: Sequence[Any], response: str | None) -> str:
    blocks = [f"<tool_call>\n{line}\n</tool_call>" for line in call_lines(calls, "arguments")]
    return prose_turn(think, response, blocks)
