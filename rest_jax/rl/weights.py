"""Region weights from entropies, and token weights from region weights (docs/method.md sections 3 and 4).

    inverse_bound     w_r = 1 / (1 - exp(-H_r))          as described for ResT, the default
    inverse_entropy   w_r = 1 / H_r
    inverse_gini      w_r = 1 / mean(1 - sum_v p^2)      the exact second moment of the score, which the first bounds
    constant          w_r from the config
    uniform           w_r = 1                            plain GRPO

In: mean entropy and Gini of each region [R]; the region id of each token. Out: weights, float32, without gradient.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from rest_jax.config import WeightsConfig
from rest_jax.rl.masked import EPS
from rest_jax.tool_calls import NUM_REGIONS, Region

POLICY_REGIONS = tuple(r for r in Region if r is not Region.NONE)


@struct.dataclass
class RegionStats:
    """What one global batch says of each region; a region without tokens has count 0 and means 0."""

    entropy: Float[Array, " R"]  # mean over the tokens of the region, nats
    gini: Float[Array, " R"]
    count: Float[Array, " R"]  # tokens


def region_stats(
    region: Int[Array, "P G T"], entropy: Float[Array, "P G T"], gini: Float[Array, "P G T"]
) -> RegionStats:
    """Means over the global batch, hence across all devices."""
    member = region[..., None] == jnp.arange(NUM_REGIONS)  # [P, G, T, R]
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


def base_weights(
    entropy: Float[Array, " R"],
    gini: Float[Array, " R"],
    seen: Bool[Array, " R"],
    cfg: WeightsConfig,
) -> Float[Array, " R"]:
    """Weights before the curriculum, clipped to [w_min, w_max]; regions never seen have their constant.

    Entropy rules are scaled so that NAME has its anchor. Until a name has been seen, they are scaled so that the seen regions
    have the mean of their constants. A constant of zero (rule `constant`, the released preset) stays zero.
    """
    fixed = jnp.asarray(constants(cfg))
    if cfg.rule == "uniform":
        return jnp.ones(NUM_REGIONS, jnp.float32).at[Region.NONE].set(0.0)
    if cfg.rule == "constant":
        weight = fixed
    else:
        raw = ENTROPY_RULES[cfg.rule](entropy, gini, cfg.entropy_floor)
        seen = seen.at[Region.NONE].set(False)
        by_mean = jnp.sum(jnp.where(seen, fixed, 0)) / jnp.maximum(
            jnp.sum(jnp.where(seen, raw, 0)), EPS
        )
        scale = jnp.where(seen[Region.NAME], cfg.name_anchor / raw[Region.NAME], by_mean)
        weight = jnp.where(seen, raw * scale, fixed)
    return jnp.where(weight > 0, jnp.clip(weight, cfg.w_min, cfg.w_max), 0.0)


def token_weights(
    region: Int[Array, "P G T"], region_weight: Float[Array, " R"], normalizer: str
) -> Float[Array, "P G T"]:
    """Weight of each token, normalised within its response; zero on NONE; never carries gradient."""
    weight = jnp.take(region_weight.at[Region.NONE].set(0.0), region.astype(jnp.int32))
    return jax.lax.stop_gradient(NORMALIZERS[normalizer](weight, region != Region.NONE))


def _per_sequence_mean(weight, counted):
    mean = jnp.sum(weight, -1, keepdims=True) / jnp.maximum(jnp.sum(counted, -1, keepdims=True), 1)
    return weight / (mean + EPS)


NORMALIZERS = {
    "all_tokens": _per_sequence_mean,
    "positive_tokens": lambda weight, mask: _per_sequence_mean(weight, weight > 0),
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
