"""Tests of NAME.py: python -m pytest test_NAME.py"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from rest_jax.rl.rules import choose
from rest_jax.rl.view import TokenView

FILE = pathlib.Path(__file__).with_name(pathlib.Path(__file__).name.removeprefix("test_"))


def weigh(entropy, length, **options) -> np.ndarray:
    """The weights of a step with this entropy [P][G][T] and these lengths [P][G]."""
    rule = choose("weight", str(FILE), tuple(options.items()), "weights.options")
    entropy = jnp.asarray(entropy, jnp.float32)
    zeros = jnp.zeros_like(entropy)
    view = TokenView(
        logp=zeros,
        entropy=entropy,
        gini=zeros,
        region=zeros.astype(jnp.int8),
        mask=jnp.arange(entropy.shape[2]) < jnp.asarray(length)[..., None],
        responses=zeros.astype(jnp.int32),
        marked=None,
        reward=zeros[..., 0],
        parts=zeros[..., :1],
        exact=zeros[..., 0] > 0,
        curriculum=None,  # type: ignore[arg-type]
        key=jax.random.key(0),
        advantage=zeros[..., 0],
    )
    return np.asarray(jax.jit(lambda view: rule(view))(view))


def test_the_most_undecided_tokens_weigh_more():
    found = weigh([[[0.1, 0.9, 0.2, 0.3], [0.5, 0.4, 0.0, 0.0]]], [[4, 2]], share=0.5, factor=3)
    np.testing.assert_array_equal(found[0, 0], [1, 3, 1, 3])
    np.testing.assert_array_equal(found[0, 1, :2], [3, 1])


def test_a_share_of_zero_is_uniform():
    assert (weigh([[[0.1, 0.9]]], [[2]], share=0.0) == 1).all()
