"""The train step: a scored rollout and the train state in, the next train state and metrics out; one jitted call a step.

    scored --(curriculum, weights, advantages)--> TrainBatch --scan over mini-batches--> AdamW updates
                                                              each: scan over micro-batches, gradients summed

Every denominator is computed over the whole global mini-batch before its micro-batches run (`loss.AGGREGATIONS`).
`make_train_step` applies jit and states donation; the functions above it are pure.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from rest_jax import masked
from rest_jax.answer import Region
from rest_jax.config import LossConfig
from rest_jax.models.decoder import Decoder
from rest_jax.rl import curriculum, loss, weights
from rest_jax.rl.advantages import ADVANTAGES, has_signal
from rest_jax.rl.forward import response_logprobs
from rest_jax.rl.logprobs import Sampling
from rest_jax.rl.packing import split_groups
from rest_jax.types import (
    Params,
    RolloutBatch,
    ScoredBatch,
    TrainBatch,
    TrainState,
    response_mask,
)

Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """The static side of a step. Sizes are prompts: `updates` mini-batches a step, `micro` micro-batches in each."""

    loss: LossConfig
    schedule: curriculum.Schedule
    sampling: Sampling
    updates: int
    micro: int
    fixed_length: int  # tokens; the constant of aggregation `fixed_length`
    importance_cap: float | None = None


@struct.dataclass
class OldPolicy:
    """A second look at the rollout by the trainer's own forward pass, when asked for."""

    logp: Float[Array, "P G T"]
    entropy: Float[Array, "P G T"]
    gini: Float[Array, "P G T"]


@struct.dataclass
class Totals:
    """Metrics of a mini-batch, gathered over its micro-batches: `sums` add up, of `maxima` the largest stays."""

    sums: Metrics
    maxima: Metrics


@struct.dataclass
class Coefficients:
    """Per-token factors of the loss with their global denominators in them."""

    policy: Float[Array, "P G T"]
    regulariser: Float[Array, "P G T"]


def make_train_batch(
    scored: ScoredBatch,
    old: OldPolicy | None,
    logp_ref: jax.Array | None,
    state: TrainState,
    cfg: StepConfig,
) -> tuple[TrainBatch, curriculum.CurriculumState, Metrics]:
    """Curriculum update, token weights, advantages. With `old`, its values replace the sampler's."""
    rollout = scored.rollout
    entropy, gini = (old.entropy, old.gini) if old is not None else (rollout.entropy, rollout.gini)
    stats = weights.region_stats(scored.region, entropy, gini)
    new = curriculum.update(state.curriculum, stats, jnp.mean(scored.format_score), cfg.schedule)
    # Mass shares hold over the whole batch; normalising each response would undo them.
    mass = cfg.schedule.curriculum.target == "mass"
    normalizer = "none" if mass else cfg.schedule.weights.normalizer
    weight = weights.token_weights(scored.region, new.weight, normalizer)
    correction = None
    if cfg.importance_cap is not None and old is not None:
        correction = jnp.minimum(loss.ratio(old.logp, rollout.logp), cfg.importance_cap)
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


def coefficients(batch: TrainBatch, cfg: StepConfig) -> Coefficients:
    """Denominators over the whole mini-batch; the importance correction multiplies the loss, not the denominator."""
    policy = loss.AGGREGATIONS[cfg.loss.aggregation](batch.weight, batch.mask, cfg.fixed_length)
    if batch.correction is not None:
        policy = policy * batch.correction
    regulariser = batch.mask / jnp.maximum(jnp.sum(batch.mask), 1).astype(jnp.float32)
    return Coefficients(policy=policy, regulariser=regulariser)


def loss_terms(
    params: Params, batch: TrainBatch, c: Coefficients, decoder: Decoder, cfg: StepConfig
) -> tuple[Float[Array, ""], Totals]:
    """This micro-batch's share of the mini-batch's loss and of its metrics."""
    mask, old = batch.mask, batch.logp_old
    logp, entropy, _ = response_logprobs(
        decoder, params, batch.prompt, batch.prompt_length, batch.responses, batch.response_length,
        cfg.sampling, cfg.loss.vocab_chunk,
    )  # fmt: skip
    per_token = loss.policy_loss(logp, old, batch.advantage, cfg.loss)
    policy = masked.masked_sum(c.policy * per_token, mask)
    total = policy
    sums = {"update/policy_loss": policy}
    u = c.regulariser
    sums["update/entropy"] = masked.masked_sum(u * entropy, mask)
    if cfg.loss.entropy_coefficient > 0:
        total = total - cfg.loss.entropy_coefficient * sums["update/entropy"]
    if batch.logp_ref is not None:
        kl = masked.masked_sum(
            u * loss.KL_ESTIMATORS[cfg.loss.kl_estimator](logp, batch.logp_ref), mask
        )
        sums["update/kl"] = kl
        total = total + cfg.loss.kl_coefficient * kl
    sums["update/loss"] = total
    cut = loss.clipped(logp, old, batch.advantage, cfg.loss)
    sums["update/clip_fraction"] = masked.masked_sum(u * cut, mask)
    sums["update/ratio_mean"] = masked.masked_sum(u * loss.ratio(logp, old), mask)
    difference = jnp.abs(logp - old)
    sums["update/logp_difference"] = masked.masked_sum(u * difference, mask)
    return total, Totals(
        sums, {"update/ratio_max": loss.ratio(masked.max_over_mask(difference, mask), 0.0)}
    )


