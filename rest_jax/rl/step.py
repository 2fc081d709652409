"""The train step: a scored rollout and the train state in, the next train state and metrics out.

    scored --(curriculum, weights, advantages)--> StepBatch --for each mini-batch: micro-batches--> AdamW update

Every denominator is computed over the whole global mini-batch before its micro-batches run (`loss.AGGREGATIONS`), so groups
without advantage need no forward pass: they have entered the denominators (`plan_step` leaves them out unless a KL or
entropy term gives them gradient). `make_train_step` applies jit; the functions above it are pure.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float

from rest_jax.config import LossConfig
from rest_jax.distributed import num_data_shards, tree_shardings_like
from rest_jax.models.decoder import Decoder, param_shardings
from rest_jax.models.load import Policy
from rest_jax.rl import curriculum, loss, masked, weights
from rest_jax.rl.advantages import ADVANTAGES, nonzero_advantage
from rest_jax.rl.forward import response_logprobs, response_loss
from rest_jax.rl.gradients import Metrics, Totals, make_update
from rest_jax.rl.packing import MicroBatch, plan, put_groups, take_groups
from rest_jax.tool_calls import Region
from rest_jax.types import (
    Params,
    Sampling,
    ScoredBatch,
    TrainBatch,
    TrainState,
    response_mask,
)


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """The static side of a step: `updates` mini-batches, cut into micro-batches of at most
    `max_tokens_per_microbatch` trunk positions on each data shard (None: no limit).
    """

    loss: LossConfig
    schedule: curriculum.Schedule
    sampling: Sampling
    updates: int
    max_tokens_per_microbatch: int | None
    fixed_length: int  # tokens; the constant of aggregation `fixed_length`
    tis_cap: float | None = None
    noise_groups: int | None = (
        None  # groups of a mini-batch: `gradient_noise` is measured, group by group
    )

    @property
    def all_groups_active(self) -> bool:
        """Whether groups without advantage have gradient all the same."""
        return self.loss.kl_coefficient > 0 or self.loss.entropy_coefficient > 0


@struct.dataclass
class OldPolicy:
    """A second look at the rollout by the trainer's own forward pass, when asked for."""

    logp: Float[Array, "P G T"]
    entropy: Float[Array, "P G T"]
    gini: Float[Array, "P G T"]


@struct.dataclass
class StepBatch:
    """All that the updates of a step read, row by row."""

    batch: TrainBatch
    coefficients: "Coefficients"


@struct.dataclass
class Coefficients:
    """Per-token factors of the loss with their global denominators in them."""

    policy: Float[Array, "P G T"]
    regulariser: Float[Array, "P G T"]


def make_train_batch(
    scored: ScoredBatch,
    old: OldPolicy | None,
    logp_ref: jax.Array | None,
    state: curriculum.CurriculumState,
    cfg: StepConfig,
) -> tuple[TrainBatch, curriculum.CurriculumState, Metrics]:
    """Curriculum update, token weights, advantages. With `old`, its values replace the sampler's."""
    rollout = scored.rollout
    entropy, gini = (old.entropy, old.gini) if old is not None else (rollout.entropy, rollout.gini)
    stats = weights.region_stats(scored.region, entropy, gini)
    new = curriculum.update(state, stats, jnp.mean(scored.format_score), cfg.schedule)
    weight = weights.token_weights(scored.region, new.weight, cfg.schedule.normalizer)
    correction = None
    if cfg.tis_cap is not None and old is not None:
        correction = jnp.minimum(loss.ratio(old.logp, rollout.logp), cfg.tis_cap)
    batch = TrainBatch(
        prompt=rollout.prompt,
        prompt_length=rollout.prompt_length,
        responses=rollout.responses,
        response_length=rollout.response_length,
        logp_old=rollout.logp if old is None else old.logp,
        logp_ref=logp_ref,
        advantage=ADVANTAGES[cfg.loss.advantage](scored.reward),
        weight=weight,
        correction=correction,
    )
    metrics = batch_metrics(scored, batch, stats, new)
    if old is not None:
        metrics |= mismatch(old.logp, rollout.logp, batch.mask)
    return batch, new, metrics


