"""Model FLOPs against a loop over every token and matmul, and against what XLA counts; the table of peaks; the rates."""

import dataclasses
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from rest_jax.models.attention import prompt_rows
from rest_jax.models.config import DecoderConfig, Lora
from rest_jax.models.decoder import Decoder, abstract_params, logits
from rest_jax.run import throughput

CFG = DecoderConfig("qwen3", 61, 24, 3, 6, 2, 10, 32, qk_norm=True)
PROMPTS = np.array([4, 7, 1])
EXPERTS = dataclasses.replace(CFG, family="qwen3_moe", n_experts=5, experts_per_token=2)
RESPONSES = np.array([[6, 1], [2, 0], [5, 3]])


def matmul(rows: int, inner: int, columns: int) -> int:
    return 2 * rows * inner * columns


def one_token(cfg: DecoderConfig, keys: int) -> int:
    """Every product of one token's pass through the trunk, head by head."""
    total = 0
    for _ in range(cfg.n_layers):
        total += cfg.n_heads * matmul(1, cfg.d_model, cfg.head_dim)  # q
        total += 2 * cfg.n_kv_heads * matmul(1, cfg.d_model, cfg.head_dim)  # k, v
        total += matmul(1, cfg.n_heads * cfg.head_dim, cfg.d_model)  # o
        for _ in range(cfg.experts_per_token or 1):
            total += 3 * matmul(1, cfg.d_model, cfg.d_ff)  # gate, up, down
        total += matmul(1, cfg.d_model, cfg.n_experts)  # router
        for _ in range(cfg.n_heads):
            total += matmul(1, cfg.head_dim, keys) + matmul(1, keys, cfg.head_dim)
    return total


def by_hand(cfg: DecoderConfig, prompts, responses) -> int:
    total = 0
    for prompt, group in zip(prompts, responses, strict=True):
        total += sum(one_token(cfg, i + 1) for i in range(prompt))
        for length in group:
            for t in range(length):
                total += one_token(cfg, prompt + t + 1) + matmul(1, cfg.d_model, cfg.vocab_size)
    return total


@pytest.mark.parametrize(
    "cfg", [*(dataclasses.replace(CFG, n_kv_heads=heads) for heads in (1, 2, 6)), EXPERTS]
)
def test_rollout_and_update_are_the_sum_over_tokens(cfg):
    expected = by_hand(cfg, PROMPTS.tolist(), RESPONSES.tolist())
    assert throughput.rollout_flops(cfg, PROMPTS, RESPONSES) == expected
    assert throughput.update_flops(cfg, PROMPTS, RESPONSES) == 3 * expected


def test_frozen_matrices_have_no_gradient_of_their_own():
    cfg = dataclasses.replace(CFG, lora=Lora(2, 4.0, ("q", "v", "down")))
    tokens = int(PROMPTS.sum() + RESPONSES.sum())
    wide, narrow = (n * cfg.head_dim for n in (cfg.n_heads, cfg.n_kv_heads))
    outputs = {
        "q": (cfg.d_model, wide),
        "v": (cfg.d_model, narrow),
        "down": (cfg.d_ff, cfg.d_model),
    }
    pairs = sum(matmul(tokens, i, 2) + matmul(tokens, 2, o) for i, o in outputs.values())
    forward = by_hand(CFG, PROMPTS.tolist(), RESPONSES.tolist())
    head = int(RESPONSES.sum()) * matmul(1, cfg.d_model, cfg.vocab_size)
    attention = forward - head - tokens * one_token(CFG, 0)
    expected = 2 * forward + attention + 3 * cfg.n_layers * pairs
    assert throughput.update_flops(cfg, PROMPTS, RESPONSES) == expected
    assert throughput.rollout_flops(cfg, PROMPTS, RESPONSES) == forward


def test_groups_add_up_and_none_is_zero():
    whole = throughput.rollout_flops(CFG, PROMPTS, RESPONSES)
    each = [
        throughput.rollout_flops(CFG, PROMPTS[i : i + 1], RESPONSES[i : i + 1]) for i in range(3)
    ]
    assert whole == sum(each)
    assert throughput.update_flops(CFG, PROMPTS[:0], RESPONSES[:0]) == 0.0


