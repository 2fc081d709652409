"""Tests of NAME.py: python -m pytest test_NAME.py"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from rest_jax.rl.rules import choose
from rest_jax.rl.view import TokenView

FILE = pathlib.Path(__file__).with_name(pathlib.Path(__file__).name.removeprefix("test_"))


def advantage(reward, **options) -> np.ndarray:
    """The advantages of a step with these rewards [P][G], of completions of two tokens."""
    rule = choose("advantage", str(FILE), tuple(options.items()), "loss.advantage_options")
    reward = jnp.asarray(reward, jnp.float32)
    zeros = jnp.zeros((*reward.shape, 2), jnp.float32)
    view = TokenView(
        logp=zeros,
        entropy=zeros,
        gini=zeros,
        region=zeros.astype(jnp.int8),
        mask=zeros == 0,
        responses=zeros.astype(jnp.int32),
        marked=None,
        reward=reward,
        parts=reward[..., None],
        exact=reward > 0,
        curriculum=None,  # type: ignore[arg-type]
        key=jax.random.key(0),
    )
    return np.asarray(jax.jit(lambda view: rule(view))(view))


def test_with_power_1_the_spread_of_a_group_does_not_matter():
    found = advantage([[0, 1], [0, 10]])
    np.testing.assert_allclose(found, [[-1, 1], [-1, 1]], rtol=1e-4)


def test_with_power_0_it_does():
    np.testing.assert_allclose(advantage([[0, 1], [0, 10]], power=0), [[-0.5, 0.5], [-5, 5]])


def test_equal_rewards_have_no_advantage():
    assert not advantage([[0.1, 0.1, 0.1]]).any()
