"""From a scored rollout to what the update reads: curriculum, token weights, advantages, and the global denominators.

    prepare(scored, ..., curriculum) -> TrainBatch, CurriculumState, metrics, TokenValues

Every denominator is computed here, over the global mini-batch, before its micro-batches run. So groups without advantage
need no forward pass: they have entered the denominators already.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from rest_jax.config import Config, LossConfig
from rest_jax.rl import curriculum, masked, weights
from rest_jax.rl.loss import AGGREGATIONS, MiniBatches, ratio
from rest_jax.rl.placebo import PLACEBOS
from rest_jax.rl.rules import Chosen, advantage_rule, choose_weight_rule
from rest_jax.rl.view import TokenView, make_view, nonzero_advantage, per_token
from rest_jax.tool_calls import Region
from rest_jax.types import (
    AnyArray,
    CurriculumState,
    RolloutBatch,
    Sampling,
    ScoredBatch,
    TrainBatch,
)

Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """The static side of a step of `updates` mini-batches."""

    loss: LossConfig
    schedule: curriculum.Schedule
    sampling: Sampling
    updates: int
    fixed_length: int  # tokens; the constant of aggregation `fixed_length`
    # trunk positions on each data shard; None: no limit
    max_tokens_per_microbatch: int | None = None
    tis_cap: float | None = None  # cap of the truncated importance weights; None: off
    noise_groups: int | None = None  # groups of a mini-batch, whose gradient noise is measured
    shown_groups: tuple[int, ...] = ()  # rows of the global batch whose `TokenValues` are asked for
    weight_rule: Chosen | None = None  # of single tokens; None: regions alone decide
    placebo: str = "none"  # of the weights
    seed: int = 0  # of the run, for the rules that draw

    @property
    def advantage_rule(self) -> Chosen:
        """The rule of the advantages."""
        return advantage_rule(self.loss)

    @property
    def all_groups_active(self) -> bool:
        """Whether groups without advantage have a gradient all the same."""
        loss = self.loss
        terms = loss.kl_coefficient, loss.entropy_coefficient, loss.load_balance_coefficient
        return max(terms) > 0


def has_advantage(scored: ScoredBatch, loss: LossConfig) -> Bool[AnyArray, " P"]:
    """The groups with an advantage: their completions differ in what the rule asks for (`rules.Signal`), and pass the filter."""
    signal = advantage_rule(loss).rule.signal
    found = np.ones(len(scored.reward), bool)
    for name in (signal, "exact" if loss.group_filter == "exact" else None):
        if name is not None:
            found = found & nonzero_advantage(getattr(scored, name))
    return found


def step_config(config: Config, steps: int) -> StepConfig:
    """The static side of the steps."""
    rollout, train = config.rollout, config.train
    groups = minibatch_prompts(config)
    return StepConfig(
        loss=config.loss,
        schedule=curriculum.Schedule.of(config, steps),
        sampling=Sampling(rollout.temperature, rollout.top_k, rollout.top_p),
        updates=rollout.prompts_per_step // groups,
        fixed_length=rollout.max_response_tokens,
        max_tokens_per_microbatch=train.max_tokens_per_microbatch,
        tis_cap=rollout.tis_cap,
        noise_groups=groups if train.measure_noise else None,
        weight_rule=choose_weight_rule(config),
        placebo=config.weights.placebo,
        seed=config.seed,
    )


def minibatch_prompts(config: Config) -> int:
    """Prompts of an optimiser update."""
    return config.train.prompts_per_update or config.rollout.prompts_per_step


@struct.dataclass
class Recomputed:
    """Values of the rollout's tokens by the trainer's own forward pass, when asked for."""

    logp: Float[Array, "P G T"]
    entropy: Float[Array, "P G T"]
    gini: Float[Array, "P G T"]


@struct.dataclass
class TokenValues:
    """What the device made of the tokens of n groups (`StepConfig.shown_groups`), for people to look at."""

    weight: Float[AnyArray, "n G T"]  # normalised token weight, before the denominators
    advantage: Float[AnyArray, "n G"]  # mean over the tokens where they differ
    logp: Float[AnyArray, "n G T"] | None  # by the trainer; None where it was not recomputed


def active_groups(scored: ScoredBatch, cfg: StepConfig) -> Bool[AnyArray, " P"]:
    """The groups that must be computed; the others have no gradient."""
    return has_advantage(scored, cfg.loss) | cfg.all_groups_active


@jax.named_scope("prepare")
def prepare(
    scored: ScoredBatch,
    recomputed: Recomputed | None,
    logp_ref: Float[Array, "P G T"] | None,
    minibatch: Int[Array, " P"],
    state: CurriculumState,
    cfg: StepConfig,
) -> tuple[TrainBatch, CurriculumState, Metrics, TokenValues]:
    """What the updates of a step read. `recomputed` replaces the sampler's values; `minibatch`: of each group."""
    rollout = scored.rollout
    old = rollout if recomputed is None else recomputed
    stats = weights.region_stats(scored.region, old.entropy, old.gini)
    new = curriculum.update(state, stats, jnp.mean(scored.format_score), cfg.schedule)
    view = make_view(scored, old, new, cfg.seed)
    advantage = compute_advantage(view, cfg)
    view = dataclasses.replace(view, advantage=advantage)
    weight = weigh_tokens(view, new.weight, cfg)
    metrics = reward_metrics(scored) | rollout_metrics(rollout)
    if scored.marked is not None:
        marked = scored.marked.astype(jnp.float32)
        metrics["rollout/marked"] = masked.mean_over_mask(marked, rollout.mask)
    metrics |= curriculum_metrics(scored, weight, stats, new)

    minibatches = MiniBatches(minibatch, cfg.updates)
    mask = rollout.mask
    loss_weight = AGGREGATIONS[cfg.loss.aggregation](weight, mask, minibatches, cfg.fixed_length)
    if recomputed is not None:
        metrics |= mismatch(recomputed.logp, rollout)
        if cfg.tis_cap is not None:
            # The correction multiplies the loss, not the denominator.
            tis = jnp.minimum(ratio(recomputed.logp, rollout.logp), cfg.tis_cap)
            metrics["update/tis_weight_mean"] = masked.mean_over_mask(tis, mask)
            loss_weight = loss_weight * tis
    metrics["update/phantom_gradient"] = phantom_gradient(view, loss_weight)
    metrics["update/effective_tokens"] = effective_tokens(view, loss_weight)
    counted = mask & active_groups(scored, cfg)[:, None, None]
    batch = TrainBatch(
        prompt=rollout.prompt,
        prompt_length=rollout.prompt_length,
        responses=rollout.responses,
        response_length=rollout.response_length,
        routes=rollout.routes,
        logp_old=old.logp,
        logp_ref=logp_ref,
        advantage=advantage,
        loss_weight=loss_weight,
        regulariser=counted / jnp.maximum(minibatches.total(jnp.sum(counted, (1, 2))), 1),
    )
    rows = np.array(cfg.shown_groups, np.int32)
    logp = None if recomputed is None else recomputed.logp[rows]
    shown = advantage[rows]
    if shown.ndim == 3:
        shown = masked.mean_over_mask(shown, mask[rows], axis=-1)
    return batch, new, metrics, TokenValues(weight[rows], shown, logp)


