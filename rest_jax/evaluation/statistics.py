"""How sure a figure is: intervals of rates and means, tests of paired differences, and what a sample could have shown.

Rates have Wilson's interval, which holds its level near 0 and 1 and for few items; means have the percentile bootstrap and,
for the few seeds of a comparison, Student's t. Two models that answered the same items are compared by the items on which they
differ: McNemar's exact test; where items have shares, by Student's t test of the differences. All intervals are of 95 % unless
`level` says otherwise.
"""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy  # its modules are loaded when they are used: 0.7 s and 40 MB

RESAMPLES = 10_000
_DRAWN_AT_ONCE = 2**24  # values of resamples in memory
_LEAST_PAIRS = (
    6  # fewer than six differing items are never significant at 5 %, even if all go one way
)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The mean of `count` values with its bootstrap and its t interval, and the two-sided p-value of a t test that it is zero; of
    fewer than two values they are NaN, and the t interval and p of values that are all equal, whose spread is not known.
    """

    mean: float
    low: float
    high: float
    t_low: float
    t_high: float
    p: float
    count: int


def estimate(values: Sequence[float], level: float = 0.95) -> Estimate:
    """The mean of independent values with both intervals. ValueError without a value."""
    x = np.asarray(values, np.float64)
    if x.ndim != 1 or not x.size:
        raise ValueError(f"values of shape {x.shape}: a list of at least one is needed")
    if x.size < 2:
        return Estimate(float(x.mean()), *[float("nan")] * 5, count=1)
    with warnings.catch_warnings():
        # of values that were not measured
        warnings.simplefilter("ignore", RuntimeWarning)
        # Two seeds may well have the same difference of two counts: that is no proof of it.
        spread = np.ptp(x) > 1e-9 * np.max(np.abs(x))
        test = scipy.stats.ttest_1samp(x if spread else np.full(2, np.nan), 0.0)
        t = test.confidence_interval(level)
        bounds = scipy.stats.bootstrap(
            (x,), np.mean, n_resamples=RESAMPLES, batch=-(-_DRAWN_AT_ONCE // x.size),
            confidence_level=level, method="percentile", rng=0,
        ).confidence_interval  # fmt: skip
    ends = (float(end) for end in (bounds.low, bounds.high, t.low, t.high, test.pvalue))
    return Estimate(float(x.mean()), *ends, count=x.size)


def paired(values: Mapping[Any, float], reference: Mapping[Any, float]) -> Estimate:
    """The mean difference over the keys (seeds, items) that both have. ValueError when they share none."""
    differences = paired_differences(values, reference)
    if not differences:
        raise ValueError("nothing in common")
    return estimate(differences)


def paired_differences(values: Mapping[Any, float], reference: Mapping[Any, float]) -> list[float]:
    """Of the keys that both have, in their order."""
    return [values[key] - reference[key] for key in sorted(values.keys() & reference.keys())]


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (1979): with these all hypotheses of p <= alpha are rejected, and the probability of one false
    rejection among them is at most alpha. NaN, of what could not be tested, counts as 1.
    """
    p = np.nan_to_num(np.asarray(p_values, np.float64), nan=1.0)
    order = np.argsort(p, kind="stable")
    steps = np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p))))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(steps, 1.0)
    return adjusted.tolist()


def least_difference(
    deviation: float, count: int, alpha: float = 0.05, power: float = 0.8
) -> float:
    """The least mean of `count` paired differences of this standard deviation that a two-sided t test at level `alpha` finds with
    probability `power`. ValueError for fewer than two.
    """
    if count < 2:
        raise ValueError(f"{count} differences: at least two are needed")
    critical = scipy.stats.t.isf(alpha / 2, count - 1)

    def missing(shift: float) -> float:
        # rejections on the wrong side are too few to count
        return scipy.stats.nct.sf(critical, count - 1, shift) - power

    shift = scipy.optimize.root_scalar(missing, bracket=(1e-6, 4 * critical + 10)).root
    return float(shift * deviation / count**0.5)


def rate_interval(successes: int, count: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of the rate successes / count. ValueError for a count of 0."""
    found = scipy.stats.binomtest(successes, count).proportion_ci(level, "wilson")
    return float(found.low), float(found.high)


def mean_rate(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean of the rates of items, each 0 to 1, with its interval: Wilson's where each is 0 or 1, else the bootstrap's (0 to 1
    for a single one). ValueError without a value.
    """
    if len(values) and all(value in (0, 1) for value in values):
        right = int(sum(values))
        return right / len(values), *rate_interval(right, len(values))
    found = estimate(values)
    return (found.mean, found.low, found.high) if found.count > 1 else (found.mean, 0.0, 1.0)


def weighted_rates_interval(
    parts: Sequence[tuple[float, int, int]], level: float = 0.95
) -> tuple[float, float]:
    """The interval of sum(w s / n) over (w, s, n), weights and independent rates of s successes in n: as far from it as Wilson's
    limits of the rates are, in the square mean (MOVER; Zou, Huang and Zhang 2009). ValueError for a count of 0.
    """
    middle = below = above = 0.0
    for weight, successes, count in parts:
        low, high = rate_interval(successes, count, level)
        rate = successes / count
        middle += weight * rate
        below += (weight * (rate - low)) ** 2
        above += (weight * (high - rate)) ** 2
    return middle - below**0.5, middle + above**0.5


def mcnemar(gained: int, lost: int) -> float:
    """The exact two-sided p-value of no difference, where `gained` items are right only in the one model and `lost` only in
    the other. 1 when there are none.
    """
    return float(scipy.stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def resolvable_difference(
    count: int, differing: int, power: float = 0.8, alpha: float = 0.05
) -> float | None:
    """The least difference of two rates over `count` paired items that McNemar's exact test finds at level `alpha` with
    probability `power`, when as many items differ as have differed here (or, if more, as such a difference needs at least).

    None where no difference is large enough. The power is summed over the number of differing items and how they split.
    """
    if count < _LEAST_PAIRS or mcnemar_power(count, 1.0, 1.0, alpha) < power:
        return None

    def missing(difference: float) -> float:
        rate = max(differing / count, difference)
        return mcnemar_power(count, difference, rate, alpha) - power

    return float(scipy.optimize.root_scalar(missing, bracket=(1e-9, 1.0), xtol=1e-6).root)


def mcnemar_power(count: int, difference: float, rate: float, alpha: float = 0.05) -> float:
    """Probability that McNemar's exact test finds a `difference` of two rates when a share `rate` of `count` items differs."""
    pairs = np.arange(count + 1)
    # The most items on the smaller side that are still significant; -1: none.
    critical = scipy.stats.binom.ppf(alpha / 2, pairs, 0.5)
    critical -= scipy.stats.binom.cdf(critical, pairs, 0.5) > alpha / 2
    one_way = (1 + difference / rate) / 2
    found = scipy.stats.binom.cdf(critical, pairs, one_way)
    found += scipy.stats.binom.sf(pairs - critical - 1, pairs, one_way)
    return float(np.sum(scipy.stats.binom.pmf(pairs, count, rate) * found))
