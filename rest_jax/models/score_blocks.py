"""The scores of packed rows in blocks: what is seen of them, and what a kernel that visits the seen ones costs.

Query i sees key j iff j <= i < until[b, j] (`RowLayout`). A token sees itself, so what has until[b, j] <= j is padding: it
yields zero, in value and gradient, and is seen by nobody.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Int


def fitting_block(time: int, least: int, most: int) -> int:
    """Positions of a block: the largest power of two times `least`, within `most`, that pads a row by an eighth or less."""
    block = least
    while 2 * block <= most and -time % (2 * block) <= time // 8:
        block *= 2
    return block


def query_positions(until: Int[Array, "*B T"]) -> Int[Array, "*B T"]:
    """int32 position of every query, -1 for padding, which so sees nothing."""
    time = jnp.arange(until.shape[-1], dtype=jnp.int32)
    return jnp.where(until > time, time, -1)


def sees(query: Any, key: Any, until: Any) -> Any:
    """The mask: whether queries, by `query_positions`, see keys, by their position and `until`; of shapes that broadcast."""
    return (key <= query) & (query < until)


def seen_blocks(until: Int[Array, "B T"], queries: int, keys: int) -> Bool[Array, "B q k"]:
    """Which blocks of so many queries and keys may have a query that sees a key; both divide T."""
    time = until.shape[1]
    first_query, first_key = jnp.arange(0, time, queries)[:, None], jnp.arange(0, time, keys)
    last = jnp.max(until.reshape(until.shape[0], 1, -1, keys), axis=-1)
    return (first_key < first_query + queries) & (last > first_query)


def list_true(
    x: Bool[Array, "*B n"],
) -> tuple[Int[Array, "*B n"], Int[Array, "*B"]]:
    """int32 indices of what is true, along the last axis, in front of those of the rest; and how many are."""
    order = jnp.argsort(~x, axis=-1, stable=True)
    return order.astype(jnp.int32), jnp.sum(x, axis=-1, dtype=jnp.int32)


def kernel_cost(products: int, width: int, pairs: int, arrays: Sequence[Any]) -> pl.CostEstimate:
    """Of a kernel that reads and writes `arrays`: so many products for each pair of a query and a key that see each other, all
    heads of queries and rows together.
    """
    return pl.CostEstimate(
        flops=2 * products * width * pairs,
        transcendentals=pairs,
        bytes_accessed=sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays),
    )
