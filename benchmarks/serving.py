"""Times `rest-jax serve`: chats with tools over HTTP, `at-once` of them at a time, answered greedily.

Server and clients share the process, so that what the clients cost counts too. --requests FILE: what `write_requests` made, chats
that share their system prompt and tools; every timed call has chats of its own. `answers` of the record are digests of the ids
that the last call drew, chat by chat, as the peer's are. tokens = those asked for; few answers end before, and on both sides.
"""

import argparse
import contextlib
import hashlib
import json
import pathlib
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from benchmarks.process import Work, positive
from rest_jax.config import Config, DataConfig, ModelConfig, RolloutConfig
from rest_jax.data import fields
from rest_jax.data.tokenize import Encoder
from rest_jax.models.hf.read import read_config
from rest_jax.models.tokenizer import Tokenizer
from rest_jax.run.throughput import rollout_flops
from rest_jax.serving.prompts import encode_chat
from rest_jax.serving.server import Options, beside
from rest_jax.templates import TEMPLATES
from rest_jax.worlds import synthetic

TEMPLATE = "hermes"
# so that most answers of a small model run to their limit
LENGTHY = "Before you do it, explain at length and step by step what you are going to do, and why."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sizes of the case."""
    parser.add_argument("--model", required=True, help="an HF folder")
    parser.add_argument("--requests", type=pathlib.Path, required=True, metavar="FILE")
    parser.add_argument("--count", type=positive, default=32, help="chats a call")
    parser.add_argument("--at-once", type=positive, default=16, help="of them under way")
    parser.add_argument("--new-tokens", type=positive, default=64)
    parser.add_argument("--decode-slots", type=positive, default=16)


def write_requests(model: str, count: int, out: pathlib.Path) -> None:
    """A JSON file of `count` different chats, with the ids of their prompts: a shop's customers, who say what they want."""
    encoder = Encoder(Tokenizer.load(pathlib.Path(model)), TEMPLATES[TEMPLATE])
    chats: dict[str, Any] = {}
    tools = []
    for task in synthetic.tasks(0, 2 * count):
        messages, tools = synthetic.Shop().reset(task)
        wanted = " ".join([*task.requests, LENGTHY])
        messages = [*messages[:-1], {"role": "user", "content": wanted}]
        ids = encode_chat(encoder, messages, fields.tools(tools, "tools"))
        chats[messages[-1]["content"]] = {"messages": messages, "ids": ids.tolist()}
    found = list(chats.values())[:count]
    if len(found) < count:
        raise ValueError(f"{count} different chats; there are {len(found)}")
    out.write_text(
        json.dumps({"stop_ids": encoder.tokenizer.stop_ids, "tools": tools, "requests": found})
    )


def make_work(args: argparse.Namespace) -> Work:
    """A call is `count` chats."""
    made = json.loads(args.requests.read_text())
    tools, requests, size = made["tools"], made["requests"], args.count
    longest = max(len(request["ids"]) for request in requests)
    rollout = RolloutConfig(decode_slots=args.decode_slots, max_response_tokens=args.new_tokens)
    config = Config(
        name="served",
        model=ModelConfig(source=args.model, dtype="float32"),
        data=DataConfig(template=TEMPLATE, max_prompt_tokens=longest),
        rollout=rollout,
    )
    stack = contextlib.ExitStack()
    url = stack.enter_context(beside(config, Options(port=0)))
    pool = stack.enter_context(ThreadPoolExecutor(args.at_once))
    answers: list[str] = []

    def ask(request: dict[str, Any]) -> list[int]:
        body = {
            "messages": request["messages"],
            "tools": tools,
            "max_tokens": args.new_tokens,
            "temperature": 0,
            "return_token_ids": True,
        }
        reply = post(f"{url}/v1/chat/completions", body)
        if reply["prompt_token_ids"] != request["ids"]:
            raise ValueError("the server encodes a chat otherwise than the file")
        return reply["choices"][0]["token_ids"]

    def call(number: int) -> None:
        part = requests[number * size : (number + 1) * size]
        if len(part) < size:
            raise ValueError(f"{args.requests}: {len(requests)} chats, each call takes {size}")
        answers[:] = map(digest, pool.map(ask, part))

    lengths = np.array([len(request["ids"]) for request in requests[size : 2 * size]])
    flops = rollout_flops(
        read_config(pathlib.Path(args.model)), lengths, np.full((size, 1), args.new_tokens)
    )
    return Work(call, size * args.new_tokens, flops, lambda: {"answers": answers}, stack.close)


def post(url: str, body: dict[str, Any]) -> Any:
    """The JSON that comes back."""
    request = urllib.request.Request(url, json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request) as reply:
        return json.load(reply)


def digest(ids: Sequence[int]) -> str:
    """Of the ids of an answer."""
    return hashlib.sha256(json.dumps(list(ids)).encode()).hexdigest()[:8]
