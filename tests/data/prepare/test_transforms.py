"""Masking of names and irrelevance: hand-written records, and properties over a world of them."""

import copy
import json

import pytest

from rest_jax.data.prepare import transforms
from rest_jax.data.records import StepRecord, from_json, to_json
from rest_jax.data.synthetic import world as synthetic
from rest_jax.templates import TEMPLATES
from rest_jax.tool_calls import Call, Target

SCHEMA_TOOL = {
    "name": "get_weather",
    "description": "get_weather tells the weather of a town.",
    "parameters": {
        "type": "object",
        "properties": {
            "town": {"type": "string", "description": "Name of the town."},
            "unit": {"type": "string", "description": "Unit.", "default": "celsius"},
            "style": {"type": "string", "enum": ["short", "long"], "default": "short"},
            "days": {"type": "integer", "default": 3},
            "spots": {
                "type": "array",
                "items": {"type": "object", "properties": {"lat_deg": {"type": "number"}}},
            },
        },
        "required": ["town"],
    },
}
FLAT_TOOL = {
    "name": "search",
    "description": "Searches.",
    "parameters": {
        "town": {"description": "Town.", "type": "str", "default": ""},
        "where": {"description": "Place, world by default.", "type": "str", "default": "world"},
    },
}
RECORD = StepRecord(
    "r",
    "made",
    (SCHEMA_TOOL, FLAT_TOOL),
    (
        {"role": "system", "content": "Prefer get_weather. To search is fine."},
        {"role": "user", "content": 'I search get_weather of Köln in "town"'},
        {
            "role": "assistant",
            "content": None,
            "think": "I call get_weather with `town`, then 'search' the town.",
            "calls": [{"name": "search", "arguments": {"town": "Köln", "free": {"town": 1}}}],
        },
        {"role": "tool", "content": '{"name": "search", "town": "Köln", "get_weather2": 1}'},
    ),
    Target(
        (
            Call(
                "get_weather",
                {
                    "town": "search",
                    "unit": "celsius",
                    "style": "short",
                    "spots": [{"lat_deg": 1.5, "x": 2}, "celsius"],
                },
            ),
        ),
        "Used get_weather (lat_deg).",
        "town and unit",
        "verbatim get_weather",
    ),
    messages=({"role": "user", "content": "verbatim get_weather"},),
    extra={"raw": "get_weather"},
)


def masked(record=RECORD, seed=0) -> StepRecord:
    made = transforms.mask_names(record, seed)
    assert made is not None
    return made


def test_every_name_is_replaced_alike_everywhere():
    before = copy.deepcopy(RECORD)
    made = masked()
    assert before == RECORD  # the input is left alone
    weather, search = (tool["name"] for tool in made.tools)
    schema, flat = (tool["parameters"] for tool in made.tools)
    town, unit, style, days, spots = schema["properties"]
    (lat,) = schema["properties"][spots]["items"]["properties"]
    flat_town, where = flat
    assert flat_town == town
    names = [weather, search, town, unit, style, days, spots, lat, where]
    assert len(set(names)) == 9 and all(n.isascii() and n.islower() and n.isalpha() for n in names)
    assert schema["required"] == [town]
    new_unit = schema["properties"][unit]["default"]
    assert new_unit not in (*names, "celsius")
    assert schema["properties"][style] == SCHEMA_TOOL["parameters"]["properties"]["style"]
    assert schema["properties"][days]["default"] == 3
    assert (
        flat[list(flat)[1]] == FLAT_TOOL["parameters"]["where"]
    )  # its description says the default
    assert [t["description"] for t in made.tools] == [t["description"] for t in RECORD.tools]
    (call,) = made.target.calls
    assert call == Call(
        weather,
        {town: "search", unit: new_unit, style: "short", spots: [{lat: 1.5, "x": 2}, "celsius"]},
    )
    assert made.history[2]["calls"] == [
        {"name": search, "arguments": {town: "Köln", "free": {"town": 1}}}
    ]


def test_mentions_in_texts():
    made = masked()
    weather, search = (tool["name"] for tool in made.tools)
    properties = made.tools[0]["parameters"]["properties"]
    town, *_, spots = properties
    (lat,) = properties[spots]["items"]["properties"]
    system, user, assistant, tool = made.history
    assert system["content"] == f"Prefer {weather}. To search is fine."
    assert user == RECORD.history[1]
    assert assistant["think"] == f"I call {weather} with `{town}`, then '{search}' the town."
    assert tool["content"] == f'{{"name": "{search}", "town": "Köln", "get_weather2": 1}}'
    assert made.target.response == f"Used {weather} ({lat})."
    assert made.target.think == "town and unit"


