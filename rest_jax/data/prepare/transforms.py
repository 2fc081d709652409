"""What a prepared record may lose: the right tools, or the names of its tools; and what these and splitting share.

In: a `StepRecord` that calls only what it offers. Out: the changed one, or None where the record does not allow the change:
`unremovable` and `unmaskable` say why. A changed record has no verbatim prompt, no verbatim target and no `extra` any more: they
would contradict it. What is random depends on a seed and the record's id, never on the order of the records.

Names are masked by random words in all of a record, so that tools cannot be learned by heart. Masked are tools, and the
properties of their schemas and of what these hold under items, additionalProperties, anyOf, oneOf, allOf, $defs and definitions;
the arguments of calls follow the same schemas, and where a `$ref` of the same tool points. All else of a schema stays as it is.
"""

import dataclasses
import hashlib
import json
import random
import re
import string
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rest_jax.data.convert.xlam import NO_CALL
from rest_jax.data.records import StepRecord, called, structured, to_json
from rest_jax.templates.rendering import DEFINITIONS, UNIONS, is_schema, pointed
from rest_jax.tool_calls import Call, Target

TEXT_ONLY = "the prompt is there only as text"
# What is kept of a masked tool: other fields may hold real names.
_MASKED = ("name", "description", "parameters", "required", "strict")
# Words that a sentence may hold without meaning a tool: "search", "Weather", "send money"
_PLAIN = re.compile(r"[A-Za-z]?[a-z]*( [a-z]+)*").fullmatch

_Schema = tuple[Mapping[str, Any], Mapping[str, Any]]  # one, and the root that its $ref points into
_Rename = Callable[[str], str]


def digest(*parts: object) -> int:
    """64 bits that depend on every part; the parts are told apart by their borders."""
    text = "".join(f"{len(part)}:{part}" for part in map(str, parts))
    raw = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "big")


def draw(seed: int, purpose: str, name: str) -> float:
    """A number in [0, 1), uniform over names."""
    return digest(seed, purpose, name) / 2**64


def rewritten(record: StepRecord, **changes: Any) -> StepRecord:
    """The record with other tools, history or target, without its verbatim prompt and `extra`."""
    return dataclasses.replace(record, messages=None, extra={}, **changes)


# --- taking the right tools away -------------------------------------------------------------------------------------


def unremovable(record: StepRecord) -> str | None:
    """Why the right tools of this record cannot be taken away, None if they can."""
    if not structured(record):
        return TEXT_ONLY
    right = {call.name for call in record.target.calls}
    if not right:
        return "it calls no tool"
    if right & set(called(record)):
        return "the history calls the right tool too"
    if right >= {tool["name"] for tool in record.tools}:
        return "no other tool is offered"
    return None


def remove_right_tools(record: StepRecord, response: str = NO_CALL) -> StepRecord | None:
    """Without the tools that the target calls; the target is then `response` and no call."""
    if unremovable(record) is not None:
        return None
    right = {call.name for call in record.target.calls}
    tools = tuple(tool for tool in record.tools if tool["name"] not in right)
    return rewritten(record, tools=tools, target=Target(response=response))


# --- masking names --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Mask:
    """What masking the tools of one record needs. The dicts grow with the tools that are masked."""

    word: Callable[[], str]  # a new random word
    said: str  # the dialogue
    tools: dict[str, str] = dataclasses.field(default_factory=dict)  # names of tools
    names: dict[str, str] = dataclasses.field(default_factory=dict)  # names of parameters
    # by the identity of the schema that has it, which has to live as long
    defaults: dict[int, str] = dataclasses.field(default_factory=dict)
    schemas: dict[str, list[_Schema]] = dataclasses.field(default_factory=dict)  # by tool


def unmaskable(record: StepRecord) -> str | None:
    """Why the names of this record cannot be masked, None if they can."""
    if not structured(record):
        return TEXT_ONLY
    if not record.tools:
        return "no tool is offered"
    return None


