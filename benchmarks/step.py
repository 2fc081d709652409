"""Times a complete step: weights into the rollout layout, rollout, scoring, update with the new log-probs, entropies, regions.

Scoring is the program's own: bytes, parser, rewards, regions. No completion of random weights earns more than another, and
groups of equal rewards would skip the update; so the share of even ids, which is all of the peer's reward, is added to it,
and every group has gradient. tokens = G x (prompt + response) of every group.
"""

import argparse
import dataclasses

import jax
import numpy as np

from benchmarks import policies, rollout, update
from benchmarks.process import Work
from rest_jax.config import RewardConfig
from rest_jax.distributed import activate
from rest_jax.rl.packing import BatchLengths
from rest_jax.rl.prepare import active_groups
from rest_jax.rl.step import plan_minibatches
from rest_jax.rollout.cast import rollout_cast
from rest_jax.rollout.scoring import score_rollout
from rest_jax.run.throughput import rollout_flops, update_flops
from rest_jax.templates import TEMPLATES
from rest_jax.tool_calls import Call, Target
from rest_jax.types import RolloutBatch, ScoredBatch

TARGET = Target(calls=(Call("find_hotel", {"city": "Oslo", "nights": 2}),))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sizes of the case."""
    update.add_arguments(parser)
    rollout.add_decode_slots(parser)


def make_work(args: argparse.Namespace) -> Work:
    """A call is one step."""
    policy = policies.load(args.model, args.vocab, args.remat, args.dtype)
    prompts = policies.random_prompts(policy, args.prompts, args.prompt_tokens)
    sampler = policies.sampler_of(policy, args.group, args.response_tokens, args.decode_slots)
    cfg = update.step_config(args.response_tokens, args.max_tokens_per_microbatch)
    updates, cast = update.Updates(policy, update.optimizer(), cfg), rollout_cast(policy)
    lengths = np.full((args.prompts, args.group), args.response_tokens)

    def call(number: int) -> None:
        with activate(policy.mesh):
            params = cast(updates.state.params)
            sampled = sampler(params, prompts, updates.state.rng, number)
        scored = with_advantage(score(sampled, policy))
        plan = plan_minibatches(
            BatchLengths.of(scored.rollout), active_groups(scored, cfg), cfg, policy.mesh
        )
        rows = [row for micro in plan[0] for row in micro.rows]
        if len({piece.group for row in rows for piece in row}) != args.prompts:
            raise ValueError("a group has no gradient, so the step would not be complete")
        updates(scored, plan)

    flops = rollout_flops(policy.config, prompts.length, lengths)  # type: ignore[arg-type]
    flops += update_flops(policy.config, prompts.length, lengths)  # type: ignore[arg-type]
    tokens = int((prompts.length[:, None] + lengths).sum())
    return Work(call, tokens, flops, lambda: rollout.utilisation(sampler))


def score(sampled: RolloutBatch, policy: policies.Policy) -> ScoredBatch:
    """Rewards and regions of a rollout, every prompt with the same gold answer."""
    host = jax.tree.map(np.asarray, sampled)
    targets = [TARGET] * len(host.prompt_length)
    scored, _ = score_rollout(
        host, targets, policy.tokenizer, TEMPLATES["toolrl"], RewardConfig(), 0.5
    )
    return scored


def with_advantage(scored: ScoredBatch) -> ScoredBatch:
    """The rewards plus the share of even ids."""
    even = np.mean(scored.rollout.responses % 2 == 0, axis=-1, dtype=np.float32)
    return dataclasses.replace(scored, reward=scored.reward + even)
