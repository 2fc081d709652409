"""Attention of few queries over keys that lie in pages (`cache.Pool`).

    attend_pages(q, pool, layer, table, precision)   -> Partial    a Pallas kernel for TPUs
    gather_pages(layers, table)                      -> Layers     pages side by side, for `attend_part`

The kernel reads the pages in use alone, one after another, from a list made on the device, with a running maximum and sum
(FlashAttention-2, arXiv:2307.08691). Scores and sums are float32. On other hardware than TPUs it is interpreted, for tests; CPUs and
GPUs gather the pages once in a call of `decode` and attend over plain arrays.

A `Partial` is joined with those of other keys in one softmax (`join`, `normalise`).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from rest_jax.distributed import BATCH_AXES
from rest_jax.models.cache import Layers, PageTable, Pool, is_stacked

_FLOOR = -1e30  # score of what may not be seen: finite, so that nothing becomes NaN
_LANES = 128


class Partial(NamedTuple):
    """Unnormalised attention over one part of the keys: values weighted by exp(score - peak), total weight, peak."""

    out: Float[Array, "*B H"]  # float32, as all three
    total: Float[Array, "*B"]
    peak: Float[Array, "*B"]


def attend_part(
    q: Float[Array, "*B M H"],
    k: Float[Array, "*B S H"],
    v: Float[Array, "*B S H"],
    mask: Bool[Array, "..."],
    precision: jax.lax.Precision,
) -> Partial:
    """Attention of scaled queries over one part of the keys."""
    score = jnp.where(mask, _product("...mh,...sh->...ms", q, k, precision), _FLOOR)
    peak = jnp.maximum(jnp.max(score, axis=-1), 0.5 * _FLOOR)
    weight = jnp.exp(score - peak[..., None])
    out = _product("...ms,...sh->...mh", weight.astype(v.dtype), v, precision)
    return Partial(out, jnp.sum(weight, axis=-1), peak)


def join(*parts: Partial) -> Partial:
    """The parts as one."""
    peak = functools.reduce(jnp.maximum, (part.peak for part in parts))
    scale = [jnp.exp(part.peak - peak) for part in parts]
    total = sum(s * part.total for s, part in zip(scale, parts, strict=True))
    out = sum(s[..., None] * part.out for s, part in zip(scale, parts, strict=True))
    return Partial(out, total, peak)  # type: ignore[arg-type]


def normalise(part: Partial) -> Float[Array, "*B H"]:
    """The softmax, float32; zero where no key was seen."""
    return part.out / jnp.where(part.total > 0, part.total, 1.0)[..., None]


def _product(axes, x, y, precision):
    """einsum that sums in float32."""
    return jnp.einsum(axes, x, y, precision=precision, preferred_element_type=jnp.float32)


def gather_pages(layers: Layers, table: PageTable) -> Layers:
    """The pages of every sequence side by side: a layer `[W P K S H]` -> `[W B K M*S H]`."""

    def gather(x: jax.Array, page: jax.Array) -> jax.Array:  # [P K S H], [B M]
        found = jnp.moveaxis(jnp.take(x, page, axis=0, mode="clip"), 1, 2)  # [B K M S H]
        return found.reshape(*found.shape[:2], -1, found.shape[-1])

    def one(x: jax.Array) -> jax.Array:
        gather_shards = jax.vmap(gather)
        if is_stacked(x):
            return jax.vmap(gather_shards, in_axes=(0, None))(x, table.page)
        return gather_shards(x, table.page)

    return jax.tree.map(one, layers)


class _Visits(NamedTuple):
    """Pages to visit, sequence by sequence; behind `count` nothing is meant."""

    sequence: Int[Array, " n"]  # int32, as all
    page: Int[Array, " n"]
    begin: Int[Array, " n"]
    end: Int[Array, " n"]
    count: Int[Array, "1"]


def attend_pages(
    q: Float[Array, "W B K M H"],
    pool: Pool,
    layer: Int[Array, ""] | None,
    table: PageTable,
    precision: jax.lax.Precision,
) -> Partial:
    """Attention of M scaled queries a kv head of every sequence over the keys of its pages; `layer` of a pool of stacked layers.

    Every device computes its data shard, and its heads if the mesh divides them. The pages in use of a sequence come first.
    """
    mesh = jax.sharding.get_abstract_mesh()
    stacked = layer is not None
    where = jnp.reshape(layer if stacked else 0, (1,))
    if mesh.empty or mesh.size == 1:
        return _one_shard(q, pool, where, table, precision)
    heads = "tensor" if q.shape[2] % mesh.shape["tensor"] == 0 else None
    queries = PartitionSpec(BATCH_AXES, None, heads)
    pages = PartitionSpec(*(None,) * stacked, BATCH_AXES, None, heads)
    split = jax.shard_map(
        functools.partial(_one_shard, precision=precision),
        in_specs=(queries, pages, PartitionSpec(), PartitionSpec(BATCH_AXES)),
        out_specs=queries,
        check_vma=False,  # kernels do not say over which axes their results vary
    )
    return split(q, pool, where, table)


def _one_shard(q, pool: Pool, layer, table: PageTable, precision) -> Partial:
    """The kernel for one data shard; q [1 B K M H], table [1 B M], `layer` [1]."""
    k, v = (x if is_stacked(x) else x[None] for x in pool)
    one = PageTable(*(x[0] for x in table))
    out, lse = _visit_pages(q[0], k[:, 0], v[:, 0], layer, _list_visits(one), precision)
    seen = jnp.any(one.end > one.begin, axis=1)[:, None, None]
    lse = jnp.where(seen, lse[..., : q.shape[3]], 0.5 * _FLOOR)
    out = jnp.where(seen[..., None], out, 0.0)
    return Partial(out[None], jnp.where(seen, 1.0, 0.0 * lse)[None], lse[None])


def _list_visits(table: PageTable) -> _Visits:
    """The pages in use of `[B M]`, in order. Those of a sequence come first in its row."""
    sequences, most = table.page.shape
    pages = jnp.sum(table.end > table.begin, axis=1, dtype=jnp.int32)
    behind = jnp.cumsum(pages)
    n = jnp.arange(sequences * most, dtype=jnp.int32)
    sequence = jnp.sum(n[:, None] >= behind, axis=1, dtype=jnp.int32)
    sequence = jnp.minimum(sequence, sequences - 1)
    column = jnp.clip(n - (behind - pages)[sequence], 0, most - 1)
    fields = (x[sequence, column] for x in table)
    return _Visits(sequence, *fields, count=behind[-1:])


def _visit_pages(q, k, v, layer, visits: _Visits, precision):
    """q `[B K M H]`, k and v `[L P K S H]` -> normalised out `[B K M H]`, log of the total weight `[B K lanes]`, float32; those
    of a sequence without pages are not written.
    """
    sequences, heads, queries, width = q.shape
    size, lanes = k.shape[-2], -(-queries // _LANES) * _LANES

    def own(i, _, sequence, *__):
        return sequence[i], 0, 0, 0

    def page(i, layer, _, page, *__):
        return layer[0], page[i], 0, 0, 0

    per_sequence = pl.BlockSpec((1, heads, queries, width), own)
    per_page = pl.BlockSpec((1, 1, heads, size, width), page)
    statistic = pl.BlockSpec((1, heads, lanes), lambda i, _, sequence, *__: (sequence[i], 0, 0))
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1 + len(visits),
        grid=(jnp.maximum(visits.count[0], 1),),
        in_specs=[per_sequence, per_page, per_page],
        out_specs=[per_sequence, statistic],
        scratch_shapes=[
            pltpu.VMEM((heads, queries, width), jnp.float32),
            pltpu.VMEM((heads, queries, 1), jnp.float32),
            pltpu.VMEM((heads, queries, 1), jnp.float32),
        ],
    )
    # of one page: how many there are, only the values say
    cost = pl.CostEstimate(
        flops=4 * heads * queries * size * width,
        transcendentals=heads * queries * size,
        bytes_accessed=2 * heads * size * width * k.dtype.itemsize,
    )

    def compute(*arrays, interpret: bool):
        run = pl.pallas_call(
            functools.partial(_page_kernel, precision),
            grid_spec=grid,
            out_shape=(
                jax.ShapeDtypeStruct(q.shape, jnp.float32),
                jax.ShapeDtypeStruct((sequences, heads, lanes), jnp.float32),
            ),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
            cost_estimate=cost,
            interpret=interpret,
            name="attend_pages",
        )
        return run(*arrays)

    return jax.lax.platform_dependent(
        layer,
        *visits,
        q,
        k,
        v,
        tpu=functools.partial(compute, interpret=False),
        default=functools.partial(compute, interpret=True),
    )


def _page_kernel(precision, _, sequence, __, begin, end, count, q_ref, k_ref, v_ref, *refs):
    out_ref, lse_ref, sum_ref, peak_ref, total_ref = refs
    i, last_one = pl.program_id(0), sequence.shape[0] - 1
    live = i < count[0]
    first = live & ((i == 0) | (sequence[jnp.maximum(i - 1, 0)] != sequence[i]))
    last = live & ((i == count[0] - 1) | (sequence[jnp.minimum(i + 1, last_one)] != sequence[i]))
    heads, queries, _ = sum_ref.shape

    @pl.when(first)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)
        total_ref[...] = jnp.zeros_like(total_ref)
        peak_ref[...] = jnp.full_like(peak_ref, 0.5 * _FLOOR)

    @pl.when(live)
    def _():
        row = jax.lax.broadcasted_iota(jnp.int32, (1, k_ref.shape[-2]), 1)
        seen = (row >= begin[i]) & (row < end[i])
        for head in range(heads):
            v = v_ref[0, 0, head]
            score = _matrix_product(q_ref[0, head], k_ref[0, 0, head], 1, precision)
            score = jnp.where(seen, score, _FLOOR)
            before = peak_ref[head]
            peak = jnp.maximum(before, jnp.max(score, axis=1, keepdims=True))
            weight, scale = jnp.exp(score - peak), jnp.exp(before - peak)
            added = _matrix_product(weight.astype(v.dtype), v, 0, precision)
            sum_ref[head] = scale * sum_ref[head] + added
            total_ref[head] = scale * total_ref[head] + jnp.sum(weight, axis=1, keepdims=True)
            peak_ref[head] = peak

    @pl.when(last)
    def _():
        lanes = lse_ref.shape[-1]
        line = jax.lax.broadcasted_iota(jnp.int32, (queries, lanes), 0)
        lane = jax.lax.broadcasted_iota(jnp.int32, (queries, lanes), 1)
        for head in range(heads):
            total = total_ref[head]
            out_ref[0, head] = sum_ref[head] / total
            # a column as a row
            lse = jnp.where(line == lane, peak_ref[head] + jnp.log(total), 0.0)
            lse_ref[0, pl.ds(head, 1)] = jnp.sum(lse, axis=0, keepdims=True)


def _matrix_product(x, y, contracted: int, precision) -> Any:
    """x `[M I]` times y `[I O]` (`contracted` 0) or `[O I]` (1), summed in float32."""
    axes = (((1,), (contracted,)), ((), ()))
    return jax.lax.dot_general(x, y, axes, precision=precision, preferred_element_type=jnp.float32)
