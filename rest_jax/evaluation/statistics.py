"""How sure a mean over seeds, or a difference of methods paired by seed, is: two 95 % intervals, by scipy.

Seeds are few (five is usual). The percentile bootstrap is too narrow then; Student's t is wider and holds its level
better. A difference counts as found only where both intervals exclude zero.
"""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

RESAMPLES = 10_000


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The mean of `count` values with its bootstrap and its t interval; the bounds of fewer than two are NaN."""

    mean: float
    low: float
    high: float
    t_low: float
    t_high: float
    count: int

    @property
    def excludes_zero(self) -> bool:
        """Whether both intervals lie on one side of zero. Two values may agree by chance: three are the least."""
        outside = min(self.low, self.t_low) > 0 or max(self.high, self.t_high) < 0
        return outside and self.count >= 3


def estimate(values: Sequence[float], level: float = 0.95) -> Estimate:
    """The mean of independent values with both intervals. ValueError without a value."""
    x = np.asarray(values, np.float64)
    if x.ndim != 1 or not x.size:
        raise ValueError(f"values of shape {x.shape}: a list of at least one is needed")
    if x.size < 2:
        return Estimate(float(x.mean()), *[float("nan")] * 4, count=1)
    with warnings.catch_warnings():
        # Values that are all equal, or that were not measured, have no spread to speak of.
        warnings.simplefilter("ignore", RuntimeWarning)
        t = stats.ttest_1samp(x, 0.0).confidence_interval(level)
        bounds = stats.bootstrap(
            (x,), np.mean, n_resamples=RESAMPLES, confidence_level=level, method="percentile", rng=0
        ).confidence_interval
    ends = (float(end) for end in (bounds.low, bounds.high, t.low, t.high))
    return Estimate(float(x.mean()), *ends, count=x.size)


def paired(values: Mapping[int, float], reference: Mapping[int, float]) -> Estimate:
    """The mean difference over the seeds that both have. ValueError when they share none."""
    shared = sorted(values.keys() & reference.keys())
    if not shared:
        raise ValueError("no seed in common")
    return estimate([values[seed] - reference[seed] for seed in shared])
