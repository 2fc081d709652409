"""Region weights from entropies, and token weights from region weights (docs/method.md sections 3 and 4).

    inverse_bound     b_r = 1 / (1 - exp(-H_r))          as described for ResT, the default
    inverse_entropy   b_r = 1 / H_r
    inverse_gini      b_r = 1 / mean(1 - sum_v p^2)      the exact second moment of the score, which the first bounds
    constant          b_r from the config
    uniform           b_r = 1                            plain GRPO

In: mean entropy and Gini of each region [R], with its number of tokens; the region id of each token. Out: weights, float32,
without gradient.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from rest_jax.config import WeightsConfig
from rest_jax.rl.masked import EPS
from rest_jax.tool_calls import NUM_REGIONS, Region

POLICY_REGIONS = tuple(r for r in Region if r is not Region.NONE)


@struct.dataclass
class RegionStats:
    """What one global batch says of each region; NONE, and a region without tokens, has count 0 and means 0."""

    entropy: Float[Array, " R"]  # mean over the tokens of the region, nats
    gini: Float[Array, " R"]
    count: Float[Array, " R"]  # tokens


def region_stats(
    region: Int[Array, "P G T"], entropy: Float[Array, "P G T"], gini: Float[Array, "P G T"]
) -> RegionStats:
    """Means over the global batch, hence across all devices."""
    regions = jnp.arange(NUM_REGIONS)
    member = (region[..., None] == regions) & (regions != Region.NONE)  # [P, G, T, R]
    count = jnp.sum(member, axis=(0, 1, 2), dtype=jnp.float32)

    def mean(x):
        return jnp.sum(jnp.where(member, x[..., None], 0.0), axis=(0, 1, 2)) / jnp.maximum(count, 1)

    return RegionStats(entropy=mean(entropy), gini=mean(gini), count=count)


def constants(cfg: WeightsConfig) -> np.ndarray:
    """The configured weight of each region, [R] float32; NONE has 0."""
    table = np.zeros(NUM_REGIONS, np.float32)
    for region in POLICY_REGIONS:
        table[region] = getattr(cfg, region.name.lower())
    return table


def inverse_bound(
    entropy: Float[Array, " R"], gini: Float[Array, " R"], floor: float
) -> Float[Array, " R"]:
    """1 / (1 - exp(-H)); expm1 keeps the small entropies of learned tags exact."""
    return 1.0 / -jnp.expm1(-jnp.maximum(entropy, floor))


def inverse_entropy(
    entropy: Float[Array, " R"], gini: Float[Array, " R"], floor: float
) -> Float[Array, " R"]:
    """1 / H."""
    return 1.0 / jnp.maximum(entropy, floor)


def inverse_gini(
    entropy: Float[Array, " R"], gini: Float[Array, " R"], floor: float
) -> Float[Array, " R"]:
    """1 / E[1 - sum p^2]; floored at the bound's value for the entropy floor, so that the rules share a ceiling."""
    return 1.0 / jnp.maximum(gini, -jnp.expm1(-floor))


ENTROPY_RULES = {
    "inverse_bound": inverse_bound,
    "inverse_entropy": inverse_entropy,
    "inverse_gini": inverse_gini,
}


def base_weights(measured: RegionStats, cfg: WeightsConfig) -> Float[Array, " R"]:
    """Weights before the curriculum, clipped to [w_min, w_max]; NONE has 0.

    Entropy rules: the weights of `entropy_regions` are scaled to the token-weighted mean 1. The other regions have 1, and so
    has a region not yet measured (count 0): the mean over all tokens is 1. Numbers of rule `constant` are not scaled, and one of
    0 stays 0 (the released preset).
    """
    if cfg.rule in ("constant", "uniform"):
        weight = jnp.asarray(constants(cfg)) if cfg.rule == "constant" else jnp.ones(NUM_REGIONS)
    else:
        raw = ENTROPY_RULES[cfg.rule](measured.entropy, measured.gini, cfg.entropy_floor)
        chosen = np.isin(np.arange(NUM_REGIONS), [Region[r.upper()] for r in cfg.entropy_regions])
        followed = chosen & (measured.count > 0)
        count = jnp.where(followed, measured.count, 0.0)
        mean = jnp.sum(count * raw) / jnp.maximum(jnp.sum(count), 1)
        weight = jnp.where(followed, raw / jnp.maximum(mean, EPS), 1.0)
    weight = jnp.where(weight > 0, jnp.clip(weight, cfg.w_min, cfg.w_max), 0.0)
    return weight.at[Region.NONE].set(0.0)


def token_weights(
    region: Int[Array, "P G T"], region_weight: Float[Array, " R"], normalizer: str
) -> Float[Array, "P G T"]:
    """Weight of each token, normalised within its response or over the batch; zero on NONE; never carries gradient."""
    weight = jnp.take(region_weight.at[Region.NONE].set(0.0), region.astype(jnp.int32))
    return jax.lax.stop_gradient(NORMALIZERS[normalizer](weight, region != Region.NONE))


def _to_mean_one(weight, counted, axis):
    tokens = jnp.maximum(jnp.sum(counted, axis, keepdims=True), 1)
    return weight / (jnp.sum(weight, axis, keepdims=True) / tokens + EPS)


NORMALIZERS = {
    "all_tokens": lambda weight, mask: _to_mean_one(weight, mask, -1),
    "positive_tokens": lambda weight, mask: _to_mean_one(weight, weight > 0, -1),
    "batch": lambda weight, mask: _to_mean_one(weight, mask, None),
    "none": lambda weight, mask: weight,
}


def realised(
    region: Int[Array, "P G T"], weight: Float[Array, "P G T"]
) -> tuple[Float[Array, " R"], Float[Array, " R"]]:
    """What each region got after normalisation: its mean weight, and its share of the total weight."""
    member = (region[..., None] == jnp.arange(NUM_REGIONS)).astype(jnp.float32)
    # A sum is float32 on TPU, where a dot is not.
    total = jnp.sum(weight[..., None] * member, axis=(0, 1, 2))
    mean = total / jnp.maximum(jnp.sum(member, axis=(0, 1, 2)), 1)
    return mean, total / jnp.maximum(jnp.sum(total), EPS)
