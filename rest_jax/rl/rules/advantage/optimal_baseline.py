"""Optimal token baseline: what the others of the group earn, weighted by how much their gradient has moved so far.

    A_it = R_i - sum_k R_k W_kt / sum_k W_kt        W_it = sum_{j <= t} (1 - 2 p_ij + sum_v p_v^2)

The sums over k are over the completions of the group that have a token t. 1 - 2 p + sum_v p_v^2 is |onehot - p|^2, the
squared score in the logits, so that the baseline is free: p and Gini are of the rollout. Read in volcengine/verl
b178a3c (`compute_optimal_token_baseline_advantage`, one reward at the end; epsilon 1e-8). Where one completion alone
continues A is 0, as there without `handle_zero_tail`. W is meant for temperature 1, at which p is that of the Gini.
"""

import jax.numpy as jnp

from rest_jax.config import PositiveFloat, Section
from rest_jax.rl.rules import Rule
from rest_jax.rl.view import TokenView, nonzero_advantage


class BaselineOptions(Section):
    """Options of the rule."""

    eps: PositiveFloat = 1e-8


def subtract_optimal_baseline(view: TokenView, options: BaselineOptions):
    """[P G T]; exactly zero in groups whose rewards are all equal."""
    square = jnp.where(view.mask, 2 - 2 * jnp.exp(view.logp) - view.gini, 0.0)
    weight = jnp.where(view.mask, jnp.cumsum(square, axis=-1), 0.0)
    reward = view.reward[..., None]
    baseline = jnp.sum(reward * weight, axis=1, keepdims=True) / (
        jnp.sum(weight, axis=1, keepdims=True) + options.eps
    )
    spread = nonzero_advantage(view.reward)[:, None, None]
    return jnp.where(spread & view.mask, reward - baseline, 0.0)


RULE = Rule(subtract_optimal_baseline, BaselineOptions)
