"""What the templates share in writing: calls as JSON, tool descriptions in the two forms that data
comes in.

A tool is {"name", "description", "parameters"}. Its parameters are a JSON schema ({"type": "object",
"properties", ...}, or a union of such) or flat, as in the rlla data: {parameter: {"description",
"type", "default"}}. Types of the flat form are Python's ("List[int], optional"). What a schema says
is shown in both forms; letters are never escaped.
"""

import json
import re
import urllib.parse
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rest_jax.tool_calls import Answer, Call, Target

SCHEMA_TYPES = {
    **dict.fromkeys(("str", "text", "char", "datetime", "date", "bytes"), "string"),
    **dict.fromkeys(("int", "long"), "integer"),
    **dict.fromkeys(("float", "double", "complex", "decimal"), "number"),
    "bool": "boolean",
    **dict.fromkeys(("list", "tuple", "set", "frozenset", "sequence", "iterable"), "array"),
    **dict.fromkeys(("dict", "mapping", "map"), "object"),
    "none": "null",
    "nonetype": "null",
}
JSON_TYPES = ("string", "integer", "number", "boolean", "array", "object", "null")
UNIONS = ("anyOf", "oneOf", "allOf")
# A schema object that says no more than this has a flat form, which leaves out all but properties and required.
_FLAT = {"type", "properties", "required", "additionalProperties", "description", "title"}
_FLAT |= {"$schema", "$id", "$comment", "strict", "examples"}
DEFINITIONS = ("$defs", "definitions")
_REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")
_DATA = ("enum", "const", "default", "examples")  # what they hold are values, not schemas
_MAX_NODES = 4096  # of one tool with its references put in
_MAX_TYPE = 200  # characters of a type


def call_lines(calls: Iterable[Any], key: str) -> list[str]:
    """The calls of a target (`Call`) or of a history message ({"name", "arguments"}) as JSON, a line each; `key` is the
    template's word for the arguments.
    """
    pairs = (
        (c.name, c.arguments) if isinstance(c, Call) else (c["name"], c["arguments"]) for c in calls
    )
    return [json.dumps({"name": name, key: args}, ensure_ascii=False) for name, args in pairs]


def is_schema(parameters: Mapping[str, Any]) -> bool:
    """Whether parameters are a JSON schema, not the flat form, whose values are all objects."""
    return (
        parameters.get("type") == "object"
        or any(isinstance(parameters.get(key), list) for key in UNIONS)
        or isinstance(parameters.get("$ref"), str)
    )


