"""The loss of one token (docs/method.md section 7): clipped, weighted policy loss, KL and entropy terms, and their metrics.

    r = exp(clip(logp - logp_old, -20, 20))
    L = -min(r A, clip(r, 1 - eps_lo, 1 + eps_hi) A), or that of another rule of rl/rules/loss/
    loss = sum_it c_it L_it + kl sum_it u_it K_it - bonus sum_it u_it H_it

The coefficients c (`loss_weight`: token weight with its aggregation) and u (`regulariser`: plain token mean) hold every
denominator. They are computed once over the global mini-batch (`AGGREGATIONS`, `rl/prepare.py`), so that neither
micro-batches nor devices change the loss. float32 throughout.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from rest_jax.config import LossConfig
from rest_jax.rl.masked import EPS
from rest_jax.rl.rules import policy_rule

LOG_RATIO_CLIP = 20.0


class TokenStats(NamedTuple):
    """What the forward pass says of the sampled tokens; any shape."""

    logp: Array  # nats, of the distribution sampled from
    entropy: Array  # nats, temperature 1
    is_argmax: Array  # bool: no token is more probable


class TokenInputs(NamedTuple):
    """What the policy loss of a token reads besides; the shape of `TokenStats`."""

    logp_old: Array
    advantage: Array
    loss_weight: Array  # c
    regulariser: Array  # u
    mask: Array  # bool: a token of the policy
    logp_ref: Array | None  # None without a KL term
    # mean over the completion of logp - logp_old, without gradient; None unless the rule reads it
    sequence_log_ratio: Array | None = None


class PolicyLoss(NamedTuple):
    """The policy loss of each token, and where which clip cuts; None: the rule has no such clip."""

    loss: Array
    low: Array | None = None
    high: Array | None = None
    dual: Array | None = None


class TokenLoss(NamedTuple):
    """Loss of each token, and metrics: the sum of each of `sums`, the largest of each of `maxima`."""

    loss: Array
    sums: dict[str, Array]
    maxima: dict[str, Array]


def policy_token_loss(seen: TokenStats, x: TokenInputs, cfg: LossConfig) -> TokenLoss:
    """The loss of each token and its part in the metrics; zero outside the mask.

    Gradient flows through `seen.logp`, and through `seen.entropy` if there is an entropy term.
    """
    u, policy = x.regulariser, policy_rule(cfg)(seen, x, cfg)
    loss = x.loss_weight * policy.loss
    sums = {"update/policy_loss": loss}
    if cfg.entropy_coefficient > 0:
        loss = loss - cfg.entropy_coefficient * u * seen.entropy
    if x.logp_ref is not None:
        kl = KL_ESTIMATORS[cfg.kl_estimator](seen.logp, x.logp_ref)
        loss = loss + cfg.kl_coefficient * u * kl
        sums["update/kl"] = u * kl
    sums |= {"update/loss": loss, "update/entropy": u * seen.entropy}
    sums |= {name: u * value for name, value in ratio_metrics(seen.logp, x, policy).items()}
    difference = jnp.abs(seen.logp - x.logp_old)
    return TokenLoss(
        jnp.where(x.mask, loss, 0.0),
        {name: jnp.where(x.mask, value, 0.0) for name, value in sums.items()},
        {"update/ratio_max": jnp.where(x.mask, ratio(difference, 0.0), -jnp.inf)},
    )


def ratio_metrics(logp: Array, x: TokenInputs, policy: PolicyLoss) -> dict[str, Array]:
    """Per token: how far the policy moved since it sampled, and which clip cuts."""
    none = jnp.zeros(logp.shape, bool)
    low, high, dual = (none if cut is None else cut for cut in policy[1:])
    return {
        "update/clip_fraction": low | high | dual,
        "update/clip_low_fraction": low,
        "update/clip_high_fraction": high,
        "update/dual_clip_fraction": dual,
        "update/ratio_mean": ratio(logp, x.logp_old),
        "update/logp_difference": jnp.abs(logp - x.logp_old),
        "update/approx_kl": k3(x.logp_old, logp),
    }


def ratio(logp: Float[Array, "..."], logp_old: Float[Array, "..."] | float) -> Float[Array, "..."]:
    """exp of the clamped log-ratio."""
    return jnp.exp(jnp.clip(logp - logp_old, -LOG_RATIO_CLIP, LOG_RATIO_CLIP))


def k2(logp: Float[Array, "..."], logp_ref: Float[Array, "..."]) -> Float[Array, "..."]:
    """Half the squared log-ratio: its gradient is that of the KL from the reference."""
    return 0.5 * jnp.clip(logp - logp_ref, -LOG_RATIO_CLIP, LOG_RATIO_CLIP) ** 2


def k3(logp: Float[Array, "..."], logp_ref: Float[Array, "..."]) -> Float[Array, "..."]:
    """exp(d) - d - 1 with d = logp_ref - logp (low variance, never negative)."""
    d = jnp.clip(logp_ref - logp, -LOG_RATIO_CLIP, LOG_RATIO_CLIP)
    return jnp.exp(d) - d - 1


KL_ESTIMATORS = {"k2": k2, "k3": k3}


class MiniBatches(NamedTuple):
    """To which of `count` mini-batches (optimiser updates) each group of a batch belongs."""

    index: Int[Array, " P"]
    count: int

    def total(self, x: Shaped[Array, " P"]) -> Float[Array, "P 1 1"]:
        """For each group the sum of x over its mini-batch, across all devices."""
        member = self.index[:, None] == jnp.arange(self.count)
        sums = jnp.sum(jnp.where(member, x[:, None].astype(jnp.float32), 0.0), axis=0)
        return sums[self.index][:, None, None]


def weighted_token_mean(weight, mask, minibatches: MiniBatches, length: int):
    """w / sum of all w: the ResT aggregation."""
    return weight / jnp.maximum(minibatches.total(jnp.sum(weight, (1, 2))), EPS)


def token_mean(weight, mask, minibatches: MiniBatches, length: int):
    """w / number of tokens."""
    return weight / jnp.maximum(minibatches.total(jnp.sum(mask, (1, 2))), 1)


def sequence_mean(weight, mask, minibatches: MiniBatches, length: int):
    """Mean over sequences of the weighted mean over their tokens (the paper's formula)."""
    per_sequence = weight / jnp.maximum(jnp.sum(weight, -1, keepdims=True), EPS)
    return per_sequence / _sequences(weight, minibatches)


def fixed_length(weight, mask, minibatches: MiniBatches, length: int):
    """Dr.GRPO: divided by sequences x a constant length."""
    return weight / (_sequences(weight, minibatches) * length)


# (token weight [P G T], mask [P G T], mini-batches, length in tokens) -> c [P G T]
AGGREGATIONS = {
    "weighted_token_mean": weighted_token_mean,
    "token_mean": token_mean,
    "sequence_mean": sequence_mean,
    "fixed_length": fixed_length,
}


def _sequences(weight, minibatches: MiniBatches):
    return minibatches.total(jnp.full(weight.shape[0], weight.shape[1], jnp.float32))
