"""RLOO: minus the mean of the other completions of the group.

    A = R - mean of the others = (R - mean) G / (G - 1)

Paper: Ahmadian et al. 2024, arXiv:2402.14740. Read in volcengine/verl b178a3c (`compute_rloo_outcome_advantage`).
"""

from rest_jax.rl.rules import NoOptions, Rule
from rest_jax.rl.view import TokenView, centre


def rloo(view: TokenView, options: NoOptions):
    """[P G]; exactly zero in groups whose rewards are all equal."""
    size = view.reward.shape[1]
    return centre(view.reward) * (size / max(size - 1, 1))


RULE = Rule(rloo)
