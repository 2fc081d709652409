"""Intervals, tests and power against enumeration, simulation and what is published."""

import itertools
import warnings

import numpy as np
import pytest
import scipy

from rest_jax.evaluation.statistics import (
    estimate,
    holm,
    least_difference,
    mcnemar,
    mcnemar_power,
    mean_rate,
    paired,
    rate_interval,
    resolvable_difference,
    weighted_rates_interval,
)


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
    found = [estimate(rng.normal(1.0, 2.0, 5).tolist()) for _ in range(300)]
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
    with pytest.raises(ValueError, match="nothing in common"):
        paired({0: 1.0}, {1: 1.0})


def test_p_is_that_of_students_test():
    values = [0.4, 1.5, -0.2, 0.9, 1.1]
    statistic = np.mean(values) / (np.std(values, ddof=1) / np.sqrt(5))
    assert estimate(values).p == pytest.approx(2 * scipy.stats.t.sf(statistic, 4))
    assert np.isnan(estimate([1.0]).p)


def test_holm_by_hand():
    """The smallest of four counts four times, the next three times, none less than those before it, none more than 1."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.5]) == [1.0, 1.0]
    assert holm([0.02, float("nan")]) == [0.04, 1.0]
    assert holm([]) == []


def test_holm_rejects_a_true_hypothesis_in_one_family_of_twenty():
    """Ten true hypotheses: at least one p under 5 % in 40 % of the families without a correction."""
    rng = np.random.default_rng(0)
    families = rng.uniform(size=(4000, 10))
    assert np.mean(families.min(axis=1) < 0.05) > 0.35
    assert np.mean([min(holm(p.tolist())) < 0.05 for p in families]) < 0.06


@pytest.mark.parametrize(("count", "alpha"), [(3, 0.05), (5, 0.05), (20, 0.05), (20, 0.001)])
def test_the_least_difference_is_found_with_its_power(count, alpha):
    difference = least_difference(2.0, count, alpha)
    drawn = np.random.default_rng(0).normal(difference, 2.0, (20_000, count))
    found = scipy.stats.ttest_1samp(drawn, 0, axis=1).pvalue < alpha
    assert np.mean(found) == pytest.approx(0.8, abs=0.015)
    assert least_difference(4.0, count, alpha) == pytest.approx(2 * difference)
    with pytest.raises(ValueError, match="at least two"):
        least_difference(1.0, 1)


@pytest.mark.parametrize("values", [[1.0, 1.0, 1.0], [0.1, 0.3 - 0.2]])
def test_equal_values_prove_nothing(values):
    """Two seeds may have the same difference, of two counts; the spread of values is not known by it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = estimate(values)
    assert found.low == pytest.approx(values[0]) == found.high
    assert np.isnan([found.t_low, found.t_high, found.p]).all()


def test_one_value_has_no_interval_and_none_is_refused():
    found = estimate([3.0])
    assert found.mean == 3.0 and np.isnan([found.low, found.t_high]).all()
    with pytest.raises(ValueError, match="at least one"):
        estimate([])


def test_wilson_by_hand():
    """81 of 263 (Newcombe 1998, table I), and the bounds of none and of all."""
    assert rate_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert rate_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert rate_interval(1, 29) == pytest.approx((0.0061, 0.1718), abs=1e-4)
    low, high = rate_interval(7, 7)
    assert low == pytest.approx(1 - rate_interval(0, 7)[1]) and high == 1.0
    with pytest.raises(ValueError, match="n"):
        rate_interval(0, 0)


def test_a_mean_of_rates_has_wilsons_interval_where_each_item_is_right_or_wrong():
    assert mean_rate([1, 0.0, True, False]) == (0.5, *rate_interval(2, 4))
    shares = [0.0, 1.0, 0.5, 0.25]
    found = estimate(shares)
    assert mean_rate(shares) == (found.mean, found.low, found.high)
    assert mean_rate([0.25]) == (0.25, 0.0, 1.0)
    with pytest.raises(ValueError, match="at least one"):
        mean_rate([])


def test_mcnemar_is_the_two_sided_sign_test():
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5, 0) == mcnemar(0, 5) == pytest.approx(2 / 2**5)
    assert mcnemar(8, 2) == pytest.approx(2 * (1 + 10 + 45) / 2**10)
    assert mcnemar(4, 4) == 1.0


def test_power_of_mcnemar_by_simulation():
    count, difference, rate = 40, 0.2, 0.3
    rng = np.random.default_rng(0)
    differing = rng.binomial(count, rate, 4000)
    gained = rng.binomial(differing, (1 + difference / rate) / 2)
    drawn, times = np.unique([gained, differing - gained], axis=1, return_counts=True)
    found = np.array([mcnemar(int(g), int(lost)) <= 0.05 for g, lost in drawn.T])
    simulated = np.sum(times[found]) / 4000
    assert mcnemar_power(count, difference, rate) == pytest.approx(simulated, abs=0.02)
    assert mcnemar_power(count, 0.0, rate) < 0.05  # the test holds its level


def resolvable(count: int, differing: int) -> float:
    """The difference, where there is one."""
    found = resolvable_difference(count, differing)
    assert found is not None
    return found


def test_resolvable_differences():
    found = resolvable(597, 60)
    assert mcnemar_power(597, found, 60 / 597) == pytest.approx(0.8, abs=1e-3)
    # more items resolve smaller differences, more noise larger ones
    assert resolvable(597, 20) < found < resolvable(597, 200)
    assert resolvable(2400, 241) < found
    # models that have never differed: the difference itself makes the items differ
    least = resolvable(100, 0)
    assert mcnemar_power(100, least, least) == pytest.approx(0.8, abs=1e-3)
    assert resolvable_difference(5, 2) is None  # p of five items of one kind is 1/16


def test_the_interval_of_weighted_rates_holds_its_level():
    """Three rates of unlike sizes, one of them near 1; a rate alone has Wilson's."""
    assert weighted_rates_interval([(1.0, 7, 9)]) == pytest.approx(rate_interval(7, 9))
    rates, counts, weights = np.array([0.97, 0.4, 0.7]), [16, 200, 40], np.array([0.5, 0.3, 0.2])
    rng, truth, inside = np.random.default_rng(0), rates @ weights, 0
    for _ in range(400):
        drawn = rng.binomial(counts, rates)
        low, high = weighted_rates_interval(
            [(float(w), int(s), n) for w, s, n in zip(weights, drawn, counts, strict=True)]
        )
        inside += low <= truth <= high
    assert 0.93 < inside / 400 < 0.98
    assert weighted_rates_interval([(0.5, 0, 5), (0.5, 0, 8)])[0] == pytest.approx(0, abs=1e-12)
