"""The clipped, weighted policy loss (METHOD section 7), as a sum over tokens with coefficients fixed beforehand.

    r = exp(clip(logp - logp_old, -20, 20))
    L = -min(r A, clip(r, 1 - eps_lo, 1 + eps_hi) A);  for A < 0 also L = min(L, -c A)      (dual clip)
    loss = sum_it c_it L_it + kl sum_it u_it K_it - bonus sum_it u_it H_it

The coefficients c (weighted aggregation) and u (plain token mean) hold every denominator and are computed once over the
whole global mini-batch, so that neither micro-batches nor devices change the loss. float32 throughout.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rest_jax.config import LossConfig
from rest_jax.rl.masked import EPS

LOG_RATIO_CLIP = 20.0


def ratio(logp: Float[Array, "..."], logp_old: Float[Array, "..."] | float) -> Float[Array, "..."]:
    """exp of the clamped log-ratio."""
    return jnp.exp(jnp.clip(logp - logp_old, -LOG_RATIO_CLIP, LOG_RATIO_CLIP))


def policy_loss(
    logp: Float[Array, "P G T"],
    logp_old: Float[Array, "P G T"],
    advantage: Float[Array, "P G"],
    cfg: LossConfig,
) -> Float[Array, "P G T"]:
    """Per-token loss L, before weights."""
    return token_policy_loss(logp, logp_old, advantage[..., None], cfg)


def token_policy_loss(
    logp: Float[Array, "..."],
    logp_old: Float[Array, "..."],
    a: Float[Array, "..."],
    cfg: LossConfig,
) -> Float[Array, "..."]:
    """L where every token has its advantage beside it."""
    r = ratio(logp, logp_old)
    loss = jnp.maximum(-r * a, -jnp.clip(r, 1 - cfg.clip_low, 1 + cfg.clip_high) * a)
    if cfg.dual_clip is None:
        return loss
    return jnp.where(a < 0, jnp.minimum(loss, -cfg.dual_clip * a), loss)


def clipped(
    logp: Float[Array, "P G T"],
    logp_old: Float[Array, "P G T"],
    advantage: Float[Array, "P G"],
    cfg: LossConfig,
) -> Bool[Array, "P G T"]:
    """Where the clip or the dual clip cuts the gradient."""
    r, a = ratio(logp, logp_old), advantage[..., None]
    cut = ((a > 0) & (r > 1 + cfg.clip_high)) | ((a < 0) & (r < 1 - cfg.clip_low))
    return cut if cfg.dual_clip is None else cut | ((a < 0) & (r > cfg.dual_clip))


def k1(logp: Float[Array, "..."], logp_ref: Float[Array, "..."]) -> Float[Array, "..."]:
    """logp - logp_ref: unbiased value, high variance; its gradient has mean zero, so it only monitors."""
    return jnp.clip(logp - logp_ref, -LOG_RATIO_CLIP, LOG_RATIO_CLIP)


def k2(logp: Float[Array, "..."], logp_ref: Float[Array, "..."]) -> Float[Array, "..."]:
    """Half the squared log-ratio: its gradient is that of the KL."""
    return 0.5 * k1(logp, logp_ref) ** 2


def k3(logp: Float[Array, "..."], logp_ref: Float[Array, "..."]) -> Float[Array, "..."]:
    """exp(d) - d - 1 with d = logp_ref - logp (low variance, never negative)."""
    d = jnp.clip(logp_ref - logp, -LOG_RATIO_CLIP, LOG_RATIO_CLIP)
    return jnp.exp(d) - d - 1


KL_ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}


def weighted_token_mean(weight: Float[Array, "P G T"], mask: Bool[Array, "P G T"], length: int):
    """w / sum of all w: the ResT aggregation."""
    return weight / jnp.maximum(jnp.sum(weight), EPS)


def token_mean(weight: Float[Array, "P G T"], mask: Bool[Array, "P G T"], length: int):
    """w / number of tokens."""
    return weight / jnp.maximum(jnp.sum(mask), 1)


def sequence_mean(weight: Float[Array, "P G T"], mask: Bool[Array, "P G T"], length: int):
    """Mean over sequences of the weighted mean over their tokens (the paper's formula)."""
    total = jnp.sum(weight, -1, keepdims=True)
    return weight / jnp.maximum(total, EPS) / (weight.shape[0] * weight.shape[1])


def fixed_length(weight: Float[Array, "P G T"], mask: Bool[Array, "P G T"], length: int):
    """Dr.GRPO: divided by sequences x a constant length."""
    return weight / (weight.shape[0] * weight.shape[1] * length)


AGGREGATIONS = {
    "weighted_token_mean": weighted_token_mean,
    "token_mean": token_mean,
    "sequence_mean": sequence_mean,
    "fixed_length": fixed_length,
}
