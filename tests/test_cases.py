"""What users' own files, logs and model folders have broken, each at the surface where it was seen, with the right outcome.

One row a kind of fault: completions (parser and rewards), chats (`data prepare openai`), tools (prompts, `generate --tools`),
model folders (`convert`, tokenizers) and runs (`train`). Siblings of each kind are in the tests of the module that reads them.
"""

import contextlib
import io
import json
import shutil
import sys
import types

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from rest_jax import cli
from rest_jax.config import RewardConfig
from rest_jax.data.tokenize import Encoder, encode
from rest_jax.models.hf.folder import scan
from rest_jax.models.tokenizer import Tokenizer
from rest_jax.rewards.score import score
from rest_jax.rollout.generate import prompt_record
from rest_jax.templates import TEMPLATES
from rest_jax.tool_calls import Call, Target
from tests import runs

F = Call("f", {"a": 1})
OBJECT = '{"name": "f", "arguments": {"a": 1}}'
BLOCK = f"<tool_call>\n{OBJECT}\n</tool_call>"
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}


def refused(capsys, *words: str) -> str:
    """The one line of a command that cannot be done."""
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("rest-jax: error: ") and said.count("\n") == 1
    return said


# Completions: (template, whether the prompt opens the thought, gold answer, completion, exact)

ONE, SAID = Target((F,)), Target((), "Use </think> to close")
TAG_INSIDE = Target((Call("f", {"a": "x</think>y"}),))
QUOTED = BLOCK.replace("1", '"x</think>y"')


def toolrl(text, thought="<think> </think>\n"):
    return thought + text.replace("arguments", "parameters")


COMPLETIONS = {
    "a brace too many": ("hermes", False, ONE, BLOCK.replace("}}", "}}}"), False),
    "words before the object": ("hermes", False, ONE, BLOCK.replace("{", "Sure: {", 1), False),
    "words behind the object": ("hermes", False, ONE, BLOCK.replace("}}", "}} done, thanks!"), False),
    "a code fence in the block": ("hermes", False, ONE, BLOCK.replace(OBJECT, f"```json\n{OBJECT}\n```"), False),
    "brackets in the block": ("hermes", False, ONE, BLOCK.replace("{", "[[[{", 1), False),
    "a thought in the block": ("hermes", False, ONE, BLOCK.replace("{", "Let me think. " * 40 + "{", 1), False),
    "a brace too many, toolrl": ("toolrl", False, ONE, toolrl(BLOCK.replace("}}", "}}}")), False),
    "an unreadable object beside": ("toolrl", False, ONE, toolrl(BLOCK.replace("}}", '}}\n{"x": 1}')), False),
    "the prompt opens the thought, toolrl": ("toolrl", True, ONE, toolrl(BLOCK, "why\n</think>\n"), True),
    "the prompt opens the thought, hermes": ("hermes", True, ONE, f"why\n</think>\n\n{BLOCK}", True),
    "the prompt opens the thought, llama3": ("llama3", True, ONE, toolrl(OBJECT, "why\n</think>\n\n"), True),
    "a tag in a string, hermes": ("hermes", False, TAG_INSIDE, QUOTED, True),
    "a tag in a string, toolrl": ("toolrl", False, TAG_INSIDE, toolrl(QUOTED), True),
    "a tag in a string, llama3": ("llama3", False, TAG_INSIDE, toolrl(QUOTED[12:-13], ""), True),
    "a tag in the text": ("hermes", False, SAID, f"<think>\na\n</think>\n\n{SAID.response}", True),
}  # fmt: skip


@pytest.mark.parametrize("case", list(COMPLETIONS))
def test_completions(case):
    template, opened, target, text, exact = COMPLETIONS[case]
    form = TEMPLATES[template].behind(opened)
    found = score(form.parse(text.encode()), target, template, RewardConfig(), 1.0)
    best = 4.0 if target.calls else 1.0
    assert found.exact == exact and (found.reward == best) == exact


# Chats: (message of the assistant, or messages; tools; gold answer, or the reason to set the dialogue aside)


