"""What a server needs before it serves: the format of its tools, an address."""

import pathlib
import socket

import pytest

from rest_jax import cli
from rest_jax.config import from_overrides
from rest_jax.errors import UserError
from rest_jax.serving.server import listen, template_of, url

CHATS = pathlib.Path(__file__).parent.parent / "data" / "chat_templates"


def config(*overrides: str):
    return from_overrides({"name": "x", "model": {"source": "policy"}}, overrides)


@pytest.mark.parametrize(("chat", "name"), [
    ("qwen2.5", "hermes"), ("qwen3", "hermes"), ("llama3.1", "llama3"), ("llama3.2", "llama3"),
])  # fmt: skip
def test_the_format_is_read_off_the_chat_template(tokenizer, monkeypatch, chat, name):
    monkeypatch.setattr(tokenizer.hf, "chat_template", (CHATS / f"{chat}.jinja").read_text())
    assert template_of(config(), tokenizer).name == name
    assert template_of(config("data.template=toolrl"), tokenizer).name == "toolrl"


def test_no_format_of_tools(tokenizer):
    with pytest.raises(UserError, match=r"model policy: .* --template toolrl \| hermes \| llama3"):
        template_of(config(), tokenizer)


def test_a_port_in_use_is_one_line(capsys, tmp_path):
    (tmp_path / "config.json").touch()
    with listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        assert url(first) == f"http://127.0.0.1:{port}"
        assert cli.main(["serve", str(tmp_path), "--port", str(port)]) == 2
    error = capsys.readouterr().err
    assert f"127.0.0.1:{port}: Address already in use" in error and error.count("\n") == 1


def test_an_address_of_others_is_warned_of(capsys):
    with listen("0.0.0.0", 0) as listener:
        socket.create_connection(("127.0.0.1", listener.getsockname()[1])).close()
    assert "0.0.0.0 may be reached from other machines" in capsys.readouterr().err
