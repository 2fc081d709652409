"""The host side of an RL step: compiled functions, the plan of its micro-batches, the loop over them.

    prepare(scored, ..., state.curriculum)           -> TrainBatch, CurriculumState, metrics, TokenValues
    for micro_batches in plan_minibatches(...):
        update(state, batch, micro_batches)          -> TrainState, Totals

Everything is jitted here, with shardings in and out; the functions themselves are in `rl/prepare.py` and `rl/update.py`.
The calls only dispatch, but for the wait between two micro-batches, in which a request to stop is looked for. A step is several
programs, not one: how many micro-batches an update has depends on the lengths, rows have few lengths, and groups without
advantage are in none.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from rest_jax.config import Moments
from rest_jax.distributed import (
    HOST_MEMORY,
    batch_sharding,
    num_data_shards,
    place,
    replicated,
    tree_shardings_like,
)
from rest_jax.models.decoder import Decoder, adapter_shardings, param_shardings
from rest_jax.models.policy import Policy
from rest_jax.rl import curriculum
from rest_jax.rl.logprobs import PassSpec, response_logprobs
from rest_jax.rl.optimizer import Optimizer
from rest_jax.rl.packing import (
    BatchLengths,
    MicroBatch,
    Packing,
    assign_minibatches,
    make_rows,
    plan_microbatches,
)
from rest_jax.rl.prepare import (
    Metrics,
    Recomputed,
    StepConfig,
    TokenValues,
    change_metrics,
    prepare,
)
from rest_jax.rl.update import (
    Totals,
    UpdateSpec,
    add_gradient,
    apply_gradient,
    apply_with_host_moments,
    policy_loss,
    zero_gradient,
)
from rest_jax.types import CurriculumState, Params, RolloutBatch, TrainBatch, TrainState


def _go_on() -> None:
    """A `check` that never ends an update."""


@dataclasses.dataclass(frozen=True)
class Update:
    """One optimiser update over the micro-batches of a mini-batch: `(state, batch, micro_batches) -> (state, Totals)`.

    The state is donated, once the last micro-batch has been dispatched. Before each of them the ones before are waited for and
    `check` is called: what it raises leaves the state as it was. With LoRA `frozen` are the weights that the state's adapters
    belong to. Gradients are float32 in the sharding of the parameters, metrics are replicated; without micro-batches there are
    none of tokens.
    """

    zero: Callable[..., tuple[Params, Totals]]  # compiled `zero_gradient`
    # compiled `add_gradient`, one program for each length of rows
    add: Callable[..., tuple[Params, Totals]]
    apply: Callable[..., tuple[TrainState, Totals]]  # compiled `apply_gradient`
    mesh: Mesh

    def __call__(
        self,
        state: TrainState,
        batch: Any,
        micro_batches: Sequence[MicroBatch],
        frozen: Params | None = None,
        check: Callable[[], None] = _go_on,
    ) -> tuple[TrainState, Totals]:
        total, before = self.zero(state.params, batch, frozen=frozen), state.step
        for micro in micro_batches:
            rows = make_rows(micro, self.mesh)
            jax.block_until_ready(before)
            check()
            total = self.add(total, state.params, batch, rows, frozen=frozen)
            before = total[1]
        state, totals = self.apply(state, *total)
        return state, totals if micro_batches else totals.without_tokens()


def make_update(spec: UpdateSpec, state_shardings: TrainState) -> Update:
    """Compiles the parts of an update (`rl/update.py`)."""
    everywhere = replicated(spec.mesh)
    accumulated = (state_shardings.params, everywhere)
    kinds = {sharding.memory_kind for sharding in jax.tree.leaves(state_shardings.opt_state)}
    apply = apply_with_host_moments if HOST_MEMORY in kinds else apply_gradient
    return Update(
        zero=jax.jit(functools.partial(zero_gradient, spec=spec), out_shardings=accumulated),
        add=jax.jit(
            functools.partial(add_gradient, spec=spec),
            out_shardings=accumulated,
            donate_argnums=0,
        ),
        apply=jax.jit(
            functools.partial(apply, spec=spec),
            in_shardings=(state_shardings, *accumulated),
            out_shardings=(state_shardings, everywhere),
            donate_argnums=0,
        ),
        mesh=spec.mesh,
    )


@dataclasses.dataclass(frozen=True)
class Logprobs:
    """(params, rollout, lengths) -> Recomputed: a forward pass over a rollout in micro-batches, for recomputed old values and
    for the reference model. `lengths`: those of the global batch. `check` is called as in an `Update`.
    """

    add: Callable[..., Recomputed]  # compiled: the values so far, with those of a micro-batch
    max_tokens: int | None
    mesh: Mesh

    def __call__(
        self,
        params: Params,
        rollout: RolloutBatch,
        lengths: BatchLengths,
        check: Callable[[], None] = _go_on,
    ) -> Recomputed:
        shape, where = rollout.responses.shape, batch_sharding(self.mesh)
        zeros = (jnp.zeros(shape, jnp.float32, device=where) for _ in range(3))
        values = Recomputed(*zeros)
        for micro in plan_all_groups(lengths, self.max_tokens, self.mesh):
            rows = make_rows(micro, self.mesh)
            jax.block_until_ready(values)
            check()
            values = self.add(params, values, rollout, rows)
        return values


@dataclasses.dataclass(frozen=True)
class Step:
    """The compiled functions of an RL step."""

    prepare: Callable[..., tuple[TrainBatch, CurriculumState, Metrics, TokenValues]]
    update: Update
    logprobs: Logprobs
    advance: Callable[[jax.Array], jax.Array]  # from one step index to the next
    change: Callable[..., Metrics]  # compiled `change_metrics`


def make_step(
    decoder: Decoder,
    tx: Optimizer,
    cfg: StepConfig,
    mesh: Mesh,
    state_shardings: TrainState,
) -> Step:
    """Compiles the functions of a step on a mesh."""
    return Step(
        prepare=make_prepare(cfg, mesh),
        update=make_policy_update(decoder, tx, cfg, mesh, state_shardings),
        logprobs=make_logprobs(decoder, cfg, mesh),
        advance=make_advance(mesh),
        change=jax.jit(change_metrics, out_shardings=replicated(mesh)),
    )


def make_policy_update(
    decoder: Decoder,
    tx: Optimizer,
    cfg: StepConfig,
    mesh: Mesh,
    state_shardings: TrainState,
) -> Update:
    """The update of the policy loss on `TrainBatch`es."""
    loss_fn = functools.partial(policy_loss, decoder=decoder, cfg=cfg.loss, sampling=cfg.sampling)
    return make_update(UpdateSpec(loss_fn, tx, mesh, cfg.noise_groups), state_shardings)


def make_prepare(
    cfg: StepConfig, mesh: Mesh
) -> Callable[..., tuple[TrainBatch, CurriculumState, Metrics, TokenValues]]:
    """`prepare` compiled: (scored, recomputed | None, logp_ref | None, minibatch, curriculum state)."""
    rows, everywhere = batch_sharding(mesh), replicated(mesh)
    return jax.jit(
        functools.partial(prepare, cfg=cfg),
        # Every process has the mini-batch of every group: a NumPy array, which can only be replicated.
        in_shardings=(rows, rows, rows, everywhere, everywhere),
        out_shardings=(rows, everywhere, everywhere, everywhere),
    )


def plan_minibatches(
    lengths: BatchLengths, active: np.ndarray, cfg: StepConfig, mesh: Mesh
) -> list[list[MicroBatch]]:
    """The micro-batches of each mini-batch, with its `active_groups` bool [P]; of the global batch."""
    minibatch = assign_minibatches(len(active), cfg.updates)
    single = cfg.noise_groups is not None
    packing = Packing(num_data_shards(mesh), cfg.max_tokens_per_microbatch, single)
    return plan_microbatches(lengths, minibatch, active, packing)


def combine_updates(updates: Sequence[Totals]) -> dict[str, Any]:
    """On the host: of each metric the mean over the updates that have it, or the largest of its maxima."""
    sums, maxima = collections.defaultdict(list), collections.defaultdict(list)
    for update in updates:
        for name, value in update.sums.items():
            sums[name].append(value)
        for name, value in update.maxima.items():
            maxima[name].append(value)
    means = {name: sum(values) / len(values) for name, values in sums.items()}
    return means | {name: max(values) for name, values in maxima.items()}


def policy_metrics(prepared: Metrics, updates: Sequence[Totals]) -> dict[str, Any]:
    """On the host: the metrics of a step, from those of `prepare` and of its updates."""
    metrics = prepared | combine_updates(updates)
    first = updates[0]
    if "rollout/logp_mismatch" not in prepared and "update/logp_difference" in first.sums:
        # Before the first update the trainer's policy is the sampler's: what differs then is numerics. A later one does not
        # tell it, where the first had no tokens: moments and weight decay have moved the policy.
        metrics["rollout/logp_mismatch"] = first.sums["update/logp_difference"]
        metrics["rollout/ratio_max"] = first.maxima["update/ratio_max"]
    return metrics


def make_logprobs(decoder: Decoder, cfg: StepConfig, mesh: Mesh) -> Logprobs:
    """Compiles the forward pass over a rollout."""
    add = jax.jit(
        functools.partial(_put_logprobs, decoder=decoder, cfg=cfg),
        out_shardings=batch_sharding(mesh),
        donate_argnums=1,
    )
    return Logprobs(add, cfg.max_tokens_per_microbatch, mesh)


def plan_all_groups(lengths: BatchLengths, max_tokens: int | None, mesh: Mesh) -> list[MicroBatch]:
    """The micro-batches of a pass over all groups of a global batch."""
    groups = len(lengths.prompt_length)
    packing = Packing(num_data_shards(mesh), max_tokens)
    (micro_batches,) = plan_microbatches(
        lengths, assign_minibatches(groups, 1), np.ones(groups, bool), packing
    )
    return micro_batches


def _put_logprobs(params, values, rollout, rows, decoder, cfg) -> Recomputed:
    spec = PassSpec(cfg.sampling, cfg.loss.vocab_chunk)
    new = response_logprobs(decoder, params, rollout, rows, spec)
    return jax.tree.map(jnp.add, values, Recomputed(*new))


def init_state(
    policy: Policy,
    tx: Optimizer,
    schedule: curriculum.Schedule,
    seed: int,
    shardings: TrainState,
) -> TrainState:
    """The state before the first step, in the shardings of `abstract_state`. The optimiser's state is born sharded, on the
    devices or in the memory of their hosts; what the policy trains moves into the state (it is donated).
    """
    make = functools.partial(_fresh_state, tx=tx, schedule=schedule, seed=seed)
    return jax.jit(make, out_shardings=shardings, donate_argnums=0)(policy.trained)


def abstract_state(
    policy: Policy,
    tx: Optimizer,
    schedule: curriculum.Schedule,
    moments: Moments = "device",
) -> tuple[TrainState, TrainState]:
    """(abstract state with shardings, shardings); the policy's parameters may be abstract, too."""
    where = param_shardings if policy.adapters is None else adapter_shardings
    params_at = where(policy.config, policy.mesh)
    make = functools.partial(_fresh_state, tx=tx, schedule=schedule, seed=0)
    shapes = jax.eval_shape(make, policy.trained)
    optimiser_at = tree_shardings_like(shapes.opt_state, policy.trained, params_at)
    if moments == "host":
        optimiser_at = jax.tree.map(_in_host_memory, shapes.opt_state, optimiser_at)
    shardings = dataclasses.replace(
        jax.tree.map(lambda _: replicated(policy.mesh), shapes),
        params=params_at,
        opt_state=optimiser_at,
    )
    return place(shapes, shardings), shardings


