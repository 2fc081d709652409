"""A server of a small policy, started as a user starts it: many clients at once, clients that leave, the end."""

import concurrent.futures
import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import numpy as np
import openai
import pytest

from tests import runs

pytestmark = pytest.mark.slow
SIZES = ("data.max_prompt_tokens=256", "rollout.max_response_tokens=64", "rollout.decode_slots=8",
         "rollout.cache_tokens=8192", "--template", "hermes", "--port", "0")  # fmt: skip


@contextlib.contextmanager
def started(model, *words: str):
    """(the process, its URL)."""
    command = [sys.executable, "-m", "rest_jax", "serve", str(model), *SIZES, *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env=runs.environment(), **pipes) as process:
        assert process.stdout is not None
        try:
            said = ""
            while (found := re.search(r"http://\S+(?=/v1)", said)) is None:
                line = process.stdout.readline()
                assert line, said
                said += line
            yield process, found[0]
        finally:
            process.kill()


@pytest.fixture(scope="module")
def address(model):
    with started(model, "--name", "tiny") as (process, url):
        yield url
        process.send_signal(signal.SIGINT)
        assert runs.finish(process) == ""


@pytest.fixture
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as made:
        yield made


def meter(address: str, name: str) -> float:
    page = httpx.get(f"{address}/metrics").text
    return float(re.search(rf"^rest_jax_{name} (\S+)$", page, re.MULTILINE)[1])


def drawn(client, number: int, stream: bool = False) -> tuple[list[int], list[float]]:
    """Tokens and log-probabilities of one request of many kinds."""
    options = {
        "model": "tiny",
        "messages": [{"role": "user", "content": f"number {number} " * (1 + number % 5)}],
        "seed": number,
        "max_tokens": 1 + number % 48,
        "temperature": (0, 0.7, 1)[number % 3],
        "top_p": (1, 0.8)[number % 2],
        "logprobs": True,
        "top_logprobs": number % 4,
        "extra_body": {"return_token_ids": True},
    }
    replies = client.chat.completions.create(stream=stream, **options)
    choices = [reply.choices[0] for reply in (replies if stream else [replies])]
    ids = [i for choice in choices for i in getattr(choice, "token_ids", [])]
    tokens = [token for choice in choices if choice.logprobs for token in choice.logprobs.content]
    for token in tokens:
        assert len(token.top_logprobs) == number % 4
        assert all(other.logprob >= token.logprob for other in token.top_logprobs[:1])
    return ids, [token.logprob for token in tokens]


def test_many_at_once_are_answered_as_one_after_the_other(client):
    sequential = [drawn(client, number) for number in range(64)]
    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        together = list(pool.map(lambda n: drawn(client, n, stream=n % 2 == 0), range(64)))
    for one, other in zip(sequential, together, strict=True):
        assert one[0] == other[0] and len(one[0]) == len(one[1])
        np.testing.assert_allclose(one[1], other[1], atol=1e-3)


def test_greedy_tokens_are_the_likeliest(client):
    options = {
        "model": "tiny",
        "prompt": "a b c",
        "max_tokens": 12,
        "temperature": 0,
        "logprobs": 2,
    }
    (choice,) = client.completions.create(**options).choices
    for token, logp, top in zip(choice.logprobs.tokens, choice.logprobs.token_logprobs,
                                choice.logprobs.top_logprobs, strict=True):  # fmt: skip
        assert top[token] == logp == max(top.values())


def test_a_dialogue_that_goes_on_prefills_what_is_new(client, address):
    messages = [{"role": "user", "content": "many words " * 15}]
    before = {name: meter(address, f"{name}_tokens_total") for name in ("prompt", "prefilled")}
    for _ in range(3):
        reply = client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=8, temperature=0
        )
        messages += [reply.choices[0].message, {"role": "user", "content": "go on"}]
    new = {name: meter(address, f"{name}_tokens_total") - before[name] for name in before}
    assert new["prefilled"] < new["prompt"] * 0.7


def test_killed_clients_free_their_slots(address):
    body = json.dumps({"prompt": "x", "max_tokens": 64, "n": 8, "stream": True})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    host, port = address.removeprefix("http://").split(":")
    links = [socket.create_connection((host, int(port))) for _ in range(16)]
    for link in links:
        link.sendall((head + body).encode())
    while meter(address, "active") < 100:
        time.sleep(0.01)
    tokens = meter(address, "tokens_total")
    for link in links:
        link.close()
    while meter(address, "active"):
        time.sleep(0.01)
    assert (
        httpx.post(f"{address}/v1/completions", json={"prompt": "x", "max_tokens": 2}).status_code
        == 200
    )
    assert meter(address, "tokens_total") - tokens < 128 * 64 / 2  # not drawn to their end


def test_sigterm_finishes_what_runs(model):
    with started(model) as (process, url):
        got = []
        body = {"prompt": "x", "max_tokens": 64, "n": 8}
        ask = threading.Thread(
            target=lambda: got.append(httpx.post(f"{url}/v1/completions", json=body, timeout=60))
        )
        ask.start()
        while not meter(url, "active"):
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        ask.join()
        assert runs.finish(process) == ""
    assert got[0].status_code == 200 and len(got[0].json()["choices"]) == 8


def test_a_chat_with_a_policy_that_is_loaded(model):
    command = [
        sys.executable,
        "-m",
        "rest_jax",
        "chat",
        str(model),
        *SIZES[:-2],
        "--temperature",
        "0",
    ]
    done = subprocess.run(
        command,
        env=runs.environment(),
        input="hello\nagain\n",
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.startswith("hf, no tools (") and done.stdout.count("\n> ") >= 3


@pytest.mark.parametrize(("words", "says"), [
    (SIZES[:4], "asks for tool calls in no known format; name the one that it was trained on: --template"),
    ([*SIZES[:3], "rollout.cache_tokens=128", *SIZES[4:]], "rollout.cache_tokens holds 64; raise it"),
    (["data.template=hermes"], "exceeds the model's 1,024 positions"),
])  # fmt: skip
def test_policies_that_cannot_be_served(model, words, says):
    command = [sys.executable, "-m", "rest_jax", "serve", str(model), *words]
    done = subprocess.run(
        command, env=runs.environment(), capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1
