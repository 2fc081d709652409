"""Prompts and gold answers: their layout, and that what is rendered is parsed back."""

import json
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import pytest

from rest_jax.rewards.score import format_score
from rest_jax.templates import TEMPLATES
from rest_jax.templates.rendering import signature, type_schema
from rest_jax.tool_calls import Call, Target

FLAT = {
    "name": "weather",
    "description": "Weather of a town.",
    "parameters": {
        "town": {"description": "Name", "type": "str", "default": ""},
        "days": {"description": "How many", "type": "int, optional", "default": 3},
    },
}
SCHEMA = {
    "name": "weather",
    "description": "Weather of a town.",
    "parameters": {
        "type": "object",
        "properties": {
            "town": {"type": "string", "description": "Name"},
            "days": {"type": "integer", "description": "How many", "default": 3},
        },
        "required": ["town"],
    },
}
HISTORY = [
    {"role": "user", "content": "Rain?"},
    {
        "role": "assistant",
        "content": None,
        "calls": [{"name": "weather", "arguments": {"town": "Köln"}}],
    },
    {"role": "tool", "content": '{"rain": true}'},
    {"role": "tool", "content": "[]"},
    {"role": "assistant", "content": "Yes.", "think": "It rains."},
    {"role": "user", "content": "Thanks"},
]


def test_toolrl_dialogue():
    _, user = TEMPLATES["toolrl"].render_prompt([FLAT], HISTORY)
    assert user["content"] == (
        "**Dialogue Records History**\n<user> Rain? </user>\n\n"
        '<tool_call>\n{"name": "weather", "parameters": {"town": "Köln"}}\n</tool_call>\n'
        '<obs> {"rain": true} </obs>\n<obs> [] </obs>\n\n'
        "<think> It rains. </think>\n<response> Yes. </response>\n\n<user> Thanks </user>"
    )


def test_toolrl_tools_of_both_forms_look_alike():
    (flat, _), (schema, _) = (
        TEMPLATES["toolrl"].render_prompt([t], HISTORY) for t in (FLAT, SCHEMA)
    )
    assert (
        '"days": {"description": "How many", "type": "int, optional", "default": 3}'
        in flat["content"]
    )
    assert (
        '"days": {"description": "How many", "type": "integer, optional", "default": 3}'
        in schema["content"]
    )


def test_brief_toolrl_prompt_is_short():
    system, user = TEMPLATES["toolrl"].render_prompt([FLAT], HISTORY[:1], brief=True)
    tool, *rest = system["content"].split("\n")
    assert tool == 'Weather of a town.: "weather" (town: str, days: int, optional)'
    assert len(" ".join(rest).split()) < 40
    assert user["content"] == "<user> Rain? </user>"


def test_hermes_prompt():
    system, *turns = TEMPLATES["hermes"].render_prompt([FLAT], HISTORY)
    listed = system["content"].split("<tools>\n")[1].split("\n</tools>")[0]
    function = json.loads(listed)["function"]
    assert function["parameters"]["required"] == ["town"]
    assert function["parameters"]["properties"]["days"] == {
        "type": "integer",
        "description": "How many",
        "default": 3,
    }
    assert turns == [
        {"role": "user", "content": "Rain?"},
        {
            "role": "assistant",
            "content": '<tool_call>\n{"name": "weather", "arguments": {"town": "Köln"}}\n</tool_call>',
        },
        {
            "role": "user",
            "content": '<tool_response>\n{"rain": true}\n</tool_response>\n<tool_response>\n[]\n</tool_response>',
        },
        {"role": "assistant", "content": "<think>\nIt rains.\n</think>\n\nYes."},
        {"role": "user", "content": "Thanks"},
    ]
    assert TEMPLATES["hermes"].render_prompt([], HISTORY[:1]) == [
        {"role": "user", "content": "Rain?"}
    ]


def test_llama3_prompt():
    first, second, *_, last = TEMPLATES["llama3"].render_prompt([SCHEMA], HISTORY)
    assert first["content"].startswith("Given the following functions")
    assert first["content"].endswith("Rain?")
    assert '"required": [' in first["content"]
    assert second["content"] == '{"name": "weather", "parameters": {"town": "Köln"}}'
    assert last["content"] == "Thanks"