def accumulate(
    loss_fn: Callable[..., tuple[jax.Array, Totals]],
    params: Params,
    micro: tuple,
    shardings: Params,
) -> tuple[Params, Totals]:
    """Sums gradients (float32) and metrics over the leading axis of `micro`, one micro-batch in memory at a time."""
    grad_fn = jax.grad(loss_fn, has_aux=True)

    def add(total, part):
        grads, new = grad_fn(params, *part)
        grads = jax.lax.with_sharding_constraint(jax.tree.map(jnp.add, total[0], grads), shardings)
        sums = jax.tree.map(jnp.add, total[1].sums, new.sums)
        return (grads, Totals(sums, jax.tree.map(jnp.maximum, total[1].maxima, new.maxima))), None

    shapes = jax.eval_shape(grad_fn, params, *jax.tree.map(lambda x: x[0], micro))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(add, zeros, micro)[0]


def apply_gradients(
    state: TrainState, grads: Params, tx: optax.GradientTransformation
) -> tuple[Params, optax.OptState, Metrics]:
    """One optimiser update."""
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    metrics = {
        "update/grad_norm": optax.tree.norm(grads),
        "update/update_norm": optax.tree.norm(updates),
    }
    return optax.apply_updates(state.params, updates), opt_state, metrics


def train_step(
    state: TrainState,
    scored: ScoredBatch,
    old: OldPolicy | None,
    logp_ref: jax.Array | None,
    *,
    decoder: Decoder,
    tx: optax.GradientTransformation,
    cfg: StepConfig,
    mesh: Mesh,
    param_shardings: Params,
) -> tuple[TrainState, Metrics]:
    """All updates of one rollout step."""
    batch, new_curriculum, metrics = make_train_batch(scored, old, logp_ref, state, cfg)

    def loss_fn(params, micro_batch, micro_coefficients):
        return loss_terms(params, micro_batch, micro_coefficients, decoder, cfg)

    def update(state, mini):
        micro = split_groups((mini, coefficients(mini, cfg)), cfg.micro, mesh)
        grads, totals = accumulate(loss_fn, state.params, micro, param_shardings)
        params, opt_state, norms = apply_gradients(state, grads, tx)
        return dataclasses.replace(
            state, params=params, opt_state=opt_state
        ), totals.sums | totals.maxima | norms

    state, per_update = jax.lax.scan(update, state, split_groups(batch, cfg.updates, mesh))
    if old is None:
        # Before the first update the trainer's policy is the sampler's: what differs then is numerics.
        metrics["rollout/logp_mismatch"] = per_update["update/logp_difference"][0]
        metrics["rollout/ratio_max"] = per_update["update/ratio_max"][0]
    metrics |= {name: jnp.mean(values) for name, values in per_update.items()}
    return dataclasses.replace(state, step=state.step + 1, curriculum=new_curriculum), metrics


def make_train_step(
    decoder: Decoder,
    tx: optax.GradientTransformation,
    cfg: StepConfig,
    mesh: Mesh,
    state_shardings: TrainState,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """jit of `train_step`: (state, scored, old | None, logp_ref | None). The state is donated; metrics are replicated."""
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    everywhere = NamedSharding(mesh, PartitionSpec())

    def step(state, scored, old, logp_ref):
        return train_step(
            state, scored, old, logp_ref, decoder=decoder, tx=tx, cfg=cfg, mesh=mesh,
            param_shardings=state_shardings.params,
        )  # fmt: skip

    return jax.jit(
        step,
        in_shardings=(state_shardings, rows, rows, rows),
        out_shardings=(state_shardings, everywhere),
        donate_argnums=0,
    )


def make_logprobs(
    decoder: Decoder, cfg: StepConfig, mesh: Mesh, param_shardings: Params
) -> Callable[[Params, RolloutBatch], OldPolicy]:
    """jit of a forward pass over a rollout in micro-batches: for recomputed old values and for the reference model."""
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    parts = cfg.updates * cfg.micro

    def one(params, r):
        out = response_logprobs(
            decoder, params, r.prompt, r.prompt_length, r.responses, r.response_length,
            cfg.sampling, cfg.loss.vocab_chunk,
        )  # fmt: skip
        mask = response_mask(r.response_length, r.responses.shape[-1])
        return OldPolicy(*(jnp.where(mask, x, 0.0) for x in out))

    def logprobs(params, rollout):
        out = jax.lax.map(lambda r: one(params, r), split_groups(rollout, parts, mesh))
        return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), out)

    return jax.jit(logprobs, in_shardings=(param_shardings, rows), out_shardings=rows)


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
        "reward/equal_groups": jnp.mean(1.0 - has_signal(scored.reward)),
        "rollout/response_tokens": jnp.mean(length),
        "rollout/prompt_tokens": jnp.mean(batch.prompt_length.astype(jnp.float32)),
        "rollout/entropy": masked.mean_over_mask(scored.rollout.entropy, batch.mask),
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
    for name, column in (columns | {"weight": mean, "mass": mass}).items():
        out |= {
            f"region/{r.name.lower()}/{name}": column[r] for r in Region if r is not Region.NONE
        }
    return out
