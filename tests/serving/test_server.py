"""What a server needs before it serves: the format of its tools, an address."""

import concurrent.futures
import contextlib
import os
import pathlib
import signal
import socket
import time

import httpx
import pytest

from rest_jax import cli
from rest_jax.config import MeshConfig, from_overrides
from rest_jax.data.tokenize import Encoder
from rest_jax.errors import UserError
from rest_jax.run.load import load_policy
from rest_jax.serving import server
from rest_jax.serving.engine import Engine
from rest_jax.serving.prompts import Served
from rest_jax.serving.server import listen, template_of, url
from rest_jax.templates import TEMPLATES
from tests import runs
from tests.serving.servers import FakeStream

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


def test_all_words_that_are_missing_are_told_at_once(configs_dir, capsys):
    folder = configs_dir / "quickstart_policy"
    assert cli.main(["serve", str(folder), "--port", "0"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--template toolrl | hermes | llama3; and " in error
    words = "data.max_prompt_tokens=512 rollout.max_response_tokens=512"
    assert "exceeds the model's 1,024 positions" in error and words in error
    loaded = load_policy(config().model.model_copy(update={"source": str(folder)}), MeshConfig())
    assert server._checked_template(config("data.template=hermes", *words.split()), loaded)


def test_a_port_in_use_is_one_line(capsys, tmp_path):
    (tmp_path / "config.json").touch()
    with listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        assert url(first) == f"http://127.0.0.1:{port}"
        assert cli.main(["serve", str(tmp_path), "--port", str(port)]) == 2
    error = capsys.readouterr().err
    assert f"127.0.0.1:{port}: Address already in use" in error and error.count("\n") == 1


@pytest.mark.parametrize("host", ["x" * 300, "\udcff", "no host"])
def test_an_address_that_is_none_is_one_line(host):
    with pytest.raises(UserError, match="name another --host or --port"):
        listen(host, 0)


@pytest.mark.parametrize(
    "failure", [None, RuntimeError("out of memory")], ids=["signal", "failure"]
)
def test_the_command_serves_until_its_end(tokenizer, monkeypatch, capsys, failure):
    stream = FakeStream(tokenizer, seconds=0.05)
    served = Served("tiny", Encoder(tokenizer, TEMPLATES["hermes"]), 64, 64)
    monkeypatch.setattr(server, "load", lambda *_: (served, Engine(stream, 8)))
    monkeypatch.setattr(cli, "_load_model", lambda *_: None)
    port = runs.free_port()

    def ask() -> tuple[int, str]:
        body, link = (
            {"prompt": "x", "max_tokens": 60},
            httpx.Client(base_url=f"http://127.0.0.1:{port}"),
        )
        while True:
            with contextlib.suppress(httpx.ConnectError):
                link.get("/health")
                break
        post = pool.submit(link.post, "/v1/completions", json=body)
        while not stream.running:
            time.sleep(0.01)
        stream.failure = failure
        if failure is None:
            os.kill(os.getpid(), signal.SIGTERM)
        return post.result().status_code, post.result().text

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        asked = pool.submit(ask)
        code = cli.main(["serve", "policy", "--port", str(port)])
        status, text = asked.result()
    out, err = capsys.readouterr()
    assert out.startswith(
        f"tiny at http://127.0.0.1:{port}/v1: template hermes, prompts of up to 64"
    )
    if failure is None:
        assert (code, status, err) == (0, 200, "")
    else:
        assert (code, status) == (1, 503) and "the engine has failed: out of memory" in text
        assert err.splitlines()[-1] == "rest-jax: error: serve: the engine failed: out of memory"


def test_an_address_of_others_is_warned_of(capsys):
    with listen("0.0.0.0", 0) as listener:
        socket.create_connection(("127.0.0.1", listener.getsockname()[1])).close()
    assert "0.0.0.0 may be reached from other machines" in capsys.readouterr().err
