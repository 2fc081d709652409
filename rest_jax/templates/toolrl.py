"""The ToolRL template: <think>, one <tool_call> block with a JSON call a line ("parameters"),
<response>.

The prompt is the one of the rlla data, letter for letter for tools in the flat form: a system
message with the tools, a user message with the dialogue so far. The brief form is for tiny models:
the tools, one line on the format, and the dialogue.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rest_jax.templates import parser
from rest_jax.templates.rendering import (
    call_lines,
    flat_parameters,
    is_schema,
    leading_system,
)
from rest_jax.tool_calls import Answer, Target

INTRODUCTION = (
    "You are a helpful multi-turn dialogue assistant capable of leveraging tool calls to solve "
    "user tasks and provide structured chat responses.\n\n**Available Tools**\n"
    "In your response, you can use the following tools:\n"
)
_STEPS = """

**Steps for Each Turn**
1. **Think:** Recall relevant context and analyze the current user goal.
2. **Decide on Tool Usage:** If a tool is needed, specify the tool and its parameters.
3. **Respond Appropriately:** If a response is needed, generate one while maintaining consistency across user queries.

**Output Format**
```plaintext
<think> Your thoughts and reasoning </think>
<tool_call>
{"name": "Tool name", "parameters": {"Parameter name": "Parameter content", "... ...": "... ..."}}
{"name": "... ...", "parameters": {"... ...": "... ...", "... ...": "... ..."}}
...
</tool_call>
<response> AI's final response </response>
```

**Important Notes**
"""
_NOTES = (
    "1. You must always include the `<think>` field to outline your reasoning. Provide at least "
    "one of `<tool_call>` or `<response>`. Decide whether to use `<tool_call>` (possibly multiple "
    "times), `<response>`, or both.\n"
    "2. You can invoke multiple tool calls simultaneously in the `<tool_call>` fields. Each tool "
    'call should be a JSON object with a "name" field and an "parameters" field containing a '
    'dictionary of parameters. If no parameters are needed, leave the "parameters" field an empty '
    "dictionary.\n"
    "3. Refer to the previous dialogue records in the history, including the user's queries, "
    "previous `<tool_call>`, `<response>`, and any tool feedback noted as `<obs>` (if exists)."
)
RULES = _STEPS + _NOTES
HEADER = "**Dialogue Records History**\n"
BRIEF_FORMAT = (
    '<think> why </think> then <tool_call> {"name": tool, "parameters": {...}} </tool_call>, '
    "a line each, or <response> text </response>"
)


def render_prompt(
    tools: Sequence[Mapping[str, Any]], history: Sequence[Mapping[str, Any]], brief: bool = False
) -> list[dict[str, str]]:
    """Chat messages: a system message (tools, format, any system text at the start of the history), a
    user message (the dialogue, later system texts where they stand).
    """
    if brief:
        system = "\n".join([*map(_brief_tool, tools), BRIEF_FORMAT])
    else:
        system = INTRODUCTION + "\n".join(map(_tool, range(1, len(tools) + 1), tools)) + RULES
    extra, turns = leading_system(history)
    dialogue = _dialogue(turns)
    header = "" if brief else HEADER
    return [
        {"role": "system", "content": "\n\n".join([system, *extra])},
        {"role": "user", "content": header + dialogue},
    ]


def render_answer(target: Target) -> str:
    """The gold answer: `target.text` verbatim when given, else written from its parts; the think
    block is always there.
    """
    if target.text is not None:
        return target.text
    return _turn(target.think or "", target.calls, target.response)


def parse(data: bytes, thought_open: bool = False) -> Answer:
    """Parses one generation (see `parser`)."""
    return parser.parse_tagged(data, parser.TOOLRL, thought_open)


def _tool(number: int, tool: Mapping[str, Any]) -> str:
    parameters = json.dumps(flat_parameters(tool), ensure_ascii=False)
    return f"{number}. Name: {tool['name']}\nDescription: {tool.get('description', '')}\nParameters: {parameters}"


def _brief_tool(tool: Mapping[str, Any]) -> str:
    flat = flat_parameters(tool)
    if is_schema(flat):
        parameters = json.dumps(flat, ensure_ascii=False)
    else:
        kinds = ((name, spec.get("type", "string")) for name, spec in flat.items())
        parameters = ", ".join(f"{name}: {kind}" for name, kind in kinds)
    name = json.dumps(tool["name"], ensure_ascii=False)
    return f"{tool.get('description', '')}: {name} ({parameters})"


def _dialogue(history: Sequence[Mapping[str, Any]]) -> str:
    """User turns and assistant turns are paragraphs; a tool's result follows the turn that
    asked for it.
    """
    pieces = []
    for message in history:
        if message["role"] in ("user", "system"):
            role = message["role"]
            pieces.append(f"\n\n<{role}> {message['content']} </{role}>")
        elif message["role"] == "tool":
            pieces.append(f"\n<obs> {message['content']} </obs>")
        else:
            turn = _turn(message.get("think"), message.get("calls") or (), message.get("content"))
            pieces.append(f"\n\n{turn}")
    return "".join(pieces).lstrip("\n")


def _turn(think: str | None, calls: Sequence[Any], response: str | None) -> str:
    blocks = []
    if think is not None:
        blocks.append(f"<think> {think} </think>" if think else "<think> </think>")
    if calls:
        blocks.append("\n".join(["<tool_call>", *call_lines(calls, "parameters"), "</tool_call>"]))
    if response is not None:
        blocks.append(f"<response> {response} </response>")
    return "\n".join(blocks)
