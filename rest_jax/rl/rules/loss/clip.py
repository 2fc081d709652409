"""PPO's clip, with two bounds and the dual clip.

    L = -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A);  for A < 0 also L = min(L, -dual_clip A)

Papers: Schulman et al. 2017, arXiv:1707.06347; dual clip: Ye et al. 2020, arXiv:1912.09729; a higher upper bound
(0.28): DAPO, arXiv:2503.14476, here `method/clip_higher`. Read in volcengine/verl b178a3c
(`compute_policy_loss_vanilla`). Its options are `loss.clip_low`, `loss.clip_high` and `loss.dual_clip`.
"""

import jax.numpy as jnp

from rest_jax.config import LossConfig
from rest_jax.rl.loss import PolicyLoss, TokenInputs, TokenStats, ratio
from rest_jax.rl.rules import NoOptions, Rule


def clip(seen: TokenStats, x: TokenInputs, cfg: LossConfig, options: NoOptions) -> PolicyLoss:
    """Of each token."""
    a, r = x.advantage, ratio(seen.logp, x.logp_old)
    loss = -jnp.minimum(r * a, jnp.clip(r, 1 - cfg.clip_low, 1 + cfg.clip_high) * a)
    dual = None
    if cfg.dual_clip is not None:
        loss = jnp.where(a < 0, jnp.minimum(loss, -cfg.dual_clip * a), loss)
        dual = (a < 0) & (r > cfg.dual_clip)
    low, high = (a < 0) & (r < 1 - cfg.clip_low), (a > 0) & (r > 1 + cfg.clip_high)
    return PolicyLoss(loss, low, high, dual)


RULE = Rule(clip)
