"""Draws one token a row, with its log-prob, entropy and Gini, and makes the keys by which a draw depends on its row alone:

    key of a token = fold(run key, step, row of the prompt, sample in the group, position in the response)

so that samples of a group differ, steps differ, a resumed run repeats, and a row draws the same in any decode slot, batch and
order and on any number of devices. A draw is two uniform numbers and two inverse cumulative distributions: the first chooses a
block of the vocabulary, the second a word in it. It needs neither a sort of the vocabulary (unless top-p does) nor a random
number for every word, and reaches words that are rarer than the resolution of one float32 number.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from rest_jax.rl.logprobs import entropy_and_gini, nucleus, truncate
from rest_jax.types import AnyArray, Sampling

_BLOCK = 128  # words that the second number chooses among
_LIGHT = 2.0**-16  # share of the total below which a weight is summed before the others


class RequestSampling(NamedTuple):
    """The distributions from which requests want to be drawn."""

    temperature: Float[AnyArray, "*B"]  # float32; 0: greedy
    top_p: Float[AnyArray, "*B"]  # float32; 1: full support
    lists: Bool[AnyArray, "*B"]  # the likeliest words are wanted

    @classmethod
    def plain(cls, shape: tuple[int, ...]) -> "RequestSampling":
        """The model's own distribution."""
        return cls(np.ones(shape, np.float32), np.ones(shape, np.float32), np.zeros(shape, bool))


def row_keys(
    rng: Key[Array, ""], step: Int[Array, ""], row: Int[Array, "*B"], sample: Int[Array, "*B"]
) -> Key[Array, "*B"]:
    """The key of every response, from its prompt's row and its number in the group."""
    base = jax.random.fold_in(rng, step)

    def one(r, s):
        return jax.random.fold_in(jax.random.fold_in(base, r), s)

    flat = jax.vmap(one)(row.reshape(-1), sample.reshape(-1))
    return flat.reshape(row.shape)


def uniforms(keys: Key[Array, "*B"], position: Int[Array, "*B"]) -> Float[Array, "*B 2"]:
    """Two numbers in [0, 1) for a token of every row: multiples of 2^-32, rounded to float32."""

    def one(key, position):
        return jax.random.bits(jax.random.fold_in(key, position), (2,), jnp.uint32)

    bits = jax.vmap(one)(keys.reshape(-1), position.reshape(-1)).reshape(*keys.shape, 2)
    # Not jax.random.uniform: near 0 its numbers are 2^-23 apart, which is more than most words of a large vocabulary have.
    return jnp.minimum(bits.astype(jnp.float32) * 2.0**-32, 1 - 2.0**-24)


def draw(
    logits: Float[Array, "*B V"], uniform: Float[Array, "*B 2"], sampling: Sampling
) -> tuple[Int[Array, "*B"], Float[Array, "*B"], Float[Array, "*B"], Float[Array, "*B"]]:
    """(token int32, logp, entropy, gini), float32 nats. Greedy draws the argmax and reports its log-prob at temperature 1."""
    logits = logits.astype(jnp.float32)
    entropy, gini = entropy_and_gini(logits)
    if not sampling.greedy and sampling != Sampling():
        logits = truncate(logits, sampling)
    shifted = logits - jnp.max(logits, axis=-1, keepdims=True)
    weight = jnp.exp(shifted)
    total = jnp.sum(weight, axis=-1)
    token = _first_maximum(shifted) if sampling.greedy else _draw_word(weight, uniform)
    chosen = jnp.take_along_axis(shifted, token[..., None], axis=-1)[..., 0]
    return token, chosen - jnp.log(total), entropy, gini


def draw_each(
    logits: Float[Array, "*B V"], uniform: Float[Array, "*B 2"], sampling: RequestSampling
) -> tuple[Int[Array, "*B"], Float[Array, "*B"], Float[Array, "*B"], Float[Array, "*B"]]:
    """As `draw`, every row from its own distribution; logp is that of the model's, at temperature 1 and with full support."""
    logits = logits.astype(jnp.float32)
    entropy, gini = entropy_and_gini(logits)
    greedy = sampling.temperature == 0
    scaled = logits / jnp.where(greedy, 1.0, sampling.temperature)[..., None]
    cut = jnp.any((sampling.top_p < 1) & ~greedy)
    kept = jax.lax.cond(cut, lambda x: nucleus(x, sampling.top_p[..., None]), lambda x: x, scaled)
    shifted = kept - jnp.max(kept, axis=-1, keepdims=True)
    token = jnp.where(greedy, _first_maximum(shifted), _draw_word(jnp.exp(shifted), uniform))
    chosen = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
    return token, chosen - jax.nn.logsumexp(logits, axis=-1), entropy, gini


def likeliest(
    logits: Float[Array, "*B V"], count: int, wanted: Bool[Array, ""]
) -> tuple[Int[Array, "*B k"], Float[Array, "*B k"]]:
    """The `count` likeliest words, the first one first, and their log-probs (float32 nats); zeros if not wanted."""

    def find(x):
        x = x.astype(jnp.float32)
        values, words = jax.lax.top_k(x, count)
        return words, values - jax.nn.logsumexp(x, axis=-1, keepdims=True)

    def nothing(x):
        zeros = jnp.zeros((*x.shape[:-1], count))
        return zeros.astype(jnp.int32), zeros

    return jax.lax.cond(wanted, find, nothing, logits)


def _draw_word(weight: Float[Array, "*B V"], uniform: Float[Array, "*B 2"]) -> Int[Array, "*B"]:
    """A word with the probability weight / sum(weight): first its block, then its index in the block."""
    words = weight.shape[-1]
    size = min(_BLOCK, words)
    pad = [(0, 0)] * (weight.ndim - 1) + [(0, -words % size)]
    blocks = jnp.pad(weight, pad).reshape(*weight.shape[:-1], -1, size)
    block = _inverse_cumulative(jnp.sum(blocks, axis=-1), uniform[..., 0])
    inside = jnp.take_along_axis(blocks, block[..., None, None], axis=-2)[..., 0, :]
    index = _inverse_cumulative(inside, uniform[..., 1])
    return (block * size + index).astype(jnp.int32)


def _inverse_cumulative(
    weight: Float[Array, "*B N"], uniform: Float[Array, "*B"]
) -> Int[Array, "*B"]:
    """The index at which the cumulative weight, small weights first, exceeds uniform * total.

    Behind a large weight float32 sums and uniform numbers are too coarse for the small ones; near 0 they are not. Where
    rounding leads to a zero weight, the index is that of the largest.
    """
    light = weight < _LIGHT * jnp.sum(weight, axis=-1, keepdims=True)
    ordered = [jnp.where(light, weight, 0), jnp.where(light, 0, weight)]
    ordered = jnp.concatenate(ordered, axis=-1)
    cumulative = jnp.cumsum(ordered, axis=-1)
    index = jnp.sum(cumulative <= uniform[..., None] * cumulative[..., -1:], axis=-1)
    found = jnp.take_along_axis(ordered, index[..., None], axis=-1, mode="fill", fill_value=0)
    return jnp.where(found[..., 0] > 0, index % weight.shape[-1], jnp.argmax(weight, axis=-1))


def _first_maximum(shifted):
    """argmax of rows whose maximum is 0, as a plain minimum (XLA's CPU backend is slow at argmax)."""
    word = jax.lax.broadcasted_iota(jnp.int32, shifted.shape, shifted.ndim - 1)
    first = jnp.min(jnp.where(shifted == 0, word, shifted.shape[-1]), axis=-1)
    return jnp.minimum(first, shifted.shape[-1] - 1)  # NaN everywhere: any word
