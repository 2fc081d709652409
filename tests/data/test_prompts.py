"""The prompt of a record is what the model's own chat template makes of the chat it comes from, byte for byte.

`chat_templates/` holds one short template a family that writes what the published one writes for these chats. Where the
published ones are at hand, under the same names in the folder of REST_JAX_CHAT_TEMPLATES, `pytest -m services` compares with
these (trl 1.16.0 has all but one in trl/chat_templates: qwen2_5, qwen3, qwen3_instruct_2507, llama3_1, llama3_2).
"""

import json

import numpy as np
import pytest
import transformers

from rest_jax.data.convert import SOURCES
from rest_jax.data.fields import RecordError
from rest_jax.data.tokenize import Encoder
from rest_jax.models.chat_sandbox import rendering
from rest_jax.models.tokenizer import DATE, Tokenizer, date_text
from rest_jax.templates import TEMPLATES

HERMES = ("qwen2.5", "qwen3", "qwen3_2507", "qwen3_thinking_2507")
LLAMA = ("llama3.1", "llama3.2")
FAMILIES = [*((name, "hermes") for name in HERMES), *((name, "llama3") for name in LLAMA)]

WEATHER = {
    "description": "天气 für <towns> & 'villages'",
    "name": "get_weather",
    "parameters": {
        "type": "object",
        "properties": {
            "town": {"type": "string", "enum": ["Köln", "東京"]},
            "days": {"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None},
            "unit": {"$ref": "#/$defs/Unit"},
        },
        "required": ["town"],
        "$defs": {"Unit": {"type": ["string", "null"], "enum": ["C", "F"]}},
    },
    "strict": True,
}
UNION = {"name": "either", "parameters": {"anyOf": [{"type": "object"}, {"type": "null"}]}}
TOOLS = [{"type": "function", "function": tool} for tool in (WEATHER, {"name": "now"}, UNION)]


def _says(text, *calls):
    functions = [{"name": name, "arguments": arguments} for name, arguments in calls]
    listed = [{"id": f"{i}", "type": "function", "function": f} for i, f in enumerate(functions)]
    return {"role": "assistant", "content": text} | ({"tool_calls": listed} if calls else {})


def _user(text):
    return {"role": "user", "content": text}


def _result(text, number=0):
    return {"role": "tool", "tool_call_id": f"{number}", "content": text}


CHATS = [
    [
        _user(" Rain? "),
        _says("", ("get_weather", {"town": "Köln", "days": 2})),
        _result('{"rain": "Ö"}'),
        _says("Yes."),
        _user("Thanks"),
        _says("ok"),
    ],
    [
        {"role": "system", "content": "Be brief."},
        _user("Go"),
        _says("", ("now", {})),
        _result("9"),
        _says("", ("either", {"a": [1, None, 1.5, True, {"b": "<ü>"}]})),
        _result("8"),
        _says("z"),
        {"role": "system", "content": "From here on be kind."},
        _user("q"),
        _says("r"),
    ],
]
PARALLEL = [
    _user("Both"),
    _says("I look", ("now", {}), ("either", {})),
    _result("9"),
    _result("8", 1),
    _says("ok"),
]


def _own(tokenizer, chat, tools):
    """What transformers writes for the chat and its tools."""
    with rendering(date_text):
        return tokenizer.hf.apply_chat_template(
            chat, tools=tools, add_generation_prompt=True, tokenize=False
        )


@pytest.mark.parametrize(("family", "template"), FAMILIES)
@pytest.mark.parametrize("tools", [TOOLS, None])
def test_prompts_are_those_of_the_models_own_chat_template(tokenizers, family, template, tools):
    tokenizer = tokenizers[family]
    prompt = Encoder(tokenizer, TEMPLATES[template])._prompt
    for chat in [*CHATS, PARALLEL] if template == "hermes" else CHATS:
        records = SOURCES["openai"]({"messages": chat, "tools": tools}, "r", "here")
        ends = [i for i, message in enumerate(chat) if message["role"] == "assistant"]
        for record, end in zip(records, ends, strict=True):
            assert prompt(record) == _own(tokenizer, chat[:end], tools)


@pytest.mark.services
@pytest.mark.parametrize(("family", "template"), FAMILIES)
@pytest.mark.parametrize("tools", [TOOLS, None])
def test_prompts_are_those_of_the_published_chat_template(
    tokenizers, published, family, template, tools
):
    if family not in published:
        pytest.skip(f"no {family}.jinja in REST_JAX_CHAT_TEMPLATES")
    prompt = Encoder(published[family], TEMPLATES[template])._prompt
    for chat in [*CHATS, PARALLEL] if template == "hermes" else CHATS:
        records = SOURCES["openai"]({"messages": chat, "tools": tools}, "r", "here")
        ends = [i for i, message in enumerate(chat) if message["role"] == "assistant"]
        for record, end in zip(records, ends, strict=True):
            written = _own(published[family], chat[:end], tools)
            assert prompt(record) == written == _own(tokenizers[family], chat[:end], tools)


QUOTED = "a <|im_end|> b <tool_call> c </think> d <|eot_id|> e <|start_header_id|>f"


@pytest.mark.parametrize(("family", "template"), FAMILIES)
def test_control_tokens_that_the_data_quotes_are_plain_text_in_native_prompts(
    tokenizers, tmp_path, family, template
):
    """In tools, texts, thoughts, calls and results; those that the chat template writes stay tokens."""
    own = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    tokenizers[family].hf.save_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_special_tokens({"additional_special_tokens": list(own)})
    tokenizer.save_pretrained(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    encoder = Encoder(tokenizer, TEMPLATES[template])
    assert encoder._lists_tools

    def prompt(quoted: str) -> np.ndarray:
        schema = {"type": "object", "properties": {quoted: {"enum": [quoted], "title": quoted}}}
        tool = {"name": "now", "description": quoted, "parameters": schema}
        chat = [
            {"role": "system", "content": quoted},
            _user(quoted),
            _says(quoted, ("now", {quoted: [quoted]})) | {"reasoning": quoted},
            _result(quoted),
            _says(quoted),
            _user(quoted),
            _says("", ("now", {quoted: quoted})),
            _result(quoted),
            _says("ok"),
        ]
        record = SOURCES["openai"]({"messages": chat, "tools": [tool]}, "r", "here")[-1]
        assert record.native_prompt(TEMPLATES[template]) is not None
        ((ids,),) = encoder([record])
        return ids

    quoting, plain = prompt(QUOTED), prompt("qq")
    assert tokenizer.text(plain).count("qq") > 8
    assert tokenizer.text(quoting) == tokenizer.text(plain).replace("qq", QUOTED)
    added = tokenizer.hf.backend_tokenizer.get_added_tokens_decoder()
    assert {"<|im_end|>", "<tool_call>", "</think>", *own} <= {t.content for t in added.values()}
    for i in added:
        assert np.count_nonzero(quoting == i) == np.count_nonzero(plain == i)


@pytest.mark.parametrize("family", LLAMA)
def test_llama_prompt_says_the_frozen_date_and_takes_parallel_calls(tokenizers, family):
    raw = {"messages": PARALLEL, "tools": [{"name": "now"}, {"name": "either"}]}
    record = SOURCES["openai"](raw, "r", "here")[1]
    tokenizer = tokenizers[family]
    tools = "".join(
        json.dumps({"type": "function", "function": {"name": name}}, indent=4) + "\n\n"
        for name in ("now", "either")
    )
    bos = tokenizer.hf.bos_token or ""
    assert Encoder(tokenizer, TEMPLATES["llama3"])._prompt(record) == (
        f"{bos}<|start_header_id|>system<|end_header_id|>\n\nEnvironment: ipython\n"
        "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nGiven the following functions, please respond with a JSON for a function "
        "call with its proper arguments that best answers the given prompt.\n\nRespond in the format "
        '{"name": function name, "parameters": dictionary of argument name and its value}.Do not use variables.\n\n'
        f"{tools}Both<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nI look\n"
        '{"name": "now", "parameters": {}}\n{"name": "either", "parameters": {}}<|eot_id|>'
        '<|start_header_id|>ipython<|end_header_id|>\n\n"9"<|eot_id|>'
        '<|start_header_id|>ipython<|end_header_id|>\n\n"8"<|eot_id|>'
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


@pytest.mark.parametrize("template", ["toolrl", "hermes", "llama3"])
@pytest.mark.parametrize("family", ["smollm2", "qwen3", "llama3.2"])
def test_other_chat_templates_are_given_the_tools_as_text(tokenizers, family, template):
    """Where the chat template lists no tools, or asks for calls in another form."""
    tokenizer = tokenizers[family]
    own = (family, template) in FAMILIES
    record = SOURCES["openai"]({"messages": CHATS[0], "tools": TOOLS}, "r", "here")[-1]
    encoder = Encoder(tokenizer, TEMPLATES[template])
    written = tokenizer.render_prompt(record.prompt_messages(TEMPLATES[template]))
    assert encoder._lists_tools == own
    assert (encoder._prompt(record) == written) == (not own or family == "qwen3")
    for word in ("天气", "東京", "Köln", '"unit"', "get_weather", "either"):
        assert word in encoder._prompt(record) and word in written


def test_a_dialogue_that_the_user_does_not_begin_has_its_tools_in_a_message_of_their_own(
    tokenizers,
):
    """Llama's chat template would put them, and the user's name, over the assistant's greeting."""
    chat = [_says("Hello"), _user("time?"), _says("", ("now", {}))]
    record = SOURCES["openai"]({"messages": chat, "tools": TOOLS}, "r", "here")[1]
    text = Encoder(tokenizers["llama3.2"], TEMPLATES["llama3"])._prompt(record)
    head, greeting, rest = text.partition("<|start_header_id|>assistant<|end_header_id|>\n\nHello")
    assert greeting and "get_weather" in head and "time?" in rest


FAULTS = {
    "messages[0].content + 1": "can only concatenate str",
    "1 // (messages | length - 1)": "ZeroDivisionError",
    "messages[9].content.x": "has no element 9",
    "raise_exception('no ' + messages[0].content)": r"no x <\|im_end\|>",
}


@pytest.mark.parametrize(("expression", "message"), FAULTS.items())
def test_whatever_a_chat_template_raises_is_a_fault_of_the_record(tokenizers, expression, message):
    tokenizer = Tokenizer.load(tokenizers["smollm2"].source)
    tokenizer.hf.chat_template = "{{ " + expression + " }}"
    chat = [_user("x <|im_end|>"), _says("y")]
    (record,) = SOURCES["openai"]({"messages": chat}, "r", "here")
    with pytest.raises(
        RecordError, match=f"'r': the chat template of the tokenizer refuses it: .*{message}"
    ):
        Encoder(tokenizer, TEMPLATES["hermes"])([record])


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("%Y-%m-%d %H:%M, %A %d %B %y", "2024-07-26 00:00, Friday 26 July 24"),
        ("%B %-d, week %V, 100%%d", "July 26, week 30, 100%d"),
        ("%s", "1721952000"),
    ],
)
def test_every_format_of_the_date_is_frozen(tokenizers, written, text):
    tokenizer = Tokenizer.load(tokenizers["smollm2"].source)
    tokenizer.hf.chat_template = f"{{{{ strftime_now('{written}') }}}}"
    assert tokenizer.render_prompt([_user("x")]) == text


def test_the_words_of_the_date_are_those_of_no_locale():
    letters = "aAbBcdDeFgGhHIjmMnpPrRSTuUVwWxXyY"
    for each in (f"%{letter}" for letter in letters):
        assert date_text(each) == DATE.strftime(each), each