def test_int32_lengths_of_a_large_model_do_not_overflow():
    cfg = dataclasses.replace(CFG, n_layers=64, d_model=8192, d_ff=32768, vocab_size=151_936)
    prompts, responses = np.full(512, 65_536, np.int32), np.full((512, 16), 65_536, np.int32)
    one = throughput.rollout_flops(cfg, prompts[:1], responses[:1])
    assert throughput.rollout_flops(cfg, prompts, responses) == pytest.approx(512 * one, rel=1e-12)


@pytest.mark.parametrize(("passes", "gradient"), [(1, False), (3, True)])
def test_xla_counts_the_same_in_the_compiled_decoder(passes, gradient):
    """XLA counts norms, softmax and activations on top: under 1 % at this width, and never less than the matmuls.

    One layer, since XLA counts the body of a loop once; short rows, since it counts all T x T scores, as is done here;
    no rematerialisation, which is work done twice.
    """
    cfg = DecoderConfig("qwen3", 512, 256, 1, 4, 2, 64, 768, qk_norm=True, remat="none")
    batch, time = 2, 16
    tokens = jnp.ones((batch, time), jnp.int32)
    layout, positions = prompt_rows(tokens, jnp.full(batch, time, jnp.int32))

    def forward(params):
        hidden, _ = Decoder(cfg).apply({"params": params}, tokens, positions, layout)
        return jnp.sum(jnp.square(logits(params, cfg, hidden)))

    run = jax.grad(forward) if gradient else forward
    counted: Any = jax.jit(run).lower(nn.meta.unbox(abstract_params(cfg))).compile().cost_analysis()
    head = matmul(1, cfg.d_model, cfg.vocab_size)
    expected = batch * time * (one_token(cfg, time) + head)
    assert 1.0 <= counted["flops"] / (passes * expected) < 1.03


def fake(kind: str):
    return types.SimpleNamespace(device_kind=kind)


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
    assert throughput.peak_flops(fake(kind), jnp.bfloat16) == bfloat16
    assert throughput.peak_flops(fake(kind), "float32") == float32
    assert throughput.peak_flops(fake(kind), jnp.int8) is None


def test_a_mesh_is_the_sum_of_its_devices_and_unknown_if_one_is():
    cards = [fake("NVIDIA L4")] * 3 + [fake("NVIDIA H200")]
    assert throughput.mesh_peak_flops(cards, jnp.bfloat16) == 3 * 121e12 + 989.5e12
    assert throughput.mesh_peak_flops([*cards, fake("NVIDIA X1")], jnp.bfloat16) is None


def test_no_peak_is_published_for_cpus():
    assert throughput.mesh_peak_flops(jax.devices(), jnp.float32) is None


def test_rates_of_rollout_and_update():
    """Skipped groups count in the tokens of the update, not in its FLOPs."""
    active = np.array([True, False, True])
    speed = throughput.Speed(CFG, peak=1e9)
    flops = throughput.rollout_flops(CFG, PROMPTS, RESPONSES)
    assert speed.of_rollout(PROMPTS, RESPONSES, 2.0) == {
        "time/rollout_tokens_per_second": RESPONSES.sum() / 2,
        "time/rollout_mfu": flops / 2 / 1e9,
    }
    trained = throughput.update_flops(CFG, PROMPTS[active], RESPONSES[active])
    assert speed.of_update(PROMPTS, RESPONSES, active, 4.0) == {
        "time/update_tokens_per_second": (2 * PROMPTS.sum() + RESPONSES.sum()) / 4,
        "time/update_mfu": trained / 4 / 1e9,
    }
    unknown = throughput.Speed(CFG, peak=None)
    assert unknown.of_rollout(PROMPTS, RESPONSES, 2.0).keys() == {"time/rollout_tokens_per_second"}
    assert throughput.reward_rates(RESPONSES, 0.5) == {
        "time/reward_tokens_per_second": RESPONSES.sum() / 0.5,
        "time/reward_responses_per_second": 12.0,
    }
