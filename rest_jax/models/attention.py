"""The layouts of prompts and groups, and attention under every layout, as pure functions of queries, keys and values.

A query's keys come in parts (the shared prompt, a response's own tokens, the token just made) that are joined in one
softmax, so no mask over a packed row ever exists. Inside, heads come before time and keys are never repeated for grouped
queries (N = K * R): every product is one batch of plain matrices, in the order in which memory holds them.

`softmax_over` is differentiated by hand (the recomputing backward pass of FlashAttention): it keeps queries, keys, values
and the log-sum-exp of every query, never the scores. Scores and softmax are float32. Causal parts run in blocks of queries
that see only the keys up to their end. A query that may see nothing (padding) yields zero, in value and gradient.

On TPU (`attend_flash`) prompts and groups take the one kernel of `flash_attention.py` instead.

Positions of a group are 0, 1, .. in the prompt and prompt_length + t for response token t, whatever the padding between.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from rest_jax.models import flash_attention
from rest_jax.models.cache import DecodeLayout, GroupLayout, LayerCache, PromptLayout
from rest_jax.types import response_mask

Layout = PromptLayout | GroupLayout | DecodeLayout

_FLOOR = -1e30  # score of what may not be seen: finite, so that nothing becomes NaN
_BLOCK = 256  # queries of a causal block


class Keys(NamedTuple):
    """One part of the keys of `softmax_over`: `[P K S H]`, shared by the group, or `[P K G S H]`, each row's own."""

    k: jax.Array
    v: jax.Array
    mask: Bool[Array, "..."]  # broadcasts to the scores [P K G R M S]; True: may be seen


class Partial(NamedTuple):
    """Unnormalised attention over one part of the keys: values weighted by exp(score - peak), total weight, peak."""

    out: Float[Array, "*B H"]  # float32, as all three
    total: Float[Array, "*B"]
    peak: Float[Array, "*B"]


def prompt_rows(
    prompt: Int[Array, "P Tp"], prompt_length: Int[Array, " P"]
) -> tuple[PromptLayout, Int[Array, "P Tp"]]:
    """Layout and positions of right-padded prompts as plain rows (the pass before decoding)."""
    time = jnp.arange(prompt.shape[1], dtype=jnp.int32)
    return PromptLayout(prompt_length), jnp.broadcast_to(time, prompt.shape)


def pack_group(
    prompt: Int[Array, "P Tp"],
    prompt_length: Int[Array, " P"],
    responses: Int[Array, "P G Tr"],
    response_length: Int[Array, "P G"],
) -> tuple[Int[Array, "P packed"], Int[Array, "P packed"], GroupLayout]:
    """Tokens and positions `[P, Tp + G*Tr]` (int32) of complete groups, and their layout."""
    prompts, group_size, width = responses.shape
    tokens = jnp.concatenate([prompt, responses.reshape(prompts, group_size * width)], axis=1)
    own = prompt_length[:, None] + jnp.tile(jnp.arange(width, dtype=jnp.int32), group_size)
    first = jnp.broadcast_to(jnp.arange(prompt.shape[1], dtype=jnp.int32), prompt.shape)
    positions = jnp.concatenate([first, own.astype(jnp.int32)], axis=1)
    layout = GroupLayout(prompt_length, response_length, prompt.shape[1], group_size, width)
    return tokens.astype(jnp.int32), positions, layout


def split_group(
    x: Shaped[Array, "P packed ..."], layout: GroupLayout
) -> tuple[Shaped[Array, "P Tp ..."], Shaped[Array, "P G Tr ..."]]:
    """Cuts anything packed along axis 1 (tokens, hidden states, q, k, v) into prompt and responses."""
    prompt, rest = x[:, : layout.prompt_width], x[:, layout.prompt_width :]
    shape = (x.shape[0], layout.group_size, layout.response_width, *x.shape[2:])
    return prompt, rest.reshape(shape)


def valid_positions(layout: Layout, shape: tuple[int, int]) -> Bool[Array, "B T"]:
    """Where `[B, T]` holds tokens, not padding. A group without response tokens is padding as well; a decode slot is none."""
    if isinstance(layout, DecodeLayout):
        return jnp.ones(shape, bool)
    if isinstance(layout, PromptLayout):
        return response_mask(layout.length, shape[1])
    empty = jnp.all(layout.response_length == 0, axis=1)
    prompt = response_mask(jnp.where(empty, 0, layout.prompt_length), layout.prompt_width)
    responses = response_mask(layout.response_length, layout.response_width)
    return jnp.concatenate([prompt, responses.reshape(shape[0], -1)], axis=1)


