"""Attention of packed rows as Pallas kernels through Triton, for GPUs: nothing is as large as a row's scores.

The mask is that of `score_blocks`, the formulas and what is kept for the backward pass are those of `flash_attention`. A program
has one block, and loops over a list made of `until`. Forward and for the gradient of queries it has queries of one head and
loops over the keys they see; for that of keys and values it has keys of one kv head and loops over the queries of all its
heads that see them, so that nothing is added up across programs. Statistics and sums are float32, products take the compute
dtype, and float32 is not rounded to TF32.

On other hardware than GPUs the kernels are interpreted, for tests.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float, Int

from rest_jax.models.cache import RowLayout
from rest_jax.models.products import FLOOR, matrix_product, run_kernel
from rest_jax.models.remat import keep
from rest_jax.models.score_blocks import (
    fitting_block,
    kernel_cost,
    list_true,
    query_positions,
    seen_blocks,
    sees,
)

# Positions of a block: the least that tensor cores take, the most that a program has of its own; and positions * width * squared
# bytes of a number, with which the blocks fit into the 99 KB of shared memory of the smallest GPUs, and into registers.
_LEAST, _MOST = 16, 128
_FIT = 2**16


class _Case(NamedTuple):
    """What is fixed in a call."""

    own: int  # positions of the block that a program has
    step: int  # positions of the blocks that it loops over
    gradient_step: int  # the same in the backward pass, whose programs hold more
    pairs: int  # of query and key that see each other in a full row


def triton_attention(
    q: Float[Array, "B K R T H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    layout: RowLayout,
) -> Float[Array, "B K R T H"]:
    """Attention of scaled queries in q's dtype, differentiable in q, k, v."""
    time, width = q.shape[3:]
    padded = max(_LEAST, pl.next_power_of_2(width))
    case = _make_case(time, padded, q.dtype.itemsize, layout.pairs)
    ends = (0, -time % case.own), (0, padded - width)
    q, k, v = (jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [*ends]) for x in (q, k, v))
    until = jnp.pad(layout.until, ((0, 0), ends[0]))
    out: Any = _attend(q, k, v, until, case)
    return out[:, :, :, :time, :width]


