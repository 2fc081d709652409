"""Optimal token baseline: what the others of the group earn, weighted by how much their gradient has moved so far.

    A_it = R_i - sum_k R_k W_kt / sum_k W_kt        W_it = sum_{j <= t} (1 - 2 p_ij + sum_v p_v^2)

The sums over k are over the completions of the group that have a token t. 1 - 2 p + sum_v p_v^2 is |onehot - p|^2, the
squared score in the logits, so that the baseline is free: p and Gini are of the rollout. Read in volcengine/verl
b178a3c (`compute_optimal_token_baseline_advantage`, one reward at the end). Where one completion alone continues A is 0,
as there without `handle_zero_tail`; where no token was uncertain so far, the baseline is the mean. W is meant for
temperature 1, at which p is that of the Gini.
"""

import jax.numpy as jnp

from rest_jax.rl.rules import Rule
from rest_jax.rl.view import TokenView, nonzero_advantage


def subtract_optimal_baseline(view: TokenView, options):
    """[P G T]; exactly zero in groups whose rewards are all equal."""
    # Of a certain token the sum is what rounding leaves of 1 - 2 + 1. It lies between (1 - p)^2, of many other tokens, and
    # twice that, of a single one.
    least = jnp.expm1(view.logp) ** 2
    square = jnp.clip(2 - 2 * jnp.exp(view.logp) - view.gini, least, 2 * least)
    weight = jnp.where(view.mask, jnp.cumsum(jnp.where(view.mask, square, 0.0), axis=-1), 0.0)
    known = jnp.sum(weight, axis=1, keepdims=True) > 0
    weight = jnp.where(known, weight, view.mask)
    total = jnp.sum(weight, axis=1, keepdims=True)
    reward = view.reward[..., None]
    share = weight / jnp.where(total > 0, total, 1.0)
    baseline = jnp.sum(reward * share, axis=1, keepdims=True)
    spread = nonzero_advantage(view.reward)[:, None, None]
    return jnp.where(spread & view.mask, reward - baseline, 0.0)


RULE = Rule(subtract_optimal_baseline)