def predicting_hidden(
    hidden: Float[Array, "P packed D"], layout: GroupLayout
) -> Float[Array, "P G Tr D"]:
    """The hidden state that predicts each response token: one position earlier, for t = 0 the last prompt token's."""
    prompt, responses = split_group(hidden, layout)
    last = jnp.take_along_axis(prompt, (layout.prompt_length - 1)[:, None, None], axis=1)
    first = jnp.broadcast_to(last[:, None], (*responses.shape[:2], 1, hidden.shape[-1]))
    return jnp.concatenate([first, responses[:, :, :-1]], axis=2)


def attend(
    q: Float[Array, "B T N H"],
    kv: tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]] | None,
    layout: Layout,
    cache: LayerCache | None,
    precision: jax.lax.Precision,
) -> Float[Array, "B T N H"]:
    """Attention of queries over keys and values under `layout`, in q's dtype.

    DecodeLayout alone needs `cache`; `kv` None means that the cache holds the new tokens' keys and values already.
    """
    if isinstance(layout, DecodeLayout):
        if cache is None:
            raise ValueError("attend: DecodeLayout needs a cache")
        out = attend_cache(_by_kv_head(q, cache.response_k), kv, layout, cache, precision)
    elif kv is None:
        raise ValueError(f"attend: {type(layout).__name__} needs keys and values")
    elif isinstance(layout, PromptLayout):
        out = attend_prompts(_by_kv_head(q, kv[0]), *kv, layout, precision)
    else:
        out = attend_groups(_by_kv_head(q, kv[0]), *kv, layout, precision)
    return out.reshape(q.shape).astype(q.dtype)


def attend_flash(
    q: Float[Array, "B T N H"],
    kv: tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]] | None,
    layout: Layout,
    cache: LayerCache | None,
    precision: jax.lax.Precision,
) -> Float[Array, "B T N H"]:
    """The same by one kernel call; decoding, and rows that the mesh does not divide, as `attend` does it."""
    if isinstance(layout, DecodeLayout) or kv is None or not flash_attention.fits(q, kv[0]):
        return attend(q, kv, layout, cache, precision)
    until, pairs = seen_until(layout, q.shape[1])
    return flash_attention.flash_attention(q, *kv, until, pairs)


# by DecoderConfig.attention
ATTENTION = {"blocks": attend, "flash": attend_flash}