def mask_names(record: StepRecord, seed: int) -> StepRecord | None:
    """Random words for the names of tools and parameters and for defaults, descriptions kept. Depends on seed and id.

    The same name becomes the same word everywhere in the record: tools, nested properties, calls of the history and of the
    target. In texts: names of tools in thoughts, responses, observations and the system text, names of parameters in thoughts
    and responses, as whole words; a name that is a plain word only in quotes. What the user says stays. A default is masked when
    it is text and neither its description, nor its enum, nor the dialogue has it; arguments equal to it become the new default.
    """
    if unmaskable(record) is not None:
        return None
    raw = to_json(record)
    text = json.dumps([raw["tools"], raw["history"], raw["target"]])
    word = _words(random.Random(digest(seed, "mask", record.id)), text)
    mask = _Mask(word, "\n".join(_texts(record)))
    tools = tuple(_mask_tool(tool, mask) for tool in record.tools)
    of_tools = _replacer(mask.tools, mask.said)
    of_all = _replacer(mask.names | mask.tools, mask.said)
    target = record.target
    return rewritten(
        record,
        tools=tools,
        history=tuple(_mask_turn(turn, mask, of_tools, of_all) for turn in record.history),
        target=Target(
            calls=tuple(_mask_call(call.name, call.arguments, mask) for call in target.calls),
            response=None if target.response is None else of_all(target.response),
            think=None if target.think is None else of_all(target.think),
        ),
    )


def _words(rng: random.Random, text: str) -> Callable[[], str]:
    """A source of random words of 6 to 10 letters, none of them twice and none in the text."""
    used: set[str] = set()

    def word() -> str:
        while True:
            made = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(6, 10)))
            if made not in used and made not in text:
                used.add(made)
                return made

    return word


def _texts(record: StepRecord) -> list[str]:
    """All that is said in the dialogue and in its answer."""
    target = record.target
    texts = [turn.get(field) for turn in record.history for field in ("content", "think")]
    return [text for text in (*texts, target.response, target.think) if text]


def _mask_turn(
    turn: dict[str, Any], mask: _Mask, of_tools: _Rename, of_all: _Rename
) -> dict[str, Any]:
    if turn["role"] == "user":
        return turn
    replace = of_all if turn["role"] == "assistant" else of_tools
    masked = dict(turn)
    for field in ("content", "think"):
        if turn.get(field):
            masked[field] = replace(turn[field])
    if turn.get("calls"):
        calls = [_mask_call(call["name"], call["arguments"], mask) for call in turn["calls"]]
        masked["calls"] = [{"name": c.name, "arguments": c.arguments} for c in calls]
    return masked


def _mask_call(name: str, arguments: Mapping[str, Any], mask: _Mask) -> Call:
    return Call(mask.tools[name], _mask_value(arguments, mask.schemas[name], mask))


def _replacer(names: Mapping[str, str], said: str) -> _Rename:
    """Replaces whole-word mentions of names in parts of `said`; of names that are plain words only those in quotes."""
    longest_first = sorted((name for name in names if name in said), key=len, reverse=True)
    marked = "|".join(re.escape(name) for name in longest_first if not _PLAIN(name))
    plain = "|".join(re.escape(name) for name in longest_first if name and _PLAIN(name))
    either = [rf"(?<!\w)(?:{marked})(?!\w)"] if marked else []
    either += [rf"(?<=[\"'`])(?:{plain})(?=[\"'`])"] if plain else []
    if not either:
        return lambda text: text
    pattern = re.compile("|".join(either))
    return lambda text: pattern.sub(lambda found: names[found[0]], text)


# --- the schemas of tools --------------------------------------------------------------------------------------------


def _mask_tool(tool: dict[str, Any], mask: _Mask) -> dict[str, Any]:
    """The tool with masked name and parameters, in the form they came in."""
    name = mask.tools.setdefault(tool["name"], mask.word())
    parameters = tool.get("parameters") or {}
    flat = not (is_schema(parameters) or isinstance(parameters.get("type"), str))
    root = {"properties": parameters} if flat else parameters
    mask.schemas.setdefault(tool["name"], []).append((root, root))
    kept = {key: value for key, value in tool.items() if key in _MASKED}
    if tool.get("parameters") is None:
        return {**kept, "name": name}
    _name_properties(root, mask)  # all of them first: `required` may stand before what it names
    schema = _mask_schema(root, mask)
    masked = {**kept, "parameters": schema["properties"] if flat else schema, "name": name}
    if isinstance(required := tool.get("required"), list):
        masked["required"] = _mask_required(required, mask)
    return masked


def _name_properties(schema: Mapping[str, Any], mask: _Mask) -> None:
    """Gives a word to every name of a parameter in the schema that has none yet."""
    for name in _object(schema.get("properties")):
        if name not in mask.names:
            mask.names[name] = mask.word()
    for inner in _inner(schema):
        _name_properties(inner, mask)


