"""Controls of token weights (`weights.placebo`): the same weights, or as large ones, on the wrong tokens.

    shuffle          a random order of the weights within each completion, another one in each step
    shuffle_regions  the weights of one region go to the tokens of another: with a completion's tokens in order of their regions,
                     an order drawn once for the run, weights move on by as many tokens as the largest region has, so that no
                     region keeps its own but for what the others together have no room for
    random           uniform in the range of the weights of the batch's tokens (the control of DelTA, arXiv:2605.21467)

The first two keep the weights of every completion as they are, so that neither normalisers nor denominators change. Numbers are
drawn for the position of a token in its completion, so that neither padding nor the mesh changes them.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rest_jax.rl.view import TokenView, draw_uniform
from rest_jax.tool_calls import NUM_REGIONS


def _none(weight, view: TokenView, seed: int):
    return weight


def _shuffle(weight: Float[Array, "P G T"], view: TokenView, seed: int) -> Float[Array, "P G T"]:
    """Within completions."""
    return _hand_out(
        weight, view, jnp.arange(weight.shape[-1]), draw_uniform(view.key, weight.shape)
    )


def _shuffle_regions(weight: Float[Array, "P G T"], view: TokenView, seed: int):
    """Over the wrong regions."""
    order = jax.random.permutation(jax.random.key(seed), NUM_REGIONS)
    place = jnp.where(view.mask, order[view.region.astype(jnp.int32)], NUM_REGIONS)  # [P G T]
    line = jnp.argsort(jnp.argsort(place, axis=-1, stable=True), axis=-1)
    tokens = jnp.sum(place[..., None] == jnp.arange(NUM_REGIONS), axis=2)  # [P G R]
    largest, total = (f(tokens, axis=-1, keepdims=True) for f in (jnp.max, jnp.sum))
    return _hand_out(weight, view, line, (line - largest) % jnp.maximum(total, 1))


def _random(weight: Float[Array, "P G T"], view: TokenView, seed: int) -> Float[Array, "P G T"]:
    """Of the same range."""
    low = jnp.min(jnp.where(view.mask, weight, jnp.inf))
    high = jnp.max(jnp.where(view.mask, weight, -jnp.inf))
    drawn = low + (high - low) * draw_uniform(view.key, weight.shape)
    return jnp.where(view.mask, drawn, 0.0)


def _hand_out(weight, view: TokenView, taken, given):
    """The weights of each completion in ascending order of `taken` to its tokens in ascending order of `given`."""
    taken, given = (
        jnp.argsort(jnp.where(view.mask, x, jnp.inf), axis=-1, stable=True) for x in (taken, given)
    )
    ordered = jnp.take_along_axis(weight, taken, axis=-1)
    return jnp.take_along_axis(ordered, jnp.argsort(given, axis=-1), axis=-1)


PLACEBOS = {
    "none": _none,
    "shuffle": _shuffle,
    "shuffle_regions": _shuffle_regions,
    "random": _random,
}
