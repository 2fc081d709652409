"""Tests of NAME.py: python -m pytest test_NAME.py"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from rest_jax.config import LossConfig
from rest_jax.rl.loss import TokenInputs, TokenStats
from rest_jax.rl.rules import choose

FILE = pathlib.Path(__file__).with_name(pathlib.Path(__file__).name.removeprefix("test_"))


def loss(ratio, advantage, **options):
    """(loss, its gradient by the log-probability) of tokens with these ratios to the policy that sampled."""
    rule = choose("loss", str(FILE), tuple(options.items()), "loss.policy_options")
    ratio, advantage = jnp.asarray(ratio, jnp.float32), jnp.asarray(advantage, jnp.float32)
    zeros, yes = jnp.zeros_like(ratio), jnp.ones(ratio.shape, bool)
    inputs = TokenInputs(zeros, advantage, zeros, zeros, yes, None)

    def of_logp(logp):
        return rule(TokenStats(logp, zeros, yes), inputs, LossConfig()).loss

    value = of_logp(jnp.log(ratio))
    return np.asarray(value), np.asarray(jax.grad(lambda x: of_logp(x).sum())(jnp.log(ratio)))


def test_where_the_policy_sampled_the_gradient_is_that_of_the_advantage():
    value, gradient = loss([1, 1], [2, -3])
    np.testing.assert_allclose(value, [-2, 3])
    np.testing.assert_allclose(gradient, [-2, 3])


def test_far_from_there_a_token_has_no_gradient():
    _, gradient = loss([1.5, 0.5, 1.5], [1, -1, -1], width=0.4)
    np.testing.assert_allclose(gradient, [0, 0, 1.5], rtol=1e-6)
