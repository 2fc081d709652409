"""Attention of few queries over keys that lie in pages (`cache.Pool`).

    attend_pages(q, pool, layer, visits, recent, precision) -> Partial   a Pallas kernel for TPUs
    list_visits(table, recent)                              -> Visits    what it reads
    gather_pages(layers, table)                             -> Layers    pages side by side, for `attend_part`

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
from rest_jax.models.cache import Layers, PageTable, Pool, Visits, is_stacked

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


class Recent(NamedTuple):
    """Keys and values of responses that are in no page yet: `recent` of the cache, and those of the new tokens."""

    k: Layers  # of stacked layers [L W N K S H]
    v: Layers
    own_k: Float[Array, "W N K H"]
    own_v: Float[Array, "W N K H"]


def attend_pages(
    q: Float[Array, "W B K M H"],
    pool: Pool,
    layer: Int[Array, ""],
    visits: Visits,
    recent: Recent | None,
    precision: jax.lax.Precision,
) -> Partial:
    """Attention of M scaled queries a kv head of every sequence over the pages that it visits, in that layer of stacked ones, and its
    `recent` keys. Every device computes its data shard, and its heads if the mesh divides them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    where, attend = jnp.reshape(layer, (1,)), functools.partial(_one_shard, precision)
    if mesh.empty or mesh.size == 1:
        return attend(q, pool, where, visits, recent)
    heads = "tensor" if q.shape[2] % mesh.shape["tensor"] == 0 else None
    rows, by_head = PartitionSpec(BATCH_AXES), PartitionSpec(BATCH_AXES, None, heads)
    pages = PartitionSpec(None, BATCH_AXES, None, heads)
    extra = None if recent is None else Recent(pages, pages, by_head, by_head)  # type: ignore[arg-type]
    split = jax.shard_map(
        attend,
        in_specs=(by_head, pages, PartitionSpec(), rows, extra),
        out_specs=by_head,
        check_vma=False,  # kernels do not say over which axes their results vary
    )
    return split(q, pool, where, visits, recent)


def _one_shard(precision, q, pool: Pool, layer, visits: Visits, recent: Recent | None) -> Partial:
    """The kernel for one data shard; q [1 B K M H], visits [1 n], `layer` [1]."""
    k, v = (x[:, 0] for x in pool)  # type: ignore[call-overload]
    extra = ()
    if recent is not None:
        own = recent.own_k[0], recent.own_v[0]
        extra = (recent.k[:, 0], recent.v[:, 0], *own)  # type: ignore[call-overload]
    *listed, visited = (x[0] for x in visits)
    out, lse = _visit_pages(listed, layer, (q[0], k, v, *extra), precision)
    visited = visited[:, None, None]
    lse = jnp.where(visited, lse[..., : q.shape[3]], 0.5 * _FLOOR)
    out = jnp.where(visited[..., None], out, 0.0)
    return Partial(out[None], jnp.where(visited, 1.0, 0.0 * lse)[None], lse[None])


def list_visits(
    table: PageTable, recent: tuple[Int[Array, "W B"], Int[Array, "W B"]] | None = None
) -> Visits:
    """The pages in use, and behind those of each sequence its rows of `recent`, (begin, end), if there are. The pages in use of a
    sequence come first in its row of the table.
    """
    extra = int(recent is not None)
    sequences, most = table.page.shape[1:]

    def one(page, begin, end, *rows):
        pages = jnp.sum(end > begin, axis=1, dtype=jnp.int32)
        visits = pages + extra
        behind = jnp.cumsum(visits)
        n = jnp.arange(sequences * (most + extra), dtype=jnp.int32)
        sequence = jnp.sum(n[:, None] >= behind, axis=1, dtype=jnp.int32)
        sequence = jnp.minimum(sequence, sequences - 1)
        number = n - (behind - visits)[sequence]
        at = sequence, jnp.clip(number, 0, most - 1)
        begin, end = begin[at], end[at]
        is_recent = jnp.zeros_like(n)
        if rows:
            is_recent = jnp.where(number >= pages[sequence], 1, 0)
            begin, end = (
                jnp.where(is_recent, x[sequence], other)
                for x, other in zip(rows, (begin, end), strict=True)
            )
        return Visits(sequence, page[at], begin, end, is_recent, behind[-1:], visits > 0)

    return jax.vmap(one)(*table, *(recent or ()))


