"""Times an update: one optimiser step on a scored rollout of random tokens, rewards and regions.

Everything the program does in a step after scoring is in it: curriculum, token weights, advantages, the plan of the
micro-batches, forward, backward and AdamW. tokens = G x (prompt + response) of every group: those that the rows of a layout
without groups would hold. `skipping`: how much is saved when the groups whose rewards are all equal skip the forward pass.
"""

import argparse
import dataclasses
import statistics
import typing
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import policies
from benchmarks.process import Work, positive, timed
from benchmarks.rollout import add_dtype
from rest_jax.config import (
    CurriculumConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    WeightsConfig,
)
from rest_jax.distributed import activate
from rest_jax.models.config import Remat
from rest_jax.models.policy import Policy
from rest_jax.rl.curriculum import Schedule
from rest_jax.rl.optimizer import Optimizer, make_optimizer
from rest_jax.rl.packing import (
    BatchLengths,
    MicroBatch,
    Packing,
    assign_minibatches,
    plan_microbatches,
)
from rest_jax.rl.prepare import StepConfig, active_groups
from rest_jax.rl.step import abstract_state, init_state, make_step, plan_minibatches, policy_metrics
from rest_jax.run.throughput import update_flops
from rest_jax.types import RolloutBatch, Sampling, ScoredBatch

RUN_STEPS = 100  # length of the run the schedules believe to be in
REMAT = ModelConfig.model_fields["remat"].default  # as the recipes have it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sizes of the case."""
    parser.add_argument("--model", default="model-a", help="model-a, a preset, or an HF folder")
    parser.add_argument("--vocab", type=positive, help="of a random model")
    add_dtype(parser)
    parser.add_argument("--prompts", type=positive, default=2)
    parser.add_argument("--group", type=positive, default=8, help="responses to a prompt")
    parser.add_argument("--prompt-tokens", type=positive, default=128)
    parser.add_argument("--response-tokens", type=positive, default=128)
    parser.add_argument(
        "--max-tokens-per-microbatch", type=positive, help="trunk positions of a micro-batch"
    )
    parser.add_argument("--remat", choices=typing.get_args(Remat), default=REMAT)


class Updates:
    """A train step and its state, which every call moves on."""

    def __init__(self, policy: Policy, tx: Optimizer, cfg: StepConfig):
        self.mesh, self.cfg = policy.mesh, cfg
        with activate(self.mesh):
            _, shardings = abstract_state(policy, tx, cfg.schedule)
            self.state = init_state(policy, tx, cfg.schedule, 0, shardings)
        self.step = make_step(policy.decoder, tx, cfg, policy.mesh, shardings)

    def __call__(self, scored: ScoredBatch, plan: Sequence[Sequence[MicroBatch]] | None = None):
        """One update to its end; without a plan, the step makes its own."""
        minibatch = assign_minibatches(len(scored.reward), self.cfg.updates)
        if plan is None:
            lengths = BatchLengths.of(scored.rollout)
            plan = plan_minibatches(lengths, active_groups(scored, self.cfg), self.cfg, self.mesh)
        with activate(self.mesh):
            batch, curriculum, prepared, _ = self.step.prepare(
                scored, None, None, minibatch, self.state.curriculum
            )
            updates = []
            for micro_batches in plan:
                self.state, totals = self.step.update(self.state, batch, micro_batches)
                updates.append(totals)
            self.state = dataclasses.replace(
                self.state, step=self.step.advance(self.state.step), curriculum=curriculum
            )
            jax.block_until_ready(self.state)
            return policy_metrics(*jax.device_get((prepared, updates)))


def make_work(args: argparse.Namespace) -> Work:
    """A call is one update in which every group has gradient."""
    policy = policies.load(args.model, args.vocab, args.remat, args.dtype)
    scored = random_batch(policy, args)
    updates = Updates(
        policy, optimizer(), step_config(args.response_tokens, args.max_tokens_per_microbatch)
    )
    flops = update_flops(
        policy.config, scored.rollout.prompt_length, scored.rollout.response_length
    )
    return Work(lambda _: updates(scored), trajectory_tokens(scored), flops)


