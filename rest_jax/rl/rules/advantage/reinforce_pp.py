"""REINFORCE++: standardised over all tokens of the batch, not within the group.

    A = (R - m) / sqrt(v + 1e-8), mean m and unbiased variance v over the policy tokens of the batch
    baseline group: R minus the group's mean in place of R

Paper: Hu 2025, arXiv:2501.03262. Read in volcengine/verl b178a3c (`compute_reinforce_plus_plus_outcome_advantage` at
discount 1, `.._baseline_..`, `masked_whiten`). Groups with equal rewards have a gradient in both, so that all groups
are computed; a batch of equal rewards has none, where the code whitens what rounding leaves.
"""

from typing import Literal

import jax.numpy as jnp

from rest_jax.config import Section
from rest_jax.rl.rules import Rule
from rest_jax.rl.view import TokenView, centre


class ReinforceOptions(Section):
    """Options of the rule."""

    baseline: Literal["none", "group"] = "none"


def reinforce_pp(view: TokenView, options: ReinforceOptions):
    """[P G]; exactly zero where all scores of the batch are equal."""
    score = view.reward if options.baseline == "none" else centre(view.reward)
    tokens = jnp.sum(view.mask, axis=-1).astype(jnp.float32)
    total = jnp.maximum(jnp.sum(tokens), 1)
    mean = jnp.sum(tokens * score) / total
    variance = jnp.sum(tokens * (score - mean) ** 2) / jnp.maximum(total - 1, 1)
    spread = jnp.max(score) > jnp.min(score)
    return jnp.where(spread, (score - mean) / jnp.sqrt(variance + 1e-8), 0.0)


RULE = Rule(reinforce_pp, ReinforceOptions, signal=None)
