"""Bodies with something wrong in them: a 4xx with OpenAI's error object, never a defect."""

import asyncio
import copy
import json
import random
from collections import Counter

import httpx
import pytest

from rest_jax.data.tokenize import Encoder
from rest_jax.serving.app import Access, make_app
from rest_jax.serving.engine import Engine
from rest_jax.serving.prompts import Served
from rest_jax.templates import TEMPLATES
from tests.serving.servers import FakeStream

CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
CHAT = {
    "model": "tiny",
    "messages": [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c", "content": "3"},
    ],
    "tools": [{"type": "function", "function": {"name": "f", "description": "d", "parameters": PARAMETERS}}],
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "stop": ["a", "b"],
    "max_completion_tokens": 4,
    "temperature": 0.5,
    "stream_options": {"include_usage": True},
    "logprobs": True,
    "top_logprobs": 2,
    "response_format": {"type": "text"},
}  # fmt: skip
COMPLETION = {"prompt": [[1, 2], [3]], "max_tokens": 4, "n": 2, "seed": 3, "logprobs": 1, "stop": "x", "top_p": 1,
              "echo": False, "stream": True, "return_token_ids": True}  # fmt: skip
JUNK = [None, True, False, 0, -1, 10**30, 1.5, 1e308, "", "x", "required", "\ud800", "\x00", [], {}, [1], ["a"], [None],
        [[1]], [{}], {"a": 1}, {"type": "function"}, {"role": "user"}, "{", "é" * 50, 2**63, -(2**63)]  # fmt: skip


def paths(value, path=()):
    yield path
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, each in inner:
        yield from paths(each, (*path, key))


def damaged(draws: random.Random, body: dict) -> bytes:
    """The body with one to three values dropped or replaced, and sometimes bytes of its text."""
    body = json.loads(json.dumps(body))
    for _ in range(draws.choice([1, 1, 1, 2, 3])):
        *path, last = draws.choice([p for p in paths(body) if p] or [("messages",)])
        at = body
        for key in path:
            at = at[key]
        if draws.random() < 0.25 and isinstance(at, dict):
            at.pop(last, None)
        else:
            at[last] = copy.deepcopy(draws.choice(JUNK))
    data = bytearray(json.dumps(body).encode())
    for _ in range(draws.choice([0, 0, 0, 1, 3])):
        start = draws.randrange(len(data))
        data[start : start + draws.randint(0, 5)] = draws.randbytes(draws.randint(0, 3))
    return bytes(data)


@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_damaged_bodies(tokenizer, count):
    served = Served("tiny", Encoder(tokenizer, TEMPLATES["hermes"]), 512, 128)
    stream = FakeStream(tokenizer)
    engine = Engine(stream, 64)
    app = make_app(served, engine, Access(), lambda: None)

    async def statuses() -> Counter:
        found, draws = Counter(), random.Random(count)
        link = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://tiny")
        async with app.router.lifespan_context(app), link:
            for _ in range(count):
                path, body = draws.choice([("chat/completions", CHAT), ("completions", COMPLETION)])
                data = damaged(draws, body)
                got = await link.post(
                    f"/v1/{path}", content=data, headers={"Content-Type": "application/json"}
                )
                found[got.status_code] += 1
                if got.status_code != 200:
                    assert got.json()["error"].keys() == {"message", "type", "param", "code"}, data
        return found

    found = asyncio.run(statuses())
    assert found.keys() <= {200, 400, 404} and found[400] > count / 2
    assert not engine.active and not stream.pending
