"""Times the host's part of a step: bytes, parser, rewards and regions of the completions, then their token weights.

Completions are toolrl turns of `tokens` tokens: a thought, two calls and a response; of the G completions of a prompt one is
right, the others have a wrong value, a missing call, or end in the middle. tokens = those of all completions.

`step_share`: host time over the time a complete step of Qwen3-1.7B with the same number of groups, G and response length and
prompts of `prompt_tokens` would take this core at its matrix-product rate. `pod_step_share`: over that of 8 devices of
400 TFLOP/s each; `pod_rollout_share`: over the rollout alone, which is what scoring overlaps with.
"""

import argparse
import dataclasses
import random
import statistics
from typing import Any

import jax
import numpy as np

from benchmarks import cpu_peak, policies
from benchmarks.process import Work, positive, timed
from benchmarks.update import step_config
from rest_jax.config import RewardConfig
from rest_jax.models.presets import preset
from rest_jax.models.tokenizer import Tokenizer
from rest_jax.rl import curriculum, weights
from rest_jax.rollout.scoring import score_rollout
from rest_jax.run.throughput import rollout_flops, update_flops
from rest_jax.templates import TEMPLATES
from rest_jax.tool_calls import Call, Target
from rest_jax.types import RolloutBatch

STEP_MODEL = preset("Qwen/Qwen3-1.7B")
POD_FLOPS = 8 * 400e12
THOUGHT = "the user wants to know which hotel in town has a room for two nights so I will ask both"
WORDS = THOUGHT.split()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sizes of the case."""
    parser.add_argument("--prompts", type=positive, default=512)
    parser.add_argument("--group", type=positive, default=4, help="responses to a prompt")
    parser.add_argument("--tokens", type=positive, default=300, help="of a response")
    parser.add_argument("--prompt-tokens", type=positive, default=700, help="of the step compared")


def make_work(args: argparse.Namespace) -> Work:
    """A call scores, labels and weighs all completions."""
    targets, batch, tokenizer = make_completions(args)
    schedule = step_config(args.tokens).schedule
    state = curriculum.init(schedule)
    seconds = []

    @jax.jit
    def weigh(region, entropy, gini, format_score, state):
        stats = weights.region_stats(region, entropy, gini)
        new = curriculum.update(state, stats, format_score.mean(), schedule)
        return weights.token_weights(region, new.weight, schedule.normalizer), new

    def score() -> None:
        scored, _ = score_rollout(
            batch, targets, tokenizer, TEMPLATES["toolrl"], RewardConfig(), 0.5
        )
        fields = scored.region, batch.entropy, batch.gini, scored.format_score
        jax.block_until_ready(weigh(*fields, state))

    def call(number: int) -> None:
        seconds.append(timed(lambda _: score(), number)[0])

    def extra() -> dict[str, Any]:
        host = statistics.median(seconds[1:])
        completions = args.prompts * args.group
        return {
            "responses_per_second": completions / host,
            "bytes": text_bytes(batch, tokenizer),
        } | (shares(host, args))

    return Work(call, int(batch.response_length.sum()), 0.0, extra)


def shares(host: float, args: argparse.Namespace) -> dict[str, float]:
    """Host seconds over those of the step they belong to."""
    prompts = np.full(args.prompts, args.prompt_tokens)
    lengths = np.full((args.prompts, args.group), args.tokens)
    rollout = rollout_flops(STEP_MODEL, prompts, lengths)
    step = rollout + update_flops(STEP_MODEL, prompts, lengths)
    return {
        "step_flops": step,
        "step_share": host / (step / cpu_peak.measured_cpu_peak()),
        "pod_step_share": host / (step / POD_FLOPS),
        "pod_rollout_share": host / (rollout / POD_FLOPS),
    }


def make_completions(args: argparse.Namespace) -> tuple[list[Target], RolloutBatch, Tokenizer]:
    """Gold answers, a rollout of completions, and the tokenizer whose ids those are."""
    rng = random.Random(0)
    ids: dict[bytes, int] = {b"": 0}  # the padding
    targets = [make_target(rng) for _ in range(args.prompts)]
    rows = [
        cut(completion(target, g, args.tokens, rng), args.tokens - 1, ids, rng)
        for target in targets
        for g in range(args.group)
    ]
    stop = ids.setdefault(b"<|im_end|>", len(ids))
    shape = (args.prompts, args.group, args.tokens)
    noise = np.random.default_rng(0)
    batch = RolloutBatch(
        prompt=np.ones((args.prompts, 1), np.int32),  # type: ignore[arg-type]
        prompt_length=np.ones(args.prompts, np.int32),  # type: ignore[arg-type]
        responses=np.array([[*row, stop] for row in rows], np.int32).reshape(shape),  # type: ignore[arg-type]
        response_length=np.full(shape[:2], args.tokens, np.int32),  # type: ignore[arg-type]
        logp=np.full(shape, -1.0, np.float32),  # type: ignore[arg-type]
        entropy=noise.uniform(0, 3, shape).astype(np.float32),  # type: ignore[arg-type]
        gini=noise.uniform(0, 1, shape).astype(np.float32),  # type: ignore[arg-type]
    )
    return targets, batch.validate(), policies.make_tokenizer(tuple(ids), stop)


def make_target(rng: random.Random) -> Target:
    """Two calls with a few arguments and a response."""
    city, nights = rng.choice(WORDS), rng.randint(1, 20)
    guests = {"names": rng.sample(WORDS, 3), "age": rng.randint(18, 90), "note": 'says "hello"'}
    calls = (
        Call("find_hotel", {"city": city, "nights": nights, "guests": guests}),
        Call("book_train", {"to": city, "seats": rng.randint(1, 4), "first_class": nights > 10}),
    )
    return Target(calls=calls, response="I have asked both, one moment please.")


def completion(target: Target, g: int, tokens: int, rng: random.Random) -> bytes:
    """The g-th completion, with a thought that makes it about four bytes a token long."""
    first, second = target.calls
    wrong = Call(second.name, second.arguments | {"seats": "two"})
    calls = [(first, second), (first, wrong), (first,), (first, second)][g % 4]
    given = dataclasses.replace(target, calls=calls)
    left = 4 * tokens - len(TEMPLATES["toolrl"].render_answer(given))
    thought = " ".join(rng.choices(WORDS, k=max(left // 4, 1)))
    text = TEMPLATES["toolrl"].render_answer(dataclasses.replace(given, think=thought)).encode()
    return text[:-60] if g % 4 == 3 else text


def cut(text: bytes, count: int, ids: dict[bytes, int], rng: random.Random) -> list[int]:
    """The text as exactly `count` pieces cut at random places, the pieces numbered as they come."""
    inner = sorted(rng.sample(range(1, len(text)), min(count, len(text)) - 1))
    ends = [*inner, *[len(text)] * (count - len(inner))]
    pieces = (text[a:b] for a, b in zip([0, *ends], ends, strict=False))
    return [ids.setdefault(piece, len(ids)) for piece in pieces]


def text_bytes(batch: RolloutBatch, tokenizer: Tokenizer) -> int:
    """Bytes of all completions."""
    return int(tokenizer.piece_lengths[batch.responses].sum())
