"""Policy losses against numbers worked out by hand; tests/rl/test_loss.py has those of `clip`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rest_jax.config import LossConfig
from rest_jax.rl.loss import TokenInputs, TokenStats, policy_token_loss


def inputs(logp_old, advantage, **fields) -> TokenInputs:
    ones = jnp.ones(np.shape(logp_old))
    plain = {"loss_weight": ones, "regulariser": ones, "mask": ones > 0, "logp_ref": None}
    old, a = jnp.asarray(logp_old, jnp.float32), jnp.asarray(advantage, jnp.float32)
    return TokenInputs(old, a, **plain | fields)


def evaluate(policy: str, logp, x: TokenInputs, **options):
    """(loss, its slope, metrics) of each token."""
    cfg = LossConfig.model_validate({"policy": policy, "policy_options": options})

    def loss_of(logp):
        seen = TokenStats(logp, jnp.zeros_like(logp), jnp.zeros(logp.shape, bool))
        out = policy_token_loss(seen, x, cfg)
        return jnp.sum(out.loss), out

    (_, out), slope = jax.value_and_grad(loss_of, has_aux=True)(jnp.asarray(logp, jnp.float32))
    return np.asarray(out.loss), np.asarray(slope), out.sums


RATIO = np.array([0.5, 1.0, 2.0, 9.0])


def test_cispo_cuts_the_ratio_and_keeps_the_gradient():
    logp = np.array([-1.0, -2.0, -0.5, -0.1])
    x = inputs(logp - np.log(RATIO), [1, -1, 2, 1])
    loss, slope, sums = evaluate("cispo", logp, x)
    cut = np.array([0.5, 1, 2, 5])
    np.testing.assert_allclose(slope, -cut * [1, -1, 2, 1], rtol=1e-5)
    np.testing.assert_allclose(loss, -cut * [1, -1, 2, 1] * logp, rtol=1e-5)
    np.testing.assert_array_equal(sums["update/clip_high_fraction"], [0, 0, 0, 1])
    _, low, _ = evaluate("cispo", logp, x, low=0.8, high=1.2)
    np.testing.assert_allclose(low, -np.array([0.8, -1, 2.4, 1.2]), rtol=1e-5)


def test_sapo_is_a_soft_gate():
    logp = np.log(RATIO) - 10
    loss, slope, sums = evaluate("sapo", logp, inputs(np.full(4, -10.0), [1, 1, -1, -1]))
    tau = np.array([1, 1, 1.05, 1.05])
    gate = 1 / (1 + np.exp(-tau * (RATIO - 1)))
    sign = np.array([-1, -1, 1, 1])
    np.testing.assert_allclose(loss, sign * 4 / tau * gate, rtol=1e-4)
    np.testing.assert_allclose(slope, sign * 4 * gate * (1 - gate) * RATIO, rtol=2e-3)
    assert slope[1] == pytest.approx(-1, rel=1e-3)  # that of r A at r = 1
    np.testing.assert_array_equal(sums["update/clip_fraction"], 0)


def test_gspo_has_the_ratio_of_the_completion():
    """Whatever the token's own: within the bounds, beyond them on the side that is cut, beyond them on the other."""
    mean = np.log([1.0003, 1.001, 1.001, 0.999, 0.999])
    x = inputs(np.full(5, -3.0), [2, 2, -2, 2, -2], sequence_log_ratio=jnp.asarray(mean))
    loss, slope, sums = evaluate("gspo", np.full(5, -1.0), x)
    s = np.exp(mean)
    np.testing.assert_allclose(
        loss, [-2 * s[0], -2 * 1.0004, 2 * s[2], -2 * s[3], 2 * 0.9997], rtol=1e-6
    )
    np.testing.assert_allclose(slope, [-2 * s[0], 0, 2 * s[2], -2 * s[3], 0], rtol=1e-6)
    np.testing.assert_array_equal(sums["update/clip_fraction"], [0, 1, 0, 0, 1])
    _, wide, _ = evaluate("gspo", np.full(5, -1.0), x, low=0.1, high=0.1)
    np.testing.assert_allclose(wide, -np.array([2, 2, -2, 2, -2]) * s, rtol=1e-6)
