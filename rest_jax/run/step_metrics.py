"""What the host knows of a step: rewards, lengths, packing."""

from collections.abc import Sequence

import numpy as np

from rest_jax.rewards import Score
from rest_jax.rl.packing import MicroBatch
from rest_jax.rl.step import BatchLengths
from rest_jax.rollout.experience import Experience
from rest_jax.tool_calls import Target
from rest_jax.types import RolloutBatch


def step_metrics(
    now: Experience,
    whole: BatchLengths,
    plan: Sequence[Sequence[MicroBatch]],
    stop_ids: tuple[int, ...],
) -> dict[str, float]:
    """Metrics of a step that need no device; `whole` is the batch of all processes."""
    micro = [m for update in plan for m in update]
    padded = sum(m.padded for m in micro)
    taken = sum(int((m.pick >= 0).sum()) for m in micro)
    return (
        {
            "rollout/truncated": truncated(now.scored.rollout, stop_ids),
            "rollout/tokens": int(np.sum(now.scored.rollout.response_length)),
            "rollout/decode_slot_utilisation": now.stats.utilisation,
            "rollout/staleness": now.staleness,
            "update/micro_batches": len(micro),
            "update/padding": 1 - sum(m.tokens for m in micro) / padded if padded else 0.0,
            "update/skipped_groups": 1 - taken / len(whole.prompt_length),
        }
        | reward_metrics(now.scores, now.targets, now.progress)
        | now.seconds
    )


def truncated(rollout: RolloutBatch, stop_ids: tuple[int, ...]) -> float:
    """Share of the responses whose last token does not end the turn."""
    last = np.take_along_axis(rollout.responses, rollout.response_length[..., None] - 1, axis=-1)
    return float(np.mean(~np.isin(last, stop_ids)))


def reward_metrics(
    scores: list[list[Score]], targets: list[Target], progress: float
) -> dict[str, float]:
    """Means over the sampled answers of what the host found."""
    flat = [s for group in scores for s in group]
    spurious = [
        s.spurious for group, t in zip(scores, targets, strict=True) for s in group if not t.calls
    ]
    return {
        "reward/progress": progress,
        "reward/format_part": float(np.mean([s.format_part for s in flat])),
        "reward/correctness_part": float(np.mean([s.correctness_part for s in flat])),
        "reward/accuracy": float(np.mean([s.accuracy for s in flat])),
        "reward/exact": float(np.mean([s.exact for s in flat])),
        "reward/spurious": float(np.mean(spurious)) if spurious else 0.0,
    }
