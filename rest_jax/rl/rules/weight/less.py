"""LESS: decided passages that right and wrong completions share say nothing, those of one kind alone say more.

    n-gram: n tokens in a row, each of an entropy below the completion's `share` quantile
    low entropy:  w = c / K, K the completions of its own kind (right or wrong) in the group, c those that contain the n-gram
                  around it; 0 where completions of the other kind contain it, too; 1 / K where none is shared
    high entropy: w = 1

Paper: ACL 2026 findings 1650. Read in QWE-CXZ/LESS ed92908 (`revise_adv`): there maximal passages of low entropy of at
least `length` tokens are compared as texts, and only one that another contains as a whole is shared; here every n-gram
of `length` ids is. A token in several n-grams takes the largest w, but 0 if one of them is in both kinds. length 5,
share 0.8: their code. Their kinds are right and wrong, here the signs of the advantage (`TokenView.right`).
"""

import jax
import jax.numpy as jnp

from rest_jax.config import Fraction, PositiveInt, Section
from rest_jax.rl.masked import rank_over_mask
from rest_jax.rl.rules import Rule
from rest_jax.rl.view import TokenView


class LessOptions(Section):
    """Options of the rule."""

    length: PositiveInt = 5  # tokens of an n-gram
    share: Fraction = 0.8  # of a completion's tokens that are of low entropy


def silence_shared(view: TokenView, options: LessOptions):
    """[P G T], in [0, 1]."""
    n = options.length
    threshold = _threshold(view, options.share)
    whole = view.mask & (view.entropy < threshold)
    for step in range(1, n):
        whole &= _ahead(view.mask & (view.entropy < threshold), step)
    contained = _contained(_hashes(view.responses, n), whole)  # [P G T G]
    right = view.right[:, None, None, :]
    own = jnp.where(view.right[..., None, None], right, ~right)
    kind = jnp.maximum(jnp.sum(own, axis=-1), 1)  # [P G 1]
    count = jnp.where(whole, jnp.sum(contained & own, axis=-1), 1)
    both = whole & jnp.any(contained & ~own, axis=-1)
    # an n-gram covers the n tokens from its own on
    for step in range(1, n):
        count = jnp.maximum(count, _ahead(jnp.where(whole, count, 1), -step))
    covered = both
    for step in range(1, n):
        covered |= _ahead(both, -step)
    low = jnp.where(covered, 0.0, count / kind)
    return jnp.where(view.entropy <= threshold, low, 1.0)


def _threshold(view: TokenView, share: float):
    """[P G 1]: the entropy at the share of the completion's tokens in ascending order."""
    length = jnp.sum(view.mask, axis=-1, keepdims=True)
    place = jnp.minimum(jnp.round(share * length), length - 1)
    at = view.mask & (rank_over_mask(view.entropy, view.mask) == place)
    return jnp.sum(jnp.where(at, view.entropy, 0.0), axis=-1, keepdims=True)


def _ahead(x, step: int):
    """x[..., t + step]; zero, or False, beyond the ends."""
    pad = [(0, 0)] * (x.ndim - 1) + [(max(-step, 0), max(step, 0))]
    moved = jnp.pad(x, pad)
    return moved[..., max(step, 0) : max(step, 0) + x.shape[-1]]


def _hashes(ids, n: int):
    """Two uint32 of the n ids from each position on; together they are the same by chance once in 2^64."""

    def one(factor: int, step: int):
        total = jnp.zeros(ids.shape, jnp.uint32)
        for i in range(n):
            mixed = (_ahead(ids, i).astype(jnp.uint32) + jnp.uint32(step)) * jnp.uint32(factor)
            total = (total * jnp.uint32(0x01000193)) ^ mixed ^ (mixed >> 15)
        return total

    return one(0x9E3779B1, 1), one(0x85EBCA77, 7)


def _contained(hashes, whole):
    """bool [P G T G]: whether the n-gram at a position of a completion is one of another's (or its own)."""

    def one(first, second, whole):  # of a group: [G T]
        first = jnp.where(whole, first, jnp.uint32(0xFFFFFFFF))
        order = jnp.argsort(first, axis=-1, stable=True)
        of_each = [jnp.take_along_axis(x, order, -1) for x in (first, second, whole)]

        def among(a, b, c):  # all n-grams [G T] among those of one completion [T]
            at = jnp.clip(jnp.searchsorted(a, first), 0, a.size - 1)
            return (a[at] == first) & (b[at] == second) & c[at]

        return jnp.moveaxis(jax.vmap(among)(*of_each), 0, -1)

    first, second = hashes
    return jax.vmap(one)(first, second, whole)


RULE = Rule(silence_shared, LessOptions)
