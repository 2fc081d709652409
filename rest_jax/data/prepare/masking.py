"""Names and defaults of tools' parameters under random words: in their JSON schemas, and in the arguments of calls.

In: a tool and a `Mask`, which remembers the words given. Out: the tool, or the arguments, under the new names. Masked are the
properties of a schema and of what it holds under items, additionalProperties, anyOf, oneOf, allOf, $defs and definitions; the
arguments follow the same schemas, and where a `$ref` of the same tool points. Everything else of a schema stays as it is.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

_BRANCHES = ("anyOf", "oneOf", "allOf")
_DEFINITIONS = ("$defs", "definitions")

Schema = tuple[Mapping[str, Any], Mapping[str, Any]]  # one, and the whole that its $ref points into


@dataclasses.dataclass(frozen=True)
class Mask:
    """What masking the tools of one record needs. The dicts grow with the tools that are masked."""

    word: Callable[[], str]  # a new random word
    names: dict[str, str]  # of parameters, as they are given
    defaults: dict[int, str]  # by the identity of the schema that has it, which has to live as long
    said: str  # the dialogue


def whole_schema(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """The parameters of a tool as one schema, also where they are in the flat form."""
    parameters = tool.get("parameters") or {}
    if isinstance(parameters.get("type"), str):  # in the flat form each value is an object
        return parameters
    return {"properties": parameters}


def mask_tool(tool: dict[str, Any], whole: Mapping[str, Any], mask: Mask) -> dict[str, Any]:
    """The tool with masked parameters, in the form they came in; `whole` is its `whole_schema`."""
    if tool.get("parameters") is None:
        return tool
    _name_properties(whole, mask)  # all of them first: `required` may stand before what it names
    schema = _mask_schema(whole, mask)
    as_given = schema if whole is tool["parameters"] else schema["properties"]
    masked = {**tool, "parameters": as_given}
    if isinstance(required := tool.get("required"), list):
        masked["required"] = _mask_required(required, mask)
    return masked


def _name_properties(schema: Mapping[str, Any], mask: Mask) -> None:
    """Gives a word to every name of a parameter in the schema that has none yet."""
    for name in _object(schema.get("properties")):
        if name not in mask.names:
            mask.names[name] = mask.word()
    for inner in _inner(schema):
        _name_properties(inner, mask)


def _inner(schema: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The schemas that stand in a schema, of those places where names are masked."""
    for key, value in schema.items():
        if key in ("properties", *_DEFINITIONS):
            yield from filter(_is_object, _object(value).values())
        elif key in ("items", "additionalProperties") and _is_object(value):
            yield value
        elif key in _BRANCHES and isinstance(value, list):
            yield from filter(_is_object, value)


def _mask_schema(schema: Mapping[str, Any], mask: Mask) -> dict[str, Any]:
    def inner(value: Any) -> Any:
        return _mask_schema(value, mask) if _is_object(value) else value

    masked = dict(schema)
    for key, value in schema.items():
        if key == "properties" and _is_object(value):
            masked[key] = {mask.names[name]: inner(v) for name, v in value.items()}
        elif key in _DEFINITIONS and _is_object(value):
            masked[key] = {name: inner(v) for name, v in value.items()}
        elif key in ("items", "additionalProperties"):
            masked[key] = inner(value)
        elif key in _BRANCHES and isinstance(value, list):
            masked[key] = list(map(inner, value))
        elif key == "required" and isinstance(value, list):
            masked[key] = _mask_required(value, mask)
        elif key == "$ref" and isinstance(value, str):
            masked[key] = _mask_pointer(value, mask)
    if (new := _mask_default(schema, mask)) is not None:
        masked["default"] = mask.defaults[id(schema)] = new
    return masked


def _mask_default(schema: Mapping[str, Any], mask: Mask) -> str | None:
    old, choices = schema.get("default"), schema.get("enum")
    if not isinstance(old, str) or not old or (isinstance(choices, list) and old in choices):
        return None
    if (before := mask.defaults.get(id(schema))) is not None:  # one object in two places
        return before
    known = f"{schema.get('description', '')}\n{mask.said}"
    return None if old in known and _whole_word(old).search(known) else mask.word()


def _mask_required(required: list[Any], mask: Mask) -> list[Any]:
    return [mask.names.get(name, name) if isinstance(name, str) else name for name in required]


def _mask_pointer(pointer: str, mask: Mask) -> str:
    """A JSON pointer whose steps behind `properties` are names of parameters."""
    steps = pointer.split("/")
    for i in range(1, len(steps)):
        if steps[i - 1] == "properties":
            steps[i] = mask.names.get(steps[i], steps[i])
    return "/".join(steps)


def mask_value(value: Any, schemas: list[Schema], mask: Mask) -> Any:
    """A value under new names and defaults, as the schemas say that apply to it; what none of them declares stays."""
    schemas = _applying(schemas)
    if isinstance(value, str):
        new = (mask.defaults.get(id(s)) for s, _ in schemas if s.get("default") == value)
        return next(filter(None, new), value)
    if isinstance(value, Mapping):
        return dict(_mask_member(name, inner, schemas, mask) for name, inner in value.items())
    if isinstance(value, list):
        items = _at("items", schemas)
        return [mask_value(item, items, mask) for item in value]
    return value


def _mask_member(name: str, value: Any, schemas: list[Schema], mask: Mask) -> tuple[str, Any]:
    """(name, value) of one member of an object, masked."""
    declaring = [s for s in schemas if name in _object(s[0].get("properties"))]
    if not declaring:
        return name, mask_value(value, _at("additionalProperties", schemas), mask)
    found = [(s["properties"][name], whole) for s, whole in declaring]
    return mask.names[name], mask_value(value, list(filter(_is_schema, found)), mask)


def _at(key: str, schemas: list[Schema]) -> list[Schema]:
    return [(s[key], whole) for s, whole in schemas if _is_object(s.get(key))]


def _applying(schemas: list[Schema]) -> list[Schema]:
    """The schemas and all that they are composed of or point to, each once."""
    found: dict[int, Schema] = {}
    waiting = list(schemas)
    while waiting:
        schema, whole = waiting.pop()
        if id(schema) not in found:
            found[id(schema)] = schema, whole
            branches = [b for k in _BRANCHES if isinstance(schema.get(k), list) for b in schema[k]]
            pointed = _pointed(schema.get("$ref"), whole)
            waiting += filter(_is_schema, ((b, whole) for b in [*branches, pointed]))
    return list(found.values())


def _pointed(pointer: Any, whole: Any) -> Any:
    """What a `$ref` of the form `#/a/b` points to, None if nothing."""
    if not isinstance(pointer, str) or not pointer.startswith("#"):
        return None
    for step in pointer.split("/")[1:]:
        whole = _object(whole).get(step.replace("~1", "/").replace("~0", "~"))
    return whole


def _object(value: Any) -> Mapping[str, Any]:
    return value if _is_object(value) else {}


def _is_object(value: Any) -> bool:
    return isinstance(value, Mapping)


def _is_schema(found: tuple[Any, Any]) -> bool:
    return _is_object(found[0])


def _whole_word(text: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(text)}(?!\w)")
