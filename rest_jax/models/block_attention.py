"""Attention of rows in blocks of scores, in XLA's own operations, with the mask of `score_blocks`.

Queries go block by block over the blocks of keys that one of them sees, with a running maximum and sum
(FlashAttention-2, arXiv:2307.08691; the formulas are in `flash_attention.py`), forward and backward, so that nothing is as
large as a row's scores and blocks that nobody sees cost nothing. Kept for the backward pass: q, k, v, out, log-sum-exp.

Blocks are visited one after another: small ones for a CPU, whose caches hold them, large ones for an accelerator.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rest_jax.models.cache import RowLayout
from rest_jax.models.products import FLOOR, float32_einsum
from rest_jax.models.remat import keep
from rest_jax.models.score_blocks import list_true, query_positions, seen_blocks, sees

# Of blocks that hold less the products are too small for the threads of a CPU to share, of larger ones more is masked.
_SMALL, _LARGE = (64, 64), (128, 256)
WIDE = (512, 512)  # for an accelerator without kernels
_NARROW = 256  # width of all heads together, up to which blocks are small


class _Visits(NamedTuple):
    """For each block of queries its blocks of keys; behind `count` any others."""

    keys: Int[Array, "q k"]  # int32
    count: Int[Array, " q"]


def block_attention(
    q: Float[Array, "B K R T H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    layout: RowLayout,
    blocks: tuple[int, int] | None = None,
) -> Float[Array, "B K R T H"]:
    """Attention of scaled queries in q's dtype, differentiable in q, k, v.

    `blocks`: positions of queries and of keys at once, powers of two; None: those that are fast on a CPU.
    """
    _, heads, repeats, time, width = q.shape
    most = 1 << (time - 1).bit_length()  # no block is longer than a row needs
    queries, keys = blocks or cpu_blocks(heads * repeats * width)
    blocks = min(queries, most), min(keys, most)
    padding = -time % max(blocks)
    q, k, v = (jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, padding), (0, 0)]) for x in (q, k, v))
    until = jnp.pad(layout.until, ((0, 0), (0, padding)))
    out: Any = _attend(q, k, v, until, blocks)
    return out[:, :, :, :time]


def cpu_blocks(width: int) -> tuple[int, int]:
    """Positions of queries and of keys at once that are fast on a CPU; `width` of all heads together."""
    return _SMALL if width <= _NARROW else _LARGE


def mean_visits(until: Int[Array, "B T"], blocks: tuple[int, int]) -> float:
    """Mean number of key blocks that a query block visits."""
    padded = jnp.pad(until, ((0, 0), (0, -until.shape[1] % max(blocks))))
    return float(jnp.mean(_list_visits(padded, blocks).count))


def _list_visits(until: Int[Array, "B T"], blocks: tuple[int, int]) -> _Visits:
    """What a query of any row may see."""
    return _Visits(*list_true(jnp.any(seen_blocks(until, *blocks), axis=0)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, until, blocks: tuple[int, int]):
    """Time is a multiple of both blocks."""
    return _attend_forward(q, k, v, until, blocks)[0]


def _attend_forward(q, k, v, until, blocks: tuple[int, int]):
    visits = _list_visits(until, blocks)
    shape = (*q.shape[:2], q.shape[2] * blocks[0])

    def attend_block(i):
        queries = _queries(q, i, blocks[0])

        def visit(n, carry):
            out, total, before = carry
            j = visits.keys[i, n]
            keys, values = (_cut(x, j, blocks[1]) for x in (k, v))
            score = _scores(queries, keys, until, (i, j), blocks)
            peak = jnp.maximum(before, jnp.max(score, axis=-1))
            weight, scale = jnp.exp(score - peak[..., None]), jnp.exp(before - peak)
            out = scale[..., None] * out
            out = out + float32_einsum("bkms,bksh->bkmh", weight.astype(v.dtype), values)
            return out, scale * total + jnp.sum(weight, axis=-1), peak

        # half the floor: exp of the floor then is zero also for queries that see nothing, here and in the backward pass
        start = jnp.zeros((*shape, q.shape[-1])), jnp.zeros(shape), jnp.full(shape, 0.5 * FLOOR)
        out, total, peak = jax.lax.fori_loop(0, visits.count[i], visit, start)
        total = jnp.where(total > 0, total, 1.0)
        return (out / total[..., None]).astype(q.dtype), peak + jnp.log(total)

    out, lse = jax.lax.map(attend_block, jnp.arange(q.shape[3] // blocks[0]))
    out = _join(out, q)
    out, lse = keep(out), keep(lse)
    return out, (q, k, v, until, out, lse)


def _attend_backward(blocks: tuple[int, int], kept, d_out):
    q, k, v, until, out, lse = kept
    visits = _list_visits(until, blocks)
    # delta = sum_h out d_out
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)

    def attend_block(carry, i):
        queries, d_block, delta_block = (_queries(x, i, blocks[0]) for x in (q, d_out, delta))

        def visit(n, carry):
            d_q, d_k, d_v = carry
            j = visits.keys[i, n]
            keys, values = (_cut(x, j, blocks[1]) for x in (k, v))
            score = _scores(queries, keys, until, (i, j), blocks)
            weight = jnp.exp(score - lse[i][..., None])
            d_weight = float32_einsum("bkmh,bksh->bkms", d_block, values)
            d_score = (weight * (d_weight - delta_block)).astype(q.dtype)
            d_q = d_q + float32_einsum("bkms,bksh->bkmh", d_score, keys)
            d_k = _add(d_k, j, float32_einsum("bkms,bkmh->bkhs", d_score, queries))
            weight = weight.astype(q.dtype)
            return d_q, d_k, _add(d_v, j, float32_einsum("bkms,bkmh->bkhs", weight, d_block))

        start = jnp.zeros(queries.shape), *carry
        d_q, *carry = jax.lax.fori_loop(0, visits.count[i], visit, start)
        return tuple(carry), d_q.astype(q.dtype)

    # [B K H T]: XLA's CPU backend is up to half faster at these products than at those for [B K T H]; turned once at the end
    zeros = jnp.zeros((*k.shape[:2], k.shape[3], k.shape[2]))
    carry, d_q = jax.lax.scan(attend_block, (zeros, zeros), jnp.arange(lse.shape[0]))
    d_k, d_v = (x.swapaxes(2, 3) for x in carry)
    return _join(d_q, q), d_k.astype(k.dtype), d_v.astype(v.dtype), None


_attend.defvjp(_attend_forward, _attend_backward)


def _cut(x, i, block: int):
    """Block `i` along time, the last axis but one."""
    return jax.lax.dynamic_slice_in_dim(x, i * block, block, axis=x.ndim - 2)


def _queries(x, i, block: int):
    """Block `i` of `[B K R T X]`, all heads of a kv head together: `[B K R*block X]`."""
    return _cut(x, i, block).reshape(*x.shape[:2], -1, x.shape[-1])


def _join(blocks, like):
    """The inverse of `_queries` for all blocks."""
    count, batch, heads, _, width = blocks.shape
    blocks = blocks.reshape(count, batch, heads, like.shape[2], -1, width)
    return jnp.moveaxis(blocks, 0, 3).reshape(like.shape)


def _add(x, j, part):
    """Adds to block `j` of `[B K H T]`."""
    at = j * part.shape[3]
    old = jax.lax.dynamic_slice_in_dim(x, at, part.shape[3], axis=3)
    return jax.lax.dynamic_update_slice_in_dim(x, old + part, at, axis=3)


def _scores(queries, keys, until, at, blocks: tuple[int, int]):
    """float32 `[B K R*queries keys]` of the blocks `at` (of queries, of keys)."""
    query = _cut(query_positions(until)[..., None], at[0], blocks[0])
    end = _cut(until[:, None, :, None], at[1], blocks[1])[..., 0]
    seen = sees(query, at[1] * blocks[1] + jnp.arange(blocks[1]), end)
    repeats = queries.shape[2] // blocks[0]
    score = float32_einsum("bkmh,bksh->bkms", queries, keys)
    return jnp.where(jnp.tile(seen, (1, repeats, 1))[:, None], score, FLOOR)
