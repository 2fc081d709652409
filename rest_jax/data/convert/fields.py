"""Fields of raw items for the converters: kinds are checked, and JSON in strings is read strictly.

Every function takes a value and `where` (file, item and field) and gives the value back, or raises a `RecordError` that
opens with `where`.
"""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from rest_jax.data.records import RecordError, check_tool, mapping, text

MAX_DEPTH = 64  # of a raw item, and of JSON in a string


def item(raw: Any, where: str) -> Mapping[str, Any]:
    """A raw item: an object that nests no deeper than 64."""
    check_depth(raw, where)
    return mapping(raw, where)


def json_text(value: Any, where: str) -> Any:
    """What a string of JSON says. Keys that come twice, numbers that are not finite and deep nesting are refused."""
    try:
        decoded = _DECODER.decode(text(value, where))
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{where}: not JSON: {error}") from error
    check_depth(decoded, where)
    return decoded


def tool(value: Any, where: str) -> dict[str, Any]:
    """A tool as a record holds it: it can be rendered, what is null is left out, a schema of parameters has type object."""
    function = {k: v for k, v in mapping(value, where).items() if v is not None}
    text(function.get("description", ""), f"{where}: description")
    parameters = function.get("parameters")
    if isinstance(parameters, Mapping) and _is_untyped_schema(parameters):
        function["parameters"] = {**parameters, "type": "object"}
    return check_tool(function, where)


def _is_untyped_schema(parameters: Mapping[str, Any]) -> bool:
    """Whether parameters are a JSON schema that says so in another way than `"type": "object"`.

    In the flat form every value describes a parameter and is an object, also those of parameters that are called type or
    properties; the latter's words are then texts, where a schema has an object for each property.
    """
    kind, properties = parameters.get("type"), parameters.get("properties")
    if isinstance(kind, str):
        return kind.lower() in ("dict", "object")
    if isinstance(kind, Mapping) or (isinstance(kind, list) and "object" not in kind):
        return False
    return isinstance(properties, Mapping) and all(
        isinstance(schema, Mapping) for schema in properties.values()
    )


def one_of(value: Any, known: Iterable[str], where: str) -> str:
    """The value if it is one of the known words."""
    if not isinstance(value, str) or value not in known:
        raise RecordError(f"{where}: {value!r:.60} is not one of {', '.join(known)}")
    return value


def call(value: Any, where: str, key: str = "arguments") -> dict[str, Any]:
    """A call {"name", `key`} as a turn holds it; it has no other field."""
    raw = mapping(value, where)
    if unknown := [k for k in raw if k not in ("name", key)]:
        raise RecordError(f"{where}: unknown field {unknown[0]!r} (known: name, {key})")
    arguments = mapping(raw.get(key), f"{where}: {key}")
    return {"name": text(raw.get("name"), f"{where}: name"), "arguments": dict(arguments)}


def check_depth(raw: Any, where: str) -> None:
    """RecordError when a JSON value nests deeper than 64."""
    level, depth = [raw], 0
    while level:
        if depth > MAX_DEPTH:
            raise RecordError(f"{where}: nests deeper than {MAX_DEPTH}")
        depth += 1
        level = [
            inner
            for value in level
            if isinstance(value, (dict, list))
            for inner in (value.values() if isinstance(value, dict) else value)
        ]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("an object has the same key twice")
    return members


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits[:20]} is too large a number")
    return number


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not a JSON number")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=_finite, parse_constant=_refuse)
