"""GTPO: undecided tokens of right completions are rewarded more, decided tokens of wrong ones blamed more.

    right:  f_it = d_t H_it / sum_k H_kt            over the d_t right completions of the group that have a token t
    wrong:  f_it = d_t (1 / H_it) / sum_k 1 / H_kt  over the wrong ones
    w = 1 - beta + beta f

Paper: GTPO and GRPO-S, ICML 2026, arXiv:2508.04349. From notes: no code of the authors is known. There f shapes the
reward, which is normalised afterwards; here it multiplies the advantage, as in teilomillet/retrain 19db12f (1 + b (H /
mean H - 1), b 0.1, over the tokens of one completion), so that groups with equal rewards have no gradient. beta 0.1:
retrain; the floor of H is ours.
"""

import jax.numpy as jnp

from rest_jax.config import Fraction, PositiveFloat, Section
from rest_jax.rl.rules import Rule
from rest_jax.rl.view import TokenView


class GtpoOptions(Section):
    """Options of the rule."""

    beta: Fraction = 0.1  # 0: GRPO
    floor: PositiveFloat = 1e-3  # nats, of the entropy


def share_by_entropy(view: TokenView, options: GtpoOptions):
    """[P G T]: 1 on average over the completions of a kind at each position."""
    entropy = jnp.maximum(view.entropy, options.floor)
    factor = jnp.ones(entropy.shape, jnp.float32)
    for kind, amount in ((view.right, entropy), (~view.right, 1 / entropy)):
        member = kind[..., None] & view.mask
        total = jnp.sum(jnp.where(member, amount, 0.0), axis=1, keepdims=True)
        count = jnp.sum(member, axis=1, keepdims=True)
        factor = jnp.where(member, count * amount / jnp.where(count > 0, total, 1.0), factor)
    return 1 - options.beta + options.beta * factor


RULE = Rule(share_by_entropy, GtpoOptions)
