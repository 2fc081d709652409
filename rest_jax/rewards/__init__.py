"""Rule-based reward of one answer: format part + correctness part (+ length part, off by default).

Host code without jax. The parts are scores in [0, 1] mapped onto bounds that move with progress
(`schedule`). docs/method.md section 6.
"""

import dataclasses

from rest_jax.config import RewardConfig
from rest_jax.rewards.format import format_score
from rest_jax.rewards.schedule import correctness_bounds, format_bounds, scale
from rest_jax.rewards.tool_call import accuracy, same_calls
from rest_jax.tool_calls import Answer, Target


@dataclasses.dataclass(frozen=True)
class Score:
    """The reward of one answer and what it was made of."""

    reward: float  # sum of the parts
    format_part: float
    correctness_part: float
    format_score: float  # S_format, 0 or 1
    accuracy: float  # S_acc in [0, 1]; without gold calls: 1, or 0 if a tool was called
    exact: bool  # calls equal gold as multisets, none unreadable, and the format is right
    spurious: bool  # gold has no calls, the answer calls a tool or tries to


def score(
    answer: Answer,
    target: Target,
    template_name: str,
    cfg: RewardConfig,
    progress: float,
    tokens: int = 0,
) -> Score:
    """Scores one answer at `progress` mu in [0, 1]. `tokens`: length of the response, for the
    length part.
    """
    s_format = format_score(answer, target, template_name, cfg.strict_format)
    bounds = correctness_bounds(cfg, progress)
    spurious = not target.calls and bool(answer.calls or answer.broken_calls)
    if target.calls:
        s_acc = accuracy(target.calls, answer.calls, cfg)
        correctness_part = scale(s_acc, bounds)
    else:
        s_acc = 0.0 if spurious else 1.0
        correctness_part = bounds[0] if spurious and cfg.penalise_spurious_calls else 0.0
    format_part = scale(s_format, format_bounds(cfg, progress))
    length_part = cfg.length_weight * min(1.0, tokens / cfg.length_target_tokens)
    return Score(
        reward=format_part + correctness_part + length_part,
        format_part=format_part,
        correctness_part=correctness_part,
        format_score=s_format,
        accuracy=s_acc,
        exact=s_format == 1.0
        and not answer.broken_calls
        and same_calls(target.calls, answer.calls),
        spurious=spurious,
    )
