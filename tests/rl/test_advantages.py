"""Group-relative advantages against NumPy oracles of docs/method.md section 7."""

import jax.numpy as jnp
import numpy as np

from rest_jax.rl.advantages import dr_grpo, grpo, nonzero_advantage

REWARD = np.array([[1.0, 2.0, 4.0, 1.0], [3.3, 3.3, 3.3, 3.3], [-3.0, 4.0, 4.0, 4.0]], np.float32)


def test_grpo_is_unbiased_standardisation():
    expected = (REWARD - REWARD.mean(1, keepdims=True)) / (
        REWARD.std(1, ddof=1, keepdims=True) + 1e-6
    )
    expected[1] = 0
    np.testing.assert_allclose(grpo(jnp.asarray(REWARD)), expected, rtol=1e-5, atol=1e-7)


def test_dr_grpo_only_centres():
    np.testing.assert_allclose(
        dr_grpo(jnp.asarray(REWARD)), REWARD - REWARD.mean(1, keepdims=True), atol=1e-6
    )


def test_equal_rewards_give_exactly_zero():
    # 0.1 summed seven times is not 0.7: the mean of equal float32 rewards may differ from each of them.
    reward = jnp.full((3, 7), 0.1, jnp.float32)
    for advantage in (grpo(reward), dr_grpo(reward)):
        np.testing.assert_array_equal(advantage, 0.0)
    np.testing.assert_array_equal(nonzero_advantage(jnp.asarray(REWARD)), [True, False, True])
