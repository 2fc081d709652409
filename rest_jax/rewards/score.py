"""Rule-based reward of one completion: format part + correctness part (+ length part, off by default) (+ that of a plug-in).

Host code without jax. The parts are scores in [0, 1] mapped onto bounds that move linearly with progress mu in [0, 1]:
format hi 2 -> 1, correctness hi 2 -> 3, lo = -hi; static (an ablation): format [0, 1], correctness [-3, 3].
docs/method.md section 6.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import NamedTuple

from rest_jax.config import RewardConfig
from rest_jax.rewards.tool_call import accuracy, same_calls
from rest_jax.tool_calls import Answer, Block, Target

_LETTER = {
    Block.THINK: "T",
    Block.CALLS: "C",
    Block.RESPONSE: "R",
    Block.TEXT: "x",
    Block.BROKEN: "x",
}

# (gold has calls, gold has a response) -> all blocks of a well-formed completion
_TOOLRL = {(True, False): "TC", (False, True): "TR", (True, True): "TCR", (False, False): "T"}
_PROSE = {(True, False): "T?C+", (False, True): "T?R", (True, True): "T?RC+", (False, False): "T"}

# of `Score`, whose sum is the reward
PARTS = ("format_part", "correctness_part", "length_part", "plugin_part")


@dataclasses.dataclass(frozen=True)
class Score:
    """The reward of one completion and what it was made of."""

    reward: float  # sum of the parts
    format_part: float
    correctness_part: float
    format_score: float  # S_format, 0 or 1
    accuracy: float  # S_acc in [0, 1]; without gold calls: 1, or 0 if a tool was called
    # the format is right, and its reference reader reads the gold calls, in any order, and no others
    exact: bool
    spurious: bool  # gold has no calls, the completion calls a tool or tries to
    length_part: float = 0.0  # off by default
    plugin_part: float = 0.0


@dataclasses.dataclass(frozen=True)
class PluginScore(Score):
    """The score of a run with a `reward.plugin`."""

    plugin_parts: Mapping[str, float] = dataclasses.field(default_factory=dict)
    plugin_fault: str | None = None  # why it has none

    @property
    def outcome(self) -> "Outcome":
        """What the plug-in has said."""
        return Outcome(self.plugin_parts, self.plugin_fault)


class Outcome(NamedTuple):
    """What a plug-in makes of a completion: named parts, or a fault and none."""

    parts: Mapping[str, float]
    fault: str | None = None


def add_plugin(score: Score, outcome: Outcome) -> PluginScore:
    """The score with the parts of a plug-in in its reward."""
    part = sum(outcome.parts.values())
    values = vars(score) | {"reward": score.reward + part, "plugin_part": part}
    return PluginScore(**values, plugin_parts=dict(outcome.parts), plugin_fault=outcome.fault)


def score(
    answer: Answer,
    target: Target,
    template_name: str,
    cfg: RewardConfig,
    progress: float,
    tokens: int = 0,
) -> Score:
    """Scores one parsed completion at `progress` mu in [0, 1]. `tokens`: length of the completion, for the length part."""
    s_format = format_score(answer, target, template_name, cfg.strict_format)
    bounds = correctness_bounds(cfg, progress)
    spurious = not target.calls and bool(answer.calls or answer.broken_calls)
    if target.calls:
        s_acc = accuracy(target.calls, answer.calls, cfg, answer.broken_calls)
        correctness_part = scale(s_acc, bounds)
    else:
        s_acc = 0.0 if spurious else 1.0
        correctness_part = bounds[0] if spurious and cfg.penalise_spurious_calls else 0.0
    format_part = scale(s_format, format_bounds(cfg, progress))
    if not cfg.builtin:
        format_part = correctness_part = 0.0
    length_part = cfg.builtin * cfg.length_weight * min(1.0, tokens / cfg.length_target_tokens)
    return Score(
        reward=format_part + correctness_part + length_part,
        format_part=format_part,
        correctness_part=correctness_part,
        format_score=s_format,
        accuracy=s_acc,
        exact=s_format == 1.0
        and not answer.broken_calls
        and answer.executable
        and same_calls(target.calls, answer.calls),
        spurious=spurious,
        length_part=length_part,
    )


def format_score(answer: Answer, target: Target, template_name: str, strict: bool) -> float:
    """S_format: 1.0 if `answer` has the blocks that its kind of gold answer needs in this template, else 0.0.

    Gold kinds: calls only, response only, both, think only (neither). A think block is required by toolrl, optional
    elsewhere. strict: the blocks are exactly those, so that text outside them, repeated blocks and broken tags fail, and what is
    asked for says something. Not strict (the released rule): the required blocks occur, in order, and toolrl has no response
    block where gold has none.
    """
    kind = (bool(target.calls), target.response is not None)
    written = "".join(map(_LETTER.__getitem__, answer.blocks))
    toolrl = template_name == "toolrl"
    pattern = (_TOOLRL if toolrl else _PROSE)[kind]
    if strict:
        said = answer.response if kind[1] else kind[0] or answer.think
        return float(bool(said) and re.fullmatch(pattern, written) is not None)
    if toolrl and not kind[1] and "R" in written:
        return 0.0
    return float(_occur_in_order(pattern.replace("T?", "").replace("+", ""), written))


def format_bounds(cfg: RewardConfig, progress: float) -> tuple[float, float]:
    """(lo, hi) of the format part at progress mu = min(1, `progress`); ValueError below 0 where the scale is dynamic."""
    if not cfg.dynamic:
        return 0.0, 1.0
    high = _between(cfg.format_scale_start, cfg.format_scale_end, progress)
    return -high, high


def correctness_bounds(cfg: RewardConfig, progress: float) -> tuple[float, float]:
    """(lo, hi) of the correctness part at progress mu = min(1, `progress`); ValueError below 0 where the scale is dynamic."""
    if not cfg.dynamic:
        return -3.0, 3.0
    high = _between(cfg.correctness_scale_start, cfg.correctness_scale_end, progress)
    return -high, high


def scale(score: float, bounds: tuple[float, float]) -> float:
    """Maps a score in [0, 1] linearly onto the bounds."""
    low, high = bounds
    return low + (high - low) * score


def _occur_in_order(required: str, written: str) -> bool:
    pos = 0
    for letter in required:
        pos = written.find(letter, pos) + 1
        if pos == 0:
            return False
    return True


def _between(start: float, end: float, progress: float) -> float:
    if not progress >= 0.0:
        raise ValueError(f"reward progress {progress}: a number from 0 to 1 is needed")
    return start + (end - start) * min(1.0, progress)
