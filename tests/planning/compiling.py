"""Small programs, compiled for this machine and read, for the tests of what is read in them."""

import jax
import jax.numpy as jnp

from rest_jax.planning import hlo
from rest_jax.planning.measure import Sizes, measure


def compiled(f, *shapes, **options) -> hlo.Module:
    """`jax.jit(f, **options)` of float32 arrays of these shapes."""
    arguments = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    return hlo.parse(jax.jit(f, **options).lower(*arguments).compile().as_text())


def flops(module: hlo.Module) -> float:
    """Of the whole program."""
    return sum(work.flops for work in measure(module, Sizes(0)).once.values())
