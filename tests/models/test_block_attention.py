"""Attention in blocks against dense attention in float32, and which blocks it visits."""

import functools
from collections.abc import Iterator

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params

from rest_jax.models.block_attention import _list_visits, block_attention
from rest_jax.models.cache import RowLayout
from tests.models.rows import (
    PACKED,
    any_row,
    assert_close,
    assert_dense,
    by_kernel,
    dense,
    make_inputs,
    packed_row,
    value_and_gradients,
    visible_pairs,
)

BLOCKS = [(64, 64), (64, 128), (128, 256), (256, 128)]  # of queries and of keys
small_blocks = functools.partial(block_attention, blocks=(64, 64))


@pytest.mark.parametrize(
    ("heads", "kv_heads"),
    [
        (4, 2),
        *(pytest.param(*x, marks=pytest.mark.wide) for x in [(2, 2), (4, 1), (6, 2), (16, 1)]),
    ],
)
def test_packed_rows_equal_dense_attention(heads, kv_heads):
    """Padding, of which every output has a gradient here, is zero in value and gradients."""
    inputs = make_inputs(*PACKED.shape, heads, kv_heads)
    assert_dense(value_and_gradients(by_kernel(small_blocks, PACKED), *inputs), inputs, PACKED)


@pytest.mark.parametrize("blocks", [*BLOCKS[1:], (512, 512), None], ids=str)
def test_blocks_of_any_size_compute_the_same(blocks):
    inputs = make_inputs(*PACKED.shape, 4, 2)
    kernel = functools.partial(block_attention, blocks=blocks)
    assert_dense(value_and_gradients(by_kernel(kernel, PACKED), *inputs), inputs, PACKED)


@pytest.mark.parametrize(
    "time", [65, *(pytest.param(n, marks=pytest.mark.wide) for n in (1, 63, 64, 300))]
)
def test_rows_of_any_length(time):
    half = time // 2
    until = np.stack([packed_row(time, [(time - half, time - half, [half], half)])] * 2)
    inputs = make_inputs(2, time, 8, 2)
    assert_dense(value_and_gradients(by_kernel(small_blocks, until), *inputs), inputs, until)


def test_bfloat16():
    """Products of rounded numbers, sums in float32."""
    *inputs, weight = make_inputs(*PACKED.shape, 4, 2)
    inputs = [x.astype(jnp.bfloat16) for x in inputs]
    found = value_and_gradients(by_kernel(small_blocks, PACKED), *inputs, weight)
    assert all(x.dtype == jnp.bfloat16 for x in found)
    assert_dense(found, (*inputs, weight), PACKED, tolerance=2e-2)


@hypothesis.given(st.lists(any_row(), min_size=2, max_size=2))
@hypothesis.settings(max_examples=25)
def test_visits_hide_no_visible_pair(tables):
    """Not of any row."""
    until = np.stack(tables)
    seen = visible_pairs(until).any(0)
    for queries, keys in BLOCKS:
        blocks = seen.reshape(512 // queries, queries, 512 // keys, keys).any((1, 3))
        visits = _list_visits(jnp.asarray(until), (queries, keys))
        for i, count in enumerate(visits.count):
            visited = np.asarray(visits.keys[i, :count])
            assert len(set(visited)) == count and np.all(visited * keys < (i + 1) * queries)
            assert set(visited) >= set(np.flatnonzero(blocks[i]))


def test_blocks_that_nobody_sees_are_not_visited():
    """Two groups, each a prompt of a block and four responses of a block: a response sees its prompt and itself."""
    group = (64, 64, [64] * 4, 64)
    until = np.stack([packed_row(704, [group, group]), packed_row(704, [])])
    visits = _list_visits(jnp.asarray(until), (64, 64))
    assert visits.count.tolist() == [1, 2, 2, 2, 2, 1, 2, 2, 2, 2, 0]
    found = [set(keys[:n].tolist()) for keys, n in zip(visits.keys, visits.count, strict=True)]
    assert found == [{n, n // 5 * 5} for n in range(10)] + [set()]
    causal = _list_visits(jnp.full((1, 704), 704), (64, 64))
    assert causal.count.tolist() == list(range(1, 12))


def test_groups_do_not_touch_the_blocks_of_others():
    """A group whose keys and values are NaN spoils neither value nor gradients of the next one, as a visit with all pairs hidden
    would.
    """
    until = packed_row(256, [(64, 64, [64], 64)] * 2)[None]
    q, k, v, weight = make_inputs(1, 256, 4, 2)
    first = jnp.arange(256)[:, None, None] < 128
    spoilt = q, *(jnp.where(first, jnp.nan, x) for x in (k, v)), jnp.where(first, 0, weight)
    found = value_and_gradients(by_kernel(small_blocks, until), *spoilt)
    expected = value_and_gradients(
        functools.partial(dense, until=until), q, k, v, jnp.where(first, 0, weight)
    )
    assert not np.all(np.isfinite(found[0]))
    assert_close([x[:, 128:] for x in found], [x[:, 128:] for x in expected])


@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
def test_no_array_is_as_large_as_the_scores_of_a_row(blocks):
    """The largest grows with the time, not with its square, forward and backward."""

    def total(q, k, v, until):
        return jnp.sum(block_attention(q, k, v, RowLayout(until, 1), blocks))

    def largest(time: int) -> int:
        shapes = (1, 2, 2, time, 32), (1, 2, time, 32), (1, 2, time, 32)
        inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        until = jax.ShapeDtypeStruct((1, time), jnp.int32)
        jaxpr = jax.make_jaxpr(jax.value_and_grad(total, (0, 1, 2)))(*inputs, until)
        return max(_sizes(jaxpr.jaxpr))

    assert largest(8192) <= 2 * largest(4096)


def _sizes(jaxpr) -> Iterator[int]:
    """Elements of every array that a program makes, loops included."""
    for eqn in jaxpr.eqns:
        yield from (int(np.prod(v.aval.shape)) for v in eqn.outvars)
        for inner in jaxprs_in_params(eqn.params):
            yield from _sizes(inner)
