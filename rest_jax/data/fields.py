"""The one reader of what dialogues hold (tools, calls, texts, thoughts), whoever wrote them: records, every source, `--tools`.

In: a value as files, servers and people write it, and `where` (file, item and field). Out: the value as a `StepRecord` holds it.
Null, an empty text and an absent field mean the default; lists and objects may also be texts of JSON, which are read
strictly. What cannot be read is a `RecordError` that opens with `where` and names the value.
"""

import json
import math
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rest_jax.errors import UserError
from rest_jax.templates.rendering import DEFINITIONS, JSON_TYPES, UNIONS, is_schema, type_schema

MAX_DEPTH = 64  # of a raw item, and of JSON in a string
# what servers call a thought
THOUGHTS = ("reasoning_content", "reasoning", "reasoning_text", "thinking", "think", "thought")
THOUGHTS += ("thoughts", "reasoning_details", "thinking_blocks")
_PARAMETERS = ("parameters", "input_schema", "inputSchema", "arguments", "args", "inputs", "params")
_ARGUMENTS = ("arguments", "parameters", "input", "args")
_CALLS = ("function", "function_call", "tool_use")  # types of a call
_TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_THOUGHT_PARTS = ("thinking", "reasoning", "redacted_thinking")
_OF_A_THOUGHT = ("thinking", "reasoning", "text", "content", "summary")
_VALUES = ("default", "const")  # of a schema: values, of which null is one
_NAMED = ("properties", *DEFINITIONS, "patternProperties", "dependentSchemas")
_LISTS = ("items", "prefixItems")
_INNER = ("items", "additionalProperties", "not", "if", "then", "else", "contains")


class RecordError(UserError):
    """A record that cannot be read; the text names the record, the field and what is wrong with it."""


# --- plain values -----------------------------------------------------------------------------------------------------


def text(value: Any, where: str) -> str:
    """The value if it is text."""
    if not isinstance(value, str):
        raise RecordError(f"{where}: text is needed, found {kind(value)}")
    return value


def mapping(value: Any, where: str) -> Mapping[str, Any]:
    """The value if it is an object."""
    if not isinstance(value, Mapping):
        raise RecordError(f"{where}: an object is needed, found {kind(value)}")
    return value


def sequence(value: Any, where: str) -> list[Any]:
    """The value if it is a list."""
    if not isinstance(value, (list, tuple)):
        raise RecordError(f"{where}: a list is needed, found {kind(value)}")
    return list(value)


def one_of(value: Any, known: Iterable[str], where: str) -> str:
    """The value if it is one of the known words."""
    if not isinstance(value, str) or value not in known:
        raise RecordError(f"{where}: {shown(value)} is not one of {', '.join(known)}")
    return value


def kind(value: Any) -> str:
    """What a value is, and its beginning, for a message."""
    return "nothing" if value is None else f"{type(value).__name__} {shown(value)}"


def shown(value: Any) -> str:
    """A value for a message: one line, at most 60 characters, whatever its size."""
    return _REPR.repr(value)[:60]


def others(raw: Mapping[str, Any], read: Iterable[str]) -> dict[str, Any]:
    """What an item says besides the fields that are read, without nulls and NaN, for `StepRecord.extra`."""
    return finite({str(k): v for k, v in raw.items() if k not in read and v is not None})


