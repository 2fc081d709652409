"""Attention of few queries over keys that lie in pages (`cache.Pool`).

    attend_prompts(q, pool, layer, layout)             by Pallas kernels, for TPUs
    attend_responses(q, pool, layer, visits, response)
    list_visits(table, recent)     -> Visits           what they read
    gather_pages(layers, table)    -> Layers           pages side by side, for `attend_part`

The kernels read the pages in use alone, one after another, from a list made on the device, with a running maximum and sum
(FlashAttention-2, arXiv:2307.08691). Scores and sums are float32. On other hardware than TPUs they are interpreted, for
tests; CPUs and GPUs gather the pages once in a call of `decode` and attend over plain arrays.

A `Partial` is joined with those of other keys in one softmax (`join`, `normalise`).
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from rest_jax.models.cache import (
    DecodeLayout,
    Layers,
    PagedKeys,
    PageTable,
    Pool,
    Visits,
    is_stacked,
)
from rest_jax.models.products import FLOOR, float32_einsum, matrix_product, run_kernel

_LANES = 128
_USUAL_MEMORY = 2**24  # bytes that a kernel has on the chip, if it does not ask for more


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
) -> Partial:
    """Attention of scaled queries over one part of the keys."""
    score = jnp.where(mask, float32_einsum("...mh,...sh->...ms", q, k), FLOOR)
    peak = jnp.maximum(jnp.max(score, axis=-1), 0.5 * FLOOR)
    weight = jnp.exp(score - peak[..., None])
    out = float32_einsum("...ms,...sh->...mh", weight.astype(v.dtype), v)
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


class Response(NamedTuple):
    """What responses attend to besides their pages. A: attention heads, those of a kv head one after another."""

    recent_k: Layers  # of stacked layers [L W N K S H]
    recent_v: Layers
    own_k: Float[Array, "W N K H"]  # of the new tokens
    own_v: Float[Array, "W N K H"]
    prompt: Float[Array, "W N A H"]  # attention to the prompt, normalised, float32
    prompt_lse: Float[Array, "W N A _"]  # log of its total weight, the same in all lanes


def attend_prompts(
    q: Float[Array, "1 N A H"], pool: Pool, layer: Int[Array, ""], layout: DecodeLayout
) -> tuple[Float[Array, "1 N A H"], Float[Array, "1 N A _"]]:
    """Attention of the scaled queries of a data shard's new tokens to their prompts, in that layer of stacked ones: normalised,
    and the log of the total weight, in all lanes; float32. Zero and very small in a slot whose prompt has no visits.

    The kernel brings the queries of a prompt together and its results back, since XLA would copy and pad them for that.
    """
    assert isinstance(layout.keys, PagedKeys)
    (count, heads, width), group = q.shape[1:], layout.members.shape[2]
    kv_heads, rows = pool.k.shape[-3], group * heads // pool.k.shape[-3]  # type: ignore[union-attr]
    scratch = [((kv_heads, rows, w), jnp.float32) for w in (width, width, 1, 1)]
    results = [((count, heads, w), jnp.float32) for w in (width, _LANES)]
    whole = [(q.shape[1:], q.dtype), *results]
    held = sum(_tiled_bytes(*x) for x in scratch) + 2 * sum(_tiled_bytes(*x) for x in whole)
    found = _visit_pages(
        "attend_prompts",
        functools.partial(_prompt_kernel, group),
        layout.keys.prompts,
        layer,
        [x.reshape(-1) for x in (layout.members, layout.entry, layout.member)],
        [(q[0], _all_of(q.shape[1:])), *_pages(pool)],
        ([jax.ShapeDtypeStruct(*x) for x in results], [_all_of(shape) for shape, _ in results]),
        [pltpu.VMEM(*x) for x in scratch],
        _cost(pool, rows),
        # half of the usual for the pages and what a visit computes
        max(_USUAL_MEMORY, _USUAL_MEMORY // 2 + held),
    )
    return found[0][None], found[1][None]


def attend_responses(
    q: Float[Array, "1 N A H"],
    pool: Pool,
    layer: Int[Array, ""],
    visits: Visits,
    response: Response,
) -> Float[Array, "1 N A H"]:
    """Attention of the new tokens of a data shard to all that they see, in q's dtype. Anything for a slot without
    visits.
    """
    heads, width = q.shape[2:]
    kv_heads, size = pool.k.shape[-3:-1]  # type: ignore[union-attr]
    recent = Pool(response.recent_k, response.recent_v)
    own_rows = _own_rows(heads // kv_heads, kv_heads, size)
    each = _of_sequence(heads, width)
    arrays = [
        (jnp.asarray(own_rows), _all_of(own_rows.shape)),
        (q[0], each),
        *_pages(pool),
        *_pages(recent, of_sequence=True),
        *((x[0], _of_sequence(kv_heads, width)) for x in (response.own_k, response.own_v)),
        (response.prompt[0], each),
        (response.prompt_lse[0], _of_sequence(heads, _LANES)),
    ]
    sums = [pltpu.VMEM((heads, w), jnp.float32) for w in (width, 1, 1)]
    out = jax.ShapeDtypeStruct(q.shape[1:], q.dtype), each
    found = _visit_pages(
        "attend_responses",
        _response_kernel,
        visits,
        layer,
        [],
        arrays,
        out,
        sums,
        _cost(pool, heads // kv_heads),
    )
    return found[None]


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
        return Visits(sequence, page[at], begin, end, is_recent, behind[-1:])

    return jax.tree.map(lambda x: x.reshape(-1), jax.vmap(one)(*table, *(recent or ())))


def _all_of(shape: tuple[int, ...]) -> pl.BlockSpec:
    """An array that the kernel has whole."""
    return pl.BlockSpec(shape, lambda *_: (0,) * len(shape))


def _of_sequence(*shape: int) -> pl.BlockSpec:
    """What an array `[B ...]` has of the sequence that is visited."""
    return pl.BlockSpec((1, *shape), lambda i, layer, sequence, *_: (sequence[i], 0, 0))


def _pages(layers: Pool, of_sequence: bool = False) -> list[tuple[jax.Array, pl.BlockSpec]]:
    """Keys and values `[L 1 P K S H]`, and the page of them that is visited, or that of the sequence."""

    def index(i, layer, sequence, page, *_):
        return layer[0], (sequence if of_sequence else page)[i], 0, 0, 0

    return [(x[:, 0], pl.BlockSpec((1, 1, *x.shape[3:]), index)) for x in layers]  # type: ignore[call-overload, union-attr]


def _tiled_bytes(shape: tuple[int, ...], dtype: Any) -> int:
    """What an array takes on the chip, in tiles of 32 bytes x 128 lanes."""
    *outer, rows, lanes = shape
    item = jnp.dtype(dtype).itemsize
    tiles = -(-rows // (32 // item)) * -(-lanes // _LANES)
    return math.prod(outer) * tiles * 32 * _LANES


def _cost(pool: Pool, queries: int) -> pl.CostEstimate:
    """Of one visit, with so many queries of every kv head that see the page: how many visits there are, only the values say."""
    heads, size, width = pool.k.shape[-3:]  # type: ignore[union-attr]
    return pl.CostEstimate(
        flops=4 * heads * queries * size * width,
        transcendentals=heads * queries * size,
        bytes_accessed=2 * heads * size * width * pool.k.dtype.itemsize,  # type: ignore[union-attr]
    )


def _own_rows(repeats: int, kv_heads: int, size: int) -> np.ndarray:
    """int32 [A, K*S]: which row of a page a key is, in the columns of the head's own keys; S in those of other heads."""
    head, key = np.indices((kv_heads * repeats, kv_heads * size))
    return np.where(head // repeats == key // size, key % size, size).astype(np.int32)


def _visit_pages(
    name: str,
    body: Callable[..., None],
    visits: Visits,
    layer: Int[Array, ""],
    scalars: Sequence[jax.Array],
    arrays: Sequence[tuple[jax.Array, pl.BlockSpec]],
    out: tuple[Any, Any],
    scratch: Sequence[Any],
    cost: pl.CostEstimate,
    memory: int | None = None,
):
    """What `body` makes of one visit after another. It gets layer, visits and `scalars` as numbers, then blocks of the arrays, of
    what comes `out`, and `scratch`. `memory`: bytes on the chip.
    """
    numbers = [jnp.reshape(layer, (1,)), *visits, *scalars]
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(numbers),
        grid=(jnp.maximum(visits.count[0], 1),),
        in_specs=[spec for _, spec in arrays],
        out_specs=out[1],
        scratch_shapes=scratch,
    )

    def kernel(interpret: bool):
        return pl.pallas_call(
            body,
            grid_spec=grid,
            out_shape=out[0],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("arbitrary",), vmem_limit_bytes=memory
            ),
            cost_estimate=cost,
            interpret=interpret,
            name=name,
        )

    return run_kernel(kernel, *numbers, *(array for array, _ in arrays))


