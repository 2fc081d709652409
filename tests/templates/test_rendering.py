"""Prompts and gold answers: their layout, and that what is rendered is parsed back."""

import json
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import pytest

from rest_jax.rewards.score import format_score
from rest_jax.templates import TEMPLATES
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
