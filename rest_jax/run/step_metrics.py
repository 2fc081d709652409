"""What the host knows of a step: rewards, lengths, packing; and how fast its stages were against the machine's peak."""

from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

from rest_jax.models.config import DecoderConfig
from rest_jax.rewards import Score
from rest_jax.rl.packing import MicroBatch
from rest_jax.rl.step import BatchLengths
from rest_jax.rollout.experience import Experience
from rest_jax.run import flops, machine
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


class Speed:
    """Rates of a run's stages; the share of the peak (MFU) is left out where the hardware's peak is not known."""

    def __init__(self, cfg: DecoderConfig, mesh: Mesh):
        self.cfg = cfg
        self.peak = machine.mesh_peak_flops(mesh.devices.flat, cfg.dtype)

    def of_experience(self, now: Experience, whole: BatchLengths) -> dict[str, float]:
        """Of rollout and reward; `whole` is the batch of all processes."""
        prompts, responses = whole.prompt_length, whole.response_length
        rollout, score = now.seconds["time/rollout"], max(now.seconds["time/score"], 1e-9)
        own = now.scored.rollout.response_length
        work = flops.rollout_flops(self.cfg, prompts, responses)
        return {
            "time/rollout_tokens_per_second": float(responses.sum()) / rollout,
            "time/reward_tokens_per_second": float(own.sum()) / score,
            "time/reward_responses_per_second": own.size / score,
            **self._mfu("time/rollout_mfu", work, rollout),
        }

    def of_update(
        self, whole: BatchLengths, wanted: np.ndarray, seconds: float
    ) -> dict[str, float]:
        """Of the update, on trajectory tokens: a skipped group's tokens count, its FLOPs do not."""
        prompts, responses = whole.prompt_length, whole.response_length
        trajectory = float(responses.shape[1] * prompts.sum() + responses.sum())
        work = flops.update_flops(self.cfg, prompts[wanted], responses[wanted])
        return {
            "time/update_tokens_per_second": trajectory / seconds,
            **self._mfu("time/update_mfu", work, seconds),
        }

    def _mfu(self, name: str, work: float, seconds: float) -> dict[str, float]:
        return {} if self.peak is None else {name: work / seconds / self.peak}