def compute_advantage(view: TokenView, cfg: StepConfig) -> Float[Array, "P G *T"]:
    """By the rule: of completions, or of their tokens, then zero outside the mask. Without gradient."""
    advantage = cfg.advantage_rule(view)
    if advantage.ndim == 3:
        advantage = jnp.where(view.mask, advantage, 0.0)
    if cfg.loss.group_filter == "exact":
        mixed = nonzero_advantage(view.exact)
        advantage = jnp.where(jnp.expand_dims(mixed, range(1, advantage.ndim)), advantage, 0.0)
    return jax.lax.stop_gradient(advantage)


def weigh_tokens(
    view: TokenView, region_weight: Float[Array, " R"], cfg: StepConfig
) -> Float[Array, "P G T"]:
    """Weight of its region x that of the rule, by the placebo elsewhere, normalised. Without gradient."""
    weight = weights.token_weights(view.region, region_weight, "none")
    if cfg.weight_rule is not None:
        weight = weight * cfg.weight_rule(view)
    weight = PLACEBOS[cfg.placebo](weight, view, cfg.seed)
    return jax.lax.stop_gradient(weights.NORMALIZERS[cfg.schedule.normalizer](weight, view.mask))


def phantom_gradient(view: TokenView, loss_weight: Float[Array, "P G T"]) -> Float[Array, ""]:
    """Share of the policy gradient, as the sum of |coefficient x advantage|, that groups without any exact completion have."""
    size = jnp.sum(jnp.abs(loss_weight * view.token_advantage), axis=(1, 2))
    without = ~jnp.any(view.exact, axis=1)
    return jnp.sum(jnp.where(without, size, 0.0)) / jnp.maximum(jnp.sum(size), 1e-30)


