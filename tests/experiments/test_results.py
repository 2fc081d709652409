"""Intervals over seeds against enumeration and simulation."""

import itertools
import warnings

import numpy as np
import pytest

from rest_jax.experiments.results import estimate, paired


def test_bootstrap_is_the_percentiles_of_all_resamples():
    x = [0.2, 0.5, 0.55, 0.9]
    means = [np.mean(rows) for rows in itertools.product(x, repeat=len(x))]
    found = estimate(x)
    expected = np.percentile(means, [2.5, 97.5])
    np.testing.assert_allclose((found.low, found.high), expected, atol=0.03)
    assert estimate(x) == found  # seeded


def test_t_interval_holds_its_level_and_the_bootstrap_does_not():
    """Five values, three hundred times: the reason why both are asked."""
    rng = np.random.default_rng(0)
    found = [estimate(rng.normal(1.0, 2.0, 5)) for _ in range(300)]
    student = np.mean([e.t_low <= 1 <= e.t_high for e in found])
    resampled = np.mean([e.low <= 1 <= e.high for e in found])
    assert 0.92 < student < 0.98
    assert resampled < 0.90


def test_t_interval_by_hand():
    found = estimate([1.0, 2.0, 3.0])  # standard error 1 / sqrt(3), t(2, 0.975) = 4.3027
    assert found.mean == 2.0
    assert found.t_high - found.mean == pytest.approx(4.302653 / np.sqrt(3), rel=1e-5)
    assert found.mean - found.t_low == pytest.approx(4.302653 / np.sqrt(3), rel=1e-5)


def test_pairs_go_by_seed_and_only_those_of_both():
    found = paired({0: 1.0, 2: 5.0, 7: 9.0}, {7: 8.0, 2: 5.5, 1: 100.0})
    assert found.count == 2 and found.mean == pytest.approx((1.0 - 0.5) / 2)
    with pytest.raises(ValueError, match="no seed in common"):
        paired({0: 1.0}, {1: 1.0})


def test_both_intervals_must_be_on_one_side_of_zero():
    assert estimate([1.0, 1.1, 0.9, 1.05]).excludes_zero
    assert estimate([-1.0, -1.1, -0.9, -1.05]).excludes_zero
    almost = estimate([0.1, 0.2, 1.9])  # the bootstrap leaves zero out, t does not
    assert almost.low > 0 > almost.t_low and not almost.excludes_zero
    assert not estimate([1.0]).excludes_zero


def test_equal_values_have_an_interval_of_one_point():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = estimate([1.0, 1.0, 1.0])
    assert (found.low, found.high, found.t_low, found.t_high) == (1.0, 1.0, 1.0, 1.0)
    assert not estimate([1.0, 1.0]).excludes_zero  # no spread, but two seeds show nothing


def test_one_value_has_no_interval_and_none_is_refused():
    found = estimate([3.0])
    assert found.mean == 3.0 and np.isnan([found.low, found.t_high]).all()
    with pytest.raises(ValueError, match="at least one"):
        estimate([])