@pytest.mark.parametrize("template", list(TEMPLATES))
def test_system_text_of_the_history_is_kept(template):
    history = [{"role": "system", "content": "Today is Monday."}, *HISTORY]
    messages = TEMPLATES[template].render_prompt([FLAT], history)
    assert messages[0]["role"] == "system"
    assert "Today is Monday." in messages[0]["content"]


def test_toolrl_gold_text():
    target = Target((Call("f", {"a": True}), Call("g", {})), "ok", "why")
    assert TEMPLATES["toolrl"].render_answer(target) == (
        '<think> why </think>\n<tool_call>\n{"name": "f", "parameters": {"a": true}}\n'
        '{"name": "g", "parameters": {}}\n</tool_call>\n<response> ok </response>'
    )


def test_hermes_gold_text():
    target = Target((Call("f", {"a": True}), Call("g", {})), "ok", "why")
    assert TEMPLATES["hermes"].render_answer(target) == (
        '<think>\nwhy\n</think>\n\nok\n<tool_call>\n{"name": "f", "arguments": {"a": true}}\n</tool_call>\n'
        '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>'
    )


def test_text_in_the_templates_own_form_is_kept():
    text = '<tool_call>\n{"arguments": {}, "name": "f"}\n</tool_call>'
    assert TEMPLATES["hermes"].render_answer(Target((Call("f", {}),), text=text)) == text
    assert TEMPLATES["toolrl"].render_answer(Target((Call("f", {}),), text="any")) == "any"