def effective_tokens(view: TokenView, loss_weight: Float[Array, "P G T"]) -> Float[Array, ""]:
    """Kish's effective sample size of the coefficients c = loss weight x advantage, (sum |c|)^2 / sum c^2, over the tokens."""
    size = jnp.abs(loss_weight * view.token_advantage)
    size = size / jnp.maximum(jnp.max(size), 1e-30)  # squares of tiny ones would vanish
    effective = jnp.sum(size) ** 2 / jnp.maximum(jnp.sum(size**2), 1e-30)
    return effective / jnp.maximum(jnp.sum(view.mask), 1)


def change_metrics(
    logp: Float[Array, "P G T"],
    batch: TrainBatch,
    region: Int[Array, "P G T"],
    mask: Bool[Array, "P G T"],
) -> Metrics:
    """What a step changed: of each region the mean of the new `logp` less that of the batch, over the tokens of positive and
    of negative advantage; 0 where there are none. The batch's is the sampler's unless it was recomputed, so that what sampler and
    trainer differ by (`rollout/logp_mismatch`) is in it.
    """
    change, advantage = logp - batch.logp_old, per_token(batch.advantage)
    signs = {"change_positive": advantage > 0, "change_negative": advantage < 0}
    return {
        f"region/{own.name.lower()}/{name}": masked.mean_over_mask(
            change, mask & there & (region == own)
        )
        for name, there in signs.items()
        for own in Region
        if own is not Region.NONE
    }


def mismatch(logp: Float[Array, "P G T"], rollout: RolloutBatch) -> Metrics:
    """How far the sampler's log-probs are from the trainer's."""
    difference = jnp.abs(logp - rollout.logp)
    return {
        "rollout/logp_mismatch": masked.mean_over_mask(difference, rollout.mask),
        "rollout/ratio_max": ratio(masked.max_over_mask(difference, rollout.mask), 0.0),
    }


def reward_metrics(scored: ScoredBatch) -> Metrics:
    """Rewards over the batch and within the groups."""
    reward = scored.reward
    return {
        "reward/mean": jnp.mean(reward),
        "reward/std": jnp.std(reward),
        "reward/min": jnp.min(reward),
        "reward/max": jnp.max(reward),
        "reward/group_std": jnp.mean(jnp.std(reward, axis=1)),
        "reward/format_score": jnp.mean(scored.format_score),
        "reward/equal_groups": jnp.mean(1.0 - nonzero_advantage(reward)),
    }


def rollout_metrics(rollout: RolloutBatch) -> Metrics:
    """Lengths, and means over the sampled tokens."""
    length = rollout.response_length.astype(jnp.float32)
    mask = rollout.mask
    return {
        "rollout/response_tokens": jnp.mean(length),
        "rollout/response_tokens_max": jnp.max(length),
        "rollout/prompt_tokens": jnp.mean(rollout.prompt_length.astype(jnp.float32)),
        "rollout/logp": masked.mean_over_mask(rollout.logp, mask),
        "rollout/entropy": masked.mean_over_mask(rollout.entropy, mask),
        "rollout/gini": masked.mean_over_mask(rollout.gini, mask),
    }


def curriculum_metrics(
    scored: ScoredBatch,
    weight: Float[Array, "P G T"],
    stats: weights.RegionStats,
    state: CurriculumState,
) -> Metrics:
    """Progress, and for each region entropy, weight in force, realised weight and weight share, tokens."""
    mean, share = weights.realised(scored.region, weight)
    columns = {
        "entropy": stats.entropy,
        "gini": stats.gini,
        "count": stats.count,
        "base": state.weight,
        "weight": mean,
        "weight_share": share,
    }
    return {"curriculum/nu": state.nu, "curriculum/format_score": state.format_score} | {
        f"region/{region.name.lower()}/{name}": column[region]
        for name, column in columns.items()
        for region in Region
        if region is not Region.NONE
    }
