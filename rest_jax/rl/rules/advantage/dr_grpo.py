"""Dr.GRPO: centred within the group.

    A = R - mean

Paper: Liu et al. 2025, arXiv:2503.20783. Read in volcengine/verl b178a3c (`norm_adv_by_std_in_grpo` false).
"""

from rest_jax.rl.rules import NoOptions, Rule
from rest_jax.rl.view import TokenView, centre


def dr_grpo(view: TokenView, options: NoOptions):
    """[P G]; exactly zero in groups whose rewards are all equal."""
    return centre(view.reward)


RULE = Rule(dr_grpo)
