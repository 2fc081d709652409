"""S_acc against a brute-force oracle, JSON equality, the options, and many calls."""

import itertools
import time
from collections import Counter

import hypothesis
import hypothesis.strategies as st
import pytest

from rest_jax.config import RewardConfig
from rest_jax.rewards.tool_call import accuracy, canonical, match_calls, r_name, same_calls
from rest_jax.tool_calls import Call

DEFAULT = RewardConfig()
RELEASED = RewardConfig(count_extra_calls=False, extra_call_penalty=0)
PLAIN = RewardConfig(extra_call_penalty=0)


def json_equal(a, b) -> bool:
    """Equality of JSON values by its definition."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(json_equal(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(json_equal, a, b))
    return (type(a) in (int, float) and type(b) in (int, float) and a == b) or (
        type(a) is type(b) and a == b
    )


def oracle(gold, predicted) -> float:
    """S_acc by trying every pairing."""
    n, m = Counter(c.name for c in gold), Counter(c.name for c in predicted)
    best = 0.0
    slots = [*range(len(predicted)), *[None] * len(gold)]
    for chosen in set(itertools.permutations(slots, len(gold))):
        total = 0.0
        for g, j in zip(gold, chosen, strict=True):
            if j is None or predicted[j].name != g.name:
                continue
            a, b = g.arguments, predicted[j].arguments
            total += len(a.keys() & b.keys()) / len(a.keys() | b.keys()) if a or b else 1.0
            total += sum(k in b and json_equal(v, b[k]) for k, v in a.items())
        best = max(best, total)
    score = sum((n & m).values()) / sum((n | m).values()) + best
    return score / (1 + len(gold) + sum(len(g.arguments) for g in gold))


VALUES = st.sampled_from(
    [0, 1, True, False, 1.0, "1", None, [], {}, [1], [True], {"a": 1}, {"a": 1.0}, {"a": True}]
)
A_CALL = st.builds(
    Call, st.sampled_from("fg"), st.dictionaries(st.sampled_from("xyz"), VALUES, max_size=3)
)


@hypothesis.settings(max_examples=300)
@hypothesis.given(
    gold=st.lists(A_CALL, min_size=1, max_size=3), predicted=st.lists(A_CALL, max_size=3)
)
def test_accuracy_equals_the_best_of_all_pairings(gold, predicted):
    assert accuracy(gold, predicted, PLAIN) == pytest.approx(oracle(gold, predicted), abs=1e-12)


@hypothesis.given(st.lists(A_CALL, min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_order_of_calls_does_not_matter(calls, random):
    shuffled = list(calls)
    random.shuffle(shuffled)
    assert accuracy(calls, shuffled, DEFAULT) == pytest.approx(1.0)
    assert same_calls(calls, shuffled)


@hypothesis.given(VALUES | st.lists(VALUES), VALUES | st.lists(VALUES))
def test_canonical_forms_are_equal_where_json_is(a, b):
    assert (canonical(a) == canonical(b)) == json_equal(a, b)


def test_types_matter():
    def one(a, b):
        return accuracy([Call("f", {"x": a})], [Call("f", {"x": b})], DEFAULT)

    assert one(1, 1.0) == one({"a": 1, "b": 2}, {"b": 2, "a": 1}) == 1.0
    for a, b in [
        (True, 1),
        (False, 0),
        ("1", 1),
        (None, ""),
        ([1, 2], [2, 1]),
        ([True], [1]),
        ({}, []),
    ]:
        assert one(a, b) == pytest.approx(2 / 3)


def test_pairing_is_optimal_not_greedy():
    gold = [Call("f", {"a": 1}), Call("f", {"a": 1, "b": 2})]
    predicted = [Call("f", {"a": 1, "b": 2}), Call("f", {"a": 1})]
    assert match_calls(gold, predicted) == [2.0, 3.0]
    assert accuracy(gold, predicted, DEFAULT) == 1.0


def test_missing_calls_lower_the_score_and_none_is_zero():
    gold = [Call("f", {"a": 1}), Call("g", {})]
    assert accuracy(gold, [gold[0]], DEFAULT) == pytest.approx((0.5 + 1 + 1) / 4)
    assert accuracy(gold, [], DEFAULT) == 0.0
    assert match_calls(gold, [gold[0]]) == [2.0, 0.0]


def test_extra_calls():
    gold = [Call("f", {"a": 1})]
    twice = gold * 2
    assert r_name(gold, twice) == 0.5
    assert r_name(gold, twice, count_extra=False) == 1.0
    assert accuracy(gold, twice, RELEASED) == 1.0
    assert accuracy(gold, twice, PLAIN) == pytest.approx(2.5 / 3)
    assert accuracy(gold, twice, DEFAULT) == pytest.approx(2.5 / 3 / 2)
    assert accuracy(gold, gold * 50, DEFAULT) == 0.0


def test_wrong_calls_that_are_not_superfluous_stay_in_the_union():
    gold, predicted = [Call("f", {}), Call("g", {})], [Call("f", {}), Call("h", {})]
    assert (
        r_name(gold, predicted)
        == r_name(gold, predicted, count_extra=False)
        == pytest.approx(1 / 3)
    )


def test_strict_match_and_coarse():
    gold = [Call("f", {"a": 1, "b": 2}), Call("g", {})]
    near = [Call("f", {"a": 1}), Call("g", {})]
    assert accuracy(gold, near, DEFAULT) == pytest.approx((1 + 0.5 + 1 + 1) / 5)
    assert accuracy(gold, near, RewardConfig(strict_match=True)) == pytest.approx(
        (1 + 0 + 1 + 1) / 5
    )
    assert accuracy(gold, near[:1], RewardConfig(strict_match=True)) == pytest.approx(1 / 5)
    assert accuracy(gold, near, RewardConfig(coarse=True)) == 0.0
    assert accuracy(gold, gold[::-1], RewardConfig(coarse=True)) == 1.0


def test_accuracy_needs_gold_calls():
    with pytest.raises(ValueError, match="gold has 0 calls"):
        accuracy([], [Call("f", {})], DEFAULT)


def test_five_thousand_calls_take_less_than_two_seconds():
    gold = [Call("f", {"a": i, "b": [i]}) for i in range(8)]
    predicted = [Call("f", {"a": i, "b": [i]}) for i in range(5_000)]
    started = time.process_time()
    assert accuracy(gold, predicted[::-1], RELEASED) == pytest.approx(1.0)
    assert time.process_time() - started < 2.0