def _visit_pages(visits: list[jax.Array], layer, arrays, precision):
    """q `[B K M H]`, k and v `[L P K S H]`, and with `recent` its `[L B K S H]` twice and the own `[B K H]` twice -> normalised out
    `[B K M H]`, log of the total weight `[B K lanes]`, float32; those of a sequence without visits are not written.
    """
    q, k = arrays[:2]
    sequences, heads, queries, width = q.shape
    size, lanes = k.shape[-2], -(-queries // _LANES) * _LANES
    per_sequence = pl.BlockSpec(
        (1, heads, queries, width), lambda i, layer, sequence, *_: (sequence[i], 0, 0, 0)
    )
    per_page = pl.BlockSpec(
        (1, 1, heads, size, width), lambda i, layer, _, page, *__: (layer[0], page[i], 0, 0, 0)
    )
    per_recent = pl.BlockSpec(
        (1, 1, heads, size, width),
        lambda i, layer, sequence, *_: (layer[0], sequence[i], 0, 0, 0),
    )
    own = pl.BlockSpec((1, heads, width), lambda i, layer, sequence, *_: (sequence[i], 0, 0))
    statistic = pl.BlockSpec((1, heads, lanes), lambda i, layer, sequence, *_: (sequence[i], 0, 0))
    specs = [per_sequence, per_page, per_page, per_recent, per_recent, own, own]
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1 + len(visits),
        grid=(jnp.maximum(visits[-1][0], 1),),
        in_specs=specs[: len(arrays)],
        out_specs=[per_sequence, statistic],
        scratch_shapes=[
            pltpu.VMEM((heads, queries, width), jnp.float32),
            pltpu.VMEM((heads, queries, 1), jnp.float32),
            pltpu.VMEM((heads, queries, 1), jnp.float32),
        ],
    )
    # of one visit: how many there are, only the values say
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
        *arrays,
        tpu=functools.partial(compute, interpret=False),
        default=functools.partial(compute, interpret=True),
    )


def _page_kernel(precision, _, sequence, __, begin, end, recent, count, q_ref, *refs):
    *keys, out_ref, lse_ref, sum_ref, peak_ref, total_ref = refs
    i, last_one = pl.program_id(0), sequence.shape[0] - 1
    live = i < count[0]
    first = live & ((i == 0) | (sequence[jnp.maximum(i - 1, 0)] != sequence[i]))
    last = live & ((i == count[0] - 1) | (sequence[jnp.minimum(i + 1, last_one)] != sequence[i]))
    heads, queries, width = sum_ref.shape

    @pl.when(first)
    def _():
        if len(keys) == 2:
            sum_ref[...] = jnp.zeros_like(sum_ref)
            total_ref[...] = jnp.zeros_like(total_ref)
            peak_ref[...] = jnp.full_like(peak_ref, 0.5 * _FLOOR)
            return
        total_ref[...] = jnp.ones_like(total_ref)
        for head in range(heads):
            q = q_ref[0, head].astype(jnp.float32)
            k, v = (ref[0, pl.ds(head, 1)].astype(jnp.float32) for ref in keys[4:])
            peak_ref[head] = jnp.sum(q * k, axis=1, keepdims=True)
            sum_ref[head] = jnp.broadcast_to(v, (queries, width))

    def visit(k_ref, v_ref):
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

    pl.when(live & (recent[i] == 0))(functools.partial(visit, *keys[:2]))
    if len(keys) > 2:
        pl.when(live & (recent[i] == 1))(functools.partial(visit, *keys[2:4]))

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
