"""GRPO: standardised within the group.

    A = (R - mean) / (std + 1e-6), unbiased std over the G rewards of a prompt

Paper: Shao et al. 2024, arXiv:2402.03300. Read in volcengine/verl b178a3c (`compute_grpo_outcome_advantage`), whose
epsilon it is; huggingface/trl f2cd577 has 1e-4.
"""

from rest_jax.rl.rules import NoOptions, Rule
from rest_jax.rl.view import TokenView, standardise


def grpo(view: TokenView, options: NoOptions):
    """[P G]; exactly zero in groups whose rewards are all equal."""
    return standardise(view.reward)


RULE = Rule(grpo)
