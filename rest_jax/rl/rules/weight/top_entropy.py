"""80/20: only the tokens at which the policy is most undecided carry gradient.

    w = 1 where H is at least the (1 - share) quantile of the entropies of the batch, else 0

Paper: Wang et al., NeurIPS 2025, arXiv:2506.01939. Read in huggingface/trl f2cd577 (`get_high_entropy_mask`): the
quantile is over the policy tokens of the global batch. share 0.2: the paper and TRL. TRL divides by all tokens; the
paper, and the code of HTMR, by the selected ones, as `method/top_entropy` does.
"""

import jax.numpy as jnp

from rest_jax.config import Fraction, Section
from rest_jax.rl.masked import quantile_over_mask
from rest_jax.rl.rules import Rule
from rest_jax.rl.view import TokenView


class TopEntropyOptions(Section):
    """Options of the rule."""

    share: Fraction = 0.2  # of the policy tokens that are kept


def top_entropy(view: TokenView, options: TopEntropyOptions):
    """[P G T]: 1 on the tokens of the highest entropy."""
    threshold = quantile_over_mask(view.entropy, view.mask, 1 - options.share)
    return (view.mask & (view.entropy >= threshold)).astype(jnp.float32)


RULE = Rule(top_entropy, TopEntropyOptions)
