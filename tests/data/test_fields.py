"""Tools, calls, texts and thoughts as servers and people write them: one reading, and one line for what has none."""

import json

import pytest

from rest_jax.data import fields
from rest_jax.data.fields import RecordError
from rest_jax.templates import TEMPLATES

SCHEMA = {
    "type": "object",
    "properties": {"town": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["town"],
}
UNTYPED = {"properties": {"town": {"type": "STRING", "enum": None}, "days": {"type": "int"}}}
TOOL = {"name": "weather", "description": "Weather.", "parameters": SCHEMA}


@pytest.mark.parametrize("tools", [
    [TOOL],
    [{"type": "function", "function": TOOL}],
    [{"type": "function", **TOOL}],
    [{"type": "function", "strict": None, "function": {**TOOL, "strict": None}}],
    [{"type": None, "function": TOOL}],
    [{"function": json.dumps(TOOL)}],
    [json.dumps(TOOL)],
    [json.dumps({"type": "function", "function": TOOL})],
    json.dumps([TOOL]),
    json.dumps([json.dumps(TOOL)]),
    [{**TOOL, "parameters": json.dumps(SCHEMA)}],
    [{"name": "weather", "description": "Weather.", "input_schema": SCHEMA}],
    [{"type": "custom", "name": "weather", "description": "Weather.", "input_schema": SCHEMA}],
    [{"name": "weather", "description": "Weather.", "inputSchema": json.dumps(SCHEMA)}],
    [{**TOOL, "parameters": {**SCHEMA, "title": None, "$defs": None, "anyOf": None, "additionalProperties": None}}],
    [{**TOOL, "parameters": {**SCHEMA, "type": "OBJECT"}}],
    [{"name": "weather", "description": "Weather.", "arguments": SCHEMA}],
    [{**TOOL, "parameters": {**SCHEMA, "type": ["object"]}}],
    [{**TOOL, "parameters": {**SCHEMA, "required": '["town"]'}}],
    [{**TOOL, "parameters": {**UNTYPED, "required": ["town"]}}],
])  # fmt: skip
def test_a_tool_however_it_is_written(tools):
    assert fields.tools(tools, "tools") == (TOOL,)


@pytest.mark.parametrize("value", [None, "", " ", [], "[]", "null"])
def test_no_tools(value):
    assert fields.tools(value, "tools") == ()


@pytest.mark.parametrize(
    ("parameters", "read"),
    [
        (None, None),
        ("", None),
        ({}, {}),
        ("{}", {}),
        ({"type": "object", "properties": None}, {"type": "object"}),
        ({"type": "object", "properties": None, "required": None}, {"type": "object"}),
        (
            {"type": "object", "properties": {}, "required": ""},
            {"type": "object", "properties": {}},
        ),
        (
            {"properties": {"a": None, "b": True}},
            {"properties": {"a": {}, "b": {}}, "type": "object"},
        ),
        ({"a": None, "b": {"type": "str"}}, {"a": {}, "b": {"type": "str"}}),
        ({"anyOf": [{"type": "dict"}, None]}, {"anyOf": [{"type": "object"}, {}]}),
        ({"$ref": "#/$defs/A", "$defs": {"A": {"type": "dict"}}}, {"$ref": "#/$defs/A", "$defs": {"A": {"type": "object"}}}),
        (
            {"type": "object", "properties": {"a": {"type": "List[str]", "default": None}}},
            {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "string"}, "default": None}}},
        ),
        (
            {"type": "object", "properties": {"a": {"type": "list", "items": {"type": "float"}}}},
            {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "number"}}}},
        ),
    ],
)  # fmt: skip
def test_parameters_however_they_are_written(parameters, read):
    (tool,) = fields.tools([{"name": "f", "parameters": parameters}], "tools")
    assert tool == {"name": "f"} | ({} if read is None else {"parameters": read})
    for template in TEMPLATES.values():
        assert template.render_prompt([tool], [{"role": "user", "content": "x"}])
        template.render_prompt([tool], [{"role": "user", "content": "x"}], brief=True)


