"""Published sizes, from the models' config.json files: to plan and test without the weights."""

import dataclasses

from rest_jax.models.config import DecoderConfig, RopeScaling


def _qwen3(d: int, layers: int, heads: int, f: int, *, tied: bool) -> DecoderConfig:
    return DecoderConfig(
        family="qwen3",
        vocab_size=151_936,
        d_model=d,
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=8,
        head_dim=128,
        d_ff=f,
        rope_theta=1e6,
        qk_norm=True,
        tied=tied,
        max_positions=40_960,
    )


def _qwen25(
    d: int, layers: int, heads: int, kv_heads: int, f: int, vocab: int, *, tied: bool
) -> DecoderConfig:
    return DecoderConfig(
        family="qwen2",
        vocab_size=vocab,
        d_model=d,
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=kv_heads,
        head_dim=d // heads,
        d_ff=f,
        rope_theta=1e6,
        qkv_bias=True,
        tied=tied,
        max_positions=32_768,
    )


def _llama3(d: int, layers: int, heads: int, f: int, factor: float, *, tied: bool) -> DecoderConfig:
    return DecoderConfig(
        family="llama",
        vocab_size=128_256,
        d_model=d,
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=8,
        head_dim=d // heads,
        d_ff=f,
        rope_theta=5e5,
        rope_scaling=RopeScaling(factor, 1.0, 4.0, 8192),
        norm_eps=1e-5,
        tied=tied,
        max_positions=131_072,
    )


PRESETS: dict[str, DecoderConfig] = {
    "qwen3-0.6b": _qwen3(1024, 28, 16, 3072, tied=True),
    "qwen3-1.7b": _qwen3(2048, 28, 16, 6144, tied=True),
    "qwen3-4b": _qwen3(2560, 36, 32, 9728, tied=True),
    "qwen3-4b-2507": dataclasses.replace(
        _qwen3(2560, 36, 32, 9728, tied=True), rope_theta=5e6, max_positions=262_144
    ),
    "qwen3-8b": _qwen3(4096, 36, 32, 12288, tied=False),
    "qwen3-14b": _qwen3(5120, 40, 40, 17408, tied=False),
    "qwen3-32b": _qwen3(5120, 64, 64, 25600, tied=False),
    "qwen2.5-0.5b": _qwen25(896, 24, 14, 2, 4864, 151_936, tied=True),
    "qwen2.5-1.5b": _qwen25(1536, 28, 12, 2, 8960, 151_936, tied=True),
    "qwen2.5-3b": _qwen25(2048, 36, 16, 2, 11008, 151_936, tied=True),
    "qwen2.5-7b": _qwen25(3584, 28, 28, 4, 18944, 152_064, tied=False),
    "llama-3.1-8b": _llama3(4096, 32, 32, 14336, 8.0, tied=False),
    "llama-3.2-1b": _llama3(2048, 16, 32, 8192, 32.0, tied=True),
    "llama-3.2-3b": _llama3(3072, 28, 24, 8192, 32.0, tied=True),
    "smollm2-135m": DecoderConfig(
        family="llama",
        vocab_size=49_152,
        d_model=576,
        n_layers=30,
        n_heads=9,
        n_kv_heads=3,
        head_dim=64,
        d_ff=1536,
        rope_theta=1e5,
        norm_eps=1e-5,
        tied=True,
        max_positions=8192,
    ),
}
