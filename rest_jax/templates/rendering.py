"""What the templates share in writing: calls as JSON, tool descriptions in the two forms that data
comes in.

A tool is {"name", "description", "parameters"}. Its parameters are a JSON schema object ({"type":
"object", "properties", ...}) or flat, as in the rlla data: {parameter: {"description", "type",
"default"}}.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rest_jax.tool_calls import Answer, Call, Target

SCHEMA_TYPES = {
    "str": "string",
    "int": "integer",
    "float": "number",
    "bool": "boolean",
    "list": "array",
    "tuple": "array",
    "set": "array",
    "dict": "object",
}


def call_lines(calls: Iterable[Any], key: str) -> list[str]:
    """The calls of a target (`Call`) or of a history message ({"name", "arguments"}) as JSON, a line each; `key` is the
    template's word for the arguments.
    """
    pairs = (
        (c.name, c.arguments) if isinstance(c, Call) else (c["name"], c["arguments"]) for c in calls
    )
    return [json.dumps({"name": name, key: args}, ensure_ascii=False) for name, args in pairs]


def is_schema(parameters: Mapping[str, Any]) -> bool:
    """Whether parameters are a JSON schema object, not the flat form."""
    return parameters.get("type") == "object"


def flat_parameters(tool: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters in the flat form; what is not required has ", optional" behind its type."""
    parameters = tool.get("parameters") or {}
    if not is_schema(parameters):
        return dict(parameters)
    required = parameters.get("required")
    flat = {}
    for name, schema in parameters.get("properties", {}).items():
        rest = {k: v for k, v in schema.items() if k not in ("description", "type", "default")}
        kind = schema.get("type", "string")
        optional = required is not None and name not in required
        flat[name] = {
            "description": schema.get("description", ""),
            "type": f"{kind}, optional" if optional else kind,
            "default": schema.get("default", ""),
            **rest,
        }
    return flat


def schema_parameters(tool: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters as a JSON schema object; a flat parameter is required when it has no default."""
    parameters = tool.get("parameters") or {}
    if is_schema(parameters):
        return dict(parameters)
    properties, required = {}, []
    for name, flat in parameters.items():
        kind = str(flat.get("type", "string"))
        schema = {k: v for k, v in flat.items() if k not in ("type", "default")}
        word = kind.split(",")[0].split("[")[0].strip().lower()
        properties[name] = {"type": SCHEMA_TYPES.get(word, word or "string"), **schema}
        if flat.get("default", "") != "":
            properties[name]["default"] = flat["default"]
        elif "optional" not in kind.lower():
            required.append(name)
    return {"type": "object", "properties": properties, "required": required}


def signature(tool: Mapping[str, Any]) -> dict[str, Any]:
    """The tool as the {"type": "function", ...} record that Qwen and Llama read."""
    function = {
        "name": tool["name"],
        "description": tool.get("description", ""),
        "parameters": schema_parameters(tool),
    }
    return {"type": "function", "function": function}


def prose_turn(think: str | None, response: str | None, calls: Sequence[str]) -> str:
    """A turn of the templates that answer in plain text: the thought, the text, the calls."""
    thought = "" if think is None else f"<think>\n{think}\n</think>\n\n"
    return thought + "\n".join(([response] if response else []) + list(calls))


def verbatim(target: Target, parse: Callable[[bytes], Answer]) -> str | None:
    """`target.text` if it is written in the template of `parse`, else None.

    Source texts are mostly in the toolrl form; another template must not train on that.
    """
    if target.text is None:
        return None
    answer = parse(target.text.encode("utf-8", "replace"))
    same = (
        answer.calls == target.calls and (answer.response or "") == (target.response or "").strip()
    )
    return target.text if same and answer.executable and not answer.broken_calls else None
