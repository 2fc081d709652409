"""What a measurement of gradient variance found (`rl/variance.py`): settings and rows, plain values, as JSON."""

import dataclasses
import math
from typing import Any

from rest_jax.analysis.variance.group_gradients import EXACT_FLOATS

# Of 1 - sum p^2 <= 1 - exp(-H): the rounding of a float32 softmax, its sums included.
TOLERANCE = 1e-5
TELLING = 1e-3  # least 1 - exp(-H) at which the ratio of the two sides is more than rounding


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a measurement costs and how it draws."""

    tokens: int = 32  # a region, for beta
    resamples: int = 2000  # of the groups, for intervals
    chunk: int = 128  # response tokens a row whose logits exist at once
    exact_floats: int = EXACT_FLOATS
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Inequality:
    """Lemma 2: means over the tokens of a region, or over all.

    |onehot(a) - p|^2 = 1 - 2 p_a + sum p^2 has the mean 1 - sum p^2 over a ~ p. So over all tokens `sampled` is `gini` within
    `sampled_error` (which counts the draw of actions alone: given their contexts, the deviations of different tokens are
    uncorrelated). Within a region it need not be: which region a token belongs to depends on the action drawn.
    """

    tokens: int
    entropy: float  # nats
    gini: float  # 1 - sum p^2 = E|onehot - p|^2
    bound: float  # 1 - exp(-H)
    sampled: float  # |onehot(a) - p|^2 of the actions drawn
    sampled_error: float
    largest_ratio: (
        float | None
    )  # gini / bound over single tokens; None when every bound is below `TELLING`
    largest_excess: float  # gini - bound over single tokens
    violations: int  # tokens whose gini is above their bound by more than `TOLERANCE`


@dataclasses.dataclass(frozen=True)
class RegionRow(Inequality):
    """The inequality, the gradient of the region, and its tokens' own gradients (+- standard error)."""

    gradient_square: float  # |g|^2 of the part of the uniform loss on this region
    gradient_variance: float  # of that part
    sampled_tokens: int  # looked at for what follows
    beta: float  # mean |J|_F^2 (1 - exp(-H))
    beta_error: float | None
    jacobian: float  # |J|_F^2, weighted by 1 - exp(-H)
    jacobian_error: float | None
    score: float  # mean E_a |J^T s|^2, at most beta
    score_error: float | None


@dataclasses.dataclass(frozen=True)
class RuleRow:
    """The mini-batch gradient under one weight rule; intervals are 95 %, over resampled groups."""

    weights: dict[str, float]  # realised mean by region
    bound: float  # sum_t beta_t w_t^2, uniform = 1
    variance: float
    mean_square: float
    share: float  # variance / mean_square
    share_interval: tuple[float, float]
    relative: float  # share / that of uniform
    relative_interval: tuple[float, float]
    noise_scale: (
        float | None
    )  # prompts at which noise and signal are equal; None: no signal seen in this batch
    cosine: float  # of the gradient with that of uniform


@dataclasses.dataclass(frozen=True)
class VarianceReport:
    """What `measure` found. `to_json` gives plain values; numbers that are not finite become null."""

    prompts: int
    group_size: int
    groups_with_advantage: int
    exact_gradients: bool  # False: from count sketches
    gradient_dimensions: int
    tolerance: float
    settings: Settings
    overall: Inequality
    regions: dict[str, RegionRow]
    rules: dict[str, RuleRow]

    def to_json(self) -> dict[str, Any]:
        """Nested dicts of numbers, in the order of the fields."""
        return _plain(dataclasses.asdict(self))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(v) for name, v in value.items()}
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value
