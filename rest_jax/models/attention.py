"""Attention under every layout, as pure functions of queries, keys and values.

Rows (`RowLayout`) go through one of three kernels that never hold a row's scores: `block_attention` in plain operations of XLA,
`flash_attention` on TPUs, `triton_attention` on GPUs. Decoding (`DecodeLayout`) reads a `Cache`: a query's keys come in parts
(the shared prompt, what the response has drawn, the token just made) that are joined in one softmax. Rows behind a prefix
(`PrefixedRows`) hold their scores: they are short.

Keys are never repeated for grouped queries (N = K * R): every product is one batch of plain matrices, in the order in which
memory holds them. Scores and softmax are float32. A query that may see nothing (padding) yields zero, in value and gradient.

Positions are given by the caller (`prompt_rows`, `rl.packing.Rows`, `rollout.engine`).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from rest_jax.distributed import BATCH_AXES, num_data_shards
from rest_jax.models.block_attention import WIDE, block_attention
from rest_jax.models.cache import (
    DecodeLayout,
    GatheredKeys,
    LayerCache,
    Layout,
    PagedKeys,
    Pool,
    PrefixedRows,
    RowLayout,
)
from rest_jax.models.config import DecoderConfig
from rest_jax.models.flash_attention import flash_attention
from rest_jax.models.paged_attention import (
    Partial,
    Response,
    attend_part,
    attend_prompts,
    attend_responses,
    join,
    normalise,
)
from rest_jax.models.triton_attention import triton_attention

# by DecoderConfig.attention: (scaled q [B K R T H], k and v [B K T H], layout) -> [B K R T H]
KERNELS = {
    "blocks": block_attention,
    "wide_blocks": functools.partial(block_attention, blocks=WIDE),
    "flash": flash_attention,
    "triton": triton_attention,
}


def prompt_rows(
    prompt: Int[Array, "P Tp"], prompt_length: Int[Array, " P"]
) -> tuple[RowLayout, Int[Array, "P Tp"]]:
    """Layout and positions of right-padded prompts as plain rows (the pass before decoding)."""
    width = prompt.shape[1]
    time = jnp.arange(width, dtype=jnp.int32)
    length = prompt_length[:, None].astype(jnp.int32)
    layout = RowLayout(jnp.where(time < length, length, 0), width * (width + 1) // 2)
    return layout, jnp.broadcast_to(time, prompt.shape)


def valid_positions(layout: Layout, shape: tuple[int, int]) -> Bool[Array, "B T"]:
    """Where `[B, T]` holds tokens, not padding; a decode slot is none."""
    return jnp.ones(shape, bool) if isinstance(layout, DecodeLayout) else layout.valid


def attend(
    q: Float[Array, "B T N H"],
    kv: tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]] | None,
    layout: Layout,
    cache: LayerCache | Pool | None,
    cfg: DecoderConfig,
) -> Float[Array, "B T N H"]:
    """Attention of queries over keys and values under `layout`, in q's dtype.

    DecodeLayout needs a `LayerCache`, where `kv` None means that `recent` holds the new tokens' keys and values already;
    PrefixedRows needs the pages of the layer.
    """
    if isinstance(layout, RowLayout):
        if kv is None:
            raise ValueError("attend: RowLayout needs keys and values")
        return attend_rows(q, *kv, layout, KERNELS[cfg.attention])
    if isinstance(layout, PrefixedRows):
        if kv is None or not isinstance(cache, Pool):
            raise ValueError("attend: PrefixedRows needs keys and values, and pages")
        return attend_prefixed(q, kv, layout, cache)
    if not isinstance(cache, LayerCache):
        raise ValueError("attend: DecodeLayout needs a cache")
    return attend_cache(q, kv, layout, cache)


def attend_rows(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    layout: RowLayout,
    kernel: Callable[..., Float[Array, "B K R T H"]],
) -> Float[Array, "B T N H"]:
    """Attention of rows by `kernel`, in q's dtype, differentiable in q, k, v.

    Under `distributed.activate` every device computes its rows and its heads, if the mesh divides them; fewer kv heads than
    tensor devices are on all of those, and each takes the one that its queries go to.
    """
    mesh = jax.sharding.get_abstract_mesh()
    layout = RowLayout(layout.until, layout.pairs)
    if mesh.empty or mesh.size == 1 or not _divides(mesh, q, k):
        return _attend_heads_first(q, k, v, layout, kernel)
    tensor, repeats = mesh.shape["tensor"], q.shape[2] // k.shape[2]
    rows, heads = PartitionSpec(BATCH_AXES), PartitionSpec(BATCH_AXES, None, "tensor")
    replicated = k.shape[2] % tensor != 0

    def on_device(q, k, v, layout):
        if replicated:
            head = jax.lax.axis_index("tensor") * q.shape[2] // repeats
            k, v = (jax.lax.dynamic_slice_in_dim(x, head, 1, axis=2) for x in (k, v))
        return _attend_heads_first(q, k, v, layout, kernel)

    kv_heads = rows if replicated else heads
    # kernels do not say over which axes their results vary
    split = jax.shard_map(
        on_device, in_specs=(heads, kv_heads, kv_heads, rows), out_specs=heads, check_vma=False
    )
    return split(q, k, v, layout)


def _divides(mesh, q, k) -> bool:
    """Whether a mesh splits rows and heads evenly."""
    tensor, (rows, _, heads, _), kv_heads = mesh.shape["tensor"], q.shape, k.shape[2]
    even = heads % tensor == 0 and (kv_heads % tensor == 0 or tensor % kv_heads == 0)
    return even and rows % num_data_shards(mesh) == 0


def _attend_heads_first(q, k, v, layout: RowLayout, kernel):
    by_head = _by_kv_head(q, k.shape[2]).transpose(0, 2, 3, 1, 4)  # [B T K R H] -> [B K R T H]
    out = kernel(by_head, *(x.transpose(0, 2, 1, 3) for x in (k, v)), layout)
    return out.transpose(0, 3, 1, 2, 4).reshape(q.shape)


def attend_prefixed(
    q: Float[Array, "W T N H"],
    kv: tuple[Float[Array, "W T K H"], Float[Array, "W T K H"]],
    layout: PrefixedRows,
    pages: Pool,
) -> Float[Array, "W T N H"]:
    """Attention of the parts of rows to the pages that they continue and to themselves, in q's dtype. `pages`: of one layer."""
    shards, parts = layout.prefix.shape[:2]
    heads, size = kv[0].shape[2], q.shape[1] // parts

    def by_part(x):  # [W T ...] -> [W E T/E ...]
        return x.reshape(shards, parts, size, *x.shape[2:])

    by_head = by_part(_by_kv_head(q, heads)).transpose(0, 1, 3, 4, 2, 5)  # [W E K R T/E H]
    together = by_head.reshape(*by_head.shape[:3], -1, q.shape[-1])
    time = jnp.arange(size)
    until = by_part(layout.until) - size * jnp.arange(parts)[:, None]
    own = (time <= time[:, None]) & (time[:, None] < until[:, :, None])
    own = jnp.tile(own, (1, 1, by_head.shape[3], 1))[:, :, None]
    k, v = (by_part(x).transpose(0, 1, 3, 2, 4) for x in kv)
    before = layout.prefix[:, :, None, None]
    joined = join(
        attend_part(together, pages.k, pages.v, before),  # type: ignore[arg-type]
        attend_part(together, k, v, own),
    )
    out = normalise(joined).reshape(by_head.shape).transpose(0, 1, 4, 2, 3, 5)
    return out.reshape(q.shape).astype(q.dtype)


