"""A rule of advantages of your own: NAME.py.

    rest-jax train FILES... loss.advantage_plugin=NAME.py loss.advantage_options.power=0.5

The rule reads a scored step and says how much better each completion is than expected: [P G], or [P G T] where its tokens
differ. It is traced by jax (jnp, no `if` on values), over the global batch: a mean over P is one over all devices. What it may
read: `reward`, `parts` [P G K] (what the reward is the sum of, `rest_jax.rewards.score.PARTS`), `exact`, `mask`, `entropy`, ..
(`rest_jax.rl.view.TokenView`). `Rule(signal=...)` says what must differ between the completions of a group for it to have any
advantage: groups in which it does not are left out of the update, which saves their time. None: no group is left out.
"""

import jax.numpy as jnp

from rest_jax.config import NonNegativeFloat, Section
from rest_jax.rl.rules import Rule
from rest_jax.rl.view import TokenView, centre


class Options(Section):
    """What `loss.advantage_options` may say, with its defaults."""

    power: NonNegativeFloat = 1.0  # of the standard deviation; 1: GRPO, 0: only centred
    eps: NonNegativeFloat = 1e-6


def divide_by_spread(view: TokenView, options: Options):
    """[P G]: the reward less the mean of the group, over a power of the group's standard deviation."""
    centred = centre(view.reward)
    spread = jnp.sqrt(jnp.mean(centred**2, axis=1, keepdims=True))
    return centred / (spread + options.eps) ** options.power


RULE = Rule(divide_by_spread, Options, signal="reward")
