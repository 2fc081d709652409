"""The opposite of `ar`: unlikely tokens count more.

    w = 1 + alpha (1 - p)

Paper: direction of updates, arXiv:2603.22117. From notes: neither paper nor code could be read. alpha 0.2 is ours, that
of `ar`, so that the two differ in sign alone.
"""

import jax.numpy as jnp

from rest_jax.config import NonNegativeFloat, Section
from rest_jax.rl.rules import Rule
from rest_jax.rl.view import TokenView


class DirectionOptions(Section):
    """Options of the rule."""

    alpha: NonNegativeFloat = 0.2


def reweight(view: TokenView, options: DirectionOptions):
    """[P G T]: falls with the probability of the token."""
    return 1 + options.alpha * (1 - jnp.exp(view.logp))


RULE = Rule(reweight, DirectionOptions)
