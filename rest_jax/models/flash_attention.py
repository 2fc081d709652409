"""Attention of packed rows as Pallas TPU kernels that never hold a row's scores, with the mask of `score_blocks`.

With s = k q / sqrt(H) and p = exp(s - lse), where lse is the log of the sum of exp(s) over the keys that a query sees:

    out = sum_j p v        d_v = sum_i p d_out        d_s = p (v d_out - sum_h out d_out)
                           d_q = sum_j d_s k          d_k = sum_i d_s q

(FlashAttention-2, arXiv:2307.08691.) Kept for the backward pass: q, k, v, out, lse. Statistics and sums are float32, products
take the compute dtype. A block of the scores has keys as rows and the queries of all heads of a kv head as columns, so that
statistics are rows and sums over keys stay in a column. Blocks that nobody sees are not visited: the kernels loop
over lists of the others, made from the table on the device and as long as the longest of a batch.

On other hardware than TPUs the kernels are interpreted, for tests.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

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

_COLUMNS = 1024  # queries of a block, all heads of a kv head together
_BLOCK = 512  # positions of a block at most; a block of scores has _BLOCK x _COLUMNS at most
_LANES = 128
_INPUTS = ("until", "position", "query", "key", "value")  # of all kernels, by how they are cut


class _Case(NamedTuple):
    """What is fixed in a call."""

    queries: int  # positions of a block of queries
    keys: int  # positions of a block of keys
    pairs: int  # of query and key that see each other in a full row


class _Visits(NamedTuple):
    """Blocks of scores to visit, row by row; behind `count` the last of them is repeated."""

    query: Int[Array, "B n"]  # int32 block of queries
    key: Int[Array, "B n"]  # int32 block of keys
    count: Int[Array, " B"]


def flash_attention(
    q: Float[Array, "B K R T H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    layout: RowLayout,
) -> Float[Array, "B K R T H"]:
    """Attention of scaled queries in q's dtype, differentiable in q, k, v."""
    time = q.shape[3]
    case = _make_case(time, q.shape[2], layout.pairs)
    padding = -time % max(case.queries, case.keys)
    q, k, v = (jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, padding), (0, 0)]) for x in (q, k, v))
    until = jnp.pad(layout.until, ((0, 0), (0, padding)))
    out: Any = _attend(q, k, v, until, case)
    return out[:, :, :, :time]


