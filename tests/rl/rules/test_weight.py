"""Token weights against numbers worked out by hand."""

import numpy as np
import pytest

from rest_jax.config import Options
from rest_jax.rl.rules import choose
from rest_jax.tool_calls import Region


def weigh(name: str, view, **options) -> np.ndarray:
    """Of the tokens in the mask; 0 elsewhere."""
    found = choose("weight", name, tuple(options.items()), name)(view)
    return np.where(view.mask, np.broadcast_to(found, view.mask.shape), 0)


ENTROPY = [[[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]]


def test_top_entropy_keeps_what_is_at_least_the_quantile(view):
    # the 0.8-quantile of 1 .. 10 is 8.2
    np.testing.assert_array_equal(
        weigh("top_entropy", view(entropy=ENTROPY)), [[[0] * 5, [0, 0, 0, 1, 1]]]
    )
    # of 1 .. 8, the mask leaving out two, the 0.5-quantile is 4.5
    short = view(entropy=ENTROPY, length=[[5, 3]])
    np.testing.assert_array_equal(
        weigh("top_entropy", short, share=0.5), [[[0, 0, 0, 0, 1], [1, 1, 1, 0, 0]]]
    )


def test_htmr_adds_the_tokens_of_the_task(view):
    region = [[[Region.NAME, Region.THINK, 1, Region.PARAM, 1], [5, 5, 5, 5, 5]]]
    found = weigh("htmr", view(entropy=ENTROPY, region=region))
    np.testing.assert_array_equal(found, [[[1, 0, 0, 1, 0], [0, 0, 0, 1, 1]]])
    only = weigh("htmr", view(entropy=ENTROPY, region=region), regions=("think",), share=0)
    np.testing.assert_array_equal(only, [[[0, 1, 0, 0, 0], [1, 1, 1, 1, 1]]])


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("ar", {}, [0.9, 1, 0.85]),
        ("ar", {"alpha": 0.5}, [0.75, 1, 0.625]),
        ("direction", {}, [1.1, 1, 1.15]),
        ("tr_grpo", {}, [1, 2 / (1 + np.exp(-1)), 2 / (1 + np.exp(0.5))]),
    ],
    ids=["ar", "ar_half", "direction", "tr_grpo"],
)
def test_weights_by_probability(view, name, options, expected):
    seen = view(logp=[[np.log([0.5, 1, 0.25])]])
    np.testing.assert_allclose(weigh(name, seen, **options)[0, 0], expected, rtol=1e-6)


def test_covariance(view):
    """c = 1, -1, 0, 0: its variance is 1/2."""
    seen = view(logp=[[[-1, -3], [-2, -2]]], advantage=[[1, -1]])
    e = np.exp(-1)
    np.testing.assert_allclose(weigh("covariance", seen), [[[e, e], [1, 1]]], rtol=1e-6)
    np.testing.assert_array_equal(weigh("covariance", view(logp=[[[-1, -1]]], advantage=[[0]])), 1)


def test_a3po_raises_a_fifth_of_each_completion(view):
    logp = [[[-1, -5, -2, -3, -4], [-0.1, -5, -2, -3, -4], [-1, -5, -2, -3, -4]]]
    seen = view(logp=logp, advantage=[[1, -1, 0]], nu=0.25)
    expected = [[[1, 1.75, 1, 1, 1], [1.75, 1, 1, 1, 1], [1] * 5]]
    np.testing.assert_allclose(weigh("a3po", seen), expected)
    short = view(logp=logp, advantage=[[1, -1, 0]], length=[[1, 3, 5]])  # at least one token
    np.testing.assert_allclose(weigh("a3po", short)[0, :2, :3], [[2, 0, 0], [2, 1, 1]])


def test_gtpo(view):
    """Right ones have entropies 1 and 3 at the first token, wrong ones 1/2 and 1."""
    entropy = [[[1, 2], [3, 2], [0.5, 5], [1, 9]]]
    seen = view(entropy=entropy, advantage=[[1, 1, -1, -1]], length=[[2, 1, 1, 1]])
    found = weigh("gtpo", seen)[0]
    first = [0.9 + 0.1 * f for f in (0.5, 1.5, 4 / 3, 2 / 3)]
    np.testing.assert_allclose(found[:, 0], first, rtol=1e-6)
    assert found[0, 1] == pytest.approx(1)  # alone at its position


def test_steer(view):
    """|O| = 0.5 |ln 0.5 + 0.2| and 0.1 |ln 0.9 + 0.1|."""
    seen = view(logp=[[np.log([0.5, 0.9])]], entropy=[[[0.2, 0.1]]], advantage=[[-1]])
    most, least = 0.5 * (np.log(2) - 0.2), 0.1 * abs(np.log(0.9) + 0.1)
    found = weigh("steer", seen)[0, 0]
    np.testing.assert_allclose(found, [0.8, 0.8 ** (least / most)], rtol=1e-5)
    np.testing.assert_allclose(weigh("steer", seen, form="linear")[0, 0], [0.8, 1.2], rtol=1e-6)
    # below 0.02 the greatest |O| no longer sets the scale
    small = view(logp=[[np.log([0.5])]], entropy=[[[0.2]]], advantage=[[0.01]])
    np.testing.assert_allclose(weigh("steer", small), 0.8 ** (most / 100 / 0.02 * 1), rtol=1e-5)


def test_less(view):
    """Bigrams of the three first tokens. (1, 2) is in both right ones, (2, 3) in a right and in a wrong one."""
    ids = [[[1, 2, 3, 8, 9], [1, 2, 4, 8, 9], [2, 3, 6, 8, 9], [7, 7, 7, 8, 9]]]
    entropy = np.broadcast_to([0.1, 0.1, 0.1, 2.0, 1.0], (1, 4, 5))
    seen = view(responses=ids, entropy=entropy, advantage=[[1, 1, -1, -1]])
    expected = [
        [1, 0, 0, 1, 0.5],
        [1, 1, 0.5, 1, 0.5],
        [0, 0, 0.5, 1, 0.5],
        [0.5, 0.5, 0.5, 1, 0.5],
    ]
    np.testing.assert_allclose(weigh("less", seen, length=2, share=0.6)[0], expected)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("top_entropy", {"share": 1}),
        ("htmr", {"share": 1}),
        ("ar", {"alpha": 0}),
        ("direction", {"alpha": 0}),
        ("gtpo", {"beta": 0}),
        ("a3po", {"scale": 1}),
        ("steer", {"low": 1}),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_rules_that_are_switched_off_weigh_every_token_1(view, name, options: Options):
    rng = np.random.default_rng(0)
    shape = (2, 3, 7)
    fields = {"entropy": rng.exponential(size=shape), "logp": -rng.exponential(size=shape)}
    advantage = rng.normal(size=shape[:2])
    seen = view(**fields, advantage=advantage, length=rng.integers(1, 8, shape[:2]))
    np.testing.assert_array_equal(weigh(name, seen, **options), np.asarray(seen.mask, np.float32))
