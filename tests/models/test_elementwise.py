"""The norm and SwiGLU against NumPy in float64, their gradients against autodiff of the plain formulas and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rest_jax.models.elementwise import rms_norm, swiglu
from rest_jax.models.products import row_sums

EPS = 1e-6


def draw(shape: tuple[int, ...], seed: int, dtype: str = "float32") -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def plain_norm(x, scale):
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + EPS)
    return (wide * scale.astype(jnp.float32)).astype(x.dtype)


def plain_swiglu(gate, up):
    return jax.nn.silu(gate) * up


def gradients(function, inputs, d_out):
    return jax.jit(lambda *x: jax.vjp(function, *x)[1](d_out))(*inputs)


def test_the_values_are_those_of_numpy_in_float64():
    x, scale, up = draw((2, 5, 48), 0), draw((48,), 1), draw((2, 5, 48), 2)
    wide, s, u = (np.asarray(v, np.float64) for v in (x, scale, up))
    np.testing.assert_allclose(row_sums(x, up), (wide * u).sum(-1), rtol=1e-5, atol=1e-5)
    normed = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + EPS) * s
    np.testing.assert_allclose(rms_norm(x, scale, EPS), normed, rtol=1e-5, atol=1e-6)
    gated = wide / (1 + np.exp(-wide)) * u
    np.testing.assert_allclose(swiglu(x, up), gated, rtol=1e-5, atol=1e-6)


# of hidden states, and of heads
@pytest.mark.parametrize("shape", [(2, 7, 64), (2, 7, 3, 16)])
@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-6), ("bfloat16", 1e-2)])
def test_gradients_of_the_norm_are_those_of_autodiff(shape, dtype, error):
    x, scale, d_out = draw(shape, 0, dtype), 1 + draw(shape[-1:], 1), draw(shape, 2, dtype)
    own = gradients(lambda x, s: rms_norm(x, s, EPS), (x, scale), d_out)
    expected = gradients(plain_norm, (x, scale), d_out)
    for got, wanted in zip(own, expected, strict=True):
        assert got.dtype == wanted.dtype and got.shape == wanted.shape
        wide, wanted = (np.asarray(v, np.float32) for v in (got, wanted))
        np.testing.assert_allclose(wide, wanted, atol=error * np.abs(wanted).max())


@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-6), ("bfloat16", 1e-2)])
def test_gradients_of_swiglu_are_those_of_autodiff(dtype, error):
    gate, up, d_out = (3 * draw((2, 7, 64), seed, dtype) for seed in range(3))
    own = gradients(swiglu, (gate, up), d_out)
    for got, wanted in zip(own, gradients(plain_swiglu, (gate, up), d_out), strict=True):
        assert got.dtype == wanted.dtype
        wide, wanted = (np.asarray(v, np.float32) for v in (got, wanted))
        np.testing.assert_allclose(wide, wanted, atol=error * np.abs(wanted).max())


def test_gradients_of_the_norm_are_slopes():
    x, scale, d_out = (
        np.asarray(v, np.float64)
        for v in (draw((1, 3, 32), 0), 1 + draw((32,), 1), draw((1, 3, 32), 2))
    )

    def loss(x, scale):
        return float((x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * scale * d_out).sum())

    narrow = [jnp.asarray(v, jnp.float32) for v in (x, scale, d_out)]
    d_x, d_scale = gradients(lambda x, s: rms_norm(x, s, EPS), narrow[:2], narrow[2])
    for at in [(0, 0, 0), (0, 1, 7), (0, 2, 31)]:
        step = np.zeros(x.shape)
        step[at] = 1e-5
        slope = (loss(x + step, scale) - loss(x - step, scale)) / 2e-5
        np.testing.assert_allclose(d_x[at], slope, rtol=1e-3, atol=1e-5)
    for at in (0, 31):
        step = np.zeros(scale.shape)
        step[at] = 1e-5
        slope = (loss(x, scale + step) - loss(x, scale - step)) / 2e-5
        np.testing.assert_allclose(d_scale[at], slope, rtol=1e-3, atol=1e-5)


def test_a_large_gate_has_a_finite_gradient():
    gate = jnp.array([-200.0, -20.0, 0.0, 20.0, 200.0])
    d_gate, d_up = gradients(swiglu, (gate, jnp.ones(5)), jnp.ones(5))
    np.testing.assert_allclose(d_gate, [0, 0, 0.5, 1, 1], atol=1e-6)
    np.testing.assert_allclose(d_up, [0, 0, 0, 20, 200], atol=1e-6)


def test_what_is_kept_for_the_gradients():
    """Of SwiGLU its inputs, of the norm its input and one number a row: no second array as wide as they are."""
    x, scale = draw((4, 64), 0), draw((64,), 1)

    def kept(function, *inputs):
        _, pull = jax.vjp(function, *inputs)
        return sorted(leaf.size for leaf in jax.tree.leaves(pull) if hasattr(leaf, "size"))

    assert kept(swiglu, x, x + 1) == [256, 256]
    assert kept(lambda x, s: rms_norm(x, s, EPS), x, scale) == [4, 64, 256]