def make_skipping_work(args: argparse.Namespace) -> Work:
    """A call is one update in which every other group has equal rewards; `cost_ratio` sets its CPU time against that of
    an update in which all have gradient, measured alternately in the same process.
    """
    policy = policies.load(args.model, args.vocab, args.remat, args.dtype)
    cfg = step_config(args.response_tokens, args.max_tokens_per_microbatch)
    full = random_batch(policy, args)
    half = dataclasses.replace(full, reward=equal_in_half(full.reward))
    difference = gradient_difference(args, half, cfg)
    updates, costs = Updates(policy, optimizer(), cfg), []

    def call(number: int) -> None:
        full_cost, _ = timed(lambda _: updates(full), number)
        half_cost, _ = timed(lambda _: updates(half), number)
        costs.append((full_cost, half_cost))

    def extra() -> dict[str, Any]:
        full_cost, half_cost = map(statistics.median, zip(*costs[1:], strict=True))
        return {
            "full_cpu_seconds": full_cost,
            "half_cpu_seconds": half_cost,
            "cost_ratio": half_cost / full_cost,
            "gradient_difference": difference,
        }

    lengths = full.rollout.prompt_length, full.rollout.response_length
    flops = 1.5 * update_flops(policy.config, *lengths)
    return Work(call, 2 * trajectory_tokens(full), flops, extra)


def gradient_difference(args: argparse.Namespace, scored: ScoredBatch, cfg: StepConfig) -> float:
    """Largest difference between the gradients with and without the groups that may be skipped, over the largest entry."""
    gradients, trace = [], optax.trace(0.0)  # its state is the last gradient
    tracer = Optimizer(trace.init, trace.update, optax.constant_schedule(0.0))
    every = plan_microbatches(
        BatchLengths.of(scored.rollout),
        assign_minibatches(len(scored.reward), 1),
        np.ones(len(scored.reward), bool),
        Packing(1, cfg.max_tokens_per_microbatch),
    )
    for plan in (None, every):
        policy = policies.load(args.model, args.vocab, args.remat, args.dtype)
        updates = Updates(policy, tracer, cfg)
        updates(scored, plan)
        gradients.append(updates.state.opt_state.trace)
    size = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(gradients[1]))
    apart = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), *gradients)
    return max(map(float, jax.tree.leaves(apart))) / size


def optimizer() -> Optimizer:
    """The recipes' AdamW."""
    return make_optimizer(OptimizerConfig(), RUN_STEPS)


def step_config(response_tokens: int, max_tokens_per_microbatch: int | None = None) -> StepConfig:
    """The recipes' defaults, one update a step."""
    return StepConfig(
        loss=LossConfig(),
        schedule=Schedule(WeightsConfig(), CurriculumConfig(), RUN_STEPS),
        sampling=Sampling(),
        updates=1,
        max_tokens_per_microbatch=max_tokens_per_microbatch,
        fixed_length=response_tokens,
    )


def random_batch(policy: Policy, args: argparse.Namespace) -> ScoredBatch:
    """A scored rollout of random tokens with full-length prompts and responses."""
    rng = np.random.default_rng(0)
    prompts = policies.random_prompts(policy, args.prompts, args.prompt_tokens)
    shape = (args.prompts, args.group, args.response_tokens)
    vocab = policy.config.vocab_size
    rollout = RolloutBatch(
        prompt=prompts.tokens,
        prompt_length=prompts.length,
        responses=rng.integers(1, vocab, shape).astype(np.int32),  # type: ignore[arg-type]
        response_length=np.full(shape[:2], shape[2], np.int32),  # type: ignore[arg-type]
        logp=np.full(shape, -np.log(vocab), np.float32),  # type: ignore[arg-type]
        entropy=rng.uniform(0.1, np.log(vocab), shape).astype(np.float32),  # type: ignore[arg-type]
        gini=rng.uniform(0.1, 1.0, shape).astype(np.float32),  # type: ignore[arg-type]
    )
    region = rng.integers(1, 8, shape).astype(np.int8)
    reward = rng.normal(size=shape[:2]).astype(np.float32)
    return ScoredBatch(
        rollout=rollout,
        region=region,  # type: ignore[arg-type]
        reward=reward,  # type: ignore[arg-type]
        format_score=np.ones(shape[:2], np.float32),  # type: ignore[arg-type]
        parts=reward[..., None],  # type: ignore[arg-type]
        exact=reward > 0,  # type: ignore[arg-type]
    ).validate()


def equal_in_half(reward: Any) -> Any:
    """The rewards with every other group's set to the same number."""
    reward = np.array(reward)
    reward[::2] = 1.0
    return reward


def trajectory_tokens(scored: ScoredBatch) -> int:
    """Prompt and response tokens, the prompt once a response."""
    prompt, response = scored.rollout.prompt_length, scored.rollout.response_length
    return int((prompt[:, None] + response).sum())
