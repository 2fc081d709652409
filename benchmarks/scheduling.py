"""What the scheduler of the rollout makes of given lengths, on any number of data shards: its record as one JSON line.

    python -m benchmarks.scheduling [--shards 16] [--prompts 512] [--group 8] [--decode-slots 64] ...

Prompts and responses have log-normal lengths, like those of rlla in Qwen tokens by default. The book-keeping is the product's own
(`rollout.shard.Shard`); a response is drawn token by token until it has its length. `ideal_steps`: of shards whose slots are
always busy; `steps_of_slots`: how many steps had so many decode slots a shard, which are removed at the end as in a rollout;
`prefill_use`: the share of prefilled positions that hold a token of a prompt.
"""

import argparse
import json
import sys
import time
from typing import Any

import numpy as np

from benchmarks.process import Parser, positive
from rest_jax.rollout.engine import NOBODY, RolloutSettings
from rest_jax.rollout.scheduler import prefill_width
from rest_jax.rollout.shard import CallResult, Shard
from rest_jax.types import Sampling

DESCRIPTION = (
    "The scheduler of the rollout on given lengths; its record is one JSON line on stdout."
)


def main(argv: list[str] | None = None) -> int:
    """0; 2 for bad arguments."""
    parser = Parser(prog="python -m benchmarks.scheduling", description=DESCRIPTION)
    for name, default in {
        "shards": 16,
        "prompts": 512,
        "group": 8,
        "decode-slots": 64,
        "max-prompt-tokens": 2048,
        "max-response-tokens": 1024,
        "median-prompt": 690,
        "median-response": 130,
    }.items():
        parser.add_argument(f"--{name}", type=positive, default=default)
    parser.add_argument("--spread", type=float, default=0.5, help="sigma of the log of a response")
    parser.add_argument("--entries", type=positive, help="prompts in the cache of a shard")
    parser.add_argument("--cache-tokens", type=positive, help="of a shard")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.prompts % args.shards:
        parser.error(f"--prompts {args.prompts} is not a multiple of --shards {args.shards}")
    print(json.dumps(simulate(args)))
    return 0


def simulate(args: argparse.Namespace) -> dict[str, Any]:
    """Samples the lengths, runs the scheduler over them, counts."""
    rng = np.random.default_rng(args.seed)
    prompts = _lengths(rng, args.median_prompt, 0.35, args.prompts, args.max_prompt_tokens)
    shape = args.prompts, args.group
    responses = _lengths(rng, args.median_response, args.spread, shape, args.max_response_tokens)
    settings = RolloutSettings(
        args.group,
        args.max_response_tokens,
        (0,),
        0,
        Sampling(),
        args.decode_slots,
        args.entries,
        args.cache_tokens,
    )
    groups = np.arange(args.prompts).reshape(args.shards, -1)
    groups = [sorted(own.tolist(), key=lambda g: -prompts[g]) for own in groups]
    sizes = settings.sizes(len(groups[0]), int(prompts.max()))
    shards = [Shard(own, prompts, settings, sizes) for own in groups]
    pages = -(-prompts // settings.page)
    most = max(int(pages[own].sum()) for own in groups)
    width = prefill_width(int(pages.max()), most, settings.page)
    count = {"calls": 0, "steps": 0, "prefill_calls": 0, "dropped": 0}
    steps_of_slots = dict.fromkeys(sizes.slot_counts, 0)
    drawn = np.zeros(args.prompts * args.group, int)
    started = time.perf_counter()
    while any(shard.waiting or shard.unstarted or shard.running for shard in shards):
        while any(shard.wants_prompts for shard in shards):
            for shard in shards:
                shard.place_prompts(width)
            count["prefill_calls"] += 1
        for shard in shards:
            for response in shard.drop_youngest():
                count["dropped"] += 1
                drawn[shard.number(response)] = 0
        if all(shard.nothing_waits for shard in shards):
            busy = max(len(shard.running) for shard in shards)
            slots = min(n for n in sizes.slot_counts if n >= busy)
            for shard in shards:
                if slots < shard.num_slots:
                    shard.keep(slots)
        steps = [_draw(shard, responses.reshape(-1), drawn, settings.page) for shard in shards]
        count["calls"] += 1
        count["steps"] += max(steps)
        steps_of_slots[shards[0].num_slots] += max(steps)
    ideal = responses.sum() / args.shards / sizes.slots
    slot_steps = args.shards * sum(slots * n for slots, n in steps_of_slots.items())
    return count | {
        "steps_of_slots": {str(slots): n for slots, n in steps_of_slots.items() if n},
        "tokens": int(responses.sum()),
        "ideal_steps": round(ideal),
        "slot_use": round(int(responses.sum()) / slot_steps, 3),
        "steps_a_call": round(count["steps"] / count["calls"], 1),
        "prefill_use": round(
            int(prompts.sum()) / (count["prefill_calls"] * args.shards * width), 3
        ),
        "host_seconds": round(time.perf_counter() - started, 2),
    }


def _lengths(rng, median: int, spread: float, shape, most: int) -> np.ndarray:
    return np.clip(rng.lognormal(np.log(median), spread, shape), 8, most).astype(int)


def _draw(shard: Shard, lengths: np.ndarray, drawn: np.ndarray, page: int) -> int:
    """A call of one shard; the steps until nothing is left to draw."""
    next_pages = shard.next_pages()
    owner = {slot: shard.number(one.response) for slot, one in shard.running.items()}
    begin = np.zeros(shard.num_slots, int)
    queue, taken, steps = [shard.number(one) for one in shard.unstarted], 0, 0
    while steps < page and (owner or taken < len(queue)):
        for slot in range(shard.num_slots):
            if slot not in owner and slot in next_pages and taken < len(queue):
                owner[slot], begin[slot] = queue[taken], steps
                taken += 1
        # until something ends
        least = min(lengths[number] - drawn[number] for number in owner.values())
        now = int(min(least, page - steps))
        drawn[list(owner.values())] += now
        steps += now
        owner = {slot: n for slot, n in owner.items() if drawn[n] < lengths[n]}
    running = np.full(shard.num_slots, NOBODY)
    for slot, number in owner.items():
        running[slot] = number
    shard.advance(CallResult(running, begin, taken, steps, next_pages))
    return steps


if __name__ == "__main__":
    sys.exit(main())
