"""How fast a run is: tokens a second, and the FLOPs of its model over what the hardware could do (MFU).

FLOPs of a decoder are the matmul work its maths asks for, whatever the hardware does; a multiply-add is 2. With L layers, D
model, N heads, K key/value heads, H head dim, F mlp, V vocabulary:

    trunk, a token            L (4 D N H + 4 D K H + 6 D F)    q and o, k and v, gate, up and down
      with E experts          L (.. + 6 D F k + 2 D E)         of the k experts of a token, and the router
    head, a position          2 D V
    attention, a query        4 L N H keys                     scores and the weighted sum of values
    adapters, a token         2 L r (I + O) of each matrix     of LoRA, whose frozen matrices have no gradient of their own

Norms, rotations, softmax, activations and the embedding look-up are not counted; neither are padding, recomputation in
the backward pass, or keys behind the causal mask. (PaLM, arXiv:2204.02311, appendix B, with attention exact.)
"""

import re
import resource
import sys
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Int

from rest_jax.models.config import DecoderConfig

# Published peak FLOP/s of one jax device: dense, no sparsity, by a pattern searched in `device_kind`; the first match
# counts. bfloat16: matrix units with float32 accumulation. float32: the FP32 units of a GPU, since the models ask
# for true float32 matmuls, not TF32; no such rate is published for TPUs. NVIDIA's sheets state most bfloat16 rates
# with sparsity: twice the dense ones.
_BFLOAT16, _FLOAT32 = "bfloat16", "float32"
PEAK_FLOPS: dict[str, dict[str, float]] = {
    # docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e: peak compute per chip; a chip is one jax device
    r"TPU v4$": {_BFLOAT16: 275e12},
    r"TPU v5 lite|TPU v5e": {_BFLOAT16: 197e12},
    r"TPU v5p?$": {_BFLOAT16: 459e12},
    r"TPU v6 lite|TPU v6e": {_BFLOAT16: 918e12},
    # docs.cloud.google.com/tpu/docs/tpu7x: 2307e12 a chip, and a chip is two jax devices
    r"TPU7x": {_BFLOAT16: 2307e12 / 2},
    # NVIDIA A100 datasheet (nvidia.com/en-us/data-center/a100); SXM and PCIe are alike
    r"\bA100\b": {_BFLOAT16: 312e12, _FLOAT32: 19.5e12},
    # NVIDIA H100 and H200 datasheets (nvidia.com/en-us/data-center/h100, h200): SXM unless named otherwise
    r"\bH100 PCIe": {_BFLOAT16: 1513e12 / 2, _FLOAT32: 51e12},
    r"\bH[12]00 NVL": {_BFLOAT16: 1671e12 / 2, _FLOAT32: 60e12},
    r"\bH[12]00\b": {_BFLOAT16: 1979e12 / 2, _FLOAT32: 67e12},
    # NVIDIA HGX page (nvidia.com/en-us/data-center/hgx): HGX B200, 36e15 sparse and 600e12, by 8 GPUs
    r"\bB200\b": {_BFLOAT16: 2250e12, _FLOAT32: 75e12},
    # NVIDIA L4, L40S and A10 datasheets (nvidia.com/en-us/data-center/l4, l40s, products/a10-gpu)
    r"\bL4\b": {_BFLOAT16: 242e12 / 2, _FLOAT32: 30.3e12},
    r"\bL40S\b": {_BFLOAT16: 362.05e12, _FLOAT32: 91.6e12},
    r"\bA10\b": {_BFLOAT16: 125e12, _FLOAT32: 31.2e12},
    # NVIDIA Ada GPU architecture whitepaper, appendix A; the laptop's and the "D" are other chips
    r"RTX 4090$": {_BFLOAT16: 165.2e12, _FLOAT32: 82.6e12},
}


def rollout_flops(
    cfg: DecoderConfig,
    prompt_lengths: Int[np.ndarray, " P"],
    response_lengths: Int[np.ndarray, "P G"],
) -> float:
    """Useful FLOPs of sampling: every prompt once, and for every response token trunk, head and attention over the prompt,
    the earlier tokens and itself.
    """
    return sum(_forward_flops(cfg, prompt_lengths, response_lengths))


def _forward_flops(cfg: DecoderConfig, prompt_lengths, response_lengths) -> tuple[float, float]:
    """Of products with weights, and of attention."""
    prompts, responses = (np.asarray(x, np.int64) for x in (prompt_lengths, response_lengths))
    answered = int(responses.sum())
    keys = int(_causal(prompts).sum() + (prompts[:, None] * responses + _causal(responses)).sum())
    heads = 4 * cfg.d_model * (cfg.n_heads + cfg.n_kv_heads) * cfg.head_dim
    mlp = 6 * cfg.d_model * cfg.d_ff
    if cfg.n_experts:
        mlp = cfg.experts_per_token * mlp + 2 * cfg.d_model * cfg.n_experts
    trunk = cfg.n_layers * (heads + mlp) * (int(prompts.sum()) + answered)
    attention = 4 * cfg.n_layers * cfg.n_heads * cfg.head_dim * keys
    return float(trunk + 2 * cfg.d_model * cfg.vocab_size * answered), float(attention)