class _Visit(NamedTuple):
    """Where a kernel is."""

    sequence: jax.Array
    live: jax.Array  # false where nothing is meant
    first: jax.Array  # of a sequence
    last: jax.Array
    begin: jax.Array
    end: jax.Array
    recent: jax.Array


def _visit(sequence, _, begin, end, recent, count) -> _Visit:
    i, final = pl.program_id(0), sequence.shape[0] - 1
    live = i < count[0]
    before, after = sequence[jnp.maximum(i - 1, 0)], sequence[jnp.minimum(i + 1, final)]
    return _Visit(
        sequence[i],
        live,
        live & ((i == 0) | (before != sequence[i])),
        live & ((i == count[0] - 1) | (after != sequence[i])),
        begin[i],
        end[i],
        recent[i] == 1,
    )


class _Sums(NamedTuple):
    """The keys so far of a matrix of queries, as refs."""

    out: Any  # [M, H]: values weighted by exp(score - peak)
    total: Any  # [M, 1]
    peak: Any  # [M, 1]

    def of(self, head: int) -> "_Sums":
        """Those of a kv head, of stacked ones."""
        return _Sums(*(ref.at[head] for ref in self))

    def add(self, q, k, v, seen) -> None:
        """Keys and values [S, H], of which every query sees those where `seen` [M or 1, S]."""
        score = jnp.where(seen, matrix_product(q, k, (1, 1)), FLOOR)
        before = self.peak[...]
        peak = jnp.maximum(before, jnp.max(score, axis=1, keepdims=True))
        weight, scale = jnp.exp(score - peak), jnp.exp(before - peak)
        self.out[...] = scale * self.out[...] + matrix_product(weight.astype(v.dtype), v, (1, 0))
        self.total[...] = scale * self.total[...] + jnp.sum(weight, axis=1, keepdims=True)
        self.peak[...] = peak


