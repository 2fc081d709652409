"""Model FLOPs against a loop over every token and matmul, and against what XLA counts in the compiled decoder."""

import dataclasses
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from rest_jax.models.attention import prompt_rows
from rest_jax.models.config import DecoderConfig
from rest_jax.models.decoder import Decoder, abstract_params, logits
from rest_jax.run import flops

CFG = DecoderConfig("qwen3", 61, 24, 3, 6, 2, 10, 32, qk_norm=True)
PROMPTS = np.array([4, 7, 1])
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
        total += 3 * matmul(1, cfg.d_model, cfg.d_ff)  # gate, up, down
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


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_rollout_and_update_are_the_sum_over_tokens(kv_heads):
    cfg = dataclasses.replace(CFG, n_kv_heads=kv_heads)
    expected = by_hand(cfg, PROMPTS.tolist(), RESPONSES.tolist())
    assert flops.rollout_flops(cfg, PROMPTS, RESPONSES) == expected
    assert flops.update_flops(cfg, PROMPTS, RESPONSES) == 3 * expected


def test_parts_of_one_token():
    parts = flops.token_flops(CFG) + flops.attention_flops(CFG, 5)
    assert parts == one_token(CFG, 5)
    assert flops.head_flops(CFG) == matmul(1, CFG.d_model, CFG.vocab_size)
    assert flops.attention_flops(CFG, 0) == 0


def test_groups_add_up_and_none_is_zero():
    whole = flops.rollout_flops(CFG, PROMPTS, RESPONSES)
    each = [flops.rollout_flops(CFG, PROMPTS[i : i + 1], RESPONSES[i : i + 1]) for i in range(3)]
    assert whole == sum(each)
    assert flops.update_flops(CFG, PROMPTS[:0], RESPONSES[:0]) == 0.0


def test_int32_lengths_of_a_large_model_do_not_overflow():
    cfg = dataclasses.replace(CFG, n_layers=64, d_model=8192, d_ff=32768, vocab_size=151_936)
    prompts, responses = np.full(512, 65_536, np.int32), np.full((512, 16), 65_536, np.int32)
    one = flops.rollout_flops(cfg, prompts[:1], responses[:1])
    assert flops.rollout_flops(cfg, prompts, responses) == pytest.approx(512 * one, rel=1e-12)


def test_lengths_that_do_not_belong_together_are_refused():
    with pytest.raises(ValueError, match=r"\(3,\), \(2, 2\)"):
        flops.rollout_flops(CFG, PROMPTS, RESPONSES[:2])
    with pytest.raises(ValueError, match=r"\(3,\), \(3,\)"):
        flops.update_flops(CFG, PROMPTS, RESPONSES[:, 0])


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
    query = flops.attention_flops(cfg, time)
    expected = batch * time * (flops.token_flops(cfg) + flops.head_flops(cfg) + query)
    assert 1.0 <= counted["flops"] / (passes * expected) < 1.03


def test_no_jax_is_imported():
    code = "import sys; from rest_jax import flops; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
