"""STEER: tokens whose update would change the entropy most count less.

    O = (A / p) p (1 - p) (ln p + H) = A (1 - p) (ln p + H)
    exponential:  w = exp(-k |O|), k = -ln(low) / max(max |O|, 0.02), hence in [low, 1]
    linear:       w falls from `high` at the least |O| to `low` at the greatest

Paper: Hao et al., ACL 2026, arXiv:2510.10150. Read in zz-haooo/STEER b31df71 (`compute_token_weights`): there the first
p is of the sampling policy, the others of the current one, and the greatest |O| is that of a micro-batch. Here all are
of the sampling policy, the same in the first update of a step, and extremes are over the global batch. low 0.8,
exponential: their main script; high 1.2: their linear one.
"""

from typing import Literal

import jax.numpy as jnp

from rest_jax.config import Fraction, PositiveFloat, Section
from rest_jax.rl.rules import Rule
from rest_jax.rl.view import TokenView


class SteerOptions(Section):
    """Options of the rule."""

    form: Literal["exponential", "linear"] = "exponential"
    low: Fraction = 0.8
    high: PositiveFloat = 1.2  # of form `linear`


def steady_entropy(view: TokenView, options: SteerOptions):
    """[P G T], in [low, 1] or [low, high]."""
    p = jnp.clip(jnp.exp(view.logp), 1e-8, 1 - 1e-8)
    change = jnp.abs(view.token_advantage * (1 - p) * (jnp.log(p) + view.entropy))
    change = jnp.where(view.mask, change, 0.0)
    most = jnp.max(change)
    if options.form == "exponential":
        # exp(-k |O|) with k = -ln low / most
        return jnp.maximum(options.low, 1e-8) ** (change / jnp.maximum(most, 0.02))
    least = jnp.min(jnp.where(view.mask, change, jnp.inf))
    place = (change - least) / jnp.maximum(most - least, 1e-12)
    middle = (options.low + options.high) / 2
    fallen = options.high - place * (options.high - options.low)
    return jnp.where(most > least, fallen, middle)


RULE = Rule(steady_entropy, SteerOptions)
