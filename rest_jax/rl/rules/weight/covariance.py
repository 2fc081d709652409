"""Covariance-aware GRPO: tokens that change the entropy most, one way or the other, count less.

    c = (logp - mean logp) (A - mean A)        w = exp(-c^2 / (2 s^2)), s the standard deviation of c

Paper: Wang et al., ACL 2026 short 45, arXiv:2605.11538, without hyperparameters. Formula from notes: of the paper the
abstract was read (covariance, Gaussian kernel), and there is no code. That means are over all tokens of the batch is
ours.
"""

import jax.numpy as jnp

from rest_jax.rl.masked import mean_over_mask
from rest_jax.rl.rules import NoOptions, Rule
from rest_jax.rl.view import TokenView


def damp_covariance(view: TokenView, options: NoOptions):
    """[P G T], in (0, 1]; 1 everywhere when nothing varies."""

    def centred(x):
        return x - mean_over_mask(x, view.mask)

    advantage = jnp.broadcast_to(view.token_advantage, view.mask.shape)
    covariance = centred(view.logp) * centred(advantage)
    variance = mean_over_mask(centred(covariance) ** 2, view.mask)
    return jnp.exp(-(covariance**2) / jnp.maximum(2 * variance, 1e-12))


RULE = Rule(damp_covariance)
