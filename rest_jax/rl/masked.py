"""Every masked reduction of the project, its denominator in its name. Inputs float32, masks bool of the same shape."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

EPS = 1e-8


def masked_sum(x: Float[Array, "..."], mask: Bool[Array, "..."], axis=None) -> Float[Array, "..."]:
    """Sum of x where mask; entries outside may be NaN."""
    return jnp.sum(jnp.where(mask, x, 0.0), axis=axis)


def mean_over_mask(
    x: Float[Array, "..."], mask: Bool[Array, "..."], axis=None
) -> Float[Array, "..."]:
    """Mean over the masked entries; 0 where the mask is empty."""
    return masked_sum(x, mask, axis) / jnp.maximum(jnp.sum(mask, axis=axis), 1)


def weighted_mean(
    x: Float[Array, "..."], weight: Float[Array, "..."], axis=None
) -> Float[Array, "..."]:
    """sum(w x) / (sum(w) + 1e-8); entries of weight 0 may be NaN."""
    return jnp.sum(jnp.where(weight != 0, weight * x, 0.0), axis=axis) / (
        jnp.sum(weight, axis=axis) + EPS
    )


def max_over_mask(
    x: Float[Array, "..."], mask: Bool[Array, "..."], axis=None
) -> Float[Array, "..."]:
    """Maximum over the masked entries; -inf where the mask is empty."""
    return jnp.max(jnp.where(mask, x, -jnp.inf), axis=axis)
