"""Dynamic scaling: the bounds of the two parts of the reward over progress mu in [0, 1].

Format hi 2 -> 1, correctness hi 2 -> 3, lo = -hi, linear in mu; static (an ablation): format [0,
1], correctness [-3, 3].
"""

from rest_jax.config import RewardConfig


def format_bounds(cfg: RewardConfig, progress: float) -> tuple[float, float]:
    """(lo, hi) of the format part at `progress` mu; ValueError below 0, 1 from 1 on."""
    if not cfg.dynamic:
        return 0.0, 1.0
    high = _between(cfg.format_scale_start, cfg.format_scale_end, progress)
    return -high, high


def correctness_bounds(cfg: RewardConfig, progress: float) -> tuple[float, float]:
    """(lo, hi) of the correctness part at `progress` mu; ValueError below 0, 1 from 1 on."""
    if not cfg.dynamic:
        return -3.0, 3.0
    high = _between(cfg.correctness_scale_start, cfg.correctness_scale_end, progress)
    return -high, high


def scale(score: float, bounds: tuple[float, float]) -> float:
    """Maps a score in [0, 1] linearly onto the bounds."""
    low, high = bounds
    return low + (high - low) * score


def _between(start: float, end: float, progress: float) -> float:
    if not progress >= 0.0:
        raise ValueError(f"reward progress {progress}: a number from 0 to 1 is needed")
    return start + (end - start) * min(1.0, progress)