def said(content, **more):
    return {"role": "assistant", "content": content, **more}


def called(*calls, **more):
    return said(None, tool_calls=list(calls), **more)


FUNCTION = {"name": "f", "arguments": '{"a": 1}'}
CALL = {"id": "c", "type": "function", "function": FUNCTION}
NO_PARAMETERS = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "properties": None}},
}
AS_TEXT = {"type": "function", "function": {"name": "f", "parameters": json.dumps(SCHEMA)}}
EMPTY_ID = {**CALL, "id": ""}
RESULTS = [{"role": "tool", "tool_call_id": "", "content": text} for text in ("one", "two")]
CHATS = {
    "a call as text": (said(BLOCK), [TOOL], Target((F,))),
    "a call as text that cannot be read": (said(BLOCK.replace("}}", "}")), [TOOL], "a call that cannot be read"),
    "white space beside a call": (called(CALL) | {"content": "\n\n"}, [TOOL], Target((F,))),
    "a thought as text": (said("<think>\nhmm\n</think>\n\nHello"), [], Target((), "Hello", "hmm")),
    "the thought under reasoning": (said("Hi", reasoning="because"), [], Target((), "Hi", "because")),
    "the thought under thinking": (said("Hi", thinking="because"), [], Target((), "Hi", "because")),
    "properties null": (called(CALL), [NO_PARAMETERS], Target((F,))),
    "ids that are empty": ([called(EMPTY_ID, EMPTY_ID), *RESULTS, said("done")], [TOOL], Target((), "done")),
    "function_call beside tool_calls": (called(CALL, function_call=FUNCTION), [TOOL], Target((F,))),
    "tool_calls as a text of JSON": (said(None, tool_calls=json.dumps([CALL])), [TOOL], Target((F,))),
    "tools as texts of JSON": (called(CALL), [json.dumps(TOOL)], Target((F,))),
    "parameters as a text of JSON": (called(CALL), [AS_TEXT], Target((F,))),
}  # fmt: skip


