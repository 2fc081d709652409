"""Every masked reduction of the project, its denominator in its name. Inputs float32, masks bool of the same shape."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

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
