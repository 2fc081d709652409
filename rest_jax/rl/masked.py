"""Every masked reduction of the project, its denominator in its name. Inputs float32, masks bool of the same shape."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

EPS = 1e-8


def mean_over_mask(
    x: Float[Array, "..."], mask: Bool[Array, "..."], axis=None
) -> Float[Array, "..."]:
    """Mean over the masked entries, 0 where the mask is empty; entries outside may be NaN."""
    total = jnp.sum(jnp.where(mask, x, 0.0), axis=axis)
    return total / jnp.maximum(jnp.sum(mask, axis=axis), 1)


def max_over_mask(
    x: Float[Array, "..."], mask: Bool[Array, "..."], axis=None
) -> Float[Array, "..."]:
    """Maximum over the masked entries; -inf where the mask is empty."""
    return jnp.max(jnp.where(mask, x, -jnp.inf), axis=axis)


def quantile_over_mask(
    x: Float[Array, "*B T"], mask: Bool[Array, "*B T"], q: float
) -> Float[Array, ""]:
    """The q-quantile of all masked entries, linear between two; +inf where the mask is empty."""
    ordered = jnp.sort(jnp.where(mask, x, jnp.inf), axis=None)
    place = q * jnp.maximum(jnp.sum(mask) - 1, 0).astype(jnp.float32)
    low = jnp.floor(place).astype(jnp.int32)
    below, above = ordered[low], ordered[jnp.ceil(place).astype(jnp.int32)]
    return jnp.where(place > low, below + (place - low) * (above - below), below)


def rank_over_mask(x: Float[Array, "*B T"], mask: Bool[Array, "*B T"]) -> Int[Array, "*B T"]:
    """How many masked entries of the last axis come before each in ascending order, equal ones as they stand; those outside
    come last.
    """
    order = jnp.argsort(jnp.where(mask, x, jnp.inf), axis=-1, stable=True)
    return jnp.argsort(order, axis=-1)