def coefficients(batch: TrainBatch, counted: Bool[Array, " P"], cfg: StepConfig) -> Coefficients:
    """Denominators over a whole mini-batch; the importance correction multiplies the loss, not the denominator.

    The regulariser is the plain mean over the tokens of the `counted` groups: those that are computed at all.
    """
    policy = loss.AGGREGATIONS[cfg.loss.aggregation](batch.weight, batch.mask, cfg.fixed_length)
    if batch.correction is not None:
        policy = policy * batch.correction
    mask = batch.mask & counted[:, None, None]
    regulariser = mask / jnp.maximum(jnp.sum(mask), 1).astype(jnp.float32)
    return Coefficients(policy=policy, regulariser=regulariser)


@jax.named_scope("prepare")
def prepare_step(
    scored: ScoredBatch,
    old: OldPolicy | None,
    logp_ref: jax.Array | None,
    state: curriculum.CurriculumState,
    cfg: StepConfig,
) -> tuple[StepBatch, curriculum.CurriculumState, Metrics]:
    """`make_train_batch` and the coefficients of its mini-batches; row p belongs to mini-batch p % updates."""
    batch, new, metrics = make_train_batch(scored, old, logp_ref, state, cfg)
    counted = nonzero_advantage(scored.reward) | cfg.all_groups_active

    def by_update(x):
        return x.reshape(-1, cfg.updates, *x.shape[1:])

    parts = jax.tree.map(by_update, (batch, counted))
    one = jax.vmap(lambda b, c: coefficients(b, c, cfg), in_axes=1, out_axes=1)(*parts)
    return StepBatch(batch, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), one)), new, metrics


def loss_terms(
    params: Params, part: StepBatch, decoder: Decoder, cfg: StepConfig
) -> tuple[Float[Array, ""], Totals]:
    """This micro-batch's share of the mini-batch's loss and of its metrics."""
    batch, c = part.batch, part.coefficients
    mask, old, u = batch.mask, batch.logp_old, c.regulariser
    advantage = jnp.broadcast_to(batch.advantage[..., None], mask.shape)
    kl_estimator = loss.KL_ESTIMATORS[cfg.loss.kl_estimator]

    def token_loss(logp, entropy, x):
        total = x["policy"] * loss.token_policy_loss(logp, x["old"], x["advantage"], cfg.loss)
        if cfg.loss.entropy_coefficient > 0:
            total = total - cfg.loss.entropy_coefficient * x["regulariser"] * entropy
        if batch.logp_ref is not None:
            total = total + cfg.loss.kl_coefficient * x["regulariser"] * kl_estimator(
                logp, x["reference"]
            )
        return total

    extra = {"policy": c.policy, "old": old, "advantage": advantage, "regulariser": u}
    if batch.logp_ref is not None:
        extra["reference"] = batch.logp_ref
    total, logp, entropy = response_loss(
        decoder, params, batch.prompt, batch.prompt_length, batch.responses, batch.response_length,
        extra, token_loss, cfg.sampling, cfg.loss.vocab_chunk,
        entropy_counts=cfg.loss.entropy_coefficient > 0,
    )  # fmt: skip
    logp, entropy = jax.lax.stop_gradient((logp, entropy))
    per_token = loss.policy_loss(logp, old, batch.advantage, cfg.loss)
    cut = loss.clipped(logp, old, batch.advantage, cfg.loss)
    difference = jnp.abs(logp - old)
    sums = {
        "update/loss": total,
        "update/policy_loss": masked.masked_sum(c.policy * per_token, mask),
        "update/entropy": masked.masked_sum(u * entropy, mask),
        "update/clip_fraction": masked.masked_sum(u * cut, mask),
        "update/ratio_mean": masked.masked_sum(u * loss.ratio(logp, old), mask),
        "update/logp_difference": masked.masked_sum(u * difference, mask),
    }
    if batch.logp_ref is not None:
        sums["update/kl"] = masked.masked_sum(u * kl_estimator(logp, batch.logp_ref), mask)
    largest = loss.ratio(masked.max_over_mask(difference, mask), 0.0)
    return total, Totals(sums, {"update/ratio_max": largest})


