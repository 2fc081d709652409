"""CISPO: the ratio is cut, not the gradient.

    L = -sg(clip(r, low, high)) A logp

Paper: MiniMax-M1 2025, arXiv:2506.13585. Read in volcengine/verl b178a3c (`compute_policy_loss_cispo`, bounds 1 - 0.2
and 1 + 0.2 in its example) and huggingface/trl f2cd577 (an upper bound alone, 5 in ScaleRL, arXiv:2510.13786): they
disagree, and the paper does not bound from below. The defaults are ScaleRL's.
"""

import jax
import jax.numpy as jnp

from rest_jax.config import LossConfig, NonNegativeFloat, PositiveFloat, Section
from rest_jax.rl.loss import PolicyLoss, TokenInputs, TokenStats, ratio
from rest_jax.rl.rules import Rule


class CispoOptions(Section):
    """Options of the rule."""

    low: NonNegativeFloat = 0.0
    high: PositiveFloat = 5.0


def cispo(seen: TokenStats, x: TokenInputs, cfg: LossConfig, options: CispoOptions) -> PolicyLoss:
    """Of each token. A clipped token keeps its gradient."""
    r = jax.lax.stop_gradient(ratio(seen.logp, x.logp_old))
    loss = -jnp.clip(r, options.low, options.high) * x.advantage * seen.logp
    return PolicyLoss(loss, r < options.low, r > options.high)


RULE = Rule(cispo, CispoOptions)
