"""Which blocks of scores are seen, and how large blocks are."""

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest

from rest_jax.models.score_blocks import fitting_block, list_true, seen_blocks
from tests.models.rows import any_row, packed_row, visible_pairs


@hypothesis.given(any_row())
@hypothesis.settings(max_examples=25)
def test_no_visible_pair_is_in_a_block_that_is_not_seen(row):
    for queries, keys in [(256, 128), (128, 256), (64, 64)]:
        found = np.asarray(seen_blocks(jnp.asarray(row[None]), queries, keys)[0])
        pairs = visible_pairs(row[None])[0].reshape(512 // queries, queries, 512 // keys, keys)
        assert np.all(found | ~pairs.any((1, 3)))


def test_a_response_sees_its_prompt_and_itself():
    """Two groups, each a prompt of a block and two responses of a block, then a block of padding."""
    row = packed_row(448, [(64, 64, [64] * 2, 64)] * 2)
    found = np.asarray(seen_blocks(jnp.asarray(row[None]), 64, 64)[0])
    expected = np.diag([True] * 6 + [False])
    expected[[1, 2, 4, 5], [0, 0, 3, 3]] = True
    np.testing.assert_array_equal(found, expected)


def test_indices_of_what_is_true_come_first_and_in_order():
    order, count = list_true(jnp.array([[False, True, False, True], [False] * 4]))
    np.testing.assert_array_equal(order[0, :2], [1, 3])
    np.testing.assert_array_equal(count, [2, 0])
    assert sorted(order[0].tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("time", "least", "most", "block"),
    [(1, 16, 128, 16), (300, 16, 128, 64), (512, 128, 341, 256), (4096, 128, 64, 128)],
)
def test_a_block_is_as_large_as_padding_lets_it(time, least, most, block):
    assert fitting_block(time, least, most) == block
