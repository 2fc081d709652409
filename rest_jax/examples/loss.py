"""A policy loss of your own: NAME.py.

    rest-jax train FILES... loss.policy_plugin=NAME.py loss.policy_options.width=0.3

The rule gives the loss of every token of any shape; token weight, denominators, KL and entropy terms are added by
`rest_jax/rl/loss.py`. It is traced and differentiated by jax: the gradient flows through `seen.logp` alone.

    seen.logp, seen.entropy        nats, of the policy being trained
    x.logp_old, x.advantage        nats of the policy that sampled; the advantage of the token
    x.loss_weight, x.mask          coefficient of the token (applied elsewhere); False where there is none
    x.sequence_log_ratio           mean of logp - logp_old over the completion, with Rule(reads_sequence=True)
    cfg                            section `loss` of the config
"""

import jax.numpy as jnp

from rest_jax.config import LossConfig, PositiveFloat, Section
from rest_jax.rl.loss import PolicyLoss, TokenInputs, TokenStats, ratio
from rest_jax.rl.rules import Rule


class Options(Section):
    """What `loss.policy_options` may say, with its defaults."""

    width: PositiveFloat = 0.2


def clip_both_sides(seen: TokenStats, x: TokenInputs, cfg: LossConfig, options: Options):
    """PPO's clip with one width: -min(r A, clip(r, 1 - width, 1 + width) A). `low` and `high` say where it cuts, for metrics."""
    r = ratio(seen.logp, x.logp_old)
    clipped = jnp.clip(r, 1 - options.width, 1 + options.width)
    return PolicyLoss(
        loss=-jnp.minimum(r * x.advantage, clipped * x.advantage),
        low=(x.advantage < 0) & (r < 1 - options.width),
        high=(x.advantage > 0) & (r > 1 + options.width),
    )


RULE = Rule(clip_both_sides, Options)
