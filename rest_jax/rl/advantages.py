"""Group-relative advantages (docs/method.md section 7).

grpo:     A_i = (R_i - mean_group) / (std_group + 1e-6), unbiased std over the G rewards of a prompt.
dr_grpo:  A_i = R_i - mean_group.
In: rewards [P, G] float32. Out: advantages [P, G] float32, exactly zero for a group whose rewards are all equal.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

EPS = 1e-6


def nonzero_advantage(reward: Float[Array, "P G"]) -> Bool[Array, " P"]:
    """False for groups whose rewards are all equal: they carry no gradient."""
    return jnp.max(reward, axis=1) != jnp.min(reward, axis=1)


def grpo(reward: Float[Array, "P G"]) -> Float[Array, "P G"]:
    """Standardised within the group; unbiased (G - 1) standard deviation, in float32."""
    centred = dr_grpo(reward)
    std = jnp.sqrt(jnp.sum(centred**2, axis=1, keepdims=True) / max(reward.shape[1] - 1, 1))
    return centred / (std + EPS)


def dr_grpo(reward: Float[Array, "P G"]) -> Float[Array, "P G"]:
    """Centred within the group. The comparison of rewards, not of rounded differences, decides what is zero."""
    reward = reward.astype(jnp.float32)
    centred = reward - jnp.mean(reward, axis=1, keepdims=True)
    return jnp.where(nonzero_advantage(reward)[:, None], centred, 0.0)


ADVANTAGES = {"grpo": grpo, "dr_grpo": dr_grpo}
