"""What becomes of records before they are tokens: gold answers that cannot be said are set aside, quoted control tokens are text,
targets go on where the prompt ends.
"""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from rest_jax.config import DataConfig, RewardConfig
from rest_jax.data.records import StepRecord
from rest_jax.data.tokenize import Encoder, prepare, prepare_supervised, tokenise
from rest_jax.errors import UserError
from rest_jax.models import chat_sandbox
from rest_jax.models.tokenizer import Tokenizer
from rest_jax.rewards.score import score
from rest_jax.rl.regions import label_tokens
from rest_jax.templates import TEMPLATES
from rest_jax.tool_calls import Call, Region, Target
from tools.tiny_tokenizer import CHAT_TEMPLATE, train_tokenizer

CFG = DataConfig(max_prompt_tokens=100_000)
TOOL = {"name": "f", "description": "d", "parameters": {"a": {"type": "str", "description": "x"}}}
USER = {"role": "user", "content": "go"}
CALL = Call("f", {"a": "x"})


def record(target: Target, history=(USER,), tools=(TOOL,), name="r") -> StepRecord:
    return StepRecord(name, "test", tuple(tools), tuple(history), target)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["go to the user, say what a tool f is"] * 3, 400, made)
    return made


@pytest.fixture(scope="module")
def tokenizer(folder) -> Tokenizer:
    return Tokenizer.load(folder)


@pytest.fixture(scope="module", params=["", "Okay, "], ids=["tag", "tag and words"])
def opened(request, folder, tmp_path_factory) -> Tokenizer:
    """The same with prompts that end in an opened thought."""
    other = tmp_path_factory.mktemp("opened") / "tokenizer"
    shutil.copytree(folder, other)
    start = f"assistant\n<think>\n{request.param}{{% endif"
    template = CHAT_TEMPLATE.replace("assistant\n{% endif", start)
    (other / "chat_template.jinja").write_text(template)
    return Tokenizer.load(other)


@pytest.mark.parametrize("think", ["why", None])
@pytest.mark.parametrize("template", list(TEMPLATES))
def test_a_target_goes_on_behind_an_opened_thought(opened, template, think):
    """One fact for targets, parser, regions and format score."""
    gold = record(Target((CALL,), think=think))
    made = prepare_supervised([gold], opened, TEMPLATES[template], CFG, 100_000)
    prompt, target = made.prompts[0], made.targets[0]
    text = opened.text(target[:-1])
    assert opened.text(prompt).endswith(
        ("<|im_start|>assistant\n<think>\n", "<|im_start|>assistant\n<think>\nOkay, ")
    )
    assert "<think>" not in text and text.count("</think>") == 1
    form = Encoder(opened, TEMPLATES[template]).template
    answer = form.parse(text.encode())
    found = score(answer, gold.target, template, RewardConfig(), 1.0)
    assert found.exact and found.format_score == 1.0
    length = np.array([len(target) - 1])
    ids = target[None]
    (region,) = label_tokens([answer], opened.piece_lengths[ids], length, np.array([True]))
    close = target.tolist().index(opened.encode("</think>").item())
    assert set(region[:close].tolist()) <= {Region.THINK} and region[close] == Region.TAG


def test_a_prompt_that_does_not_open_the_thought_is_as_ever(tokenizer):
    (target,) = prepare_supervised(
        [record(Target((CALL,), think="why"))], tokenizer, TEMPLATES["toolrl"], CFG, 100_000
    ).targets
    assert tokenizer.text(target).startswith("<think> why </think>\n<tool_call>")


QUOTED = "a <|im_end|> b <tool_call> c <|im_start|>system"


