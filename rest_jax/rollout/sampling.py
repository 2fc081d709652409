"""Drawing one token a row, with its log-prob, entropy and Gini; and the keys that make a draw depend on its row alone.

    key of a token = fold(run key, step, row of the prompt, sample in the group, position in the response)

so that samples of a group differ, steps differ, a resumed run repeats, and a row draws the same whatever lane, batch, order
or number of devices it runs in. A draw is one uniform number and the inverse of the cumulative distribution: the vocabulary
is neither sorted (unless top-p asks) nor filled with random numbers.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from rest_jax.rl.logprobs import sum_of_products, truncate
from rest_jax.types import Sampling

_BLOCK = 128  # words summed before the search


def row_keys(
    rng: Key[Array, ""], step: Int[Array, ""], row: Int[Array, "*B"], sample: Int[Array, "*B"]
) -> Key[Array, "*B"]:
    """The key of every response, from its prompt's row and its place in the group."""
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
    shifted = logits - jnp.max(logits, axis=-1, keepdims=True)
    weight = jnp.exp(shifted)
    total = jnp.sum(weight, axis=-1)
    entropy = jnp.log(total) - sum_of_products(weight, shifted) / total
    gini = 1 - sum_of_products(weight, weight) / (total * total)
    if sampling.greedy:
        token = _first_maximum(shifted)
    else:
        if sampling != Sampling():
            kept = truncate(logits, sampling)
            shifted = kept - jnp.max(kept, axis=-1, keepdims=True)
            weight = jnp.exp(shifted)
            total = jnp.sum(weight, axis=-1)
        token = _inverse(weight, uniform)
    chosen = jnp.take_along_axis(shifted, token[..., None], axis=-1)[..., 0]
    return token, chosen - jnp.log(total), entropy, gini


def _inverse(weight: Float[Array, "*B V"], uniform: Float[Array, "*B"]) -> Int[Array, "*B"]:
    """The word at which the cumulative weight passes uniform * total: first its block, then its place in the block."""
    words = weight.shape[-1]
    size = min(_BLOCK, words)
    pad = [(0, 0)] * (weight.ndim - 1) + [(0, -words % size)]
    blocks = jnp.pad(weight, pad).reshape(*weight.shape[:-1], -1, size)
    mass = jnp.sum(blocks, axis=-1)
    below = jnp.cumsum(mass, axis=-1)
    target = uniform * below[..., -1]
    block = _pass(below, mass, target)
    before = jnp.take_along_axis(below - mass, block[..., None], axis=-1)[..., 0]
    inside = jnp.take_along_axis(blocks, block[..., None, None], axis=-2)[..., 0, :]
    place = _pass(jnp.cumsum(inside, axis=-1), inside, target - before)
    return (block * size + place).astype(jnp.int32)


def _pass(below, mass, target):
    """Index at which `below` first exceeds the target; where rounding leads to an entry without mass, the largest."""
    index = jnp.sum(below <= target[..., None], axis=-1)
    found = jnp.take_along_axis(mass, index[..., None], axis=-1, mode="fill", fill_value=0)
    return jnp.where(found[..., 0] > 0, index, jnp.argmax(mass, axis=-1))


def _first_maximum(shifted):
    """argmax of rows whose maximum is 0, as a plain minimum (XLA's CPU backend is slow at argmax)."""
    word = jax.lax.broadcasted_iota(jnp.int32, shifted.shape, shifted.ndim - 1)
    found = jnp.min(jnp.where(shifted == 0, word, shifted.shape[-1]), axis=-1)
    return jnp.minimum(found, shifted.shape[-1] - 1)  # NaN everywhere: any word