def _prompt_kernel(group: int, _, *refs) -> None:
    """One matrix of queries for every kv head: those of the prompt's responses, one after another."""
    at, (members, entry, member) = _visit(*refs[:6]), refs[6:9]
    q_ref, k_ref, v_ref, out_ref, lse_ref, queries_ref, *sums = refs[9:]
    found, kv_heads = _Sums._make(sums), k_ref.shape[2]
    repeats = q_ref.shape[1] // kv_heads

    def rows(i: int):
        return pl.ds(i * repeats, repeats)

    @pl.when(pl.program_id(0) == 0)
    def _():
        out_ref[...] = jnp.zeros_like(out_ref)
        lse_ref[...] = jnp.full_like(lse_ref, FLOOR)

    @pl.when(at.first)
    def _():
        for m in range(group):
            slot = members[at.sequence * group + m]
            for head in range(kv_heads):
                queries_ref[head, rows(m)] = q_ref[slot, rows(head)].astype(jnp.float32)
        found.out[...] = jnp.zeros_like(found.out)
        found.total[...] = jnp.zeros_like(found.total)
        found.peak[...] = jnp.full_like(found.peak, 0.5 * FLOOR)

    @pl.when(at.live)
    def _():
        row = jax.lax.broadcasted_iota(jnp.int32, (1, k_ref.shape[3]), 1)
        seen = (row >= at.begin) & (row < at.end)
        for head in range(kv_heads):
            q = queries_ref[head].astype(q_ref.dtype)
            found.of(head).add(q, k_ref[0, 0, head], v_ref[0, 0, head], seen)

    @pl.when(at.last)
    def _():
        total = found.total[...]
        found.out[...] = found.out[...] / total
        found.peak[...] = found.peak[...] + jnp.log(total)
        for m in range(group):
            slot = members[at.sequence * group + m]

            # an unused element of `members` may name any slot
            @pl.when((entry[slot] == at.sequence) & (member[slot] == m))
            def _(m=m, slot=slot):
                for head in range(kv_heads):
                    out_ref[slot, rows(head)] = found.out[head, rows(m)]
                    lse = found.peak[head, rows(m)]
                    lse_ref[slot, rows(head)] = jnp.broadcast_to(lse, (repeats, _LANES))


def _response_kernel(_, *refs) -> None:
    """One matrix of queries, those of all heads: the keys of other heads are computed and not seen, which is less than a product
    of few rows for every head.
    """
    at = _visit(*refs[:6])
    own_rows_ref, q_ref, k_ref, v_ref, recent_k_ref, recent_v_ref, own_k_ref, own_v_ref = refs[6:14]
    prompt_ref, prompt_lse_ref, out_ref, *sums = refs[14:]
    found, q = _Sums._make(sums), q_ref[0]

    def of_all_heads(ref):
        return ref[0, 0].reshape(-1, ref.shape[-1])

    @pl.when(at.first)
    def _():
        found.out[...] = prompt_ref[0]
        found.peak[...] = prompt_lse_ref[0][:, :1]
        found.total[...] = jnp.ones_like(found.total)
        shape = q.shape[0], own_k_ref.shape[1]
        head, kv_head = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
        first = kv_head * (shape[0] // shape[1])
        seen = (head >= first) & (head < first + shape[0] // shape[1])
        # in float32: Mosaic does not compile a product of bfloat16 with the only row of a lone kv head
        k, v = (ref[0].astype(jnp.float32) for ref in (own_k_ref, own_v_ref))
        found.add(q.astype(jnp.float32), k, v, seen)

    def add(k_ref, v_ref) -> None:
        row = own_rows_ref[...]
        seen = (row >= at.begin) & (row < at.end)
        found.add(q, of_all_heads(k_ref), of_all_heads(v_ref), seen)

    pl.when(at.live & ~at.recent)(lambda: add(k_ref, v_ref))
    pl.when(at.live & at.recent)(lambda: add(recent_k_ref, recent_v_ref))

    @pl.when(at.last)
    def _():
        out_ref[0] = (found.out[...] / found.total[...]).astype(out_ref.dtype)
