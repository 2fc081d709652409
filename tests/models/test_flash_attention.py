"""Which blocks the kernels visit; what they compute is in `test_attention.py`."""

import hypothesis
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from rest_jax.models import flash_attention
from tests.models.rows import any_row, packed_row, visible_pairs


def visit_set(until, case, by_key):
    visits = flash_attention._list_visits(
        flash_attention._visited_blocks(jnp.asarray(until), case), by_key
    )
    query, key, count = map(np.asarray, visits)
    return [list(zip(query[b, :n], key[b, :n], strict=True)) for b, n in enumerate(count)], visits


@hypothesis.given(st.lists(any_row(), min_size=2, max_size=2))
@hypothesis.settings(max_examples=25)
def test_visits_hide_no_visible_pair(tables):
    until = np.stack(tables)
    seen = visible_pairs(until)
    for queries, keys in [(256, 128), (128, 256)]:
        case = flash_attention._Case(queries, keys, 1)
        blocks = seen.reshape(2, 512 // queries, queries, 512 // keys, keys).any((2, 4))
        for by_key in (False, True):
            found, visits = visit_set(until, case, by_key)
            for b, pairs in enumerate(found):
                assert set(pairs) >= set(zip(*np.nonzero(blocks[b]), strict=True))
                assert pairs == sorted(pairs, key=lambda p: p[::-1] if by_key else p)
                assert len(set(pairs)) == len(pairs)
                # every output is written, and what is behind the list loads nothing
                assert {q for q, _ in pairs} == set(range(512 // queries))
                assert {k for _, k in pairs} == set(range(512 // keys))
                rest = np.stack([visits.query[b], visits.key[b]], axis=1)[len(pairs) :]
                assert np.all(rest == pairs[-1])


def test_blocks_that_nobody_sees_are_not_visited():
    """Two groups, each a prompt of a block and four responses of a block: a response sees its prompt and itself. Of padding the
    diagonal is visited, which writes its zeros.
    """
    group = (128, 128, [128] * 4, 128)
    until = np.stack([packed_row(1408, [group, group]), packed_row(1408, [])])
    case = flash_attention._Case(128, 128, 1)
    (first, second), _ = visit_set(until, case, by_key=False)
    own = [(n, n) for n in range(11)]
    shared = [(n, n // 5 * 5) for n in range(10) if n % 5]
    assert sorted(first) == sorted(own + shared) and second == own


def test_lists_hold_a_causal_row():
    """Where nothing is left out, they are as long as they may be."""
    until = np.full((1, 1024), 1024, np.int32)
    for queries, keys in [(128, 128), (512, 128), (128, 256)]:
        case = flash_attention._Case(queries, keys, 1)
        blocks = visible_pairs(until).reshape(1024 // queries, queries, 1024 // keys, keys)
        for by_key in (False, True):
            (found,), visits = visit_set(until, case, by_key)
            assert len(found) == visits.query.shape[1] == blocks.any((1, 3)).sum()