@dataclasses.dataclass(frozen=True)
class BatchLengths:
    """What the host must know of a whole (global) batch to cut it: NumPy."""

    prompt_length: np.ndarray  # [P]
    response_length: np.ndarray  # [P, G]
    reward: np.ndarray  # [P, G]
    widths: tuple[int, int]  # padded prompt and response positions

    @classmethod
    def of(cls, scored: ScoredBatch) -> "BatchLengths":
        """Of a batch that this process can read whole."""
        r = scored.rollout
        arrays = map(np.asarray, (r.prompt_length, r.response_length, scored.reward))
        return cls(*arrays, widths=(r.prompt.shape[1], r.responses.shape[2]))


def active_groups(reward: np.ndarray, cfg: StepConfig) -> np.ndarray:
    """bool [P]: the groups that must be computed; the others have neither advantage nor another term's gradient."""
    return (reward.max(axis=1) != reward.min(axis=1)) | cfg.all_groups_active


def plan_step(extents: BatchLengths, cfg: StepConfig, ways: int) -> list[list[MicroBatch]]:
    """The micro-batches of each update, for the groups that must be computed."""
    return plan(
        extents.prompt_length,
        extents.response_length,
        extents.widths,
        ways=ways,
        budget=cfg.max_tokens_per_microbatch,
        wanted=active_groups(extents.reward, cfg),
        updates=cfg.updates,
        most_rows=None if cfg.noise_groups is None else 1,
    )


def plan_all(extents: BatchLengths, cfg: StepConfig, ways: int) -> list[MicroBatch]:
    """Micro-batches that name every group once."""
    (found,) = plan(
        extents.prompt_length,
        extents.response_length,
        extents.widths,
        ways=ways,
        budget=cfg.max_tokens_per_microbatch,
    )
    return found


TrainStep = Callable[..., tuple[TrainState, Metrics]]


def make_train_step(
    decoder: Decoder,
    tx: optax.GradientTransformation,
    cfg: StepConfig,
    mesh: Mesh,
    state_shardings: TrainState,
) -> TrainStep:
    """(state, scored, old | None, logp_ref | None, plan) -> (state, metrics): all updates of one rollout step.

    The state is donated, metrics are replicated. Without a plan (`plan_step`), `scored` must be readable by this process.
    The call only dispatches: it returns before the device is done.
    """
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    everywhere = NamedSharding(mesh, PartitionSpec())
    ways = num_data_shards(mesh)

    prepare = jax.jit(
        functools.partial(prepare_step, cfg=cfg),
        in_shardings=(rows, rows, rows, state_shardings.curriculum),
        out_shardings=(rows, everywhere, everywhere),
    )
    terms = functools.partial(loss_terms, decoder=decoder, cfg=cfg)
    update = make_update(terms, tx, mesh, state_shardings, cfg.noise_groups)
    combine = jax.jit(_combine, out_shardings=everywhere)

    def step(state, scored, old, logp_ref, micro_batches: Sequence | None = None):
        if micro_batches is None:
            micro_batches = plan_step(BatchLengths.of(scored), cfg, ways)
        batch, new_curriculum, metrics = prepare(scored, old, logp_ref, state.curriculum)
        per_update = []
        for mini in micro_batches:
            state, found = update(state, batch, mini)
            per_update.append(found)
        step_index, metrics = combine(state.step, metrics, per_update)
        return dataclasses.replace(state, step=step_index, curriculum=new_curriculum), metrics

    return step


def _combine(step, metrics: Metrics, per_update: list[Metrics]) -> tuple[jax.Array, Metrics]:
    """The next step index; metrics of the step, those of its updates averaged."""
    if "rollout/logp_mismatch" not in metrics:
        # Before the first update the trainer's policy is the sampler's: what differs then is numerics.
        metrics = metrics | {
            "rollout/logp_mismatch": per_update[0]["update/logp_difference"],
            "rollout/ratio_max": per_update[0]["update/ratio_max"],
        }
    mean = jax.tree.map(lambda *x: sum(x) / len(x), *per_update)
    return step + 1, metrics | mean


