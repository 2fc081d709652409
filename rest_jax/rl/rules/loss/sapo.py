"""SAPO: a soft gate in place of the clip.

    L = -4 / tau sigmoid(tau (r - 1)) A, tau = tau_pos where A > 0, else tau_neg

Paper: Gao et al. 2025, arXiv:2511.20347. Read in volcengine/verl b178a3c (`compute_policy_loss_sapo`) and
huggingface/trl f2cd577; tau_pos 1, tau_neg 1.05: both. `method/sapo` takes the mean over completions, as both do.
"""

import jax
import jax.numpy as jnp

from rest_jax.config import LossConfig, PositiveFloat, Section
from rest_jax.rl.loss import PolicyLoss, TokenInputs, TokenStats, ratio
from rest_jax.rl.rules import Rule


class SapoOptions(Section):
    """Options of the rule."""

    tau_pos: PositiveFloat = 1.0
    tau_neg: PositiveFloat = 1.05


def sapo(seen: TokenStats, x: TokenInputs, cfg: LossConfig, options: SapoOptions) -> PolicyLoss:
    """Of each token; its gradient at r = 1 is that of r A. No token is cut."""
    tau = jnp.where(x.advantage > 0, options.tau_pos, options.tau_neg)
    gate = 4 / tau * jax.nn.sigmoid(tau * (ratio(seen.logp, x.logp_old) - 1))
    return PolicyLoss(-gate * x.advantage)


RULE = Rule(sapo, SapoOptions)
