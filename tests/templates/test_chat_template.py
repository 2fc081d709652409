"""Exported chat templates: OpenAI's messages and tools become the prompt of training, letter for letter."""

import json
import pathlib
import shutil

import pytest

from rest_jax.data.convert import SOURCES
from rest_jax.models.chat_sandbox import rendering
from rest_jax.models.tokenizer import Tokenizer, date_text
from rest_jax.templates import TEMPLATES
from rest_jax.templates.chat_template import trained

OWN_TEMPLATES = pathlib.Path(__file__).parents[1] / "data" / "chat_templates"


def function(name, description=None, **parameters):
    made = {"name": name}
    if description is not None:
        made["description"] = description
    return {
        "type": "function",
        "function": made | ({"parameters": parameters} if parameters else {}),
    }


TOOLS = [
    function(
        "weather",
        "Weather of a town: \"now\", 'then'.",
        type="object",
        properties={
            "town": {"type": "string", "enum": ["Köln", "東京"], "description": "Name"},
            "days": {"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None},
            "unit": {"type": ["string", "null"], "enum": ["C", "F"], "default": "C"},
            "at": {"oneOf": [{"type": "string", "format": "date"}, {"type": "integer"}]},
            "mode": {"enum": ["a", 1, 1.5, True, None, [1], {}]},
            "once": {"const": 3},
            "where": {"type": "object", "properties": {"x": {"type": "number"}}, "title": "W"},
            "tags": {"type": "array", "items": {"type": "string"}, "minItems": 1},
            "any": {},
            "all": {"allOf": [{"type": "string"}, {"maxLength": 3}]},
            "deep": {
                "anyOf": [{"oneOf": [{"type": "string"}, {"type": "boolean"}]}, {"type": "string"}]
            },
        },
        required=["town", "mode"],
    ),
    function("now"),
    function("plain", "No properties", type="object"),
    function("empty", "", type="object", properties={}, required=[]),
    function("loose", "x", type="object", properties={"a": {"type": "string"}}),
    function("map", "x", type="object", additionalProperties={"type": "string"}),
    function("either", "x", anyOf=[{"type": "object"}, {"type": "null"}]),
    function("patterned", "x", type="object", patternProperties={"^a": {}}, properties={}),
]

FLAT = [
    function(
        "flat",
        "x",
        town={"description": 'A "town"', "type": "str, optional", "default": ""},
        type={"type": "List[int]", "minItems": 1},
        properties={"description": "P", "type": "str"},
        none=None,
        any={},
    ),
    function("typed", "x", properties={"a": {"type": "string"}, "b": None}, required=["a"]),
    function("python", "x", type="Dict", properties={"a": {"type": "string"}}),
]


def call(name, arguments, as_text=False):
    shown = json.dumps(arguments, ensure_ascii=False) if as_text else arguments
    return {"id": "0", "type": "function", "function": {"name": name, "arguments": shown}}


def calls(*made, **message):
    numbered = [one | {"id": str(i)} for i, one in enumerate(made)]
    return {"role": "assistant", "content": None, "tool_calls": numbered} | message


def user(text):
    return {"role": "user", "content": text}


def result(text, number=0):
    return {"role": "tool", "tool_call_id": str(number), "content": text}


CHATS = {
    "a question": [user(' Rain in "Köln"?\n\n<b> ')],
    "a system text": [{"role": "system", "content": "Be brief."}, user("Go")],
    "two system texts, one amid": [
        {"role": "system", "content": "A"},
        {"role": "system", "content": "B"},
        user("Go"),
        {"role": "assistant", "content": "z"},
        {"role": "system", "content": "From here on be kind."},
        user("q"),
    ],
    "calls and results": [
        user("Rain?"),
        calls(call("weather", {"town": "Köln", "days": [1, None, 1.5, True, {"b": "<ü>"}]})),
        result('{"rain": "Ö"}'),
        {"role": "assistant", "content": "Yes."},
        user("Thanks"),
    ],
    "parallel calls with thought and text": [
        user("Both"),
        calls(
            call("now", {}),
            call("empty", {"a": "\n"}, True),
            content="I look",
            reasoning_content="Two of them.",
        ),
        result("9"),
        result("8", 1),
        {"role": "assistant", "content": "ok", "reasoning_content": "Done."},
        user("more"),
    ],
    "parts": [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    ],
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory, configs_dir):
    """(a chat template of tests/data) -> a tokenizer with it."""

    def make(name):
        folder = tmp_path_factory.mktemp("tokenizer") / name
        ignore = shutil.ignore_patterns("*.safetensors")
        shutil.copytree(configs_dir / "quickstart_policy", folder, ignore=ignore)
        shutil.copy(OWN_TEMPLATES / f"{name}.jinja", folder / "chat_template.jinja")
        return Tokenizer.load(folder)

    return make


@pytest.mark.parametrize("tools", [TOOLS, []], ids=["tools", "none"])
@pytest.mark.parametrize(
    ("name", "brief"),
    [("toolrl", False), ("toolrl", True), ("hermes", False), ("llama3", False)],
    ids=["toolrl", "brief toolrl", "hermes", "llama3"],
)
def test_a_chat_becomes_the_prompt_of_training(tokenizer, name, brief, tools):
    check_prompts(tokenizer("smollm2"), name, brief, tools)


@pytest.mark.parametrize("brief", [False, True])
def test_tools_in_the_flat_form_are_those_of_training(tokenizer, brief):
    check_prompts(tokenizer("smollm2"), "toolrl", brief, FLAT)


@pytest.mark.parametrize("name", ["toolrl", "hermes", "llama3"])
def test_what_a_template_begins_with_is_kept(tokenizer, name):
    made = tokenizer("smollm2")
    made.hf.chat_template = "\n  {% set x = 1 %}" + made.hf.chat_template
    assert made.render_prompt([user("x")]).startswith("\n<|im_start|>")
    check_prompts(made, name, False, TOOLS)


def check_prompts(made, name, brief, tools):
    exported = trained(name, made.hf.chat_template, brief)
    for label, chat in CHATS.items():
        answered = [*chat, {"role": "assistant", "content": "end"}]
        record = SOURCES["openai"]({"messages": answered, "tools": tools}, "r", "here")[-1]
        expected = made.render_prompt(record.prompt_messages(TEMPLATES[name], brief))
        with rendering(date_text):
            found = made.hf.apply_chat_template(
                chat,
                tools=tools or None,
                add_generation_prompt=True,
                tokenize=False,
                chat_template=exported,
            )
        assert found == expected, label
