"""A rule of token weights of your own: NAME.py.

    rest-jax train FILES... weights.plugin=NAME.py weights.options.share=0.3

The rule reads a scored step and gives every token a factor; weights.normalizer then divides them by their mean. It is traced by
jax: jnp instead of numpy, and no `if` on values. Nothing is differentiated through it. The view is of all prompts of the step
[P], their completions [G] and their tokens [T] (`rest_jax.rl.view.TokenView`):

    logp, entropy, gini   [P G T]  nats, nats and 1 - sum p^2, of the policy that sampled
    region, mask          [P G T]  `rest_jax.tool_calls.Region` of each token; False behind the end, where all values are 0
    responses             [P G T]  ids
    reward, exact         [P G]    the reward, and whether it is in the format with exactly the gold calls
    advantage             [P G] or [P G T]; view.token_advantage is one that broadcasts against tokens
    curriculum.nu         progress of the run, 0 to 1; key: of the step, for rules that draw (jax.random)
"""

import jax.numpy as jnp

from rest_jax.config import Fraction, NonNegativeFloat, Section
from rest_jax.rl.rules import Rule
from rest_jax.rl.view import TokenView


class Options(Section):
    """What `weights.options` may say, with its defaults; anything else is refused when the run begins."""

    share: Fraction = 0.2  # of the tokens of a completion that are weighed more
    factor: NonNegativeFloat = 2.0  # by how much


def weigh_undecided(view: TokenView, options: Options):
    """[P G T], never negative: the tokens of highest entropy of each completion weigh `factor`, all others 1."""
    entropy = jnp.where(view.mask, view.entropy, -jnp.inf)
    count = jnp.sum(view.mask, axis=-1, keepdims=True)
    # how many tokens of the completion are more undecided
    rank = jnp.sum(entropy[..., None, :] > entropy[..., :, None], axis=-1)
    return jnp.where(rank < options.share * count, options.factor, 1.0)


RULE = Rule(weigh_undecided, Options)