def make_logprobs(
    decoder: Decoder, cfg: StepConfig, mesh: Mesh, param_shardings: Params
) -> Callable[..., OldPolicy]:
    """(params, rollout, plan) -> OldPolicy: a forward pass over a rollout in micro-batches, for recomputed old values and
    for the reference model. The plan must name every group once; without one, `rollout` must be readable here.
    """
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    ways = num_data_shards(mesh)

    def one(params, out, rollout, pick, slots):
        r = take_groups(rollout, pick, slots, mesh)
        found = response_logprobs(
            decoder, params, r.prompt, r.prompt_length, r.responses, r.response_length,
            cfg.sampling, cfg.loss.vocab_chunk,
        )  # fmt: skip
        mask = response_mask(r.response_length, r.responses.shape[-1])
        return put_groups(out, OldPolicy(*(jnp.where(mask, x, 0.0) for x in found)), pick)

    jitted = jax.jit(one, static_argnames="slots", out_shardings=rows, donate_argnums=1)

    def logprobs(params, rollout, micro_batches: Sequence[MicroBatch] | None = None):
        if micro_batches is None:
            lengths = np.asarray(rollout.prompt_length), np.asarray(rollout.response_length)
            widths = rollout.prompt.shape[1], rollout.responses.shape[2]
            micro_batches = plan_all(BatchLengths(*lengths, lengths[1], widths), cfg, ways)
        shape = rollout.responses.shape
        out = OldPolicy(*(jnp.zeros(shape, jnp.float32, device=rows) for _ in range(3)))
        for micro in micro_batches:
            pick = jax.device_put(micro.pick, rows)
            out = jitted(params, out, rollout, pick, slots=micro.slots)
        return out

    return logprobs


def mismatch(logp: jax.Array, logp_rollout: jax.Array, mask: jax.Array) -> Metrics:
    """How far the sampler's log-probs are from the trainer's."""
    difference = jnp.abs(logp - logp_rollout)
    return {
        "rollout/logp_mismatch": masked.mean_over_mask(difference, mask),
        "rollout/ratio_max": loss.ratio(masked.max_over_mask(difference, mask), 0.0),
    }


def batch_metrics(
    scored: ScoredBatch,
    batch: TrainBatch,
    stats: weights.RegionStats,
    state: curriculum.CurriculumState,
) -> Metrics:
    """Rewards, lengths, curriculum, and per region: entropy, weight in force, realised weight, mass, tokens."""
    length = scored.rollout.response_length.astype(jnp.float32)
    out = {
        "reward/mean": jnp.mean(scored.reward),
        "reward/std": jnp.std(scored.reward),
        "reward/format_score": jnp.mean(scored.format_score),
        "reward/equal_groups": jnp.mean(1.0 - nonzero_advantage(scored.reward)),
        "rollout/response_tokens": jnp.mean(length),
        "rollout/prompt_tokens": jnp.mean(batch.prompt_length.astype(jnp.float32)),
        "rollout/entropy": masked.mean_over_mask(scored.rollout.entropy, batch.mask),
        "rollout/logp": masked.mean_over_mask(scored.rollout.logp, batch.mask),
        "curriculum/nu": state.nu,
        "curriculum/format_score": state.format_score,
    }
    mean, mass = weights.realised(scored.region, batch.weight)
    columns = {
        "entropy": stats.entropy,
        "gini": stats.gini,
        "count": stats.count,
        "base": state.weight,
    }
    for name, column in (columns | {"weight": mean, "weight_share": mass}).items():
        out |= {
            f"region/{r.name.lower()}/{name}": column[r] for r in Region if r is not Region.NONE
        }
    return out


def init_state(
    policy: Policy, tx: optax.GradientTransformation, schedule: curriculum.Schedule, seed: int
) -> tuple[TrainState, TrainState, TrainState]:
    """(state, abstract state with shardings, shardings). The optimiser's state is born sharded; the policy's weights
    move into the state (they are donated).
    """
    everywhere = NamedSharding(policy.mesh, PartitionSpec())
    params_at = param_shardings(policy.config, policy.mesh)

    def make(params):
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=tx.init(params),
            rng=jax.random.key(seed),
            curriculum=curriculum.init(schedule),
        )

    shapes = jax.eval_shape(make, policy.params)
    shardings = dataclasses.replace(
        jax.tree.map(lambda _: everywhere, shapes),
        params=params_at,
        opt_state=tree_shardings_like(shapes.opt_state, policy.params, params_at),
    )
    state = jax.jit(make, out_shardings=shardings, donate_argnums=0)(policy.params)
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )
    return state, abstract, shardings