def _make_case(time: int, width: int, itemsize: int, pairs: int) -> _Case:
    most = max(_LEAST, min(_MOST, _FIT // (width * itemsize**2)))
    own = fitting_block(time, _LEAST, most)
    return _Case(own, max(_LEAST, own // 2), max(_LEAST, own // 4), pairs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, until, case: _Case):
    """Time is a multiple of both blocks, the width a power of two."""
    return _attend_forward(q, k, v, until, case)[0]


def _attend_forward(q, k, v, until, case: _Case):
    lse = jax.ShapeDtypeStruct(q.shape[:-1], jnp.float32)
    outputs = {"query": jax.ShapeDtypeStruct(q.shape, v.dtype), "statistic": lse}
    call = _Call(_forward_kernel, 2, ("query", "keys", "keys"), outputs)
    out, lse = _run(call, until, (q, k, v), case)
    out, lse = keep(out), keep(lse)
    return out, (q, k, v, until, out, lse)


def _attend_backward(case: _Case, kept, d_out):
    q, k, v, until, out, lse = kept
    case = case._replace(step=case.gradient_step)
    # delta = sum_h out d_out
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    inputs = q, k, v, d_out, lse, delta
    like_q, like_k = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k))
    kinds = "query", "keys", "keys", "query", "statistic", "statistic"
    call = _Call(_query_gradient_kernel, 3, kinds, {"query": like_q})
    (d_q,) = _run(call, until, inputs, case)
    kinds = "queries", "key", "key", "queries", "statistics", "statistics"
    call = _Call(_key_gradient_kernel, 4, kinds, {"key": like_k, "value": like_k})
    d_k, d_v = _run(call, until, inputs, case)
    return d_q, d_k, d_v, None


_attend.defvjp(_attend_forward, _attend_backward)


class _Call(NamedTuple):
    """A kernel, what it takes and what it makes; arrays by how they are cut (`_block_specs`)."""

    kernel: Callable[..., None]
    products: int  # of matrices, for a block of scores
    inputs: tuple[str, ...]
    outputs: dict[str, jax.ShapeDtypeStruct]


def _run(call: _Call, until: Int[Array, "B T"], inputs: tuple[jax.Array, ...], case: _Case):
    """The kernel over all blocks, heads and rows."""
    batch, kv_heads, repeats, time, width = inputs[0].shape
    by_key = "key" in call.inputs
    visited = seen_blocks(until, *((case.step, case.own) if by_key else (case.own, case.step)))
    visits, count = list_true(visited.transpose(0, 2, 1) if by_key else visited)
    kinds = "row", "row", "visits", "counts", *call.inputs
    arrays = until, query_positions(until), visits, count, *inputs
    outputs = tuple(call.outputs.values())
    specs = _block_specs(case, inputs[0].shape, visits.shape, by_key)
    heads = kv_heads * repeats
    cost = kernel_cost(call.products, width, case.pairs * batch * heads, (*arrays, *outputs))

    def kernel(interpret: bool):
        return pl.pallas_call(
            functools.partial(call.kernel, case),
            grid=(time // case.own, kv_heads if by_key else heads, batch),
            in_specs=[specs[kind] for kind in kinds],
            out_specs=[specs[kind] for kind in call.outputs],
            out_shape=outputs,
            compiler_params=pltriton.CompilerParams(
                num_warps=8 if case.own > 64 else 4, num_stages=2
            ),
            cost_estimate=cost,
            interpret=interpret,
            # Triton's call keeps no estimate: `planning.work` reads the FLOPs in the name of the operation
            name=f"{call.kernel.__name__.strip('_')}_{cost.flops}_flops",
        )

    return run_kernel(kernel, *arrays, platform="cuda")


def _block_specs(
    case: _Case, shape: tuple[int, ...], visits: tuple[int, ...], by_key: bool
) -> dict[str, pl.BlockSpec]:
    """How arrays are cut for a program: to its own block those of kind query, statistic, key and value; the others to all of its
    row, of the heads it has to do with. q is `[B K R T H]`, the visits are `[B blocks steps]`.
    """
    _, _, repeats, time, width = shape
    _, blocks, steps = visits

    def of_query(i, h, b):
        return b, jax.lax.div(h, repeats), jax.lax.rem(h, repeats), i

    def of_keys(i, h, b):
        return b, h if by_key else jax.lax.div(h, repeats), 0, 0

    key = pl.BlockSpec((None, None, case.own, width), lambda i, h, b: (b, h, i, 0))
    return {
        "row": pl.BlockSpec((None, time), lambda i, h, b: (b, 0)),
        "visits": pl.BlockSpec((None, None, steps), lambda i, h, b: (b, i, 0)),
        "counts": pl.BlockSpec((None, blocks), lambda i, h, b: (b, 0)),
        "query": pl.BlockSpec((None, None, None, case.own, width), lambda *at: (*of_query(*at), 0)),
        "statistic": pl.BlockSpec((None, None, None, case.own), of_query),
        "keys": pl.BlockSpec((None, None, time, width), of_keys),
        "key": key,
        "value": key,
        "queries": pl.BlockSpec(
            (None, None, repeats, time, width), lambda i, h, b: (b, h, 0, 0, 0)
        ),
        "statistics": pl.BlockSpec((None, None, repeats, time), lambda i, h, b: (b, h, 0, 0)),
    }


def _forward_kernel(case: _Case, *refs):
    until_ref, position_ref, visit_ref, count_ref, q_ref, k_ref, v_ref, out_ref, lse_ref = refs
    i, q = pl.program_id(0), q_ref[...]
    query = position_ref[pl.ds(i * case.own, case.own)][:, None]

    def visit(n, carry):
        out, total, before = carry
        keys = pl.ds(visit_ref[n] * case.step, case.step)
        score = _scores(q, k_ref[keys, :], sees(query, _positions(keys), until_ref[keys]))
        peak = jnp.maximum(before, jnp.max(score, axis=1))
        weight, scale = jnp.exp(score - peak[:, None]), jnp.exp(before - peak)
        v = v_ref[keys, :]
        out = scale[:, None] * out + matrix_product(weight.astype(v.dtype), v, (1, 0))
        return out, scale * total + jnp.sum(weight, axis=1), peak

    # half the floor: exp of the floor then is zero also for queries that see nothing, here and in the backward pass
    zeros, floor = jnp.zeros((case.own,)), jnp.full((case.own,), 0.5 * FLOOR)
    start = jnp.zeros(q.shape), zeros, floor
    out, total, peak = jax.lax.fori_loop(0, count_ref[i], visit, start)
    total = jnp.where(total > 0, total, 1.0)
    out_ref[...] = (out / total[:, None]).astype(out_ref.dtype)
    lse_ref[...] = peak + jnp.log(total)


def _query_gradient_kernel(case: _Case, *refs):
    until_ref, position_ref, visit_ref, count_ref, q_ref, k_ref, v_ref, *rest, d_q_ref = refs
    i, q = pl.program_id(0), q_ref[...]
    query = position_ref[pl.ds(i * case.own, case.own)][:, None]
    d_out, lse, delta = (ref[...] for ref in rest)

    def visit(n, d_q):
        keys = pl.ds(visit_ref[n] * case.step, case.step)
        k = k_ref[keys, :]
        score = _scores(q, k, sees(query, _positions(keys), until_ref[keys]))
        d_weight = matrix_product(d_out, v_ref[keys, :], (1, 1))
        d_score = jnp.exp(score - lse[:, None]) * (d_weight - delta[:, None])
        return d_q + matrix_product(d_score.astype(k.dtype), k, (1, 0))

    d_q = jax.lax.fori_loop(0, count_ref[i], visit, jnp.zeros(q.shape))
    d_q_ref[...] = d_q.astype(d_q_ref.dtype)


def _key_gradient_kernel(case: _Case, *refs):
    """Its blocks of scores have keys as rows, so that both products take them as they are."""
    until_ref, position_ref, visit_ref, count_ref, q_ref, k_ref, v_ref, *rest, d_k_ref, d_v_ref = (
        refs
    )
    i, k, v = pl.program_id(0), k_ref[...], v_ref[...]
    repeats, keys = q_ref.shape[0], pl.ds(i * case.own, case.own)
    key, until = _positions(keys)[:, None], until_ref[keys][:, None]

    def visit(n, carry):
        d_k, d_v = carry
        queries = pl.ds(visit_ref[jax.lax.div(n, repeats)] * case.step, case.step)
        q, d_out, lse, delta = (ref[jax.lax.rem(n, repeats), queries] for ref in (q_ref, *rest))
        weight = jnp.exp(_scores(k, q, sees(position_ref[queries], key, until)) - lse)
        d_score = weight * (matrix_product(v, d_out, (1, 1)) - delta)
        d_k = d_k + matrix_product(d_score.astype(q.dtype), q, (1, 0))
        return d_k, d_v + matrix_product(weight.astype(d_out.dtype), d_out, (1, 0))

    start = jnp.zeros(k.shape), jnp.zeros(v.shape)
    d_k, d_v = jax.lax.fori_loop(0, count_ref[i] * repeats, visit, start)
    d_k_ref[...] = d_k.astype(d_k_ref.dtype)
    d_v_ref[...] = d_v.astype(d_v_ref.dtype)


def _positions(at: Any) -> jax.Array:
    return at.start + jnp.arange(at.size, dtype=jnp.int32)


def _scores(rows, columns, seen):
    """float32, of queries and keys or the other way round."""
    return jnp.where(seen, matrix_product(rows, columns, (1, 1)), FLOOR)
