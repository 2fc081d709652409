"""The table of published peaks, by device kind and dtype, and their sum over a mesh."""

import types

import jax.numpy as jnp
import pytest

from rest_jax.run import machine


def fake(kind: str, platform: str = "gpu", process: int = 0):
    return types.SimpleNamespace(device_kind=kind, platform=platform, process_index=process)


@pytest.mark.parametrize(
    ("kind", "bfloat16", "float32"),
    [
        ("TPU v4", 275e12, None),
        ("TPU v4 lite", None, None),
        ("TPU v5 lite", 197e12, None),
        ("TPU v5e", 197e12, None),
        ("TPU v5", 459e12, None),
        ("TPU v5p", 459e12, None),
        ("TPU v6 lite", 918e12, None),
        ("TPU7x", 1153.5e12, None),
        ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None, None),
        ("NVIDIA H100 80GB HBM3", 989.5e12, 67e12),
        ("NVIDIA H100 PCIe", 756.5e12, 51e12),
        ("NVIDIA H100 NVL", 835.5e12, 60e12),
        ("NVIDIA H200", 989.5e12, 67e12),
        ("NVIDIA GH200 480GB", None, None),
        ("NVIDIA B200", 2250e12, 75e12),
        ("NVIDIA GB200", None, None),
        ("NVIDIA L4", 121e12, 30.3e12),
        ("NVIDIA L40S", 362.05e12, 91.6e12),
        ("NVIDIA L40", None, None),
        ("NVIDIA A10", 125e12, 31.2e12),
        ("NVIDIA A10G", None, None),
        ("NVIDIA GeForce RTX 4090", 165.2e12, 82.6e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
        ("cpu", None, None),
    ],
)
def test_peaks_by_device_kind_and_dtype(kind, bfloat16, float32):
    assert machine.peak_flops(fake(kind), jnp.bfloat16) == bfloat16
    assert machine.peak_flops(fake(kind), "float32") == float32
    assert machine.peak_flops(fake(kind), jnp.int8) is None


def test_a_mesh_is_the_sum_of_its_devices_and_unknown_if_one_is():
    cards = [fake("NVIDIA L4")] * 3 + [fake("NVIDIA H200")]
    assert machine.mesh_peak_flops(cards, jnp.bfloat16) == 3 * 121e12 + 989.5e12
    assert machine.mesh_peak_flops([*cards, fake("NVIDIA X1")], jnp.bfloat16) is None


def test_a_cpu_has_no_published_peak():
    assert machine.mesh_peak_flops([fake("cpu", "cpu"), fake("NVIDIA L4")], jnp.float32) is None