def attend_cache(
    q: Float[Array, "W N A H"],
    own: tuple[Float[Array, "W N K H"], Float[Array, "W N K H"]] | None,
    layout: DecodeLayout,
    cache: LayerCache,
) -> Float[Array, "W N A H"]:
    """The new tokens of N decode slots, with A heads, against their prompt, their response's earlier tokens and themselves, in
    q's dtype.

    `own` holds their keys and values; None: `recent` has them already. Queries are brought together by prompt, so that the keys
    of a prompt are read once for all its responses.
    """
    if isinstance(layout.keys, PagedKeys):
        if own is None or cache.layer is None:
            raise ValueError("attend: the kernels take stacked layers, and new tokens apart")
        return _on_devices(_attend_pages, q, own, layout, cache)
    by_head = _by_kv_head(q, cache.recent_k.shape[2])
    together, (k, v) = _by_prompt(by_head, layout), cache.pool
    shared: Any = attend_part(together, k, v, layout.keys.prompts[:, :, None, None])  # type: ignore[arg-type]
    shared = Partial(*(_back_to_rows(x, layout, by_head.shape[3]) for x in shared))
    out = normalise(join(shared, _attend_recent(by_head, own, layout, cache)))
    return out.reshape(q.shape).astype(q.dtype)


def _on_devices(function: Callable[..., jax.Array], q, own, layout: DecodeLayout, cache):
    """Every device computes its data shard, and its heads if the mesh divides them. Left to GSPMD, the transpositions around a
    kernel become exchanges between the devices of a tensor group.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function(q, own, layout, cache)
    heads = "tensor" if own[0].shape[2] % mesh.shape["tensor"] == 0 else None
    everywhere, rows = PartitionSpec(), PartitionSpec(BATCH_AXES)
    by_head = PartitionSpec(BATCH_AXES, None, heads)
    pages = PartitionSpec(None, BATCH_AXES, None, heads)
    where: Any = (
        by_head,
        by_head,
        DecodeLayout(rows, everywhere, rows, rows, rows),  # type: ignore[arg-type]
        LayerCache(pages, everywhere, pages, pages),  # type: ignore[arg-type]
    )
    # kernels do not say over which axes their results vary
    split = jax.shard_map(function, in_specs=where, out_specs=by_head, check_vma=False)
    return split(q, own, layout, cache)


def _attend_pages(q, own, layout: DecodeLayout, cache: LayerCache):
    """`attend_cache` by kernels, of one data shard."""
    assert isinstance(layout.keys, PagedKeys) and cache.layer is not None
    q, pages = q * q.shape[-1] ** -0.5, (cache.pool, cache.layer)
    with jax.named_scope("prompt_pages"):
        prompt = attend_prompts(q, *pages, layout)
    response = Response(cache.recent_k, cache.recent_v, own[0], own[1], prompt[0], prompt[1])
    with jax.named_scope("response_pages"):
        return attend_responses(q, *pages, layout.keys.responses, response)


def _attend_recent(q, own, layout: DecodeLayout, cache: LayerCache) -> Partial:
    """Attention to what responses have drawn, the new tokens among them."""
    assert isinstance(layout.keys, GatheredKeys)
    seen = layout.keys.recent
    if own is None:
        seen = seen | (jnp.arange(seen.shape[-1]) == layout.time)
    recent = cache.recent_k, cache.recent_v
    drawn = attend_part(q, *recent, seen[:, :, None, None])
    if own is None:
        return drawn
    score = jnp.sum(q.astype(jnp.float32) * own[0].astype(jnp.float32)[:, :, :, None], axis=-1)
    value = jnp.broadcast_to(own[1].astype(jnp.float32)[:, :, :, None], q.shape)
    return join(drawn, Partial(value, jnp.ones_like(score), score))


def _by_prompt(q: Float[Array, "W N K R H"], layout: DecodeLayout) -> Float[Array, "W Q K GR H"]:
    """The queries of every prompt's responses together."""
    shards, _, heads, repeats, width = q.shape
    prompts, members = layout.members.shape[1:]
    together = _take_rows(q, layout.members.reshape(shards, -1))
    together = together.reshape(shards, prompts, members, heads, repeats, width)
    together = together.transpose(0, 1, 3, 2, 4, 5)
    return together.reshape(shards, prompts, heads, members * repeats, width)


def _by_kv_head(q, kv_heads: int):
    """Scaled queries by the head of the keys they go to: `[B T N H]` -> `[B T K R H]`."""
    batch, time, heads, width = q.shape
    return (q * width**-0.5).reshape(batch, time, kv_heads, heads // kv_heads, width)


def _take_rows(x, index):
    """x `[W N ...]`, index `[W M]` -> `[W M ...]`; shard by shard, so that nothing crosses devices."""
    return jax.vmap(lambda rows, i: jnp.take(rows, i, axis=0, mode="clip"))(x, index)


def _back_to_rows(x, layout: DecodeLayout, repeats: int):
    """`[W Q K members*R ...]` -> `[W N K R ...]`: what each decode slot got at its prompt."""
    shards, prompts, heads = x.shape[:3]
    members, tail = layout.members.shape[2], x.shape[4:]
    x = x.reshape(shards, prompts, heads, members, repeats, *tail)
    x = jnp.moveaxis(x, 3, 2).reshape(shards, prompts * members, heads, repeats, *tail)
    return _take_rows(x, layout.entry * members + layout.member)
