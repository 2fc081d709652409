"""Matrix products summed in float32, and how a Pallas kernel is run, for attention and the vocabulary pass."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

FLOOR = -1e30  # attention score of what may not be seen: finite, so that nothing becomes NaN


def precision_of(dtype: Any) -> jax.lax.Precision:
    """Of products: float32 means float32 on every backend, not three bfloat16 passes or TF32."""
    exact = jnp.dtype(dtype) == jnp.float32
    return jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT


def float32_einsum(axes: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """einsum of two arrays that sums in float32, at the precision of x's dtype."""
    return jnp.einsum(
        axes, x, y, precision=precision_of(x.dtype), preferred_element_type=jnp.float32
    )


def matrix_product(x: jax.Array, y: jax.Array, contracted: tuple[int, int]) -> jax.Array:
    """Of matrices over one axis of each, as a kernel can write it; summed in float32, at the precision of x's dtype."""
    axes = (((contracted[0],), (contracted[1],)), ((), ()))
    precision = precision_of(x.dtype)
    return jax.lax.dot_general(x, y, axes, precision=precision, preferred_element_type=jnp.float32)


def row_sums(x: Float[Array, "*B D"], y: Float[Array, "*B D"]) -> Float[Array, "*B"]:
    """float32 sums of x y along the last axis, as products of vectors: several times a fused sum's speed on CPU."""
    return jnp.einsum("...d,...d->...", x, y, precision=jax.lax.Precision.HIGHEST)


def run_kernel(
    kernel: Callable[[bool], Callable[..., Any]], *arrays: jax.Array, platform: str = "tpu"
) -> Any:
    """What a Pallas kernel for `platform` ("tpu", "cuda") makes of the arrays: `kernel(interpret)` is the call; interpreted
    elsewhere.
    """
    compiled: dict[str, Any] = {platform: kernel(False)}
    return jax.lax.platform_dependent(*arrays, **compiled, default=kernel(True))
