"""Rotary position embeddings: angle tables from positions, and their application to query and key heads.

Frequencies are theta^(-2i/H) for i in [0, H/2); Llama 3.1 divides those of long wavelengths by a factor and blends in
between. Halves are rotated against each other (x[i] with x[i + H/2]), which is the order of HF checkpoints.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rest_jax.models.config import RopeScaling

Rope = tuple[Float[Array, "B T half"], Float[Array, "B T half"]]  # cosines, sines


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Radians a position for every pair of a head, float32 `[H/2]`."""
    base = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    if scaling is None:
        return base.astype(np.float32)
    wavelength = 2 * math.pi / base
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    # 0 below the low-frequency bound (stretched in full), 1 above the high-frequency bound (kept), linear between
    keep = np.clip((scaling.original_max_positions / wavelength - low) / (high - low), 0.0, 1.0)
    return ((1 - keep) * base / scaling.factor + keep * base).astype(np.float32)


def rope_tables(
    positions: Int[Array, "B T"], head_dim: int, theta: float, scaling: RopeScaling | None
) -> Rope:
    """Cosines and sines `[B, T, H/2]` of the angles, float32: bfloat16 would lose full turns."""
    angle = positions[..., None].astype(jnp.float32) * frequencies(head_dim, theta, scaling)
    return jnp.cos(angle), jnp.sin(angle)


def apply_rope(x: Float[Array, "B T N H"], rope: Rope) -> Float[Array, "B T N H"]:
    """Rotates every head of x by its position; computed in float32, returned in x's dtype."""
    cos, sin = rope[0][:, :, None, :], rope[1][:, :, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