def _make_case(time: int, repeats: int, pairs: int) -> _Case:
    """Blocks as large as the scores may be."""
    queries = fitting_block(time, _LANES, min(_BLOCK, _COLUMNS // repeats))
    keys = fitting_block(time, _LANES, min(_BLOCK, _BLOCK * _COLUMNS // (queries * repeats)))
    return _Case(queries, keys, pairs)


def _visited_blocks(until: Int[Array, "B T"], case: _Case) -> Bool[Array, "B q k"]:
    """Which blocks of scores may have a query that sees a key, and those on the diagonal, so that every output is written."""
    first_query = jnp.arange(0, until.shape[1], case.queries)[:, None]
    first_key = jnp.arange(0, until.shape[1], case.keys)
    diagonal = (first_key < first_query + case.queries) & (first_query < first_key + case.keys)
    return diagonal | seen_blocks(until, case.queries, case.keys)


def _list_visits(visited: Bool[Array, "B q k"], by_key: bool) -> _Visits:
    """The blocks in the order of the queries, or of the keys."""
    batch, queries, keys = visited.shape
    visited = visited.transpose(0, 2, 1) if by_key else visited
    order, count = list_true(visited.reshape(batch, -1))
    # the most there are: the blocks of a causal row
    length = sum(-(-(n + 1) * keys // queries) for n in range(queries))
    n = jnp.minimum(jnp.arange(length), count[:, None] - 1)
    order = jnp.take_along_axis(order, n, axis=1)
    outer, inner = jnp.divmod(order, queries if by_key else keys)
    return _Visits(inner, outer, count) if by_key else _Visits(outer, inner, count)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, until, case: _Case):
    """q `[B K R T H]`, scaled; k, v `[B K T H]`; until `[B T]` -> `[B K R T H]`."""
    return _attend_forward(q, k, v, until, case)[0]


def _attend_forward(q, k, v, until, case: _Case):
    width, columns = q.shape[-1], q.shape[2] * case.queries
    visits = _list_visits(_visited_blocks(until, case), by_key=False)
    masks = until[:, None], _query_positions(until, case, q.shape[2])
    lse = jax.ShapeDtypeStruct((*q.shape[:2], q.shape[3] // case.queries, 1, columns), jnp.float32)
    outputs = {"query": jax.ShapeDtypeStruct(q.shape, v.dtype), "statistic": lse}
    scratch = [(width, columns), (1, columns), (1, columns)]
    call = _Call(_forward_kernel, False, 2, _INPUTS, outputs, scratch)
    out, lse = _run(call, visits, (*masks, q, k, v), case)
    out, lse = keep(out), keep(lse)
    return out, (q, k, v, until, out, lse)


def _attend_backward(case: _Case, kept, d_out):
    q, k, v, until, out, lse = kept
    width, columns = q.shape[-1], lse.shape[-1]
    masks = until[:, None], _query_positions(until, case, q.shape[2])
    visited = _visited_blocks(until, case)
    like_q, like_k, statistic = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, lse))

    outputs = {"query": like_q, "statistic": statistic}
    kinds = (*_INPUTS, "query", "statistic", "query")
    call = _Call(_query_gradient_kernel, False, 3, kinds, outputs, [(width, columns)])
    inputs = *masks, q, k, v, d_out, lse, out
    d_q, delta = _run(call, _list_visits(visited, by_key=False), inputs, case)
    outputs = {"key": like_k, "value": like_k}
    kinds = (*_INPUTS, "query", "statistic", "statistic")
    call = _Call(_key_gradient_kernel, True, 4, kinds, outputs, [(case.keys, width)] * 2)
    inputs = *masks, q, k, v, d_out, lse, delta
    d_k, d_v = _run(call, _list_visits(visited, by_key=True), inputs, case)
    return d_q, d_k, d_v, None


_attend.defvjp(_attend_forward, _attend_backward)


def _query_positions(until: Int[Array, "B T"], case: _Case, repeats: int):
    """int32 `[B 1 blocks 1 columns]`: the position of every query of a block."""
    position = query_positions(until).reshape(until.shape[0], 1, -1, 1, case.queries)
    return jnp.tile(position, repeats)


class _Call(NamedTuple):
    """A kernel, what it takes and what it makes; arrays by how they are cut (`_block_specs`)."""

    kernel: Callable[..., None]
    by_key: bool  # its visits are in the order of the keys
    products: int  # of matrices, for a block of scores
    inputs: tuple[str, ...]
    outputs: dict[str, jax.ShapeDtypeStruct]
    scratch: list[tuple[int, int]]  # float32


def _run(call: _Call, visits: _Visits, inputs: tuple[jax.Array, ...], case: _Case):
    """The kernel over all rows, kv heads and visits."""
    batch, kv_heads, repeats, _, width = inputs[2].shape
    specs = _block_specs(case, repeats, width)
    outputs = tuple(call.outputs.values())
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(visits),
        grid=(batch, kv_heads, jnp.max(visits.count)),
        in_specs=[specs[kind] for kind in call.inputs],
        out_specs=[specs[kind] for kind in call.outputs],
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in call.scratch],
    )
    pairs = case.pairs * batch * kv_heads * repeats
    cost = kernel_cost(call.products, width, pairs, (*inputs, *outputs))

    def kernel(interpret: bool):
        return pl.pallas_call(
            functools.partial(call.kernel, case, call.by_key),
            grid_spec=grid,
            out_shape=outputs,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary")
            ),
            cost_estimate=cost,
            interpret=interpret,
            name=call.kernel.__name__.strip("_"),
        )

    return run_kernel(kernel, *visits, *inputs)


def _block_specs(case: _Case, repeats: int, width: int) -> dict[str, pl.BlockSpec]:
    """How arrays are cut: until `[B 1 T]`, positions `[B 1 blocks 1 columns]`, queries and their like `[B K R T H]`, keys and
    values `[B K T H]`, statistics of queries `[B K blocks 1 columns]`.
    """
    row = (1, 1, 1, 1, repeats * case.queries)
    keys = pl.BlockSpec(
        (1, 1, case.keys, width), lambda b, h, n, query, key, _: (b, h, key[b, n], 0)
    )
    return {
        "until": pl.BlockSpec((1, 1, case.keys), lambda b, h, n, query, key, _: (b, 0, key[b, n])),
        "position": pl.BlockSpec(row, lambda b, h, n, query, key, _: (b, 0, query[b, n], 0, 0)),
        "query": pl.BlockSpec(
            (1, 1, repeats, case.queries, width),
            lambda b, h, n, query, key, _: (b, h, 0, query[b, n], 0),
        ),
        "key": keys,
        "value": keys,
        "statistic": pl.BlockSpec(row, lambda b, h, n, query, key, _: (b, h, query[b, n], 0, 0)),
    }


class _Visit(NamedTuple):
    """Where a kernel is."""

    key: jax.Array  # position of the block's first key
    live: jax.Array  # false behind the end of the list
    first: jax.Array  # of those that add to the same output
    last: jax.Array


def _visit(case: _Case, by_key: bool, query_ref, key_ref, count_ref) -> _Visit:
    b, n = pl.program_id(0), pl.program_id(2)
    count, outer = count_ref[b], key_ref if by_key else query_ref
    live = n < count
    before = outer[b, jnp.maximum(n - 1, 0)]
    after = outer[b, jnp.minimum(n + 1, outer.shape[1] - 1)]
    return _Visit(
        key_ref[b, n] * case.keys,
        live,
        live & ((n == 0) | (before != outer[b, n])),
        live & ((n == count - 1) | (after != outer[b, n])),
    )


def _forward_kernel(case: _Case, by_key: bool, query, key, count, *refs):
    *inputs, v_ref, out_ref, lse_ref, sum_ref, peak_ref, total_ref = refs
    at = _visit(case, by_key, query, key, count)

    @pl.when(at.first)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)
        total_ref[...] = jnp.zeros_like(total_ref)
        # half the floor: exp of the floor then is zero also for queries that see nothing, here and in the backward pass
        peak_ref[...] = jnp.full_like(peak_ref, 0.5 * FLOOR)

    @pl.when(at.live)
    def _():
        score = _scores(case, at, *inputs)
        before = peak_ref[...]
        peak = jnp.maximum(before, jnp.max(score, axis=0, keepdims=True))
        weight, scale = jnp.exp(score - peak), jnp.exp(before - peak)
        v = v_ref[0, 0]
        sum_ref[...] = scale * sum_ref[...] + matrix_product(v, weight.astype(v.dtype), (0, 0))
        total_ref[...] = scale * total_ref[...] + jnp.sum(weight, axis=0, keepdims=True)
        peak_ref[...] = peak

    @pl.when(at.last)
    def _():
        total = jnp.where(total_ref[...] > 0, total_ref[...], 1.0)
        out = (sum_ref[...] / total).T
        out_ref[0, 0] = out.reshape(out_ref.shape[2:]).astype(out_ref.dtype)
        lse_ref[0, 0, 0] = peak_ref[...] + jnp.log(total)


def _query_gradient_kernel(case: _Case, by_key: bool, query, key, count, *refs):
    *inputs, out_ref, d_q_ref, delta_ref, sum_ref = refs
    at = _visit(case, by_key, query, key, count)

    @pl.when(at.first)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)
        d_out, out = (_columns(ref).astype(jnp.float32) for ref in (inputs[5], out_ref))
        # a product with ones puts the sums over the head dimension in a row
        ones = jnp.ones((8, out.shape[1]), jnp.float32)
        delta_ref[0, 0, 0] = matrix_product(ones, d_out * out, (1, 1))[:1]

    @pl.when(at.live)
    def _():
        k = inputs[3][0, 0]
        _, d_score = _weights_and_gradient(case, at, (*inputs, delta_ref))
        sum_ref[...] += matrix_product(k, d_score.astype(k.dtype), (0, 0))

    @pl.when(at.last)
    def _():
        d_q_ref[0, 0] = sum_ref[...].T.reshape(d_q_ref.shape[2:]).astype(d_q_ref.dtype)