def update_flops(
    cfg: DecoderConfig,
    prompt_lengths: Int[np.ndarray, " P"],
    response_lengths: Int[np.ndarray, "P G"],
) -> float:
    """FLOPs of one forward and backward pass over these groups in the group layout: 3 forward passes; with LoRA 2 through the
    frozen weights, and 3 of attention and the adapters.

    The forward pass does the work of the rollout: a prompt once, the head on response positions only, i + 1 keys at
    position i. Groups that skip the pass are for the caller to leave out.
    """
    weights, attention = _forward_flops(cfg, prompt_lengths, response_lengths)
    if cfg.lora is None:
        return 3.0 * (weights + attention)
    tokens = float(np.sum(prompt_lengths) + np.sum(response_lengths))
    q, k = cfg.n_heads * cfg.head_dim, cfg.n_kv_heads * cfg.head_dim
    other = {"q": q, "k": k, "v": k, "o": q}  # than the model's, of the two sides of a matrix
    sides = sum(cfg.d_model + other.get(name, cfg.d_ff) for name in cfg.lora.targets)
    adapters = 2.0 * cfg.n_layers * cfg.lora.rank * sides * tokens
    return 2.0 * weights + 3.0 * (attention + adapters)


def _causal(length: np.ndarray) -> np.ndarray:
    """Keys seen by all queries of a causal row: 1 + 2 + .. + length."""
    return length * (length + 1) // 2


def peak_flops(device: Any, dtype: Any) -> float | None:
    """Published dense peak FLOP/s of a jax device computing in `dtype`; None where none is published or known."""
    if "MIG" in device.device_kind:
        # A slice of the card.
        return None
    for pattern, peaks in PEAK_FLOPS.items():
        if re.search(pattern, device.device_kind):
            return peaks.get(np.dtype(dtype).name)
    return None


def mesh_peak_flops(devices: Iterable[Any], dtype: Any) -> float | None:
    """Peak FLOP/s of all `devices` (of a mesh: `mesh.devices.flat`); None when that of one is unknown, as on CPUs."""
    peaks = [peak_flops(device, dtype) for device in devices]
    known = [peak for peak in peaks if peak is not None]
    return sum(known) if len(known) == len(peaks) else None


class Speed:
    """Rates of a run's stages, as metrics; the MFU is left out where the peak of the hardware, `peak` FLOP/s, is not known.

    Lengths are those of the global batch: prompts [P], responses [P, G]. Seconds are wall-clock seconds.
    """

    def __init__(self, cfg: DecoderConfig, peak: float | None):
        self.cfg, self.peak = cfg, peak

    def of_rollout(
        self,
        prompt_lengths: Int[np.ndarray, " P"],
        response_lengths: Int[np.ndarray, "P G"],
        seconds: float,
    ) -> dict[str, float]:
        """Of the sampling, on its useful FLOPs."""
        work = rollout_flops(self.cfg, prompt_lengths, response_lengths)
        return {
            "time/rollout_tokens_per_second": float(response_lengths.sum()) / seconds,
            **self._mfu("time/rollout_mfu", work / seconds),
        }

    def of_update(
        self,
        prompt_lengths: Int[np.ndarray, " P"],
        response_lengths: Int[np.ndarray, "P G"],
        active: Bool[np.ndarray, " P"],
        seconds: float,
    ) -> dict[str, float]:
        """Of the update: the tokens of the groups that are not `active` count, the FLOPs that they skip do not."""
        tokens = response_lengths.shape[1] * prompt_lengths.sum() + response_lengths.sum()
        work = update_flops(self.cfg, prompt_lengths[active], response_lengths[active])
        return {
            "time/update_tokens_per_second": float(tokens) / seconds,
            **self._mfu("time/update_mfu", work / seconds),
        }

    def _mfu(self, name: str, rate: float) -> dict[str, float]:
        return {} if self.peak is None else {name: rate / self.peak}


def memory_in_use() -> dict[str, float]:
    """Most memory so far, in GiB: of this process, and of the fullest of its devices where they say (CPUs do not)."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss
    found = {"time/host_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}
    peaks = [_peak_bytes(device) for device in jax.local_devices()]
    known = [peak for peak in peaks if peak is not None]
    return found | ({"time/device_memory": max(known) / 2**30} if known else {})


def _peak_bytes(device: Any) -> int | None:
    return (device.memory_stats() or {}).get("peak_bytes_in_use")


def reward_rates(response_lengths: Int[np.ndarray, "P G"], seconds: float) -> dict[str, float]:
    """Rates of the scoring of these completions, those of all processes."""
    seconds = max(seconds, 1e-9)
    return {
        "time/reward_tokens_per_second": float(response_lengths.sum()) / seconds,
        "time/reward_responses_per_second": response_lengths.size / seconds,
    }
