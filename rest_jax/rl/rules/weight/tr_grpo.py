"""TR-GRPO: a weight that rises with the probability of the token.

    w = 2 sigmoid(slope (p - centre))

Paper: token-regulated GRPO, arXiv:2511.00066, of which only the abstract could be read: weights that are monotone in
the probability. The sigmoid is that of the "both_sigmoid" variant in zhyang2226/AR-Lopti cbeb333; slope 2 and centre
0.5 are ours.
"""

import jax
import jax.numpy as jnp

from rest_jax.config import Fraction, PositiveFloat, Section
from rest_jax.rl.rules import Rule
from rest_jax.rl.view import TokenView


class TrGrpoOptions(Section):
    """Options of the rule."""

    slope: PositiveFloat = 2.0
    centre: Fraction = 0.5  # probability whose weight is 1


def regulate(view: TokenView, options: TrGrpoOptions):
    """[P G T], in (0, 2)."""
    return 2 * jax.nn.sigmoid(options.slope * (jnp.exp(view.logp) - options.centre))


RULE = Rule(regulate, TrGrpoOptions)
