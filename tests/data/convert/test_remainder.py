"""The difference between a rebuilt item and the raw one: exact, and empty where there is none."""

import hypothesis
import hypothesis.strategies as st
import pytest

from rest_jax.data.convert.fields import check_depth
from rest_jax.data.convert.remainder import apply, difference, style_of, written
from rest_jax.data.records import RecordError

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(0, 2)
    | st.sampled_from([0.0, 1.0])
    | st.text("ab", max_size=2),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=1), inner),
    max_leaves=10,
)


def _exact(value):
    """The value with the kinds of its numbers spelled out and keys in order."""
    if isinstance(value, dict):
        return {key: _exact(value[key]) for key in sorted(value)}
    return list(map(_exact, value)) if isinstance(value, list) else repr(value)


@hypothesis.given(JSON, JSON)
def test_edits_turn_one_into_the_other(made, raw):
    before = _exact(made)
    edits = difference(made, raw)
    assert _exact(apply(made, edits)) == _exact(raw)
    assert _exact(made) == before
    assert difference(raw, raw) == []


def test_edits_are_small():
    made = {"a": [1, {"b": "x"}, 3], "c": 1, "e": None}
    raw = {"a": [1, {"b": "y"}, 3, 4], "d": True, "c": 1.0}
    edits = difference(made, raw)
    assert edits == [[["e"]], [["a", 1, "b"], "y"], [["a", 3], 4], [["d"], True], [["c"], 1.0]]
    assert difference(raw, made)[-2:] == [[["c"], 1], [["e"], None]]


def test_ways_of_writing_json():
    value = [{"ä": 1, "b": [True]}]
    for way in range(8):
        assert style_of(value, written(value, way)) == way
    assert style_of([1], "[1]", usual=1) == 1
    assert style_of([1], "[ 1]") is None


def test_depth_is_bounded():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(RecordError, match="here: nests deeper than 64"):
        check_depth({"a": deep}, "here")
    while deep:  # taken apart by hand: nested this deep, even freeing it recurses
        deep = deep.pop()