def finite(value: Any) -> Any:
    """A JSON value without NaN and infinities at any depth: fields of objects that are one are left out, items of lists null."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items() if not _is_no_number(v)}
    if isinstance(value, list):
        return [None if _is_no_number(v) else finite(v) for v in value]
    return value


def _is_no_number(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def is_given(value: Any) -> bool:
    """Whether a value says more than the default: it is not null, nor an empty text."""
    return value is not None and not (isinstance(value, str) and not value.strip())


def first_given(raw: Mapping[str, Any], keys: Sequence[str]) -> tuple[str, Any]:
    """(key, value) of the first of the keys that is given; (the first key, None) where none is."""
    return next(((key, raw[key]) for key in keys if is_given(raw.get(key))), (keys[0], None))


def item(raw: Any, where: str) -> Mapping[str, Any]:
    """A raw item: an object, or a text of JSON that is one, that nests no deeper than 64."""
    raw = parsed(raw, where)
    check_depth(raw, where)
    return mapping(raw, where)


def parsed(value: Any, where: str) -> Any:
    """The value; a text is read as JSON, an empty one is None."""
    if isinstance(value, str):
        return json_text(value, where) if value.strip() else None
    return value


def listed(value: Any, where: str) -> list[Any]:
    """The items of a list or of a text of JSON that is one; none for the default."""
    value = parsed(value, where)
    return [] if value is None else sequence(value, where)


def stands_in(value: str, said: str) -> bool:
    """Whether a value is in a text, as words of their own."""
    return re.search(rf"(?<!\w){re.escape(value)}(?!\w)", said) is not None


def json_text(value: Any, where: str) -> Any:
    """What a string of JSON says. Keys that come twice, numbers that are not finite and deep nesting are refused."""
    try:
        decoded = _DECODER.decode(text(value, where))
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{where}: not JSON: {error}: {shown(value)}") from error
    check_depth(decoded, where)
    return decoded


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


def check_storable(raw: Any, where: str) -> None:
    """RecordError, with the field and the value, for what no JSON text in UTF-8 can hold: half a character, NaN, bytes."""
    for path, value in _leaves(raw, ""):
        place = f"{where}: {path}" if path else where
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError as error:
                half = ascii(value[error.start])
                raise RecordError(
                    f"{place}: half a character ({half}), which no UTF-8 text can hold"
                ) from error
        elif isinstance(value, float) and not math.isfinite(value):
            raise RecordError(f"{place}: {value} is not a JSON number")
        elif not (value is None or isinstance(value, (bool, int, float))):
            raise RecordError(f"{place}: not a JSON value: {kind(value)}")


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """(path, value) of everything in a JSON value that is no object or list, the keys of objects too."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            place = f"{path}: {key}" if path else str(key)
            yield path, key
            yield from _leaves(inner, place)
    elif isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            yield from _leaves(inner, f"{path}[{i}]")
    else:
        yield path, value


# --- tools ------------------------------------------------------------------------------------------------------------


def tools(value: Any, where: str) -> tuple[dict[str, Any], ...]:
    """The tools of a list, of a text of JSON that is one, or of a list of such texts."""
    return tuple(tool(t, f"{where}[{i}]") for i, t in enumerate(listed(value, where)))


def tool(value: Any, where: str) -> dict[str, Any]:
    """A tool as a record holds it: {"name", "description", "parameters"} and what else is given, in the order given.

    Taken are {"type": "function", "function": {...}}, the same in one object, and Anthropic's and MCP's words for the parameters.
    A schema of parameters has type object, unless it is a union, and JSON's names of types.
    """
    raw = mapping(parsed(value, where), where)
    check_depth(raw, where)
    kind_of = raw.get("type")
    # Anthropic's tools may be of type custom; OpenAI's of that type take free text, and so have no parameters.
    known = (
        ("function", "custom") if first_given(raw, _PARAMETERS)[1] is not None else ("function",)
    )
    if is_given(kind_of) and kind_of not in known:
        raise RecordError(f"{where}: type: {shown(kind_of)} is not 'function'")
    if is_given(raw.get("function")) and not isinstance(raw.get("name"), str):
        where = f"{where}: function"
        raw = mapping(parsed(raw["function"], where), where)
    said = {k: v for k, v in raw.items() if v is not None and k != "type"}
    key, parameters = first_given(said, _PARAMETERS)
    place = f"{where}: {key}"
    parameters = parsed(parameters, place)
    if isinstance(parameters, Mapping):  # some write the definitions beside them
        beside = {k: said.pop(k) for k in DEFINITIONS if k in said and k not in parameters}
        parameters = {**parameters, **beside}
    made: dict[str, Any] = {}
    for k, v in said.items():
        if k == key and parameters is not None:
            made["parameters"] = _parameters(parameters, place)
        elif k not in _PARAMETERS:
            made[k] = v
    if not text(made.get("name"), f"{where}: name").strip():
        raise RecordError(f"{where}: name: a name is needed, found {shown(made['name'])}")
    text(made.get("description", ""), f"{where}: description")
    return made