def _inner(schema: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The schemas that stand in a schema, of those places where names are masked."""
    for key, value in schema.items():
        if key in ("properties", *DEFINITIONS):
            yield from filter(_is_object, _object(value).values())
        elif key in ("items", "additionalProperties") and _is_object(value):
            yield value
        elif key in UNIONS and isinstance(value, list):
            yield from filter(_is_object, value)


def _mask_schema(schema: Mapping[str, Any], mask: _Mask) -> dict[str, Any]:
    def inner(value: Any) -> Any:
        return _mask_schema(value, mask) if _is_object(value) else value

    masked = dict(schema)
    for key, value in schema.items():
        if key == "properties" and _is_object(value):
            masked[key] = {mask.names[name]: inner(v) for name, v in value.items()}
        elif key in DEFINITIONS and _is_object(value):
            masked[key] = {name: inner(v) for name, v in value.items()}
        elif key in ("items", "additionalProperties"):
            masked[key] = inner(value)
        elif key in UNIONS and isinstance(value, list):
            masked[key] = list(map(inner, value))
        elif key == "required" and isinstance(value, list):
            masked[key] = _mask_required(value, mask)
        elif key == "$ref" and isinstance(value, str):
            masked[key] = _mask_pointer(value, mask)
    if (new := _mask_default(schema, mask)) is not None:
        masked["default"] = mask.defaults[id(schema)] = new
    return masked


def _mask_default(schema: Mapping[str, Any], mask: _Mask) -> str | None:
    old, choices = schema.get("default"), schema.get("enum")
    if not isinstance(old, str) or not old or (isinstance(choices, list) and old in choices):
        return None
    if (before := mask.defaults.get(id(schema))) is not None:  # one object in two places
        return before
    known = f"{schema.get('description', '')}\n{mask.said}"
    said = old in known and re.search(rf"(?<!\w){re.escape(old)}(?!\w)", known)
    return None if said else mask.word()


def _mask_required(required: list[Any], mask: _Mask) -> list[Any]:
    return [mask.names.get(name, name) if isinstance(name, str) else name for name in required]


def _mask_pointer(pointer: str, mask: _Mask) -> str:
    """A JSON pointer whose steps behind `properties` are names of parameters."""
    steps = pointer.split("/")
    for i in range(1, len(steps)):
        if steps[i - 1] == "properties":
            steps[i] = mask.names.get(steps[i], steps[i])
    return "/".join(steps)


def _mask_value(value: Any, schemas: list[_Schema], mask: _Mask) -> Any:
    """A value under new names and defaults, as the schemas say that apply to it; what none of them declares stays."""
    schemas = _applying(schemas)
    if isinstance(value, str):
        new = (mask.defaults.get(id(s)) for s, _ in schemas if s.get("default") == value)
        return next(filter(None, new), value)
    if isinstance(value, Mapping):
        return dict(_mask_member(name, inner, schemas, mask) for name, inner in value.items())
    if isinstance(value, list):
        items = _at("items", schemas)
        return [_mask_value(item, items, mask) for item in value]
    return value


def _mask_member(name: str, value: Any, schemas: list[_Schema], mask: _Mask) -> tuple[str, Any]:
    """(name, value) of one member of an object, masked."""
    declaring = [s for s in schemas if name in _object(s[0].get("properties"))]
    if not declaring:
        return name, _mask_value(value, _at("additionalProperties", schemas), mask)
    found = [(s["properties"][name], root) for s, root in declaring]
    return mask.names[name], _mask_value(value, list(filter(_is_schema, found)), mask)


def _at(key: str, schemas: list[_Schema]) -> list[_Schema]:
    return [(s[key], root) for s, root in schemas if _is_object(s.get(key))]


def _applying(schemas: list[_Schema]) -> list[_Schema]:
    """The schemas and all that they are composed of or point to, each once."""
    found: dict[int, _Schema] = {}
    waiting = list(schemas)
    while waiting:
        schema, root = waiting.pop()
        if id(schema) not in found:
            found[id(schema)] = schema, root
            branches = [b for k in UNIONS if isinstance(schema.get(k), list) for b in schema[k]]
            target = pointed(schema.get("$ref"), root)
            waiting += filter(_is_schema, ((b, root) for b in [*branches, target]))
    return list(found.values())


def _object(value: Any) -> Mapping[str, Any]:
    return value if _is_object(value) else {}


def _is_object(value: Any) -> bool:
    return isinstance(value, Mapping)


def _is_schema(pair: tuple[Any, Any]) -> bool:
    return _is_object(pair[0])