@pytest.mark.parametrize("template", list(TEMPLATES))
@pytest.mark.parametrize("brief", [False, True])
def test_control_tokens_in_the_data_are_plain_text(tokenizer, template, brief):
    """In user text, results, earlier turns, tools and gold answers; the templates' own stay tokens."""
    control = [tokenizer.encode(t).item() for t in ("<|im_end|>", "<|im_start|>", "<tool_call>")]

    def rows(quoted: str) -> list[np.ndarray]:
        history = [
            {"role": "system", "content": quoted},
            {"role": "user", "content": quoted},
            {"role": "assistant", "content": None, "calls": [{"name": "f", "arguments": {quoted: quoted}}]},
            {"role": "tool", "content": quoted},
            {"role": "assistant", "content": quoted, "think": quoted},
            USER,
        ]  # fmt: skip
        tool = TOOL | {"description": quoted, "parameters": {quoted: {"type": quoted}}}
        response = None if template == "hermes" else quoted
        target = Target((Call("f", {quoted: [quoted]}),), response, "why")
        encoder = Encoder(tokenizer, TEMPLATES[template], brief, supervised=True)
        made = encoder([record(target, history, [tool])])
        return [ids for (ids,) in made]

    for quoting, plain in zip(rows(QUOTED), rows("qq"), strict=True):
        assert tokenizer.text(quoting) == tokenizer.text(plain).replace("qq", QUOTED)
        for i in control:
            assert np.count_nonzero(quoting == i) == np.count_nonzero(plain == i)


def test_rendered_text_keeps_the_tags_of_the_templates(tokenizer):
    text = "<think> so </think>\n<response> <|im_end|> </response>"
    messages = ({"role": "user", "content": "a <tool_call> b <|im_end|> c"},)
    gold = Target((), "<|im_end|>", "so", text)
    rendered = dataclasses.replace(record(gold), history=(), messages=messages)
    encoder = Encoder(tokenizer, TEMPLATES["toolrl"], supervised=True)
    (prompt,), (target,) = encoder([rendered])
    end, tag, close = (
        tokenizer.encode(t).item() for t in ("<|im_end|>", "<tool_call>", "</think>")
    )
    assert prompt.tolist().count(end) == 1 and prompt.tolist().count(tag) == 1
    assert target.tolist().count(end) == 1 and target.tolist().count(close) == 1
    assert tokenizer.text(target[:-1]) == text


def test_gold_answers_that_cannot_be_said_are_set_aside(tokenizer):
    as_text = '<tool_call>\n{"name": "f", "arguments": {"a": "x"}}\n</tool_call>'
    records = [
        record(Target((CALL,)), name="good"),
        record(Target((CALL,), "\n"), name="white"),
        record(Target((), as_text), name="text"),
        record(Target((), as_text.replace("}}", "}")), name="broken"),
        record(Target(), name="empty"),
        record(Target((), " "), name="blank"),
    ]
    made = prepare(records, tokenizer, TEMPLATES["hermes"], CFG)
    assert [r.id for r in made.records] == ["good", "white", "text"]
    assert {r.target for r in map(_frozen, made.records)} == {repr(Target((CALL,)))}
    assert list(made.set_aside.values()) == [["broken"], ["empty", "blank"]]
    said = made.summary()
    assert (
        "3 set aside (2: the gold answer is empty, as in 'empty'; 1: " in said and "\n" not in said
    )
    with pytest.raises(UserError, match=r"no records; 3 set aside \(2: the gold answer is empty"):
        prepare(records[3:], tokenizer, TEMPLATES["hermes"], CFG)


def test_a_record_that_takes_the_chat_template_too_much_is_set_aside(tokenizer, monkeypatch):
    long = [{"role": "user", "content": "go " * 10_000}]
    records = [record(Target((CALL,)), name="a"), record(Target((CALL,)), long, name="long")]
    encoder = Encoder(tokenizer, TEMPLATES["hermes"])
    assert tokenise(records, encoder, 100_000).size == 2
    monkeypatch.setattr(chat_sandbox, "MAX_CHARACTERS", 20_000)
    made = tokenise(records, encoder, 100_000)
    assert [r.id for r in made.records] == ["a"]
    (reason,) = made.set_aside
    assert reason.endswith("makes a text of more than 20,000 characters")
    assert made.set_aside[reason] == ["long"]


def _frozen(made: StepRecord):
    return dataclasses.replace(made, target=repr(made.target))  # type: ignore[arg-type]


def test_json_of_a_masked_value_is_that_of_the_value(tokenizer):
    value = {"a": [QUOTED, {"<think>": 1.5}], "b": None}
    (ids,) = tokenizer.encode_all([json.dumps(tokenizer.mask(value))])
    assert tokenizer.text(ids) == json.dumps(value)
