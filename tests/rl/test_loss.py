"""Advantages, loss terms and aggregations against NumPy oracles of METHOD section 7."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rest_jax.config import LossConfig
from rest_jax.rl import loss
from rest_jax.rl.advantages import dr_grpo, grpo, nonzero_advantage

RNG = np.random.default_rng(0)
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
    # 0.1 summed seven times is not 0.7: the mean of equal float32 rewards may differ from each of them
    reward = jnp.full((3, 7), 0.1, jnp.float32)
    for advantage in (grpo(reward), dr_grpo(reward)):
        np.testing.assert_array_equal(advantage, 0.0)
    np.testing.assert_array_equal(nonzero_advantage(jnp.asarray(REWARD)), [True, False, True])


def oracle(logp, old, a, cfg):
    out = np.zeros_like(logp)
    for index in np.ndindex(logp.shape):
        adv = a[index[:2]]
        r = np.exp(np.clip(logp[index] - old[index], -20, 20))
        value = -min(r * adv, np.clip(r, 1 - cfg.clip_low, 1 + cfg.clip_high) * adv)
        if cfg.dual_clip is not None and adv < 0:
            value = min(value, -cfg.dual_clip * adv)
        out[index] = value
    return out


@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_policy_loss(dual_clip):
    cfg = LossConfig(clip_low=0.2, clip_high=0.28, dual_clip=dual_clip)
    logp = RNG.normal(-1, 1.5, (2, 3, 9)).astype(np.float32)
    old = RNG.normal(-1, 1.5, (2, 3, 9)).astype(np.float32)
    old[0, 0, 0] = -90.0  # far outside the clamp of the log-ratio
    a = RNG.normal(0, 1, (2, 3)).astype(np.float32)
    got = loss.policy_loss(*map(jnp.asarray, (logp, old, a)), cfg)
    np.testing.assert_allclose(got, oracle(logp, old, a, cfg), rtol=2e-5, atol=1e-6)
    assert np.isfinite(np.asarray(got)).all()


def test_clipped_marks_exactly_the_tokens_without_gradient():
    cfg = LossConfig(dual_clip=None)
    logp = jnp.asarray(RNG.normal(-1, 0.4, (2, 3, 40)), jnp.float32)
    old = jnp.asarray(RNG.normal(-1, 0.4, (2, 3, 40)), jnp.float32)
    a = jnp.asarray([[1.0, -1.0, 0.5], [-0.5, 2.0, -2.0]])
    gradient = jax.grad(lambda x: loss.policy_loss(x, old, a, cfg).sum())(logp)
    np.testing.assert_array_equal(np.asarray(gradient) == 0, loss.clipped(logp, old, a, cfg))


def test_on_policy_gradient_is_that_of_reinforce():
    a = jnp.asarray([[1.0, -2.0]])
    logp = jnp.zeros((1, 2, 5))
    gradient = jax.grad(lambda x: loss.policy_loss(x, logp, a, LossConfig()).sum())(logp)
    np.testing.assert_allclose(gradient, -jnp.broadcast_to(a[..., None], (1, 2, 5)))


def test_kl_estimators():
    logp, ref = (jnp.asarray(RNG.normal(-2, 1, 50), jnp.float32) for _ in range(2))
    d = ref - logp
    np.testing.assert_allclose(loss.k1(logp, ref), -d, rtol=1e-6)
    np.testing.assert_allclose(loss.k2(logp, ref), d * d / 2, rtol=1e-5)
    np.testing.assert_allclose(loss.k3(logp, ref), np.exp(d) - d - 1, rtol=1e-4, atol=1e-6)
    assert (np.asarray(loss.k3(logp, ref)) >= 0).all()


def test_aggregations():
    length = np.array([[4, 9, 1], [7, 2, 5]])
    mask = np.arange(9) < length[..., None]
    w = (RNG.random((2, 3, 9)).astype(np.float32) + 0.1) * mask
    x = RNG.normal(size=(2, 3, 9)).astype(np.float32)
    expected = {
        "weighted_token_mean": (w * x).sum() / w.sum(),
        "token_mean": (w * x).sum() / mask.sum(),
        "sequence_mean": ((w * x).sum(-1) / w.sum(-1)).mean(),
        "fixed_length": (w * x).sum(-1).mean() / 64,
    }
    assert set(expected) == set(loss.AGGREGATIONS)
    for name, value in expected.items():
        c = loss.AGGREGATIONS[name](jnp.asarray(w), jnp.asarray(mask), 64)
        np.testing.assert_allclose(jnp.sum(c * x), value, rtol=1e-5)
        assert (np.asarray(c)[~mask] == 0).all()


def test_unit_weights_are_plain_token_mean():
    mask = jnp.arange(9) < jnp.asarray([[4, 9], [7, 2]])[..., None]
    ones = mask.astype(jnp.float32)
    a, b = (loss.AGGREGATIONS[n](ones, mask, 1) for n in ("weighted_token_mean", "token_mean"))
    np.testing.assert_array_equal(a, b)
