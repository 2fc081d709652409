"""How sure a comparison of methods is: intervals over seeds, and differences paired by seed.

Seeds are few (five is usual), so two intervals are given: the percentile bootstrap over seeds, and Student's t, which is
wider and holds its level better at that size. A difference counts as shown only where both leave zero out.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import scipy.stats

RESAMPLES = 10_000


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over seeds. Bounds are NaN for fewer than two values."""

    mean: float
    low: float  # bootstrap
    high: float
    t_low: float
    t_high: float
    count: int

    @property
    def shown(self) -> bool:
        """Whether both intervals leave zero out, on the same side. Two values may agree by chance: three are the least."""
        outside = min(self.low, self.t_low) > 0 or max(self.high, self.t_high) < 0
        return outside and self.count >= 3


def estimate(values: Sequence[float], level: float = 0.95, seed: int = 0) -> Estimate:
    """The mean of independent values with its bootstrap and t interval. ValueError without a value."""
    x = np.asarray(values, np.float64)
    if x.ndim != 1 or not x.size:
        raise ValueError(f"values of shape {x.shape}: a list of at least one is needed")
    mean = float(x.mean())
    if x.size < 2:
        return Estimate(mean, *[float("nan")] * 4, count=1)
    low, high = bootstrap(x, level, seed)
    half = scipy.stats.t.ppf(0.5 + level / 2, x.size - 1) * x.std(ddof=1) / np.sqrt(x.size)
    return Estimate(mean, low, high, mean - half, mean + half, x.size)


def bootstrap(x: np.ndarray, level: float, seed: int) -> tuple[float, float]:
    """Percentile interval of the mean over resampled values `[N]`."""
    rows = np.random.default_rng(seed).integers(0, len(x), (RESAMPLES, len(x)))
    tail = 50 * (1 - level)
    low, high = np.percentile(x[rows].mean(axis=1), [tail, 100 - tail])
    return float(low), float(high)


def paired(values: dict[int, float], reference: dict[int, float], level: float = 0.95) -> Estimate:
    """The mean difference over the seeds that both have. ValueError when they share none."""
    shared = sorted(values.keys() & reference.keys())
    if not shared:
        raise ValueError("no seed in common")
    return estimate([values[seed] - reference[seed] for seed in shared], level)
