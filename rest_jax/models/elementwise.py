"""What a block does token by token besides its products, with rules for the gradients that keep little.

Autodiff keeps every step of these (of SwiGLU five arrays as wide as the MLP, where its two inputs are enough), and on CPU
writing and reading them takes longer than computing them again. It also gives sums along a row of products of two arrays,
which XLA's CPU backend is several times slower at than at `row_sums`.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rest_jax.models.products import row_sums


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(
    x: Float[Array, "*B D"], scale: Float[Array, " D"], eps: float
) -> Float[Array, "*B D"]:
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, in float32, returned in x's dtype (arXiv:1910.07467, equation 4)."""
    return _norm_forward(x, scale, eps)[0]


def _norm_forward(x, scale, eps):
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    out = wide * inverse * scale.astype(jnp.float32)
    return out.astype(x.dtype), (x, scale, inverse)


def _norm_backward(eps, kept, d_out):
    x, scale, inverse = kept
    d_out, normed = d_out.astype(jnp.float32), x.astype(jnp.float32) * inverse
    d_scale = jnp.sum(d_out * normed, axis=range(x.ndim - 1))
    d_normed = d_out * scale.astype(jnp.float32)
    along = row_sums(d_normed, normed)[..., None] / x.shape[-1]
    d_x = inverse * (d_normed - normed * along)
    return d_x.astype(x.dtype), d_scale.astype(scale.dtype)


rms_norm.defvjp(_norm_forward, _norm_backward)


@jax.custom_vjp
def swiglu(gate: Float[Array, "*B F"], up: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
    """silu(gate) * up (arXiv:2002.05202, equation 6)."""
    return jax.nn.silu(gate) * up


def _swiglu_backward(kept, d_out):
    gate, up = kept
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    return d_out * up * (sigmoid + silu * (1 - sigmoid)), d_out * silu


swiglu.defvjp(lambda gate, up: (swiglu(gate, up), (gate, up)), _swiglu_backward)