UNIT = {"type": "string", "enum": ["°C", "°F"]}
RICH = {
    "name": "rich",
    "description": "查询",
    "parameters": {
        "type": "object",
        "properties": {
            "n": {"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None},
            "l": {"type": ["integer", "null"]},
            "one": {"oneOf": [{"type": "boolean"}, {"type": "integer"}]},
            "unit": {"$ref": "#/$defs/Unit", "description": "天气"},
            "some": {"anyOf": [{"$ref": "#/$defs/Unit"}, {"type": "array", "items": UNIT}]},
            "all": {"allOf": [{"$ref": "#/%24defs/Unit"}]},
            "fixed": {"const": 3},
            "free": {},
            "definitions": {"$ref": "#unit"},
        },
        "required": ["l", "one"],
        "$defs": {"Unit": UNIT, "Anchored": {"$anchor": "unit", "type": "string"}},
    },
}


def _toolrl_parameters(tool):
    system, _ = TEMPLATES["toolrl"].render_prompt([tool], HISTORY)
    return json.loads(system["content"].split("\nParameters: ")[1].split("\n")[0])


def test_toolrl_says_what_a_schema_says():
    shown = _toolrl_parameters(RICH)
    kinds = {name: described["type"] for name, described in shown.items()}
    assert kinds == {
        "n": "integer, optional",
        "l": "integer or null",
        "one": "boolean or integer",
        "unit": "string, optional",
        "some": "string or array, optional",
        "all": "string, optional",
        "fixed": "integer, optional",
        "free": "any, optional",
        "definitions": "string, optional",
    }
    assert shown["unit"]["enum"] == ["°C", "°F"] and shown["unit"]["description"] == "天气"
    assert shown["some"]["anyOf"] == [UNIT, {"type": "array", "items": UNIT}]
    assert shown["all"]["allOf"] == [UNIT] and shown["fixed"]["const"] == 3
    assert not {"anyOf", "oneOf"} & {*shown["n"], *shown["one"]}


@pytest.mark.parametrize(
    ("parameters", "shown"),
    [
        (
            {"anyOf": [{"$ref": "#/definitions/A"}, {"type": "null"}], "definitions": {"A": UNIT}},
            {"anyOf": [UNIT, {"type": "null"}]},
        ),
        (
            {"$ref": "#/$defs/A", "$defs": {"A": {"type": "object", "properties": {"u": UNIT}}}},
            {"u": {"description": "", "type": "string", "default": "", "enum": ["°C", "°F"]}},
        ),
        (
            {"type": "object", "additionalProperties": {"type": "integer"}},
            {"type": "object", "additionalProperties": {"type": "integer"}},
        ),
        (
            {"type": "object", "properties": {"a": {"$ref": "#/nowhere"}}},
            {"a": {"description": "", "type": "any", "default": "", "$ref": "#/nowhere"}},
        ),
    ],
)
def test_toolrl_shows_a_schema_that_has_no_flat_form_as_it_is(parameters, shown):
    tool = {"name": "f", "parameters": parameters}
    assert _toolrl_parameters(tool) == shown
    assert TEMPLATES["toolrl"].render_prompt([tool], HISTORY, brief=True)


def test_references_within_themselves_are_shown_with_their_definitions():
    node = {"type": "object", "properties": {"next": {"$ref": "#/$defs/Node"}}}
    doubled = {
        f"D{i}": {"anyOf": [{"$ref": f"#/$defs/D{i + 1}"}] * 2, "title": f"{i}"} for i in range(40)
    }
    for definitions in (
        {"Node": node},
        {"Node": {"$ref": "#/$defs/Node"}},
        doubled | {"D40": UNIT},
    ):
        name = next(iter(definitions))
        properties = {"root": {"$ref": f"#/$defs/{name}"}, "self": {"$ref": "#"}}
        parameters = {"type": "object", "properties": properties, "$defs": definitions}
        assert _toolrl_parameters({"name": "f", "parameters": parameters}) == parameters


@pytest.mark.parametrize("keyword", ["$defs", "definitions"])
@pytest.mark.parametrize(
    ("reference", "definition"),
    [
        ({"$ref": "U"}, {"$id": "U"}),
        ({"$ref": "https://x/U"}, {"$id": "https://x/U"}),
        ({"$ref": "#/$defs/Other"}, {}),
        ({"$dynamicRef": "#u"}, {"$dynamicAnchor": "u"}),
        ({"$recursiveRef": "#"}, {}),
    ],
)
def test_references_that_are_not_followed_keep_their_definitions(keyword, reference, definition):
    defined = {keyword: {"U": {**definition, "type": "integer"}}}
    parameters = {"type": "object", "properties": {"n": reference}, **defined}
    assert _toolrl_parameters({"name": "f", "parameters": parameters}) == parameters
    inner = {"items": reference, **defined}
    parameters = {"type": "object", "properties": {"n": inner}}
    shown = _toolrl_parameters({"name": "f", "parameters": parameters})["n"]
    assert {key: shown[key] for key in inner} == inner


def test_values_that_look_like_schemas_stay():
    values = [{"$defs": 1}, {"$ref": "#/$defs/U"}, {"$anchor": "u"}, {"definitions": {}}]
    inner = {"enum": values, "const": values[0], "default": values[1], "examples": values}
    parameters = {
        "type": "object",
        "properties": {"a": inner, "enum": {"$ref": "#/$defs/U"}},
        "$defs": {"U": UNIT},
    }
    shown = _toolrl_parameters({"name": "f", "parameters": parameters})
    assert {key: shown["a"][key] for key in inner} == inner
    assert shown["enum"]["enum"] == UNIT["enum"]


@pytest.mark.parametrize("brief", [False, True])
@pytest.mark.parametrize("template", list(TEMPLATES))
def test_no_letter_is_escaped(template, brief):
    tool = {**RICH, "name": "天气"}
    history = [
        *HISTORY,
        {"role": "assistant", "calls": [{"name": "天气", "arguments": {"é": "°"}}]},
    ]
    text = "".join(
        m["content"] for m in TEMPLATES[template].render_prompt([tool], history, brief=brief)
    )
    assert "\\u" not in text and "天气" in text and "查询" in text
    assert (brief and template == "toolrl") or "°F" in text


@pytest.mark.parametrize("template", ["hermes", "llama3"])
def test_a_schema_is_listed_as_it_is_given(template):
    tool = {"parameters": RICH["parameters"], "strict": True, "name": "f"}
    text = "".join(m["content"] for m in TEMPLATES[template].render_prompt([tool], HISTORY))
    indent = 4 if template == "llama3" else None
    record = {"type": "function", "function": tool}
    assert json.dumps(record, ensure_ascii=False, indent=indent) in text


@pytest.mark.parametrize(
    ("kind", "schema"),
    [
        ("str", {"type": "string"}),
        ("int, optional", {"type": "integer"}),
        ("List[int]", {"type": "array", "items": {"type": "integer"}}),
        ("List[List[float]], optional", {"type": "array", "items": {"type": "array", "items": {"type": "number"}}}),
        ("Dict[str, Any]", {"type": "object"}),
        ("dict[str, bool]", {"type": "object", "additionalProperties": {"type": "boolean"}}),
        ("Tuple[int, str]", {"type": "array", "items": {"type": ["integer", "string"]}}),
        ("tuple[int, ...]", {"type": "array", "items": {"type": "integer"}}),
        ("Set[str]", {"type": "array", "items": {"type": "string"}}),
        ("Optional[str]", {"type": ["string", "null"]}),
        ("typing.Union[int, List[str]]", {"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "string"}}]}),
        ("int | None", {"type": ["integer", "null"]}),
        ("string or null", {"type": ["string", "null"]}),
        ("Literal['a', \"b, c\", 1]", {"enum": ["a", "b, c", 1]}),
        ("Any", {}),
        ("", {}),
        (None, {}),
        ("object", {"type": "object"}),
        ("Callable[[float], float]", {"type": "Callable[[float], float]"}),
        ("ISO code", {"type": "ISO code"}),
        (["string", "None"], {"type": ["string", "null"]}),
        ("List[" * 1000, {"type": "List[" * 1000}),
    ],
)  # fmt: skip
def test_types_of_the_flat_form(kind, schema):
    assert type_schema(kind) == schema
    tool = {"name": "f", "parameters": {"x": {"type": kind, "description": "d"}}}
    optional = "optional" in str(kind).lower()
    shown = signature(tool)["function"]["parameters"]
    assert shown["properties"]["x"] == {**schema, "description": "d"}
    assert shown["required"] == ([] if optional else ["x"])


@pytest.mark.parametrize("required", [True, False])
def test_a_flat_parameter_may_say_itself_that_it_is_required(required):
    tool = {"name": "f", "parameters": {"x": {"type": "str", "default": "a", "required": required}}}
    shown = signature(tool)["function"]["parameters"]
    assert shown["required"] == (["x"] if required else [])
    assert shown["properties"]["x"] == {"type": "string", "default": "a"}


@pytest.mark.parametrize("template", list(TEMPLATES))
def test_system_turns_amid_the_dialogue_stay_where_they_are(template):
    history = [
        {"role": "system", "content": "First."},
        {"role": "system", "content": "Second."},
        *HISTORY[:1],
        {"role": "system", "content": "Later."},
        *HISTORY[1:],
    ]
    messages = TEMPLATES[template].render_prompt([FLAT], history)
    text = "\n".join(m["content"] for m in messages)
    order = [text.index(word) for word in ("First.", "Second.", "Rain?", "Later.", "Thanks")]
    assert order == sorted(order)


def test_llama3_tools_are_never_lost():
    for history in ([], HISTORY[4:5], [{"role": "system", "content": "s"}, *HISTORY[1:]]):
        messages = TEMPLATES["llama3"].render_prompt([SCHEMA], history)
        first = next(m for m in messages if m["role"] != "system")
        assert first["role"] == "user" and '"name": "weather"' in first["content"]
        assert len(messages) == len(history) + 1


WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=8,
)
NAMES = WORDS | st.sampled_from(
    ["</tool_call>", "<response>", '{"name": "', '\\"', "<|python_tag|>"]
)
CALLS = st.lists(st.builds(Call, NAMES, st.dictionaries(NAMES, JSON, max_size=3)), max_size=3)


@hypothesis.given(
    calls=CALLS,
    response=st.sampled_from([None, "Hello there.", "Line one\nline {two}", "ünï"]),
    think=st.sampled_from([None, "so", "a <tool_call> is needed"]),
    template=st.sampled_from(list(TEMPLATES)),
)
def test_what_is_rendered_is_parsed_back(calls, response, think, template):
    target = Target(tuple(calls), response, think)
    text = TEMPLATES[template].render_answer(target)
    answer = TEMPLATES[template].parse(text.encode())
    assert (answer.calls, answer.response, answer.broken_calls) == (target.calls, response, 0)
    if think:
        assert answer.think == think
    if calls or response or think:
        assert format_score(answer, target, template, strict=True) == 1.0


def test_templates_and_rewards_do_without_jax():
    code = "import rest_jax.templates, rest_jax.rewards.score, sys; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
