"""GSPO: the ratio, and so the clip, is that of the whole completion.

    s_i = exp(mean_t (logp_it - logp_old_it))        L_it = -min(s A, clip(s, 1 - low, 1 + high) A), the gradient through logp_it

Paper: Zheng et al. 2025, arXiv:2507.18071. Read in volcengine/verl b178a3c (`compute_policy_loss_gspo`: s enters with
its value, and log-probs with theirs, so that A may differ within a completion). low 3e-4, high 4e-4: the paper, by
huggingface/trl's index; `method/gspo` takes the mean over completions (aggregation `sequence_mean`), as both do.
"""

import jax
import jax.numpy as jnp

from rest_jax.config import LossConfig, PositiveFloat, Section
from rest_jax.rl.loss import LOG_RATIO_CLIP, PolicyLoss, TokenInputs, TokenStats
from rest_jax.rl.rules import Rule


class GspoOptions(Section):
    """Options of the rule."""

    low: PositiveFloat = 3e-4
    high: PositiveFloat = 4e-4


def gspo(seen: TokenStats, x: TokenInputs, cfg: LossConfig, options: GspoOptions) -> PolicyLoss:
    """Of each token."""
    a = x.advantage
    assert x.sequence_log_ratio is not None
    log_ratio = x.sequence_log_ratio + seen.logp - jax.lax.stop_gradient(seen.logp)
    s = jnp.exp(jnp.clip(log_ratio, -LOG_RATIO_CLIP, LOG_RATIO_CLIP))
    loss = -jnp.minimum(s * a, jnp.clip(s, 1 - options.low, 1 + options.high) * a)
    return PolicyLoss(loss, (a < 0) & (s < 1 - options.low), (a > 0) & (s > 1 + options.high))


RULE = Rule(gspo, GspoOptions, reads_sequence=True)
