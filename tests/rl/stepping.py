"""One RL step of the tiny policy, put together as the loop of train.py does, for the tests of the update."""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rest_jax.distributed import activate, replicated
from rest_jax.models.decoder import param_shardings
from rest_jax.rl import curriculum
from rest_jax.rl.optimizer import Optimizer
from rest_jax.rl.packing import (
    BatchLengths,
    MicroBatch,
    Packing,
    Rows,
    assign_minibatches,
    make_rows,
    plan_microbatches,
    row_length,
)
from rest_jax.rl.prepare import Recomputed, StepConfig, active_groups
from rest_jax.rl.step import (
    Update,
    make_logprobs,
    make_policy_update,
    make_prepare,
    plan_minibatches,
    policy_metrics,
)
from rest_jax.types import ResponseBatch, ScoredBatch, TrainState
from tests import tiny

# Keeps the gradient as its state and moves nothing: a difference of parameters would be rounded to the parameters' size.
RECORD = Optimizer(
    init=lambda params: jax.tree.map(jnp.zeros_like, params),
    update=lambda grads, state, params=None: (jax.tree.map(jnp.zeros_like, grads), grads),
    schedule=optax.constant_schedule(0.0),
)


def plan_of(scored: ScoredBatch, cfg: StepConfig, mesh) -> list[list[MicroBatch]]:
    """The plan of a step."""
    lengths = BatchLengths.of(scored.rollout)
    return plan_minibatches(lengths, active_groups(scored, cfg), cfg, mesh)


def plan_everything(
    scored: ScoredBatch, cfg: StepConfig, shards: int = 1, minibatch: np.ndarray | None = None
) -> list[list[MicroBatch]]:
    """A plan that skips nothing; `minibatch`: of each group, if not as the step assigns them."""
    groups = len(scored.reward)
    packing = Packing(shards, cfg.max_tokens_per_microbatch)
    if minibatch is None:
        minibatch = assign_minibatches(groups, cfg.updates)
    return plan_microbatches(
        BatchLengths.of(scored.rollout), minibatch, np.ones(groups, bool), packing
    )


def rows_of(batch: ResponseBatch, groups: Iterable[int] | None = None) -> Rows:
    """Groups of a batch, all by default, in one row."""
    lengths = BatchLengths.of(batch)
    pieces = [lengths.whole(p) for p in groups or range(len(lengths.prompt_length))]
    length = row_length(sum(map(lengths.positions, pieces)))
    return jax.tree.map(jnp.asarray, make_rows(MicroBatch((tuple(pieces),), length, lengths)))


# Compiled once for all steps that differ in their batch alone.
prepare_of = functools.cache(make_prepare)
logprobs_of = functools.cache(make_logprobs)


@functools.cache
def update_of(decoder, tx, cfg: StepConfig, mesh) -> tuple[Update, TrainState]:
    """(the update, the shardings of its state)."""
    params = tiny.params(decoder.cfg.n_experts)  # made here: what is cached must not be traced
    state = jax.eval_shape(lambda: fresh_state(params, tx, cfg))
    shardings = jax.tree.map(lambda _: replicated(mesh), state)
    shardings = shardings.replace(params=param_shardings(decoder.cfg, mesh))
    return make_policy_update(decoder, tx, cfg, mesh, shardings), shardings


def fresh_state(params, tx, cfg: StepConfig) -> TrainState:
    return TrainState(
        step=jnp.int32(0),
        params=params,
        opt_state=tx.init(params),
        rng=jax.random.key(0),
        curriculum=curriculum.init(cfg.schedule),
    )


def step(
    cfg: StepConfig,
    scored: ScoredBatch,
    plan=None,
    shape=(1, 1, 1),
    tx=RECORD,
    recomputed: Recomputed | None = None,
    logp_ref=None,
    remat="none",
    minibatch: np.ndarray | None = None,
    params=None,
    experts: int = 0,
) -> tuple[TrainState, dict[str, float]]:
    """(state after a step, its metrics) on a mesh; without a plan and a mini-batch of each group, those of the step."""
    mesh, decoder = tiny.mesh(*shape), tiny.decoder(remat, experts=experts)
    # what an update reads of its configuration
    loss = cfg.loss.model_copy(update={"advantage": "grpo", "advantage_options": ()})
    read = tiny.step_config(loss=loss, sampling=cfg.sampling, noise_groups=cfg.noise_groups)
    update, shardings = update_of(decoder, tx, read, mesh)
    start = jax.tree.map(lambda x: x.copy(), params or tiny.params(experts))
    state = jax.device_put(fresh_state(start, tx, cfg), shardings)
    prepare = prepare_of(cfg, mesh)
    if minibatch is None:
        minibatch = assign_minibatches(len(scored.reward), cfg.updates)
    batch, moved, prepared, _ = prepare(scored, recomputed, logp_ref, minibatch, state.curriculum)
    updates = []
    with activate(mesh):
        for micro_batches in plan or plan_of(scored, cfg, mesh):
            state, totals = update(state, batch, micro_batches)
            updates.append(totals)
    metrics = policy_metrics(*jax.device_get((prepared, updates)))
    values = {name: float(value) for name, value in metrics.items()}
    return state.replace(curriculum=moved), values


def logprobs(cfg: StepConfig, scored: ScoredBatch, experts: int = 0) -> Recomputed:
    """The tiny policy's own values of a rollout."""
    forward = logprobs_of(tiny.decoder(experts=experts), cfg, tiny.mesh())
    return forward(tiny.params(experts), scored.rollout, BatchLengths.of(scored.rollout))


def close(a, b, relative: float = 1e-5) -> None:
    """Every leaf within `relative` of the leaf's own norm."""
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
        error = np.linalg.norm(np.asarray(x) - np.asarray(y)) / (np.linalg.norm(y) + 1e-12)
        assert error <= relative, (jax.tree_util.keystr(path), error)
