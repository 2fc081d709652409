"""What dialogues prefill, with and without the keys and values of earlier turns: the record as one JSON line.

    python -m benchmarks.dialogues [--model configs/quickstart_policy] [--dialogues 40] [--turns 6] [--tokens 32] ...
    python -m benchmarks.dialogues --bfcl VENV ...

Every dialogue has its turns whatever the model writes: the world is a shop that answers each with a list of orders, or with
`--bfcl` the entries of BFCL's multi_turn_base, whose user speaks again once the model makes no call. They run twice,
`--decode-slots` at once, and one after the other in a stream that forgets everything before each turn, which prefills every
prompt from its first token. `ratio`: tokens prefilled in the first run over those of the second; `ratio_unshared`: the same
if no dialogue used another's keys and values. `same_ids`: whether all completions are the same, token by token, in float32 at
temperature 1.
"""

import argparse
import contextlib
import dataclasses
import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.process import Parser, positive
from rest_jax.config import MeshConfig, ModelConfig, RolloutConfig
from rest_jax.data.tokenize import Encoder
from rest_jax.evaluation import bfcl
from rest_jax.evaluation.dialogues import Conversation, Settings, answer_all
from rest_jax.models.policy import Policy
from rest_jax.rollout.requests import Request, Stream, StreamStats, make_stream
from rest_jax.run.load import load_policy
from rest_jax.templates import TEMPLATES, Template
from rest_jax.tool_calls import Call, Region
from rest_jax.worlds import synthetic
from rest_jax.worlds.dialogues import Dialogues
from rest_jax.worlds.records import Message, Source

DESCRIPTION = (
    "What dialogues prefill with a prefix cache and without; the record is one JSON line on stdout."
)


def main(argv: list[str] | None = None) -> int:
    """0; 1 where the ids differ; 2 for bad arguments."""
    parser = Parser(prog="python -m benchmarks.dialogues", description=DESCRIPTION)
    parser.add_argument("--model", default="configs/quickstart_policy", help="HF folder or hub id")
    parser.add_argument("--template", choices=TEMPLATES, default="hermes")
    sizes = {"dialogues": 40, "turns": 6, "tokens": 32, "decode-slots": 8, "cache-tokens": 2**16}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=positive, default=default)
    parser.add_argument("--bfcl", metavar="VENV", help="virtual environment with the package")
    args = parser.parse_args(argv)
    record = measure(args)
    print(json.dumps(record))
    return 0 if record["same_ids"] else 1


class Talk(synthetic.Shop):
    """A shop whose dialogues have a number of turns, whatever is called or said: each is answered with the orders."""

    def __init__(self, turns: int):
        super().__init__()
        self._left = turns

    def call(self, calls: Sequence[Call]) -> list[str]:
        self._end_turn()
        return [self._orders_now() for _ in calls]

    def say(self, text: str) -> list[Message]:
        self._end_turn()
        return [{"role": "user", "content": f"These are the orders now: {self._orders_now()}"}]

    def _end_turn(self) -> None:
        self._left -= 1
        self.done = self._left <= 0

    def _orders_now(self) -> str:
        some = list(self._task.orders.items())[self._left % 5 :][:2]
        return json.dumps(dict(some))


class Forgetful(Stream):
    """A stream that keeps nothing from one request to the next; one runs at a time."""

    def __init__(self, stream: Stream):
        vars(self).update(vars(stream))

    def submit(self, request: Request) -> int:
        self.clear(self.params)
        return super().submit(request)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the dialogues with and without earlier keys and values."""
    policy = longer(
        load_policy(ModelConfig(source=args.model, dtype="float32"), MeshConfig(), None)
    )
    rollout = RolloutConfig(decode_slots=args.decode_slots, cache_tokens=args.cache_tokens)
    stream = make_stream(policy, rollout)
    kept, found, seconds = run(policy, args, stream, args.decode_slots)
    fresh, expected, fresh_seconds = run(policy, args, Forgetful(stream), 1)
    new = sum(
        int((segment.region == Region.NONE).sum())
        for conversation in found.values()
        for segment in conversation.segments
    )
    return {
        "world": "bfcl_v4 multi_turn_base" if args.bfcl else f"shop, {args.turns} turns",
        "template": args.template,
        "dialogues": args.dialogues,
        "prompts": sum(conversation.turn for conversation in found.values()),
        "prompt_tokens": kept.prompt_tokens,
        "prefilled_tokens": kept.prefilled_tokens,
        "prefilled_without": fresh.prefilled_tokens,
        "ratio": round(kept.prefilled_tokens / fresh.prefilled_tokens, 3),
        "ratio_unshared": round(new / fresh.prefilled_tokens, 3),
        "drawn_tokens": kept.tokens,
        "same_ids": drawn(found) == drawn(expected),
        "seconds": round(seconds, 1),
        "seconds_without": round(fresh_seconds, 1),
    }


def run(
    policy: Policy, args: argparse.Namespace, stream: Stream, at_once: int
) -> tuple[StreamStats, Mapping[Hashable, Conversation], float]:
    """(counts of the stream, the dialogues in tokens, seconds)."""
    settings = Settings(args.tokens, min(policy.config.max_positions, stream.capacity), 1.0)
    stream.stats = StreamStats()
    begun = time.perf_counter()
    with asked(args, at_once) as (source, template):
        encoder = Encoder(policy.tokenizer, template)
        conversations = answer_all(source, stream, encoder, settings)
    return stream.stats, conversations, time.perf_counter() - begun


@contextlib.contextmanager
def asked(args: argparse.Namespace, at_once: int) -> Iterator[tuple[Source, Template]]:
    """The dialogues, and the template of their prompts."""
    if args.bfcl is None:
        tasks: dict[Hashable, synthetic.Task] = {
            task.id: task for task in synthetic.tasks(0, args.dialogues)
        }
        yield Dialogues(lambda: Talk(args.turns), tasks, at_once), TEMPLATES[args.template]
        return
    version = bfcl.VERSIONS["bfcl_v4"]
    with (
        tempfile.TemporaryDirectory() as folder,
        bfcl.Bfcl(version, args.bfcl, ["multi_turn_base"], args.dialogues) as source,
    ):
        source.begin(pathlib.Path(folder), args.template, at_once)
        yield source, bfcl.template(args.template)


def drawn(conversations: Mapping[Hashable, Conversation]) -> dict[Hashable, list[list[int]]]:
    """The completions of each dialogue, in order."""
    return {
        key: [
            segment.ids[(segment.turn == turn) & (segment.region != Region.NONE)].tolist()
            for segment in conversation.segments
            for turn in np.unique(segment.turn)
        ]
        for key, conversation in conversations.items()
    }


def longer(policy: Policy, positions: int = 2**15) -> Policy:
    """The policy with room for long prompts; it need not have been trained for them."""
    cfg = dataclasses.replace(policy.config, max_positions=positions)
    return dataclasses.replace(policy, decoder=policy.decoder.clone(cfg=cfg))


if __name__ == "__main__":
    sys.exit(main())