def seen_until(
    layout: PromptLayout | GroupLayout, width: int
) -> tuple[Int[Array, "B {width}"], int]:
    """Of each position, the one before which later tokens see it (`flash_attention`), int32; 0 for padding. And how many pairs
    of query and key see each other in a row without padding.
    """
    if isinstance(layout, PromptLayout):
        end, pairs = layout.length[:, None], width * (width + 1) // 2
    else:
        first, own = layout.prompt_width, layout.response_width
        start = first + own * jnp.arange(layout.group_size)
        ends = jnp.repeat(start + layout.response_length, own, axis=1)
        end = jnp.concatenate([jnp.full((ends.shape[0], first), width), ends], axis=1)
        pairs = first * (first + 1) // 2
        pairs += layout.group_size * (own * first + own * (own + 1) // 2)
    valid = valid_positions(layout, (end.shape[0], width))
    return jnp.where(valid, end, 0).astype(jnp.int32), pairs


def attend_prompts(
    q: Float[Array, "B T K R H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    layout: PromptLayout,
    precision: jax.lax.Precision,
) -> Float[Array, "B T K R H"]:
    """Causal attention of right-padded rows: what lies behind a query is never seen, so only outputs need a mask."""
    q = q.transpose(0, 2, 3, 1, 4)[:, :, None]  # [B T K R H] -> [B K 1 R T H]
    out = _attend_causally(q, _heads_first(k), _heads_first(v), precision)
    out = out[:, :, 0].transpose(0, 3, 1, 2, 4)  # [B K 1 R T H] -> [B T K R H]
    valid = jnp.arange(out.shape[1]) < layout.length[:, None]
    return jnp.where(valid[..., None, None, None], out, 0)


def attend_groups(
    q: Float[Array, "P packed K R H"],
    k: Float[Array, "P packed K H"],
    v: Float[Array, "P packed K H"],
    layout: GroupLayout,
    precision: jax.lax.Precision,
) -> Float[Array, "P packed K R H"]:
    """Prompt causally to itself; each response to all of its prompt and causally to itself.

    The queries of a group form one matrix against the shared prompt keys.
    """
    (q_prompt, q_own), (k_prompt, k_own), (v_prompt, v_own) = (
        split_group(x, layout) for x in (q, k, v)
    )
    prompts, group_size, width = q_own.shape[:3]
    prompt = PromptLayout(layout.prompt_length)
    prompt_out = attend_prompts(q_prompt, k_prompt, v_prompt, prompt, precision)

    valid = jnp.arange(layout.prompt_width) < layout.prompt_length[:, None]
    shared = Keys(
        _heads_first(k_prompt), _heads_first(v_prompt), valid[:, None, None, None, None, :]
    )
    k_own, v_own = (x.transpose(0, 3, 1, 2, 4) for x in (k_own, v_own))  # [P K G Tr H]
    out = _attend_causally(q_own.transpose(0, 3, 1, 4, 2, 5), k_own, v_own, precision, shared)
    out = out.transpose(0, 2, 4, 1, 3, 5)  # [P K G R Tr H] -> [P G Tr K R H]
    valid = jnp.arange(width) < layout.response_length[..., None]
    out = jnp.where(valid[..., None, None, None], out, 0)
    packed = out.reshape(prompts, group_size * width, *out.shape[3:])
    return jnp.concatenate([prompt_out, packed], axis=1)


def attend_cache(
    q: Float[Array, "W N K R H"],
    own: tuple[Float[Array, "W N K H"], Float[Array, "W N K H"]] | None,
    layout: DecodeLayout,
    cache: LayerCache,
    precision: jax.lax.Precision,
) -> Float[Array, "W N K R H"]:
    """New tokens against their prompt (< prompt_length), their row's earlier tokens (< index) and themselves.

    `own` holds their keys and values; None: the cache has them already, at `index`. Rows are brought together by prompt,
    so that the keys of a prompt are read once for all its rows.
    """
    shards, _, heads, repeats, width = q.shape
    prompts, members = layout.members.shape[1:]
    together = _take_rows(q, layout.members.reshape(shards, -1))
    together = together.reshape(shards, prompts, members, heads, repeats, width)
    together = together.transpose(0, 1, 3, 2, 4, 5).reshape(
        shards, prompts, heads, members * repeats, width
    )
    seen = jnp.arange(cache.prompt_k.shape[-2]) < layout.prompt_length[..., None]  # [W Q Tp]
    shared = _attend_part(
        together, cache.prompt_k, cache.prompt_v, seen[:, :, None, None], precision
    )
    parts = [Partial(*(_back_to_rows(x, layout, repeats) for x in shared))]

    written = jnp.arange(cache.response_k.shape[-2]) < (layout.index + (own is None))[..., None]
    parts.append(
        _attend_part(q, cache.response_k, cache.response_v, written[:, :, None, None], precision)
    )
    if own is not None:
        score = jnp.sum(q.astype(jnp.float32) * own[0].astype(jnp.float32)[:, :, :, None], axis=-1)
        value = jnp.broadcast_to(own[1].astype(jnp.float32)[:, :, :, None], q.shape)
        parts.append(Partial(value, jnp.ones_like(score), score))
    return _merge(*parts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def softmax_over(
    q: Float[Array, "P K G R M H"], parts: tuple[Keys, ...], precision: jax.lax.Precision
) -> Float[Array, "P K G R M H"]:
    """Attention of scaled queries over all parts in one softmax, in the dtype of the values."""
    return _softmax_forward(q, parts, precision)[0]


def _softmax_forward(q, parts, precision):
    scores = [_scores(q, part, precision) for part in parts]
    peak = functools.reduce(jnp.maximum, (jnp.max(s, axis=-1) for s in scores))
    # at least half the floor: exp of the floor then is zero also where nothing may be seen
    peak = jnp.maximum(peak, 0.5 * _FLOOR)
    weights = [jnp.exp(s - peak[..., None]) for s in scores]
    total = functools.reduce(jnp.add, (jnp.sum(w, axis=-1) for w in weights))
    out = functools.reduce(
        jnp.add, (_times(w, p.v, precision) for w, p in zip(weights, parts, strict=True))
    )
    total = jnp.where(total > 0, total, 1.0)
    out = (out / total[..., None]).astype(parts[0].v.dtype)
    return out, (q, parts, out, peak + jnp.log(total))


def _softmax_backward(precision, kept, d_out):
    q, parts, out, log_total = kept
    d_out = d_out.astype(jnp.float32)
    delta = jnp.sum(d_out * out.astype(jnp.float32), axis=-1, keepdims=True)
    d_out = d_out.astype(out.dtype)
    d_q, d_parts = 0.0, []
    for part in parts:
        p = jnp.exp(_scores(q, part, precision) - log_total[..., None])
        d_score = (p * (_times_transposed(d_out, part.v, precision) - delta)).astype(q.dtype)
        d_q = d_q + _times(d_score, part.k, precision)
        d_k = _outer(d_score, q, part.k, precision)
        d_v = _outer(p.astype(q.dtype), d_out, part.v, precision)
        d_parts.append(Keys(d_k, d_v, None))  # type: ignore[arg-type]
    return d_q.astype(q.dtype), tuple(d_parts)  # type: ignore[union-attr]


softmax_over.defvjp(_softmax_forward, _softmax_backward)


def _attend_causally(q, k, v, precision, shared: Keys | None = None):
    """Queries `[P K G R T H]` causally over keys of the same times, and over all of `shared`; block by block."""
    time = q.shape[4]
    out = []
    for start in range(0, time, _BLOCK):
        end = min(start + _BLOCK, time)
        seen = jnp.arange(start, end)[:, None] >= jnp.arange(end)  # [M S]
        keys = Keys(k[..., :end, :], v[..., :end, :], seen)
        parts = (keys,) if shared is None else (shared, keys)
        out.append(softmax_over(q[..., start:end, :], parts, precision))
    return out[0] if len(out) == 1 else jnp.concatenate(out, axis=4)


def _by_kv_head(q, keys):
    """Scaled queries by the head of the keys they go to: `[B T N H]` -> `[B T K R H]`; `keys` has K as axis 2."""
    batch, time, heads, width = q.shape
    kv_heads = keys.shape[2]
    return (q * width**-0.5).reshape(batch, time, kv_heads, heads // kv_heads, width)


def _heads_first(x):
    return x.transpose(0, 2, 1, 3)  # [P T K H] -> [P K T H]


# The four products of attention as batches of plain matrices: a part with a group axis has one matrix a row of the group,
# a shared part one for the group. Contracted axes are merged first: XLA's CPU backend copies what it must merge itself.


def _scores(q, part: Keys, precision):
    score = _times_transposed(q, part.k, precision)
    return jnp.where(part.mask, score, _FLOOR)


def _fold(x, like):
    """`x [P K G R M X]` as a batch of matrices that goes with `like`, `[P K S H]` or `[P K G S H]`."""
    lead = like.shape[:-2]
    return x.reshape(*lead, -1, x.shape[-1])


def _times_transposed(x, y, precision):
    out = _product("...mh,...sh->...ms", _fold(x, y), y, precision)
    return out.reshape(*x.shape[:-1], y.shape[-2])


def _times(x, y, precision):
    out = _product("...ms,...sh->...mh", _fold(x.astype(y.dtype), y), y, precision)
    return out.reshape(*x.shape[:-1], y.shape[-1])


def _outer(x, y, like, precision):
    """Sum over queries of x_ms y_mh, in the dtype of `like`."""
    out = _product("...ms,...mh->...sh", _fold(x, like), _fold(y, like), precision)
    return out.astype(like.dtype)


def _product(axes, x, y, precision):
    """einsum that sums in float32."""
    return jnp.einsum(axes, x, y, precision=precision, preferred_element_type=jnp.float32)


def _attend_part(
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


def _merge(*parts: Partial) -> Float[Array, "*B H"]:
    """One softmax over the keys of all parts, float32; zero where no part saw a key."""
    peak = functools.reduce(jnp.maximum, (p.peak for p in parts))
    scale = [jnp.exp(p.peak - peak) for p in parts]
    total = sum(s * p.total for s, p in zip(scale, parts, strict=True))
    out = sum(s[..., None] * p.out for s, p in zip(scale, parts, strict=True))
    return out / jnp.where(total > 0, total, 1.0)[..., None]


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