@pytest.fixture(scope="module", params=list(TEMPLATES))
def prepared(request, tmp_path_factory):
    """What `data prepare` makes of each chat, for a template: its last record's target, or the reason to set it aside."""
    folder = tmp_path_factory.mktemp("chats")
    items = []
    for answer, tools, _ in CHATS.values():
        answers = answer if isinstance(answer, list) else [answer]
        items.append({"messages": [{"role": "user", "content": "go"}, *answers], "tools": tools})
    (folder / "in.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    words = [str(folder / "in.jsonl"), str(folder / "out.jsonl"), f"data.template={request.param}"]
    with contextlib.redirect_stdout(io.StringIO()):
        assert cli.main(["data", "prepare", "openai", *words, "--keep-duplicates"]) == 0
    found = {}
    for line in (folder / "out.jsonl").read_text().splitlines():
        record = json.loads(line)
        found[int(record["id"].split("/")[0].removeprefix("in-"))] = record
    for line in (folder / "out.jsonl.rejected.jsonl").read_text().splitlines():
        aside = json.loads(line)
        found[int(aside["where"].rsplit(" ", 1)[1]) - 1] = aside["reason"]
    return dict(zip(CHATS, map(found.__getitem__, range(len(CHATS))), strict=True))


@pytest.mark.parametrize("case", list(CHATS))
def test_chats(prepared, case):
    found, (*_, expected) = prepared[case], CHATS[case]
    if isinstance(expected, str):
        assert expected in found
        return
    calls = [{"name": c.name, "arguments": c.arguments} for c in expected.calls]
    target = {"calls": calls, "response": expected.response, "think": expected.think}
    assert {"think": None, **found["target"]} == target
    results = [turn["content"] for turn in found["history"] if turn["role"] == "tool"]
    assert results == (["one", "two"] if case == "ids that are empty" else [])


# Tools: (parameters, template, what the prompt shows)

UNION = {"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None}
EITHER = {"oneOf": [{"type": "boolean"}, {"type": "integer"}]}
DEFINED = {
    "type": "object",
    "properties": {"r": {"$ref": "#/$defs/Unit"}},
    "$defs": {"Unit": {"type": "string", "enum": ["C", "F"]}},
}
TOOLS = {
    "a union with null": (UNION, "toolrl", '"type": "integer, optional"'),
    "a list of types": ({"type": ["integer", "null"]}, "toolrl", '"type": "integer or null, optional"'),
    "one of several types": (EITHER, "toolrl", '"type": "boolean or integer, optional"'),
    "a reference": (DEFINED, "toolrl", '"enum": ["C", "F"]'),
    "letters, llama3": ({"type": "string", "description": "查询é"}, "llama3", '"description": "查询é"'),
    "letters, toolrl": ({"type": "string", "description": "查询é"}, "toolrl", '"description": "查询é"'),
}  # fmt: skip


@pytest.mark.parametrize("case", list(TOOLS))
def test_tools_in_prompts(case):
    schema, template, shown = TOOLS[case]
    if "properties" not in schema:
        schema = {"type": "object", "properties": {"n": schema}, "required": []}
    tools, history = [{"name": "f", "parameters": schema}], [{"role": "user", "content": "go"}]
    messages = TEMPLATES[template].render_prompt(tools, history)
    assert shown in "".join(message["content"] for message in messages)


PARAMETERS = {
    "OpenAI's form": ([TOOL], SCHEMA),
    "one object": ([{"name": "f", "parameters": SCHEMA}], SCHEMA),
    "Anthropic's form": ([{"name": "f", "input_schema": SCHEMA}], SCHEMA),
    "properties null": ([NO_PARAMETERS], {"type": "object"}),
    "no type": ([{"name": "f", "parameters": {"properties": {"a": {}}}}], {"properties": {"a": {}}, "type": "object"}),
    "required a flag": ([{"name": "f", "parameters": {"type": "object", "required": True}}], "required: a list is needed"),
    "name a number": ([{"name": 3}], "name: text is needed, found int 3"),
    "parameters a list": ([{"name": "f", "parameters": []}], "parameters: an object is needed"),
    "a parameter a word": ([{"name": "f", "parameters": {"a": "int"}}], "a: an object is needed"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(PARAMETERS))
def test_the_tools_of_generate(tmp_path, capsys, case):
    tools, expected = PARAMETERS[case]
    file = tmp_path / "tools.json"
    file.write_text(json.dumps(tools))
    if isinstance(expected, str):
        words = ("generate", "nowhere", "--prompt", "hi", "--tools", str(file))
        assert expected in refused(capsys, *words)
        return
    record = prompt_record("hi", str(file))
    assert record.tools[0]["parameters"] == expected
    for template in TEMPLATES.values():
        assert record.prompt_messages(template)


# Model folders


def test_a_prompt_that_opens_the_thought_is_continued(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "model")
    path = folder / "chat_template.jinja"
    text = path.read_text().replace("assistant\n", "assistant\n<think>\n")
    path.write_text(text)
    tokenizer = Tokenizer.load(folder)
    record = prompt_record("go", None)
    for think in ("why", None):
        gold = type(record)(record.id, "", (), record.history, Target((F,), None, think))
        for template in TEMPLATES.values():
            encoder = Encoder(tokenizer, template, supervised=True)
            _, (prompts, answers), _ = encode([gold], encoder)
            prompt, answer = tokenizer.text(prompts[0]), tokenizer.text(answers[0])
            assert prompt.endswith("<think>\n") and "<think>" not in answer
            assert answer.strip().startswith(think or "</think>") and answer.count("</think>") == 1


def test_the_end_of_a_turn_is_that_of_the_chat_template(model, tmp_path, capsys):
    folder = shutil.copytree(model, tmp_path / "model")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": "<|endoftext|>"}))
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.text([tokenizer.end_id]) == "<|im_end|>"
    assert tokenizer.end_id in tokenizer.stop_ids
    assert "its eos is '<|endoftext|>'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "settings",
    [{"num_return_sequences": 4}, {"max_new_tokens": -1}, {"do_sample": "maybe"}],
    ids=["greedy with several", "a length below zero", "a word for a flag"],
)
def test_a_generation_config_is_needed_for_its_eos_alone(model, tmp_path, settings):
    folder = shutil.copytree(model, tmp_path / "model")
    path = folder / "generation_config.json"
    path.write_text(json.dumps(settings | {"eos_token_id": [2, 5]}))
    assert {2, 5} <= set(Tokenizer.load(folder).stop_ids)


def test_a_single_file_counts_and_computed_buffers_do_not(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(4, "f4") for i in (0, 1)}
    save_file(weights | buffers, folder / "model.safetensors", {"format": "pt"})
    others = {name: array + 1 for name, array in weights.items()}
    save_file(others, folder / "model-00001-of-00001.safetensors", {"format": "pt"})
    index = {"weight_map": dict.fromkeys(others, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    found = scan(folder)
    assert found.keys() == weights.keys()
    for name, tensor in found.items():
        np.testing.assert_array_equal(tensor.read(), weights[name])


# Runs


def write_config(tmp_path, source, **sections):
    path = tmp_path / "mine.yaml"
    raw = {"name": "mine", "output": str(tmp_path / "runs"), "model": {"source": str(source)}}
    path.write_text(yaml.safe_dump(raw | sections))
    return str(path)


def test_a_run_must_fit_into_the_positions_of_its_model(model, tmp_path, capsys):
    data = {"synthetic_size": 8, "eval": None, "brief_prompt": True, "max_prompt_tokens": 8192}
    rollout = {"prompts_per_step": 8, "max_response_tokens": 8192}
    path = write_config(tmp_path, model, data=data, rollout=rollout)
    said = refused(capsys, "train", path, "--dry-run")
    assert "8,192 tokens) exceeds the model's 1,024 positions" in said
    assert not (tmp_path / "runs").exists()


def test_a_prompt_must_fit_into_the_positions_of_the_model(model, tmp_path, capsys):
    history = [{"role": "user", "content": "go on " * 2000}]
    record = {"id": "long", "history": history, "target": {"response": "no"}}
    (tmp_path / "long.jsonl").write_text(json.dumps(record))
    words = [str(model), str(tmp_path / "long.jsonl"), "data.max_prompt_tokens=16384"]
    assert "exceeds the model's 1,024 positions" in refused(capsys, "evaluate", *words)


def test_a_tracker_without_a_login_is_told_before_the_model_is_loaded(
    tmp_path, monkeypatch, capsys
):
    def login(verify):
        raise RuntimeError("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(login=login))
    path = write_config(tmp_path, tmp_path / "nowhere")
    said = refused(capsys, "train", path, "train.wandb_project=p")
    assert "train.wandb_project: " in said and "WANDB_MODE=offline" in said
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("text", ["name: a\nname: b\n", "data: {train: a}\nseed: 1\ndata: {}\n"])
def test_a_key_twice_in_a_file_is_refused(tmp_path, capsys, text):
    (tmp_path / "twice.yaml").write_text(text)
    said = refused(capsys, "train", "scale/tiny", str(tmp_path / "twice.yaml"), "--dry-run")
    assert "found duplicate key" in said and "twice.yaml: line" in said


@pytest.mark.slow
def test_a_run_does_not_resume_over_other_records(model, tmp_path):
    raw = runs.recipe(model, tmp_path, data={"train": str(tmp_path / "data.jsonl"), "eval": None})
    for name, code in (("old", 0), ("new", 2)):
        with (tmp_path / "data.jsonl").open("w") as file:
            for i in range(8):
                history = [{"role": "user", "content": f"{name}{i}"}]
                answer = {"calls": [{"name": "f", "arguments": {"a": i}}]}
                record = {"id": f"{i}", "tools": [{"name": "f"}], "history": history}
                file.write(json.dumps(record | {"target": answer}) + "\n")
        raw["train"]["steps"] = 2 if name == "old" else 4
        out = runs.finish(runs.start("train", raw, tmp_path), code)
    assert "made of other records, prompts than are here now" in out and "Traceback" not in out
