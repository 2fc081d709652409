"""Signs that a run learns nothing, found in its metrics: each is said once, with what to do, after `STEPS` steps in a row."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

STEPS = 20
_CERTAIN = 1e-3  # nats: less entropy than this, and every completion is the same


class Symptom(NamedTuple):
    """Whether the metrics of a step show it, and what is said of it."""

    shown: Callable[[Mapping[str, float]], bool]
    advice: str


SYMPTOMS = (
    Symptom(
        lambda m: m["rollout/response_tokens_max"] <= 1,
        "completions are empty; look at the end-of-turn token of the tokenizer and at samples.jsonl",
    ),
    Symptom(
        lambda m: m["rollout/truncated"] == 1 and m["rollout/entropy"] < _CERTAIN,
        "completions are one certain text without an end; start from an earlier checkpoint with a lower optimizer.learning_rate",
    ),
    Symptom(
        lambda m: m["reward/equal_groups"] == 1,
        "the rewards of every group are equal, so that nothing is learned; look at samples.jsonl, and raise rollout.group_size "
        "or rollout.temperature, or start from a supervised run",
    ),
    Symptom(
        lambda m: m["reward/format_score"] == 0,
        "no completion is in the format of data.template; look at samples.jsonl, raise rollout.max_response_tokens if "
        "completions are cut off, or start from a supervised run",
    ),
)


class Watch:
    """Counts for how many steps in a row each symptom has been there."""

    def __init__(self) -> None:
        self._steps = dict.fromkeys(SYMPTOMS, 0)

    def look(self, metrics: Mapping[str, float]) -> list[str]:
        """What is to be said after a step; nothing of a supervised one."""
        if "reward/mean" not in metrics:
            return []
        for symptom, steps in self._steps.items():
            # What was said is not counted anew.
            if steps < STEPS:
                self._steps[symptom] = steps + 1 if symptom.shown(metrics) else 0
        said = [s.advice for s, steps in self._steps.items() if steps == STEPS]
        self._steps = {s: STEPS + 1 if n == STEPS else n for s, n in self._steps.items()}
        return [f"warning: for {STEPS} steps, {advice}" for advice in said]