def _parameters(value: Any, where: str) -> dict[str, Any]:
    """Parameters in one of the two forms, a schema without nulls and with JSON's names of types."""
    given = mapping(value, where)
    plain = {k: v for k, v in given.items() if v is not None}
    if _is_untyped_schema(plain) and not is_schema(plain):
        plain = {**plain, "type": "object"}
    if is_schema(plain):
        if isinstance(plain.get("required"), bool):
            raise RecordError(
                f"{where}: required: a list is needed, found {kind(plain['required'])}"
            )
        return _schema(plain, where)
    return {
        name: {} if described is None else dict(mapping(described, f"{where}: {name}"))
        for name, described in given.items()
    }


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
    if isinstance(parameters.get("required"), list) and properties is None:
        return True
    return isinstance(properties, Mapping) and all(
        schema is None or isinstance(schema, (Mapping, bool)) for schema in properties.values()
    )


def _schema(value: Any, where: str) -> dict[str, Any]:
    """A JSON schema: without nulls, true as the empty schema, types by their names in JSON schema."""
    if value is None or value is True:
        return {}
    made: dict[str, Any] = {}
    for key, inner in mapping(value, where).items():
        place = f"{where}: {key}"
        if key in _VALUES:
            made[key] = inner
        elif inner is None or (key in (*_NAMED, "required") and not is_given(inner)):
            continue
        elif key in _NAMED:
            named = mapping(inner, place).items()
            made[key] = {name: _schema(schema, f"{place}: {name}") for name, schema in named}
        elif key in UNIONS or (key in _LISTS and isinstance(inner, list)):
            branches = enumerate(sequence(inner, place))
            made[key] = [_schema(schema, f"{place}[{i}]") for i, schema in branches]
        elif key in _INNER and isinstance(inner, Mapping):
            made[key] = _schema(inner, place)
        elif key == "required" and not isinstance(inner, bool):
            made[key] = [text(name, place) for name in listed(inner, place)]
        elif key == "type":
            made |= _type(inner, {**value, **made}, place)
        else:
            made[key] = inner
    return made


