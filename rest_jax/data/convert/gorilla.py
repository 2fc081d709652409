"""Tools as ToolACE and BFCL describe them: JSON schema with Python's names of types ("dict", "float", ...).

In: such a tool. Out: a tool whose parameters are a JSON schema, and on the way back the same with Python's names; which of two
names that mean one type stood there is not kept here.
"""

from collections.abc import Mapping
from typing import Any

from rest_jax.data.convert import fields

_TO_SCHEMA = {
    "dict": "object",
    "float": "number",
    "int": "integer",
    "bool": "boolean",
    "str": "string",
    "list": "array",
    "tuple": "array",
}
_FROM_SCHEMA = {"object": "dict", "number": "float"}  # the names that BFCL itself uses


def tool_from(value: Any, where: str) -> dict[str, Any]:
    """The tool as a record holds it. RecordError when it has no name or its parameters are no object."""
    tool = {k: v for k, v in fields.mapping(value, where).items() if v is not None}
    if tool.get("parameters"):
        parameters = fields.mapping(tool["parameters"], f"{where}: parameters")
        if "properties" in parameters:
            parameters = {"type": "dict", **parameters}
        tool["parameters"] = _renamed(parameters, _TO_SCHEMA)
    return fields.tool(tool, where)


def tool_to(tool: Mapping[str, Any]) -> dict[str, Any]:
    """The tool as BFCL writes it."""
    raw = dict(tool)
    if raw.get("parameters"):
        raw["parameters"] = _renamed(raw["parameters"], _FROM_SCHEMA)
    return raw


def _renamed(schema: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    renamed = {}
    for key, value in schema.items():
        if key == "type" and isinstance(value, str):
            value = names.get(value, value)
        elif key == "properties" and isinstance(value, Mapping):
            value = {k: _inner(v, names) for k, v in value.items()}
        elif key in ("items", "additionalProperties"):
            value = _inner(value, names)
        renamed[key] = value
    return renamed


def _inner(value: Any, names: Mapping[str, str]) -> Any:
    return _renamed(value, names) if isinstance(value, Mapping) else value
