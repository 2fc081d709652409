"""Draws one token a row, with its log-prob, entropy and Gini, and makes the keys by which a draw depends on its row alone:

    key of a token = fold(run key, step, row of the prompt, sample in the group, position in the response)

so that samples of a group differ, steps differ, a resumed run repeats, and a row draws the same in any decode slot, batch and
order and on any number of devices. A draw is one uniform number and the inverse of the cumulative distribution: it needs
neither a sort of the vocabulary (unless top-p does) nor a random number for every word.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from rest_jax.rl.logprobs import entropy_and_gini, truncate
from rest_jax.types import Sampling

_BLOCK = 128  # words whose probabilities are summed before the search


def row_keys(
    rng: Key[Array, ""], step: Int[Array, ""], row: Int[Array, "*B"], sample: Int[Array, "*B"]
) -> Key[Array, "*B"]:
    """The key of every response, from its prompt's row and its number in the group."""
    base = jax.random.fold_in(rng, step)

    def one(r, s):
        return jax.random.fold_in(jax.random.fold_in(base, r), s)

    flat = jax.vmap(one)(row.reshape(-1), sample.reshape(-1))
    return flat.reshape(row.shape)


def uniforms(
    keys: Key[Array, "*B"], start: Int[Array, "*B"], count: int
) -> Float[Array, "count *B"]:
    """Numbers in [0, 1) for the positions start, start + 1, .. of every row."""

    def one(key, position):
        return jax.random.uniform(jax.random.fold_in(key, position))

    positions = start.reshape(1, -1) + jnp.arange(count)[:, None]
    flat = jax.vmap(jax.vmap(one), (None, 0))(keys.reshape(-1), positions)
    return flat.reshape(count, *keys.shape)


def draw(
    logits: Float[Array, "*B V"], uniform: Float[Array, "*B"], sampling: Sampling
) -> tuple[Int[Array, "*B"], Float[Array, "*B"], Float[Array, "*B"], Float[Array, "*B"]]:
    """(token int32, logp, entropy, gini), float32 nats. Greedy draws the argmax and reports its log-prob at temperature 1."""
    logits = logits.astype(jnp.float32)
    entropy, gini = entropy_and_gini(logits)
    if not sampling.greedy and sampling != Sampling():
        logits = truncate(logits, sampling)
    shifted = logits - jnp.max(logits, axis=-1, keepdims=True)
    weight = jnp.exp(shifted)
    total = jnp.sum(weight, axis=-1)
    token = _first_maximum(shifted) if sampling.greedy else _inverse_cumulative(weight, uniform)
    chosen = jnp.take_along_axis(shifted, token[..., None], axis=-1)[..., 0]
    return token, chosen - jnp.log(total), entropy, gini


def _inverse_cumulative(
    weight: Float[Array, "*B V"], uniform: Float[Array, "*B"]
) -> Int[Array, "*B"]:
    """The word at which the cumulative weight exceeds uniform * total: first its block, then its index in the block."""
    words = weight.shape[-1]
    size = min(_BLOCK, words)
    pad = [(0, 0)] * (weight.ndim - 1) + [(0, -words % size)]
    blocks = jnp.pad(weight, pad).reshape(*weight.shape[:-1], -1, size)
    in_block = jnp.sum(blocks, axis=-1)
    cumulative = jnp.cumsum(in_block, axis=-1)
    target = uniform * cumulative[..., -1]
    block = _first_above(cumulative, in_block, target)
    before = jnp.take_along_axis(cumulative - in_block, block[..., None], axis=-1)[..., 0]
    inside = jnp.take_along_axis(blocks, block[..., None, None], axis=-2)[..., 0, :]
    index = _first_above(jnp.cumsum(inside, axis=-1), inside, target - before)
    return (block * size + index).astype(jnp.int32)


def _first_above(cumulative, weight, target):
    """Index at which `cumulative` first exceeds the target; where rounding leads to a zero weight, that of the largest."""
    index = jnp.sum(cumulative <= target[..., None], axis=-1)
    at_index = jnp.take_along_axis(weight, index[..., None], axis=-1, mode="fill", fill_value=0)
    return jnp.where(at_index[..., 0] > 0, index, jnp.argmax(weight, axis=-1))


def _first_maximum(shifted):
    """argmax of rows whose maximum is 0, as a plain minimum (XLA's CPU backend is slow at argmax)."""
    word = jax.lax.broadcasted_iota(jnp.int32, shifted.shape, shifted.ndim - 1)
    first = jnp.min(jnp.where(shifted == 0, word, shifted.shape[-1]), axis=-1)
    return jnp.minimum(first, shifted.shape[-1] - 1)  # NaN everywhere: any word