def _type(value: Any, schema: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The type as it is, where JSON schema has it; else what the Python name of one says, without what the schema says itself."""
    names = value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) for name in names):
        raise RecordError(f"{where}: a name or a list of names is needed, found {kind(value)}")
    if not names or not is_given(value):
        return {}
    if all(name in JSON_TYPES for name in names):
        return {"type": value}
    found = type_schema(value)
    return {key: inner for key, inner in found.items() if key == "type" or key not in schema}


# --- messages ---------------------------------------------------------------------------------------------------------


def call(value: Any, where: str) -> dict[str, Any]:
    """A call {"name", "arguments"} as a turn holds it, of {"name", "arguments"} or {"function": {...}}; arguments are an object
    or a text of JSON, and are called parameters or input too.
    """
    raw = mapping(parsed(value, where), where)
    check_depth(raw, where)
    if is_given(kind_of := raw.get("type")) and kind_of not in _CALLS:
        raise RecordError(f"{where}: type: {shown(kind_of)} is not 'function'")
    inner = raw.get("function")
    if isinstance(inner, str) and is_given(inner) and not inner.lstrip().startswith("{"):
        raw = {**raw, "name": inner}
        del raw["function"]
    elif is_given(inner):
        where = f"{where}: function"
        raw = mapping(parsed(inner, where), where)
    name = text(raw.get("name"), f"{where}: name")
    if not name.strip():
        raise RecordError(f"{where}: name: a name is needed, found {shown(name)}")
    if not any(key in raw for key in _ARGUMENTS):
        known = ("name", "type", "id", "call_id", "index", "status")
        if unknown := [key for key in raw if key not in known]:
            raise RecordError(f"{where}: unknown field {unknown[0]!r} (known: name, arguments)")
    key, arguments = first_given(raw, _ARGUMENTS)
    place = f"{where}: {key}"
    for _ in range(2):  # some servers write the text of a text
        arguments = parsed(arguments, place)
    if arguments is None or arguments == []:  # PHP's empty object
        return {"name": name, "arguments": {}}
    return {"name": name, "arguments": dict(mapping(arguments, place))}


def call_id(raw: Mapping[str, Any], where: str, keys: Sequence[str]) -> str | None:
    """The id under the first of the keys that is given, a text or a number; an empty one is none."""
    key, value = first_given(raw, keys)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    return None if value is None else text(value, f"{where}: {key}").strip()


def content(value: Any, where: str) -> str | None:
    """The text of a message: a text, a part or a list of parts (text, input_text, output_text, refusal), joined."""
    if value is None or isinstance(value, str):
        return value
    parts = [value] if isinstance(value, Mapping) else sequence(value, where)
    texts = []
    for i, part in enumerate(parts):
        place = f"{where}[{i}]"
        if part is None or isinstance(part, str):
            texts.append(part or "")
            continue
        if mapping(part, place).get("type") in _THOUGHT_PARTS:
            continue
        if (key := _text_key(part)) is None:
            raise RecordError(f"{place}: type: {shown(part.get('type'))} is not 'text'")
        said = part.get(key)
        said = said.get("value") if isinstance(said, Mapping) else said  # of the Assistants API
        texts.append("" if said is None else text(said, f"{place}: {key}"))
    return "".join(texts)


def result(value: Any, where: str) -> str:
    """The text of a tool's result; what is neither a text nor parts of one is written as JSON."""
    if value is None:
        return ""
    if isinstance(value, str) or _is_parts(value):
        return content(value, where) or ""
    check_storable(value, where)
    return json.dumps(value, ensure_ascii=False)


def _text_key(part: Mapping[str, Any]) -> str | None:
    """The field of a part that has its text; one without a type is a text where it has one."""
    kind_of = part.get("type")
    if is_given(kind_of):
        return _TEXTS.get(kind_of) if isinstance(kind_of, str) else None
    return "text" if "text" in part else None


def _is_parts(value: Any) -> bool:
    parts = value if isinstance(value, list) else [value]
    typed = (isinstance(p, Mapping) and "type" in p and _text_key(p) for p in parts)
    return bool(parts) and all(typed)


def thought(raw: Mapping[str, Any], where: str) -> str | None:
    """The thought of a message: a field of THOUGHTS, or the parts of its content that are one."""
    given = [key for key in THOUGHTS if is_given(raw.get(key))]
    texts = [_thought_text(raw[key], f"{where}: {key}") for key in given]
    found = {" ".join(said.split()): said for said in reversed(texts) if said.strip()}
    if len(found) > 1:
        raise RecordError(f"{where}: {' and '.join(given)} differ: which is the thought?")
    if not found and isinstance(parts := raw.get("content"), list):
        kinds = [part.get("type") if isinstance(part, Mapping) else None for part in parts]
        parts = [part for part, kind in zip(parts, kinds, strict=True) if kind in _THOUGHT_PARTS]
        found = {"": _thought_text(parts, f"{where}: content")}
    return next(iter(found.values()), None) or None


def _thought_text(value: Any, where: str) -> str:
    """A thought that is a text, or parts of one."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        key, said = first_given(value, _OF_A_THOUGHT)
        return "" if said is None else _thought_text(said, f"{where}: {key}")
    texts = (_thought_text(part, where) for part in sequence(value, where))
    return "\n".join(filter(None, texts))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"an object has the same key twice: {shown(twice)}")
    return members


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits[:20]} is too large a number")
    return number


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not a JSON number")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=_finite, parse_constant=_refuse)
# Reads items: what is no JSON number is refused where it is used, so that a NaN beside the dialogue costs nothing.
ITEM_DECODER = json.JSONDecoder(object_pairs_hook=_object)
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 60
