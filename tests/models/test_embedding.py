"""The gradient of the embedding: the same sums in every order in which they are made, and no scatter that adds on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rest_jax.models.embedding import embed_tokens, sum_scattered, sum_sorted

V, D = 13, 3


def oracle(tokens: np.ndarray, rows: np.ndarray) -> np.ndarray:
    out = np.zeros((V, rows.shape[-1]))
    for token, row in zip(tokens.ravel(), rows.reshape(-1, rows.shape[-1]), strict=True):
        if 0 <= token < V:
            out[token] += row
    return out


def drawn(
    shape: tuple[int, int], seed: int = 0, vocabulary: int = V
) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocabulary, shape).astype(np.int32)
    return tokens, rng.normal(size=(*shape, D)).astype(np.float32)


@pytest.mark.parametrize("sums", [sum_scattered, sum_sorted])
@pytest.mark.parametrize("shape", [(1, 1), (3, 17)])
@pytest.mark.parametrize(
    "vocabulary", [1, 4, V, 2 * V]
)  # one id alone, repeated ones, all, some outside
def test_each_id_has_the_sum_of_its_rows(sums, shape, vocabulary):
    tokens, rows = drawn(shape, vocabulary=vocabulary)
    found = jax.jit(functools.partial(sums, V))(tokens, rows)
    np.testing.assert_allclose(found, oracle(tokens, rows), rtol=1e-5, atol=1e-5)


def test_the_gradient_is_that_of_a_lookup():
    tokens, rows = drawn((2, 9))
    embed = np.random.default_rng(1).normal(size=(V, D)).astype(np.float32)

    def plain(embed):
        return jnp.sum(jnp.take(embed, tokens, axis=0).astype(jnp.bfloat16) * rows)

    def own(embed):
        return jnp.sum(embed_tokens(embed, tokens, jnp.bfloat16) * rows)

    np.testing.assert_array_equal(plain(embed), own(embed))
    np.testing.assert_array_equal(jax.grad(plain)(embed), jax.grad(own)(embed))
    assert np.isnan(embed_tokens(jnp.array(embed), jnp.array([[V]]), jnp.float32)).all()
