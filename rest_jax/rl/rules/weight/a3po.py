"""A3PO: unlikely tokens of better completions and likely tokens of worse ones count more, less so as training proceeds.

    A > 0: the least likely `share` of a completion's tokens get x `scale`; A < 0: the most likely `share` do
    scale(nu) = 1 + (scale - 1) (1 - nu)

Paper: Tang et al., ACL 2026 long 134, arXiv:2512.21625. Read in txy77/Sample-Polarity-of-RLVR 24a37f7 (token-weighted
advantage): at least one token, ranked within the completion; share 0.2 and scale 2 are of its scripts. The decay is
from notes, not in that code; it follows the curriculum's progress nu, linear in `method/a3po`, and `curriculum.shape:
constant` has none. Their polarity is that of binary rewards, here the sign of the advantage.
"""

import jax.numpy as jnp

from rest_jax.config import Fraction, PositiveFloat, Section
from rest_jax.rl.masked import rank_over_mask
from rest_jax.rl.rules import Rule
from rest_jax.rl.view import TokenView


class A3poOptions(Section):
    """Options of the rule."""

    share: Fraction = 0.2
    scale: PositiveFloat = 2.0  # at the start


def raise_surprises(view: TokenView, options: A3poOptions):
    """[P G T]: 1, or the scale on the chosen tokens."""
    length = jnp.sum(view.mask, axis=-1, keepdims=True)
    count = jnp.maximum(1, jnp.floor(options.share * length))
    rank = rank_over_mask(view.logp, view.mask)
    advantage = view.token_advantage
    chosen = (advantage > 0) & (rank < count) | (advantage < 0) & (rank >= length - count)
    scale = 1 + (options.scale - 1) * (1 - view.curriculum.nu)
    return jnp.where(chosen, scale, 1.0)


RULE = Rule(raise_surprises, A3poOptions)