def _key_gradient_kernel(case: _Case, by_key: bool, query, key, count, *refs):
    *inputs, d_k_ref, d_v_ref, k_sum_ref, v_sum_ref = refs
    at = _visit(case, by_key, query, key, count)

    @pl.when(at.first)
    def _():
        k_sum_ref[...] = jnp.zeros_like(k_sum_ref)
        v_sum_ref[...] = jnp.zeros_like(v_sum_ref)

    @pl.when(at.live)
    def _():
        q, d_out = _columns(inputs[2]), _columns(inputs[5])
        weight, d_score = _weights_and_gradient(case, at, inputs)
        k_sum_ref[...] += matrix_product(d_score.astype(q.dtype), q, (1, 0))
        v_sum_ref[...] += matrix_product(weight.astype(d_out.dtype), d_out, (1, 0))

    @pl.when(at.last)
    def _():
        d_k_ref[0, 0] = k_sum_ref[...].astype(d_k_ref.dtype)
        d_v_ref[0, 0] = v_sum_ref[...].astype(d_v_ref.dtype)


def _weights_and_gradient(case: _Case, at: _Visit, inputs):
    """p and d_s of a block, float32 `[keys, columns]`."""
    *scored, v_ref, d_out_ref, lse_ref, delta_ref = inputs
    weight = jnp.exp(_scores(case, at, *scored) - lse_ref[0, 0, 0])
    d_weight = matrix_product(v_ref[0, 0], _columns(d_out_ref), (1, 1))
    return weight, weight * (d_weight - delta_ref[0, 0, 0])


def _scores(case: _Case, at: _Visit, until_ref, position_ref, q_ref, k_ref):
    """float32 `[keys, columns]`."""
    score = matrix_product(k_ref[0, 0], _columns(q_ref), (1, 1))
    key = at.key + jax.lax.broadcasted_iota(jnp.int32, (case.keys, 1), 0)
    seen = sees(position_ref[0, 0, 0], key, until_ref[0, 0][:, None])
    return jnp.where(seen, score, FLOOR)


def _columns(ref):
    """A block `[1 1 R queries H]` as `[R * queries, H]`."""
    return ref[0, 0].reshape(-1, ref.shape[-1])
