"""Reading rendered toolrl prompts back: the inverse of rendering, and the forms that API-Bank has."""

import hypothesis
import hypothesis.strategies as st
import pytest

from rest_jax.data.convert.rlla import read_prompt, structure
from rest_jax.templates import TEMPLATES
from rest_jax.templates.toolrl import INTRODUCTION, RULES

WORDS = st.text("ab:.é \n1", max_size=9).map(str.strip)
NAMES = st.text("ab .-", min_size=1, max_size=9).map(lambda s: f"f{s}")
VALUES = st.none() | st.booleans() | st.integers() | st.lists(WORDS, max_size=2) | WORDS
TOOL = st.fixed_dictionaries(
    {
        "name": NAMES,
        "description": WORDS,
        "parameters": st.dictionaries(NAMES, st.fixed_dictionaries({"type": WORDS}), max_size=2),
    }
)
CALL = st.fixed_dictionaries(
    {"name": NAMES, "arguments": st.dictionaries(NAMES, VALUES, max_size=2)}
)
USER = st.fixed_dictionaries({"role": st.just("user"), "content": WORDS})
OBSERVATION = st.fixed_dictionaries({"role": st.just("tool"), "content": WORDS})
ACTION = st.fixed_dictionaries(
    {
        "role": st.just("assistant"),
        "content": st.none() | WORDS,
        "calls": st.lists(CALL, min_size=1, max_size=3),
    },
    optional={"think": WORDS},
)
REPLY = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": WORDS}, optional={"think": WORDS}
)


@hypothesis.given(
    st.lists(TOOL, max_size=3), st.lists(USER | OBSERVATION | ACTION | REPLY, min_size=1)
)
def test_reading_is_the_inverse_of_rendering(tools, history):
    system, user = TEMPLATES["toolrl"].render_prompt(tools, history)
    assert read_prompt(system["content"], user["content"]) == (tuple(tools), tuple(history))
    fields = structure([system, user])
    assert fields == {"tools": tuple(tools), "history": tuple(history), "messages": None}


def test_system_text_of_the_dialogue():
    history = [{"role": "system", "content": "It is Monday."}, {"role": "user", "content": "Hi"}]
    messages = TEMPLATES["toolrl"].render_prompt([], history)
    assert structure(messages)["history"] == tuple(history)


API_BANK_TOOLS = (
    "1. Name: Lookup\nDescription: Looks up: all.\nParameters: {'a': {'type': 'str', 'description': \"it's\"}}\n"
    "2. Second: The API, with\ntwo lines.\nParameters: {}"
)
API_BANK_USER = """***Dialogue Records History**
<user>Find it.</user>
<response>Sure.</response>
<tool_call>
{"name": "Lookup", "parameters": {"a": "b"}}
</tool_call>
<obs> {'x': None} </obs>
<response>One.</response>
<response>Two.</response>

<user> Go on.</user>

"""


def test_what_api_bank_writes_is_read_and_kept():
    messages = [
        {"role": "system", "content": INTRODUCTION + API_BANK_TOOLS + RULES},
        {"role": "user", "content": API_BANK_USER},
    ]
    fields = structure(messages)
    assert fields["messages"] == tuple(messages)
    assert fields["tools"] == (
        {
            "name": "Lookup",
            "description": "Looks up: all.",
            "parameters": {"a": {"type": "str", "description": "it's"}},
        },
        {"name": "Second", "description": "The API, with\ntwo lines.", "parameters": {}},
    )
    call = {"name": "Lookup", "arguments": {"a": "b"}}
    assert fields["history"] == (
        {"role": "user", "content": "Find it."},
        {"role": "assistant", "content": "Sure.", "calls": [call]},
        {"role": "tool", "content": "{'x': None}"},
        {"role": "assistant", "content": "One."},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "Go on."},
    )


HISTORY = "**Dialogue Records History**\n"


@pytest.mark.parametrize(
    ("system", "user"),
    [
        ("Be kind.", HISTORY),
        (INTRODUCTION, HISTORY),
        (INTRODUCTION + RULES + "more", HISTORY),
        (INTRODUCTION + RULES, "<user> Hi </user>"),
        (INTRODUCTION + RULES, HISTORY + "Hi"),
        (INTRODUCTION + RULES, HISTORY + "<user> Hi"),
        (INTRODUCTION + RULES, HISTORY + "<tool_call>\nf(x)\n</tool_call>"),
        (INTRODUCTION + RULES, HISTORY + '<tool_call>\n{"name": "f"}\n</tool_call>'),
        (INTRODUCTION + RULES, HISTORY + "<tool_call>\n" + "[" * 9999 + "\n</tool_call>"),
        (INTRODUCTION + "1. Name: f\nDescription: g" + RULES, HISTORY),
        (INTRODUCTION + "2. Name: f\nDescription: g\nParameters: {}" + RULES, HISTORY),
        (INTRODUCTION + "1. Name: f\nDescription: g\nParameters: [1]" + RULES, HISTORY),
        (INTRODUCTION + "1. Name: f\nDescription: g\nParameters: open('x')" + RULES, HISTORY),
    ],
)
def test_another_text_is_kept_as_it_is(system, user):
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    assert read_prompt(system, user) is None
    assert structure(messages) == {"tools": (), "history": (), "messages": tuple(messages)}
