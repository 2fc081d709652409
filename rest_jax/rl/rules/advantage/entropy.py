"""Entropy-shaped advantage: a bonus where the policy is undecided, that never turns the sign of the advantage.

    A_t = A + min(alpha H_t, |A| / kappa), A that of GRPO

Papers: Cheng et al., AAAI 2026, arXiv:2506.14758; EGPO for function calling (arXiv:2508.05118), whose bonus is of the
thought alone and clipped, too: `method/egpo` is this rule on THINK. From notes: of both the abstract was read, of the
code nothing could be. alpha 0.4 and kappa 2: notes on the first paper; those of EGPO are not known.
"""

import jax.numpy as jnp

from rest_jax.config import NonNegativeFloat, PositiveFloat, RegionName, Section
from rest_jax.rl.rules import Rule
from rest_jax.rl.view import TokenView, standardise
from rest_jax.tool_calls import Region


class EntropyOptions(Section):
    """Options of the rule."""

    alpha: NonNegativeFloat = 0.4
    kappa: PositiveFloat = 2.0  # above 1 no advantage changes its sign
    regions: tuple[RegionName, ...] | None = None  # that get the bonus; None: all


def shape_by_entropy(view: TokenView, options: EntropyOptions):
    """[P G T]; zero in groups whose rewards are all equal."""
    advantage = standardise(view.reward)[..., None]
    bonus = jnp.minimum(options.alpha * view.entropy, jnp.abs(advantage) / options.kappa)
    if options.regions is not None:
        regions = jnp.array([Region[name.upper()] for name in options.regions], view.region.dtype)
        bonus = jnp.where(jnp.isin(view.region, regions), bonus, 0.0)
    return advantage + bonus


RULE = Rule(shape_by_entropy, EntropyOptions)