def copy_to_host(state: TrainState) -> TrainState:
    """A copy of the state in the memory of the hosts, from which it can be saved. It is made beside what the devices compute."""

    def copy(x: jax.Array) -> jax.Array:
        if not x.ndim:
            return jnp.copy(x)
        there = x.sharding.with_memory_kind(HOST_MEMORY)
        if there == x.sharding:  # and so the same buffer, unless it goes by way of the device
            x = jax.device_put(x, x.sharding.with_memory_kind("device"))
        return jax.device_put(x, there)

    return jax.tree.map(copy, state)


def first_key(seed: int, sharding: Any) -> jax.Array:
    """The random key that a run begins with."""
    return jax.jit(lambda: jax.random.key(seed), out_shardings=sharding)()


def _in_host_memory(x: Any, sharding: NamedSharding) -> NamedSharding:
    """Counts stay on the device."""
    return sharding.with_memory_kind(HOST_MEMORY) if x.ndim else sharding


def _fresh_state(params, tx, schedule, seed) -> TrainState:
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=tx.init(params),
        rng=jax.random.key(seed),
        curriculum=curriculum.init(schedule),
    )


def make_advance(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    """Function from one step index to the next, replicated over the mesh."""
    return jax.jit(lambda step: step + 1, out_shardings=replicated(mesh))
