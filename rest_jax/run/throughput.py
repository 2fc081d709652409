"""How fast the stages of a step were against the machine's peak, and how full its micro-batches."""

import numpy as np
from jax.sharding import Mesh

from rest_jax.models.config import DecoderConfig
from rest_jax.run import flops, machine


def packing_metrics(plan, groups: int) -> dict[str, float]:
    """Of the micro-batches of a step over `groups` groups."""
    micro = [m for mini in plan for m in mini]
    positions = sum(m.positions for m in micro)
    taken = sum(int((m.pick >= 0).sum()) for m in micro)
    return {
        "update/micro_batches": len(micro),
        "update/padding": 1 - sum(m.tokens for m in micro) / positions if positions else 0.0,
        "update/skipped_groups": 1 - taken / groups,
    }


class Speed:
    """Rates of a run's stages; the share of the peak (MFU) is left out where the hardware's peak is not known."""

    def __init__(self, cfg: DecoderConfig, mesh: Mesh):
        self.cfg = cfg
        self.peak = machine.mesh_peak_flops(mesh.devices.flat, cfg.dtype)

    def of_experience(
        self, prompts: np.ndarray, responses: np.ndarray, seconds: dict[str, float]
    ) -> dict[str, float]:
        """Of rollout and reward; lengths [P] and [P, G] of the global batch."""
        rollout, score = seconds["time/rollout"], max(seconds["time/score"], 1e-9)
        work = flops.rollout_flops(self.cfg, prompts, responses)
        return {
            "time/rollout_tokens_per_second": float(responses.sum()) / rollout,
            "time/reward_tokens_per_second": float(responses.sum()) / score,
            "time/reward_responses_per_second": responses.size / score,
            **self._mfu("time/rollout_mfu", work, rollout),
        }

    def of_update(
        self, prompts: np.ndarray, responses: np.ndarray, active: np.ndarray, seconds: float
    ) -> dict[str, float]:
        """Of the update, on trajectory tokens: a skipped group's tokens count, its FLOPs do not."""
        trajectory = float(responses.shape[1] * prompts.sum() + responses.sum())
        work = flops.update_flops(self.cfg, prompts[active], responses[active])
        return {
            "time/update_tokens_per_second": trajectory / seconds,
            **self._mfu("time/update_mfu", work, seconds),
        }

    def _mfu(self, name: str, work: float, seconds: float) -> dict[str, float]:
        return {} if self.peak is None else {name: work / seconds / self.peak}
