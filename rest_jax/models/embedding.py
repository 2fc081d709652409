"""Rows of the embedding matrix, with a gradient that is the same in every run.

The gradient adds up the rows of tokens with the same id. On a GPU XLA scatters them with atomic additions, in whatever order they
come: a step that is repeated would end with other bits. There the tokens of a row are sorted by id and each run of one id is
summed as a tree. CPUs and TPUs scatter in one order.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def embed_tokens(
    embed: Float[Array, "V D"], tokens: Int[Array, "B T"], dtype: Any
) -> Float[Array, "B T D"]:
    """The rows of the tokens, in `dtype`; NaN for an id outside the vocabulary."""
    return jnp.take(embed, tokens, axis=0).astype(dtype)


def _forward(embed, tokens, dtype):
    return embed_tokens(embed, tokens, dtype), (embed, tokens)


def _backward(dtype, saved, gradient):
    embed, tokens = saved
    gradient = gradient.astype(embed.dtype)
    sums: dict[str, Any] = dict.fromkeys(
        ("cuda", "rocm"), functools.partial(sum_sorted, len(embed))
    )
    scattered = functools.partial(sum_scattered, len(embed))
    return jax.lax.platform_dependent(tokens, gradient, **sums, default=scattered), None


embed_tokens.defvjp(_forward, _backward)


def sum_scattered(
    size: int, tokens: Int[Array, "B T"], rows: Float[Array, "B T D"]
) -> Float[Array, "V D"]:
    """[size D]: of each id the sum of the rows of its tokens."""
    zeros = jnp.zeros((size, rows.shape[-1]), rows.dtype)
    return zeros.at[tokens].add(rows, mode="drop")


def sum_sorted(
    size: int, tokens: Int[Array, "B T"], rows: Float[Array, "B T D"]
) -> Float[Array, "V D"]:
    """`sum_scattered` in an order that the tokens alone decide: within each of the B, then over them."""
    return jnp.sum(jax.vmap(functools.partial(_sum_runs, size))(tokens, rows), axis=0)


def _sum_runs(
    size: int, tokens: Int[Array, " T"], rows: Float[Array, "T D"]
) -> Float[Array, "V D"]:
    order = jnp.argsort(tokens)
    ids, rows = tokens[order], rows[order]
    begins = jnp.concatenate([jnp.ones(1, bool), ids[1:] != ids[:-1]])
    ends = jnp.concatenate([begins[1:], jnp.ones(1, bool)])
    _, sums = jax.lax.associative_scan(_join, (begins[:, None], rows))
    # Every id is written once: by the last of its run. The others point behind the matrix, each to a place of its own.
    place = jnp.where(ends & (ids >= 0), ids, size + jnp.arange(len(ids)))
    zeros = jnp.zeros((size, rows.shape[-1]), rows.dtype)
    return zeros.at[place].set(sums, mode="drop", unique_indices=True)


def _join(left, right):
    """Of two neighbouring stretches: whether a run begins in them, and the sum behind the last beginning."""
    (begun, before), (begins, sums) = left, right
    return begun | begins, jnp.where(begins, sums, before + sums)
