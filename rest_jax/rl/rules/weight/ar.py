"""Advantage reweighting: unlikely tokens count less, since their gradients are large.

    w = alpha p + 1 - alpha

Paper: Yang et al., ICLR 2026, arXiv:2505.12929. Read in zhyang2226/AR-Lopti cbeb333 (`compute_reweight_advantage`,
"both_linear"). alpha 0.2: their script for AR alone; it is 0.3 together with Lopti, which is not here.
"""

import jax.numpy as jnp

from rest_jax.config import Fraction, Section
from rest_jax.rl.rules import Rule
from rest_jax.rl.view import TokenView


class ArOptions(Section):
    """Options of the rule."""

    alpha: Fraction = 0.2  # 0: no reweighting


def reweight(view: TokenView, options: ArOptions):
    """[P G T]: rises with the probability of the token."""
    return options.alpha * jnp.exp(view.logp) + 1 - options.alpha


RULE = Rule(reweight, ArOptions)