def flat_parameters(tool: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters in the flat form; what is not required has ", optional" behind its type.

    References are replaced by what they point to. A schema that says more than its properties (a
    union, a pattern for names) has no flat form: it is given as it is.
    """
    parameters = tool.get("parameters") or {}
    if not is_schema(parameters):
        return dict(parameters)
    schema = _resolved(parameters)
    if not schema.keys() <= _FLAT or isinstance(schema.get("additionalProperties"), Mapping):
        return schema
    required, flat = schema.get("required"), {}
    for name, inner in (schema.get("properties") or {}).items():
        optional = required is not None and name not in required
        flat[name] = _flat_parameter(inner, optional)
    return flat


def schema_parameters(tool: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters as a JSON schema object; a flat parameter is required when it has no default."""
    parameters = tool.get("parameters") or {}
    if not parameters or is_schema(parameters):
        return dict(parameters)
    properties, required = {}, []
    for name, flat in parameters.items():
        kind, default = flat.get("type"), flat.get("default", "")
        said = {k: v for k, v in flat.items() if k not in ("type", "default")}
        needed = default == "" and "optional" not in str(kind).lower()
        if isinstance(said.get("required"), bool):
            needed = said.pop("required")
        properties[name] = {**type_schema(kind), **said}
        if default != "":
            properties[name]["default"] = default
        if needed:
            required.append(name)
    return {"type": "object", "properties": properties, "required": required}


def signature(tool: Mapping[str, Any]) -> dict[str, Any]:
    """The tool as the {"type": "function", ...} record that Qwen and Llama read: what is given, in its order."""
    function = dict(tool)
    if "parameters" in function:
        function["parameters"] = schema_parameters(tool)
    return {"type": "function", "function": function}


# --- types ------------------------------------------------------------------------------------------------------------


def type_schema(kind: Any) -> dict[str, Any]:
    """The JSON schema of a type: a name of JSON schema or of Python ("int", "List[Dict[str, float]]", "str | None",
    "Union[int, str], optional", "Literal['a', 'b']"), or a list of names. What is not known stays as it is written.
    """
    if not isinstance(kind, str):
        if not isinstance(kind, list):
            return {} if kind is None else {"type": kind}
        if not all(isinstance(name, str) for name in kind):
            return {"type": kind}
        return _union([type_schema(name) for name in kind]) if kind else {}
    if len(kind) > _MAX_TYPE:
        return {"type": kind}
    text = _OPTIONAL.sub("", kind).strip()
    choices = [part.strip() for part in _split(text, "|")]
    if len(choices) == 1 and " or " in text and "[" not in text:
        choices = text.split(" or ")
    if len(choices) > 1:
        return _union([type_schema(part) for part in choices])
    name, opened, rest = text.partition("[")
    word = name.strip().rpartition(".")[2].lower()
    inner = _split(rest[:-1], ",") if opened and rest.endswith("]") else []
    if word == "any" and not inner:
        return {}
    if word == "optional" and inner:
        return _union([type_schema(inner[0]), {"type": "null"}])
    if word == "union" and inner:
        return _union([type_schema(part) for part in inner])
    if word == "literal" and inner:
        return {"enum": [_literal(part) for part in inner]}
    base = word if word in JSON_TYPES else SCHEMA_TYPES.get(word)
    if base is None:
        return {"type": text} if text else {}
    if base == "array" and inner:
        kinds = [type_schema(part) for part in inner if part.strip() != "..."]
        items = kinds[0] if all(k == kinds[0] for k in kinds) else _union(kinds)
        return {"type": base, "items": items} if items else {"type": base}
    if base == "object" and len(inner) == 2 and (values := type_schema(inner[1])):
        return {"type": base, "additionalProperties": values}
    return {"type": base}


_OPTIONAL = re.compile(
    r",\s*(?:optional|required|default)\b.*|\s*\((?:optional|required)\)", re.I | re.S
)


def _split(text: str, mark: str) -> list[str]:
    """The parts of a text between marks that stand in no bracket and no quotation."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        else:
            depth += (letter in "[(") - (letter in "])")
        if letter == mark and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _literal(text: str) -> Any:
    text = text.strip()
    if text[:1] in ("'", '"') and text[-1:] == text[:1] and len(text) > 1:
        return text[1:-1]
    try:
        return json.loads(text.lower() if text in ("True", "False") else text)
    except ValueError:
        return None if text == "None" else text


def _union(schemas: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One of the schemas; a list of types where they say no more than their types."""
    if not all(schemas):
        return {}
    names = [s["type"] for s in schemas if s.keys() == {"type"} and isinstance(s["type"], str)]
    if len(names) < len(schemas):
        return {"anyOf": list(schemas)}
    names = list(dict.fromkeys(names))
    return {"type": names if len(names) > 1 else names[0]}


# --- what a schema says, in the flat form -----------------------------------------------------------------------------


def _flat_parameter(schema: Any, optional: bool) -> dict[str, Any]:
    schema = schema if isinstance(schema, Mapping) else {}
    kinds, complete = _kinds(schema)
    if optional and len(kinds) > 1 and "default" in schema and schema["default"] is None:
        kinds = [kind for kind in kinds if kind != "null"]  # that it may be left out says the same
    kind = " or ".join(kinds)
    hidden = ("description", "type", "default", *(UNIONS if complete else ()))
    return {
        "description": schema.get("description", ""),
        "type": f"{kind}, optional" if optional else kind,
        "default": schema.get("default", ""),
        **{key: value for key, value in schema.items() if key not in hidden},
    }


def _kinds(schema: Mapping[str, Any]) -> tuple[list[str], bool]:
    """(the types that a value may have, whether they say all that the schema's unions say)."""
    kind = schema.get("type")
    found = [kind] if isinstance(kind, str) else [k for k in kind or () if isinstance(k, str)]
    complete = True
    for key in UNIONS:
        for branch in schema.get(key) or ():
            branch = branch if isinstance(branch, Mapping) else {}
            kinds, whole = _kinds(branch)
            complete = complete and whole and key != "allOf" and branch.keys() <= {"type", *UNIONS}
            found += [k for k in kinds if k not in found]
    if not found:
        values = schema.get("enum", [schema["const"]] if "const" in schema else [])
        found = list(dict.fromkeys(_kind_of(v) for v in values)) if isinstance(values, list) else []
    return found or ["any"], complete


def _kind_of(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    names = {str: "string", int: "integer", float: "number", list: "array", dict: "object"}
    return names.get(type(value), "null")


def _resolved(root: Mapping[str, Any]) -> dict[str, Any]:
    """The schema with its references replaced by what they point to, without definitions. As it is where a reference is
    within itself, the result would be very long, or a reference is not followed (by `$id`, `$dynamicRef`) that may need the
    definitions; without any, one that points nowhere stays.
    """
    left, dropped, unfollowed = _MAX_NODES, False, False

    def resolve(value: Any, path: tuple[str, ...], names: bool = False, data: bool = False) -> Any:
        nonlocal left, dropped, unfollowed  # `names`: the keys are names of parameters
        left -= 1
        if isinstance(value, list):
            return [resolve(inner, path, data=data) for inner in value]
        if not isinstance(value, Mapping):
            return value
        if names or data:
            return {name: resolve(inner, path, data=data) for name, inner in value.items()}
        pointer = value.get("$ref")
        target = pointed(pointer, root)
        if isinstance(pointer, str) and isinstance(target, Mapping):
            if pointer in path or left < 0:
                raise RecursionError
            beside = {key: inner for key, inner in value.items() if key != "$ref"}
            return resolve({**target, **beside}, (*path, pointer))
        dropped = dropped or not value.keys().isdisjoint(DEFINITIONS)
        unfollowed = unfollowed or any(isinstance(value.get(k), str) for k in _REFERENCES)
        hidden = (*DEFINITIONS, "$anchor")
        return {
            k: resolve(inner, path, k == "properties", k in _DATA)
            for k, inner in value.items()
            if k not in hidden
        }

    try:
        resolved = resolve(root, ("#",))
    except RecursionError:
        return dict(root)
    return dict(root) if dropped and unfollowed else resolved


def pointed(pointer: Any, root: Any) -> Any:
    """What a `$ref` of the form `#/a/b` or `#anchor` points to within the root, None if nothing."""
    if not isinstance(pointer, str) or not pointer.startswith("#"):
        return None
    if pointer[1:] and not pointer.startswith("#/"):
        return _anchored(pointer[1:], root)
    for step in urllib.parse.unquote(pointer).split("/")[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        if isinstance(root, list):
            root = root[int(step)] if step.isdecimal() and int(step) < len(root) else None
        else:
            root = root.get(step) if isinstance(root, Mapping) else None
    return root


def _anchored(name: str, root: Any) -> Any:
    """The schema within the root whose `$anchor` has this name, None if none has."""
    waiting = [root]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Mapping) and value.get("$anchor") == name:
            return value
        if isinstance(value, Mapping | list):
            waiting += value.values() if isinstance(value, Mapping) else value
    return None


def leading_system(
    history: Sequence[Mapping[str, Any]],
) -> tuple[list[str], Sequence[Mapping[str, Any]]]:
    """(the system texts that open the dialogue, the turns from the first other one on)."""
    count = next((i for i, turn in enumerate(history) if turn["role"] != "system"), len(history))
    return [turn["content"] for turn in history[:count]], history[count:]


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
