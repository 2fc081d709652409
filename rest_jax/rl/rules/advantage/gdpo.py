"""GDPO: every part of the reward is standardised by itself, so that none is drowned by another.

    A_k = (R_k - mean) / (std + eps) within the group        A = sum_k weight_k A_k, whitened over the batch (eps as well)

Paper: NVIDIA 2026, arXiv:2601.05242 (on ToolRL's data among others). Read in NVlabs/GDPO 41f74c5 (trl-GDPO) and
huggingface/trl f2cd577 (`normalize_then_sum`): eps 1e-4, unbiased std, equal weights. A group in which only the sum is
equal has a gradient.
"""

import jax
import jax.numpy as jnp

from rest_jax.config import NonNegativeFloat, PositiveFloat, Section
from rest_jax.rl.rules import Rule
from rest_jax.rl.view import TokenView, nonzero_advantage, standardise


class GdpoOptions(Section):
    """Options of the rule: the weight of each part, in the order of rewards.score.PARTS."""

    format: NonNegativeFloat = 1.0
    correctness: NonNegativeFloat = 1.0
    length: NonNegativeFloat = 1.0
    plugin: NonNegativeFloat = 1.0
    eps: PositiveFloat = 1e-4


def gdpo(view: TokenView, options: GdpoOptions):
    """[P G]; exactly zero in groups whose parts are all equal."""
    weights = options.format, options.correctness, options.length, options.plugin
    weight = jnp.array(weights, jnp.float32)
    parts = jax.vmap(lambda x: standardise(x, options.eps), -1, -1)(view.parts)
    total = jnp.sum(parts * weight, axis=-1)
    white = (total - jnp.mean(total)) / (jnp.std(total, ddof=1) + options.eps)
    return jnp.where(nonzero_advantage(view.parts)[:, None], white, 0.0)


RULE = Rule(gdpo, GdpoOptions, signal="parts")