@pytest.mark.parametrize("key", ["$defs", "definitions"])
def test_definitions_beside_the_parameters_are_theirs(key):
    parameters = {"type": "object", "properties": {"a": {"$ref": f"#/{key}/A"}}}
    given = {"name": "f", key: {"A": {"type": "str"}}, "parameters": parameters}
    (tool,) = fields.tools([{"type": "function", "function": given}], "tools")
    assert tool == {"name": "f", "parameters": {**parameters, key: {"A": {"type": "string"}}}}


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ({"name": "f"}, "tools: a list is needed, found dict {'name': 'f'}"),
        ("[", "tools: not JSON: .*: '\\['"),
        ([3], r"tools\[0\]: an object is needed, found int 3"),
        ([{"name": 3}], r"tools\[0\]: name: text is needed, found int 3"),
        ([{"name": " "}], r"tools\[0\]: name: a name is needed, found ' '"),
        ([{}], r"tools\[0\]: name: text is needed, found nothing"),
        ([{"type": "web_search"}], r"tools\[0\]: type: 'web_search' is not 'function'"),
        ([{"type": "custom", "name": "f"}], r"tools\[0\]: type: 'custom' is not 'function'"),
        ([{"type": "function"}], r"tools\[0\]: name: text is needed, found nothing"),
        ([{"name": "f", "description": 3}], r"description: text is needed, found int 3"),
        ([{"name": "f", "parameters": []}], r"parameters: an object is needed, found list \[\]"),
        ([{"name": "f", "parameters": {"a": "int"}}], "parameters: a: an object .* str 'int'"),
        ([{"name": "f", "parameters": {"type": "object", "properties": []}}], "properties: an object"),
        ([{"name": "f", "parameters": {"type": "object", "properties": {"a": 3}}}], "properties: a: .* int 3"),
        ([{"name": "f", "parameters": {**SCHEMA, "required": True}}], "required: a list .* bool True"),
        ([{"name": "f", "parameters": {**SCHEMA, "required": [3]}}], "required: text .* int 3"),
        ([{"name": "f", "parameters": {"anyOf": [{"type": ["object", 3]}]}}], "type: a name or a list of names"),
        ([{"name": "f", "parameters": {"anyOf": [3]}}], r"anyOf\[0\]: an object .* int 3"),
    ],
)  # fmt: skip
def test_a_tool_that_cannot_be_read_names_the_value(tools, message):
    with pytest.raises(RecordError, match=message) as caught:
        fields.tools(tools, "tools")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("call", [
    {"name": "f", "arguments": {"a": 1}},
    {"name": "f", "arguments": '{"a": 1}'},
    {"name": "f", "parameters": {"a": 1}},
    {"name": "f", "arguments": None, "parameters": {"a": 1}},
    {"name": "f", "input": {"a": 1}, "id": "x"},
    {"type": "function", "id": "", "function": {"name": "f", "arguments": '{"a": 1}', "parsed_arguments": None}},
    {"type": "function_call", "call_id": "x", "name": "f", "arguments": '{"a": 1}'},
    '{"name": "f", "arguments": {"a": 1}}',
    {"name": "f", "arguments": json.dumps('{"a": 1}')},
    {"type": "tool_use", "id": "x", "name": "f", "input": {"a": 1}},
    {"function": "f", "arguments": {"a": 1}},
    {"type": "function", "function": '{"name": "f", "arguments": {"a": 1}}'},
])  # fmt: skip
def test_a_call_however_it_is_written(call):
    assert fields.call(call, "call") == {"name": "f", "arguments": {"a": 1}}


@pytest.mark.parametrize(
    "arguments", [{}, {"arguments": None}, {"arguments": " "}, {"arguments": "{}"}]
)
def test_a_call_without_arguments(arguments):
    assert fields.call({"name": "f", **arguments}, "call") == {"name": "f", "arguments": {}}


@pytest.mark.parametrize(
    ("content", "read"),
    [
        (None, None),
        ("", ""),
        ("a", "a"),
        ([], ""),
        ({"type": "text", "text": "a"}, "a"),
        (["a", {"text": "b"}], "ab"),
        ([{"type": "input_text", "text": "a"}, {"type": "output_text", "text": "b", "annotations": []}], "ab"),
        ([{"type": "refusal", "refusal": "no"}], "no"),
        ([{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "a"}], "a"),
    ],
)  # fmt: skip
def test_texts(content, read):
    assert fields.content(content, "content") == read


@pytest.mark.parametrize(
    ("content", "read"),
    [
        (None, ""),
        ("9", "9"),
        ({"rain": True, "ort": "Köln"}, '{"rain": true, "ort": "Köln"}'),
        ([{"a": 1}], '[{"a": 1}]'),
        ([], "[]"),
        (9.5, "9.5"),
        (False, "false"),
        ([{"type": "text", "text": "a"}, {"type": "output_text", "text": "b"}], "ab"),
    ],
)
def test_results(content, read):
    assert fields.result(content, "content") == read


@pytest.mark.parametrize("field", fields.THOUGHTS)
def test_thoughts(field):
    assert fields.thought({field: "hm", "content": "x"}, "m") == "hm"
    assert fields.thought({field: None}, "m") is fields.thought({field: " "}, "m") is None
    both = {name: "hm" for name in fields.THOUGHTS}
    assert fields.thought(both, "m") == "hm"
    assert fields.thought({field: [{"type": "thinking", "thinking": "hm"}]}, "m") == "hm"
    with pytest.raises(RecordError, match=f"m: {field}: a list is needed, found int 3"):
        fields.thought({field: 3}, "m")
    other = next(name for name in fields.THOUGHTS if name != field)
    with pytest.raises(RecordError, match=r"m: .* and .* differ"):
        fields.thought({field: "a", other: "b"}, "m")


def test_a_thought_in_parts():
    parts = [{"type": "thinking", "thinking": "a"}, {"type": "text", "text": "x"}]
    assert fields.thought({"content": [*parts, {"type": "reasoning", "text": "b"}]}, "m") == "a\nb"
    for said in (["a"], {"content": "a"}, {"summary": [{"type": "summary_text", "text": "a"}]}):
        assert fields.thought({"reasoning": said}, "m") == "a"
    assert fields.thought({"content": [{"type": "redacted_thinking", "data": "x"}]}, "m") is None
    assert fields.thought({"reasoning": "a b", "reasoning_content": "a  b\n"}, "m") == "a  b\n"


def test_a_value_is_shown_in_one_short_line():
    deep = []
    for _ in range(500):
        deep = [deep]
    for value in ("x\n" * 10_000, list(range(10_000)), {"a": deep}, "\ud83d"):
        line = fields.shown(value)
        assert len(line) <= 60 and "\n" not in line and line.encode()