def test_nothing_verbatim_stays():
    for made in (masked(), transforms.remove_right_tools(RECORD)):
        assert made is not None
        assert made.messages is None and made.extra == {} and made.target.text is None


def test_depends_on_the_seed_and_the_id_alone():
    assert masked() == masked()
    assert masked() != masked(seed=1)
    other = StepRecord(**{**RECORD.__dict__, "id": "s"})
    assert masked(other).tools != masked().tools


def test_a_default_that_the_dialogue_says_is_kept():
    history = ({"role": "user", "content": "In celsius, please."},)
    made = masked(StepRecord(**{**RECORD.__dict__, "history": history}))
    unit = list(made.tools[0]["parameters"]["properties"].values())[1]
    assert unit["default"] == "celsius" and "celsius" in made.target.calls[0].arguments.values()


def test_a_masked_tool_has_no_field_that_may_name_the_real_one():
    tool = {
        "name": "book_x1",
        "strict": True,
        "examples": ["book_x1(day_x2=3)"],
        "parameters": {"day_x2": {"type": "int"}},
    }
    made = masked(StepRecord("r", "", (tool,), (), Target((Call("book_x1", {"day_x2": 3}),))))
    assert made.tools[0].keys() == {"name", "strict", "parameters"}
    assert "book_x1" not in str(made) and "day_x2" not in str(made)


def test_schemas_of_other_types_and_odd_shapes():
    tool = {
        "name": "f(v2).x",
        "parameters": {"type": "dict", "properties": {"type": {"type": "int"}, "odd": 3}},
        "required": ["type", 4],
    }
    plain = {"name": "g"}
    target = Target((Call("f(v2).x", {"type": 1}), Call("g", {"free": 2})))
    made = masked(StepRecord("r", "", (tool, plain), (), target))
    parameters = made.tools[0]["parameters"]
    kind, odd = parameters["properties"]
    assert parameters == {"type": "dict", "properties": {kind: {"type": "int"}, odd: 3}}
    assert made.tools[0]["required"] == [kind, 4]
    assert made.tools[1].keys() == {"name"}
    assert made.target.calls == (
        Call(made.tools[0]["name"], {kind: 1}),
        Call(made.tools[1]["name"], {"free": 2}),
    )


@pytest.mark.parametrize("level", ["single", "mixed", "reasoned", "inferred"])
def test_masked_worlds_hold_no_old_name(level):
    for record in synthetic.world("train", 0, 60, level):
        made = masked(record)
        assert from_json(json.loads(json.dumps(to_json(made)))) == made
        offered = {tool["name"] for tool in made.tools}
        assert not offered & {tool["name"] for tool in record.tools}
        assert {call.name for call in made.target.calls} <= offered
        shape = [(len(call.arguments), *call.arguments.values()) for call in record.target.calls]
        assert [(len(c.arguments), *c.arguments.values()) for c in made.target.calls] == shape
        declared = {p for tool in made.tools for p in _parameters(tool)}
        assert {name for call in made.target.calls for name in call.arguments} <= declared
        assert TEMPLATES["toolrl"].render_prompt(list(made.tools), list(made.history))


def _parameters(tool):
    parameters = tool.get("parameters") or {}
    return parameters.get("properties", {}) if parameters.get("type") == "object" else parameters


def _change(**fields) -> StepRecord:
    return StepRecord(**{**RECORD.__dict__, **fields})


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (_change(tools=()), transforms.TEXT_ONLY),
        (_change(history=()), transforms.TEXT_ONLY),
        (_change(tools=(), messages=None), "no tool is offered"),
    ],
)
def test_records_that_cannot_be_masked(record, reason):
    assert transforms.unmaskable(record) == reason
    assert transforms.mask_names(record, 0) is None


def test_the_right_tool_is_taken_away():
    made = transforms.remove_right_tools(RECORD, "Cannot.")
    assert made is not None
    assert made.tools == (FLAT_TOOL,) and made.history == RECORD.history
    assert made.target == Target(response="Cannot.")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (_change(history=()), transforms.TEXT_ONLY),
        (_change(target=Target(response="x")), "it calls no tool"),
        (_change(target=Target((Call("search", {}),))), "the history calls the right tool too"),
        (_change(tools=(SCHEMA_TOOL,)), "no other tool is offered"),
    ],
)
def test_records_whose_tool_cannot_be_taken_away(record, reason):
    assert transforms.unremovable(record) == reason
    assert transforms.remove_right_tools(record) is None


