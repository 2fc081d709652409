"""Attention of every layout, as pure functions of queries, keys and values.

Each layout splits its keys into parts (the shared prompt, a response's own tokens, the token just made). A part gives a
`Partial`: values weighted by exp(score - peak), their total weight, and the peak; `_merge` joins parts into one softmax
over all their keys: out = sum_i e^(m_i - m) o_i / sum_i e^(m_i - m) s_i, m = max m_i. So no mask over a packed row ever
exists. Scores and softmax are float32. Grouped queries: N = K * R query heads, keys and values are never repeated.
A query that may see nothing (padding) yields zero, in value and gradient.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rest_jax.models.layouts import DecodeLayout, GroupLayout, RowLayout, split_group

Layout = RowLayout | GroupLayout | DecodeLayout
LayerCache = tuple[
    jax.Array, jax.Array, jax.Array, jax.Array
]  # one layer of Cache: prompt k, v; response k, v

_FLOOR = -1e30  # finite, so that a part without visible keys keeps value and gradient free of NaN


class Partial(NamedTuple):
    """Unnormalised attention over one part of the keys; axes `[..., K, R]` (`out`: and H), queries in order."""

    out: jax.Array  # float32
    total: jax.Array  # float32
    peak: jax.Array  # float32, carries no gradient: the merged result does not depend on it


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    layout: Layout,
    cache: LayerCache | None,
    precision: jax.lax.Precision,
) -> Float[Array, "B T N H"]:
    """Attention under `layout`; `cache` is needed by DecodeLayout only. Returned in q's dtype."""
    batch, time, heads, width = q.shape
    grouped = (q * width**-0.5).reshape(batch, time, k.shape[2], heads // k.shape[2], width)
    if isinstance(layout, RowLayout):
        out = attend_rows(grouped, k, v, layout, precision)
    elif isinstance(layout, GroupLayout):
        out = attend_groups(grouped, k, v, layout, precision)
    else:
        if cache is None:
            raise ValueError("attend: DecodeLayout needs a cache (see layouts.init_cache)")
        out = attend_cache(grouped, k, v, layout, cache, precision)
    return out.reshape(q.shape).astype(q.dtype)


def attend_rows(
    q: Float[Array, "B T K R H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    layout: RowLayout,
    precision: jax.lax.Precision,
) -> Float[Array, "B T K R H"]:
    """Causal attention within equal, non-zero segment ids."""
    ids = layout.segment_ids
    same = (ids[:, :, None] == ids[:, None, :]) & (ids != 0)[:, :, None]
    return _merge(_attend_part(q, k, v, same & _causal(ids.shape[1]), precision))


def attend_groups(
    q: Float[Array, "P packed K R H"],
    k: Float[Array, "P packed K H"],
    v: Float[Array, "P packed K H"],
    layout: GroupLayout,
    precision: jax.lax.Precision,
) -> Float[Array, "P packed K R H"]:
    """Prompt causally to itself; each response to the whole prompt and causally to itself.

    The G*Tr response queries of a group form one matrix against the shared prompt keys.
    """
    (q_prompt, q_own), (k_prompt, k_own), (v_prompt, v_own) = (
        split_group(x, layout) for x in (q, k, v)
    )
    prompts, group_size, slots = q_own.shape[:3]
    heads = q.shape[2:]
    valid = jnp.arange(layout.prompt_slots) < layout.prompt_length[:, None]  # [P, Tp]
    prompt_mask = _causal(layout.prompt_slots) & valid[:, None, :] & valid[:, :, None]
    prompt_out = _merge(_attend_part(q_prompt, k_prompt, v_prompt, prompt_mask, precision))

    spoken = jnp.arange(slots) < layout.response_length[..., None]  # [P, G, Tr]
    queries = q_own.reshape(prompts, group_size * slots, *heads)
    shared_mask = spoken.reshape(prompts, -1, 1) & valid[:, None, :]
    shared = _attend_part(queries, k_prompt, v_prompt, shared_mask, precision)

    rows = [x.reshape(prompts * group_size, slots, *x.shape[3:]) for x in (q_own, k_own, v_own)]
    spoken = spoken.reshape(prompts * group_size, slots)
    own_mask = _causal(slots) & spoken[:, None, :] & spoken[:, :, None]
    own = _attend_part(rows[0], rows[1], rows[2], own_mask, precision)
    own = Partial(*(x.reshape(prompts, group_size * slots, *x.shape[2:]) for x in own))
    return jnp.concatenate([prompt_out, _merge(shared, own)], axis=1)


def attend_cache(
    q: Float[Array, "P G K R H"],
    k: Float[Array, "P G K H"],
    v: Float[Array, "P G K H"],
    layout: DecodeLayout,
    cache: LayerCache,
    precision: jax.lax.Precision,
) -> Float[Array, "P G K R H"]:
    """New tokens against the prompt (< prompt_length), the row's earlier tokens (< index) and themselves."""
    prompt_k, prompt_v, response_k, response_v = cache
    prompts, group_size = layout.index.shape
    valid = jnp.arange(prompt_k.shape[1]) < layout.prompt_length[:, None]
    mask = jnp.broadcast_to(valid[:, None, :], (prompts, group_size, prompt_k.shape[1]))
    shared = _attend_part(q, prompt_k, prompt_v, mask, precision)

    rows = prompts * group_size
    one_query = q.reshape(rows, 1, *q.shape[2:])
    past_k, past_v = (x.reshape(rows, *x.shape[2:]) for x in (response_k, response_v))
    written = jnp.arange(past_k.shape[1]) < layout.index.reshape(rows, 1, 1)
    past = _attend_part(one_query, past_k, past_v, written, precision)
    past = Partial(*(x.reshape(prompts, group_size, *x.shape[2:]) for x in past))

    score = jnp.einsum(
        "pgkrh,pgkh->pgkr", q, k, precision=precision, preferred_element_type=jnp.float32
    )
    value = jnp.broadcast_to(v[:, :, :, None].astype(jnp.float32), q.shape)
    own = Partial(value, jnp.ones_like(score), score)
    return _merge(shared, past, own)


def _causal(time: int) -> Bool[Array, "T T"]:
    return jnp.tril(jnp.ones((time, time), bool))


def _attend_part(
    q: Float[Array, "B T K R H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "B T S"],
    precision: jax.lax.Precision,
) -> Partial:
    """Attention of scaled queries over one part of the keys; per batch row and kv head a (T*R) x S matrix."""
    einsum = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
    score = einsum("btkrh,bskh->bktrs", q, k)
    seen = mask[:, None, :, None, :]
    score = jnp.where(seen, score, _FLOOR)
    peak = jax.lax.stop_gradient(jnp.max(score, axis=-1, keepdims=True))
    weight = jnp.where(seen, jnp.exp(score - peak), 0.0)  # float32
    out = einsum("bktrs,bskh->btkrh", weight.astype(v.dtype), v)
    total, peak = (jnp.swapaxes(x, 1, 2) for x in (jnp.sum(weight, axis=-1), peak[..., 0]))
    return Partial(out, total, peak)


def _merge(*parts: Partial) -> Float[Array, "B T K R H"]:
    """One softmax over the keys of all parts, float32; zero where no part saw a key."""
    peak = functools.reduce(jnp.maximum, (p.peak for p in parts))
    scale = [jnp.exp(p.peak - peak) for p in parts]
    total = sum(s * p.total for s, p in zip(scale, parts, strict=True))
    out = sum(s[..., None] * p.out for s, p in zip(scale, parts, strict=True))
    return out / jnp.where(total > 0, total, 1.0)[..., None]
