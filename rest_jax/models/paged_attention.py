"""Attention of few queries over keys that lie in pages (`cache.Pool`).

    attend_prompts(q, pool, layer, visits)             by Pallas kernels, for TPUs
    attend_responses(q, pool, layer, visits, response)
    list_visits(table, recent)     -> Visits           what they read
    gather_pages(layers, table)    -> Layers           pages side by side, for `attend_part`

The kernels read the pages in use alone, one after another, from a list made on the device, with a running maximum and sum
(FlashAttention-2, arXiv:2307.08691). Scores and sums are float32. On other hardware than TPUs they are interpreted, for
tests; CPUs and GPUs gather the pages once in a call of `decode` and attend over plain arrays.

A `Partial` is joined with those of other keys in one softmax (`join`, `normalise`).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from rest_jax.models.cache import Layers, PageTable, Pool, Visits, is_stacked
from rest_jax.models.products import FLOOR, float32_einsum, matrix_product, run_kernel

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
    """What responses attend to besides their pages."""

    recent_k: Layers  # of stacked layers [L W N K S H]
    recent_v: Layers
    own_k: Float[Array, "W N K H"]  # of the new tokens
    own_v: Float[Array, "W N K H"]
    prompt: Float[Array, "W N K R H"]  # attention to the prompt, normalised, float32
    prompt_lse: Float[Array, "W N K R"]  # log of its total weight


def attend_prompts(
    q: Float[Array, "1 Q K M H"],
    pool: Pool,
    layer: Int[Array, ""],
    visits: Visits,
) -> tuple[Float[Array, "1 Q K M H"], Float[Array, "1 Q K M"]]:
    """Attention of M scaled queries a kv head to every prompt of a data shard, in that layer of stacked ones: normalised, and the
    log of the total weight, float32; zero and very small for a prompt without visits.
    """
    out, lse = _visit_pages(visits, layer, [q[0], *(x[:, 0] for x in pool)])  # type: ignore[call-overload]
    seen = visits.visited[:, None, None]
    lse = jnp.where(seen, lse[..., : q.shape[3]], FLOOR)
    return jnp.where(seen[..., None], out, 0.0)[None], lse[None]


def attend_responses(
    q: Float[Array, "1 N K R H"],
    pool: Pool,
    layer: Int[Array, ""],
    visits: Visits,
    response: Response,
) -> Float[Array, "1 N K R H"]:
    """Attention of the new tokens of a data shard to all that they see, in q's dtype. Anything for a slot without
    visits.
    """
    stacked = (*pool, response.recent_k, response.recent_v)
    arrays = [q[0], *(x[:, 0] for x in stacked), *(x[0] for x in response[2:])]  # type: ignore[call-overload]
    return _visit_pages(visits, layer, arrays)[0][None]


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

    return jax.tree.map(lambda x: x.reshape(-1), jax.vmap(one)(*table, *(recent or ())))


def _visit_pages(visits: Visits, layer, arrays: list[jax.Array]):
    """q `[B K M H]`, k and v `[L P K S H]` -> normalised out `[B K M H]`, log of the total weight `[B K padded M]`, float32. With
    what responses attend to besides, of one data shard: out alone, in q's dtype. Those of a sequence without visits are not
    written.
    """
    q, k = arrays[:2]
    *listed, _ = visits
    sequences, heads, queries, width = q.shape
    size, padded = k.shape[-2], -(-queries // _LANES) * _LANES
    of_responses = len(arrays) > 3

    def of_sequence(*shape: int) -> pl.BlockSpec:
        zeros = (0,) * len(shape)
        return pl.BlockSpec((1, *shape), lambda i, layer, sequence, *_: (sequence[i], *zeros))

    page = pl.BlockSpec(
        (1, 1, heads, size, width), lambda i, layer, _, page, *__: (layer[0], page[i], 0, 0, 0)
    )
    recent = pl.BlockSpec(
        (1, 1, heads, size, width),
        lambda i, layer, sequence, *_: (layer[0], sequence[i], 0, 0, 0),
    )
    each, own = of_sequence(heads, queries, width), of_sequence(heads, width)
    specs = [each, page, page, recent, recent, own, own, each, of_sequence(heads, queries)]
    out_shape = [jax.ShapeDtypeStruct(q.shape, q.dtype if of_responses else jnp.float32)]
    out_specs = [each]
    if not of_responses:
        out_shape.append(jax.ShapeDtypeStruct((sequences, heads, padded), jnp.float32))
        out_specs.append(of_sequence(heads, padded))
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1 + len(listed),
        grid=(jnp.maximum(visits.count[0], 1),),
        in_specs=specs[: len(arrays)],
        out_specs=out_specs,
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

    def kernel(interpret: bool):
        return pl.pallas_call(
            _response_kernel if of_responses else _prompt_kernel,
            grid_spec=grid,
            out_shape=out_shape,
            compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
            cost_estimate=cost,
            interpret=interpret,
            name="attend_responses" if of_responses else "attend_prompts",
        )

    return run_kernel(kernel, jnp.reshape(layer, (1,)), *listed, *arrays)


class _Visit(NamedTuple):
    """Where a kernel is."""

    live: jax.Array  # false where nothing is meant
    first: jax.Array  # of a sequence
    last: jax.Array
    begin: jax.Array
    end: jax.Array
    recent: jax.Array


def _visit(visits) -> _Visit:
    sequence, _, begin, end, recent, count = visits
    i, final = pl.program_id(0), sequence.shape[0] - 1
    live = i < count[0]
    before, after = sequence[jnp.maximum(i - 1, 0)], sequence[jnp.minimum(i + 1, final)]
    return _Visit(
        live,
        live & ((i == 0) | (before != sequence[i])),
        live & ((i == count[0] - 1) | (after != sequence[i])),
        begin[i],
        end[i],
        recent[i] == 1,
    )


def _prompt_kernel(_, *refs):
    *visits, q_ref, k_ref, v_ref, out_ref, lse_ref, sum_ref, peak_ref, total_ref = refs
    at, sums = _visit(visits), (sum_ref, peak_ref, total_ref)
    heads, queries, _ = sum_ref.shape

    @pl.when(at.first)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)
        total_ref[...] = jnp.zeros_like(total_ref)
        peak_ref[...] = jnp.full_like(peak_ref, 0.5 * FLOOR)

    @pl.when(at.live)
    def _():
        _add_page(at, q_ref, k_ref, v_ref, sums)

    @pl.when(at.last)
    def _():
        diagonal = _diagonal(queries, lse_ref.shape[-1])
        for head in range(heads):
            total = total_ref[head]
            out_ref[0, head] = sum_ref[head] / total
            lse = jnp.where(diagonal, peak_ref[head] + jnp.log(total), 0.0)
            lse_ref[0, pl.ds(head, 1)] = jnp.sum(lse, axis=0, keepdims=True)  # a column as a row


def _response_kernel(_, *refs):
    *visits, q_ref, k_ref, v_ref, recent_k_ref, recent_v_ref, own_k_ref, own_v_ref = refs[:13]
    prompt_ref, prompt_lse_ref, out_ref, sum_ref, peak_ref, total_ref = refs[13:]
    at, sums = _visit(visits), (sum_ref, peak_ref, total_ref)
    heads, queries, _ = sum_ref.shape

    @pl.when(at.first)
    def _():
        diagonal = _diagonal(queries, queries)
        for head in range(heads):
            lse = jnp.where(diagonal, prompt_lse_ref[0, pl.ds(head, 1)], 0.0)
            peak_ref[head] = jnp.sum(lse, axis=1, keepdims=True)  # a row as a column
            total_ref[head] = jnp.ones_like(total_ref[head])
            sum_ref[head] = prompt_ref[0, head]
            k, v = (ref[0, pl.ds(head, 1)].astype(jnp.float32) for ref in (own_k_ref, own_v_ref))
            score = jnp.sum(q_ref[0, head].astype(jnp.float32) * k, axis=1, keepdims=True)
            _add(head, score, lambda weight, v=v: weight * v, sums)

    @pl.when(at.live & ~at.recent)
    def _():
        _add_page(at, q_ref, k_ref, v_ref, sums)

    @pl.when(at.live & at.recent)
    def _():
        _add_page(at, q_ref, recent_k_ref, recent_v_ref, sums)

    @pl.when(at.last)
    def _():
        for head in range(heads):
            out_ref[0, head] = (sum_ref[head] / total_ref[head]).astype(out_ref.dtype)


def _add_page(at: _Visit, q_ref, k_ref, v_ref, sums) -> None:
    """Adds the keys of a page [1 1 K S H] to the sums of every head."""
    row = jax.lax.broadcasted_iota(jnp.int32, (1, k_ref.shape[-2]), 1)
    seen = (row >= at.begin) & (row < at.end)
    for head in range(q_ref.shape[1]):
        score = matrix_product(q_ref[0, head], k_ref[0, 0, head], (1, 1))
        v = v_ref[0, 0, head]

        def values(weight, v=v):
            return matrix_product(weight.astype(v.dtype), v, (1, 0))

        _add(head, jnp.where(seen, score, FLOOR), values, sums)


def _add(head: int, score, values: Callable[[jax.Array], jax.Array], sums) -> None:
    """Adds keys with scores [M, keys] to the sums of a head; `values` of their weights: the sum of their values [M, H]."""
    sum_ref, peak_ref, total_ref = sums
    before = peak_ref[head]
    peak = jnp.maximum(before, jnp.max(score, axis=1, keepdims=True))
    weight, scale = jnp.exp(score - peak), jnp.exp(before - peak)
    sum_ref[head] = scale * sum_ref[head] + values(weight)
    total_ref[head] = scale * total_ref[head] + jnp.sum(weight, axis=1, keepdims=True)
    peak_ref[head] = peak


def _diagonal(rows: int, columns: int):
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (rows, columns), axis) for axis in (0, 1))
    return row == column