def test_names_in_branches_definitions_and_additional_properties():
    point = {
        "type": "object",
        "properties": {"lat_deg": {"type": "number"}, "after": {"$ref": "#/$defs/Point"}},
    }
    parameters = {
        "type": "object",
        "anyOf": [{"required": ["lat_deg", "place"]}, {"required": ["free_map"]}],
        "properties": {
            "place": {"anyOf": [{"$ref": "#/$defs/Point"}, {"type": "null"}]},
            "many": {"items": {"oneOf": [{"properties": {"zip_code": {"default": "none given"}}}, {"type": "string"}]}},
            "both": {"allOf": [{"properties": {"left_x": {}}}, {"properties": {"right_y": {}}}], "required": ["right_y"]},
            "free_map": {"type": "object", "additionalProperties": {"properties": {"inner_z": {}}}},
            "again": {"$ref": "#/properties/both"},
        },
        "$defs": {"Point": point},
    }  # fmt: skip
    tool = {"name": "plot_it", "parameters": parameters}
    arguments = {
        "place": {"lat_deg": 1.5, "after": {"after": {"lat_deg": 2}, "undeclared_q": 3}},
        "many": ["none given", {"zip_code": "none given"}, {"zip_code": "8001"}],
        "both": {"left_x": 1, "right_y": 2},
        "free_map": {"key_k": {"inner_z": 3}},
        "again": {"left_x": 4},
    }
    before = copy.deepcopy(tool)
    made = masked(StepRecord("r", "", (tool,), (), Target((Call("plot_it", arguments),))))
    assert tool == before
    told = json.dumps(to_json(made))
    names = [
        "place",
        "many",
        "both",
        "free_map",
        "again",
        "lat_deg",
        "after",
        "zip_code",
        "left_x",
        "right_y",
        "inner_z",
    ]
    assert not [name for name in names if f'"{name}"' in told or f"/{name}" in told]
    schema = made.tools[0]["parameters"]
    new = dict(zip(parameters["properties"], schema["properties"], strict=True))
    new |= dict(zip(point["properties"], schema["$defs"]["Point"]["properties"], strict=True))
    (zip_code,) = schema["properties"][new["many"]]["items"]["oneOf"][0]["properties"]
    none_given = schema["properties"][new["many"]]["items"]["oneOf"][0]["properties"][zip_code][
        "default"
    ]
    left, right = (next(iter(b["properties"])) for b in schema["properties"][new["both"]]["allOf"])
    (inner,) = schema["properties"][new["free_map"]]["additionalProperties"]["properties"]
    assert made.target.calls[0].arguments == {
        new["place"]: {new["lat_deg"]: 1.5, new["after"]: {new["after"]: {new["lat_deg"]: 2}, "undeclared_q": 3}},
        new["many"]: ["none given", {zip_code: none_given}, {zip_code: "8001"}],
        new["both"]: {left: 1, right: 2},
        new["free_map"]: {"key_k": {inner: 3}},
        new["again"]: {left: 4},
    }  # fmt: skip
    assert schema["anyOf"] == [
        {"required": [new["lat_deg"], new["place"]]},
        {"required": [new["free_map"]]},
    ]
    assert schema["properties"][new["both"]]["required"] == [right]
    assert schema["properties"][new["again"]] == {"$ref": f"#/properties/{new['both']}"}


def test_a_reference_to_itself_and_one_object_in_two_places():
    shared = {"type": "string", "default": "abc def"}
    circle = {"$ref": "#", "properties": {"a_1": shared, "b_2": shared}, "type": "object"}
    tool = {"name": "f_1", "parameters": circle}
    arguments = {"a_1": "abc def", "b_2": "abc def", "c_3": {"a_1": "abc def"}}
    made = masked(StepRecord("r", "", (tool,), (), Target((Call("f_1", arguments),))))
    a, b = made.tools[0]["parameters"]["properties"].values()
    one, two, three = made.target.calls[0].arguments.values()
    assert one == a["default"] == two == b["default"] != "abc def"
    assert three == {"a_1": "abc def"}  # no schema says what c_3 is
