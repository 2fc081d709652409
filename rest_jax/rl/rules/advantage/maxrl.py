"""MaxRL: rare successes count by their rarity, as maximum likelihood has it.

    A = (r - mean) / (mean + eps), r = 1 for an exact completion, else 0; zero where none is exact

Paper: Tajwar et al. 2026, arXiv:2602.02710, for binary rewards. Formula read in teilomillet/retrain 19db12f
(`compute_maxrl_advantages`, eps 1e-6); google/tunix has eps 1e-4. The rewards of the other methods here may be
negative, so that their mean is no rate of success: exactness stands in for them, and a group needs both kinds to have a
gradient.
"""

import jax.numpy as jnp

from rest_jax.config import PositiveFloat, Section
from rest_jax.rl.rules import Rule
from rest_jax.rl.view import TokenView, centre


class MaxRlOptions(Section):
    """Options of the rule."""

    eps: PositiveFloat = 1e-6


def maxrl(view: TokenView, options: MaxRlOptions):
    """[P G]; exactly zero in groups that are all exact, or not at all."""
    success = view.exact.astype(jnp.float32)
    return centre(success) / (jnp.mean(success, axis=1, keepdims=True) + options.eps)


RULE = Rule(maxrl, MaxRlOptions, signal="exact")
