"""The record of a prompt and a file of tools, read as the tools of any data are; prompts that are refused."""

import json
import types

import pytest

from rest_jax.config import Config
from rest_jax.errors import UserError
from rest_jax.models.tokenizer import Tokenizer
from rest_jax.rollout import generate
from rest_jax.rollout.generate import prompt_record

TOOL = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}


@pytest.mark.parametrize("tools", [
    [TOOL],
    [{"type": "function", "function": TOOL}],
    [{"type": "function", **TOOL}],
    [{"name": "f", "input_schema": TOOL["parameters"]}],
    [json.dumps(TOOL)],
])  # fmt: skip
def test_tools_of_a_request(tmp_path, tools):
    path = tmp_path / "tools.json"
    path.write_text(json.dumps(tools), encoding="utf-8-sig")
    record = prompt_record("hi", str(path))
    assert record.tools == (TOOL,) and record.history == ({"role": "user", "content": "hi"},)
    assert prompt_record("hi", None).tools == ()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"name": "f"}', "a list is needed, found dict"),
        (b"[", "not JSON"),
        (b"\xff", "not UTF-8"),
        (b'[{"name": 3}]', r"\[0\]: name: text is needed, found int 3"),
        (b'[{"name": "f", "parameters": []}]', r"\[0\]: parameters: an object is needed"),
        (b'[{"name": "f", "parameters": {"a": "int"}}]', "parameters: a: an object is needed"),
        (
            b'[{"name": "f", "parameters": {"type": "object", "required": true}}]',
            "required: a list is needed, found bool True",
        ),
        (None, "No such file"),
    ],
)
def test_a_file_that_lists_no_tools_is_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "tools.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"tools {path}.*{message}") as caught:
        prompt_record("hi", str(path))
    assert "\n" not in str(caught.value)


def test_prompts_that_the_chat_template_refuses_are_told(configs_dir, monkeypatch):
    tokenizer = Tokenizer.load(configs_dir / "quickstart_policy")
    tokenizer.hf.chat_template = "{{ raise_exception('no roles') }}"
    policy = types.SimpleNamespace(tokenizer=tokenizer)
    monkeypatch.setattr(generate, "load_policy", lambda *_: policy)
    config = Config.model_validate({"name": "x", "model": {"source": "none"}})
    with pytest.raises(UserError, match=r"1 set aside .* refuses it: no roles, as in 'prompt'"):
        next(generate.generate(config, [prompt_record("hi", None)], 1, True))
