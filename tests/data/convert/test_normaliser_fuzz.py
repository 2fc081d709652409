"""Dialogues, tools and records damaged by a seeded generator: refused in one line, or records that can be stored and rendered."""

import copy
import json
import pathlib
import random

import pytest

from rest_jax.data import fields
from rest_jax.data.convert import SOURCES
from rest_jax.data.fields import RecordError
from rest_jax.data.files import to_line
from rest_jax.data.records import from_json, restored, to_json
from rest_jax.data.synthetic import world
from rest_jax.templates import TEMPLATES

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
KEYS = (
    *("role", "content", "tool_calls", "function_call", "tool_call_id", "id", "name", "type"),
    *("arguments", "parameters", "function", "properties", "required", "items", "anyOf", "$ref"),
    *("$defs", "enum", "default", "reasoning", "thinking", "refusal", "text", "from", "value"),
    *("call_id", "output", "weight", "input_schema", "additionalProperties", "calls", "think"),
)
ODD = (
    *(None, "", " ", "x", "[]", "{}", "[", "null", '{"a": 1, "a": 2}', '{"name": "f"}', "function"),
    *("\ud83d", "a\udc00", "😀", "\0", "</tool_call>", "assistant", "tool", "system", "object"),
    *("List[int]", "Union[", "#/$defs/A", "#", "int, optional", "Dict[str, Any]", "any"),
    *(0, -1, 10**30, 1.5, True, False, float("nan"), float("inf"), -float("inf")),
    *([], {}, [[]], [None], {"": None}, {"$ref": "#"}, {"type": "text", "text": "x"}, ["object"]),
)
SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"anyOf": [{"$ref": "#/$defs/A"}, {"type": "null"}], "default": None},
        "b": {"type": ["integer", "null"], "enum": [1, None]},
        "c": {"type": "array", "items": {"type": "object", "properties": {"d": {}}}},
    },
    "required": ["a"],
    "$defs": {"A": {"type": "string", "enum": ["é"]}},
}


def _chat(rng):
    """A chat of a few turns as a server may log it."""
    tools = [{"type": "function", "function": {"name": n, "parameters": SCHEMA}} for n in "fg"]
    messages = [{"role": "user", "content": "go"}]
    for turn in range(rng.randint(1, 3)):
        listed = [
            {"id": f"{turn}{i}", "type": "function", "function": {"name": "f", "arguments": '{"a": "é"}'}}
            for i in range(rng.randint(0, 2))
        ]  # fmt: skip
        thought = {rng.choice(fields.THOUGHTS): "hm"} if rng.random() < 0.3 else {}
        messages.append({"role": "assistant", "content": "y", "tool_calls": listed, **thought})
        messages += [
            {"role": "tool", "tool_call_id": call["id"], "content": "1"} for call in listed
        ]
        messages.append({"role": "user", "content": [{"type": "text", "text": "and?"}]})
    messages.append({"role": "assistant", "content": "done"})
    return {"messages": messages, "tools": tools}


def _places(value, path=()):
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield (*path, key)
            yield from _places(inner, (*path, key))


def _damage(raw, rng):
    """Something of the value dropped, replaced, repeated, added, swapped or written as text."""
    places = list(_places(raw))
    if not places:
        return
    *path, last = rng.choice(places)
    node = raw
    for key in path:
        node = node[key]
    match rng.randrange(6):
        case 0:
            del node[last]
        case 1 | 2:
            node[last] = copy.deepcopy(rng.choice(ODD))
        case 3 if isinstance(node, list):
            node.insert(last, copy.deepcopy(node[last]))
        case 4:
            target = node[last] if isinstance(node[last], dict) else node
            if isinstance(target, dict):
                target[rng.choice(KEYS)] = copy.deepcopy(rng.choice(ODD))
        case _:
            node[last] = json.dumps(node[last])


def _use(record):
    """Stores and renders a record, as preparing and training do."""
    line = to_line(record)
    assert restored(json.loads(line)) == record == from_json(json.loads(line))
    for template in TEMPLATES.values():
        for brief in (False, True):
            messages = record.prompt_messages(template, brief)
            "".join(m["content"] for m in messages).encode()
        if (native := record.native_prompt(template)) is not None:
            json.dumps(native)
        template.render_answer(record.target)


def _check(seed):
    rng = random.Random(seed)
    source = rng.choice([*SOURCES, "openai", "openai", "openai", "records", "records", "tools"])
    if source == "records":
        raw = to_json(rng.choice(RECORDS))
    elif source == "tools" or (source == "openai" and rng.random() < 0.8):
        raw = _chat(rng)
    else:
        items = json.loads((FIXTURES / f"{source}.json").read_text(encoding="utf-8"))
        raw = rng.choice(items)
    raw = copy.deepcopy(raw)
    for _ in range(rng.randint(1, 4)):
        _damage(raw, rng)
    try:
        if source == "tools":
            fields.tools(raw.get("tools"), "here")
            return False
        records = (
            [from_json(raw, "here")] if source == "records" else SOURCES[source](raw, "s", "here")
        )
        for record in records:
            _use(record)
    except RecordError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
        str(error).encode()
        return False
    return True


RECORDS = world.world("train", 0, 20, "mixed") + world.demonstrations("train", 0, 20)


@pytest.mark.parametrize(
    ("first", "count"), [(0, 1000), pytest.param(1000, 20_000, marks=pytest.mark.slow)]
)
def test_damaged_dialogues_are_refused_in_one_line_or_understood(first, count):
    understood = sum(map(_check, range(first, first + count)))
    assert 0.2 * count < understood < 0.9 * count
