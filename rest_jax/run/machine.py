"""Published peak FLOP/s of accelerators: the denominator of MFU.

`mesh_peak_flops(devices, dtype)` is the sum over the devices of a mesh, None where one is unknown. No peak is published
for CPUs, so a run on CPU reports no MFU.
"""

import re
from collections.abc import Iterable
from typing import Any

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


def peak_flops(device: Any, dtype: Any) -> float | None:
    """Published dense peak FLOP/s of a jax device computing in `dtype`; None where none is published or known."""
    import jax.numpy as jnp

    if "MIG" in device.device_kind:  # a slice of the card
        return None
    for pattern, peaks in PEAK_FLOPS.items():
        if re.search(pattern, device.device_kind):
            return peaks.get(jnp.dtype(dtype).name)
    return None


def mesh_peak_flops(devices: Iterable[Any], dtype: Any) -> float | None:
    """Peak FLOP/s of all `devices` (of a mesh: `mesh.devices.flat`); None when that of one is unknown."""
    peaks = [peak_flops(device, dtype) for device in devices]
    return None if None in peaks else sum(peak for peak in peaks if peak is not None)
