"""The config.json values of published models by hub id, to plan and test without their weights.

`PRESETS[hub_id]` has what `hf.config.decoder_config` reads; `preset(hub_id)` is the decoder.
"""

from typing import Any

from rest_jax.config import nearest
from rest_jax.errors import UserError
from rest_jax.models.config import DecoderConfig
from rest_jax.models.hf.config import decoder_config

HfConfig = dict[str, Any]


def preset(hub_id: str) -> DecoderConfig:
    """The decoder of a published model. UserError names the nearest known id."""
    if hub_id not in PRESETS:
        raise UserError(f"model {hub_id}: no preset of that name{nearest(hub_id, list(PRESETS))}")
    return decoder_config(PRESETS[hub_id])


def _qwen3(
    hidden: int, layers: int, heads: int, intermediate: int, tied: bool = False, **changes: Any
) -> HfConfig:
    return {
        "model_type": "qwen3",
        "vocab_size": 151_936,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": intermediate,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 40_960,
        **changes,
    }


def _qwen3_moe(
    hidden: int, layers: int, heads: int, intermediate: int, expert: int, **changes: Any
) -> HfConfig:
    return {
        **_qwen3(hidden, layers, heads, intermediate),
        "model_type": "qwen3_moe",
        "num_key_value_heads": 4,
        "moe_intermediate_size": expert,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        **changes,
    }


def _qwen25(
    hidden: int, layers: int, heads: tuple[int, int], intermediate: int, **changes: Any
) -> HfConfig:
    return {
        "model_type": "qwen2",
        "vocab_size": 151_936,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "intermediate_size": intermediate,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "max_position_embeddings": 32_768,
        **changes,
    }


def _llama(
    hidden: int, layers: int, heads: tuple[int, int], intermediate: int, **changes: Any
) -> HfConfig:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "intermediate_size": intermediate,
        "rms_norm_eps": 1e-5,
        **changes,
    }


def _llama3(factor: float, tied: bool) -> HfConfig:
    """What the models of Llama 3.1 and 3.2 share."""
    return {
        "vocab_size": 128_256,
        "rope_theta": 500_000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "tie_word_embeddings": tied,
        "max_position_embeddings": 131_072,
    }


_SMOLLM2: HfConfig = {
    "vocab_size": 49_152,
    "rope_theta": 100_000.0,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}
_QWEN3_4B = _qwen3(2560, 36, 32, 9728, tied=True)
_QWEN3_30B = _qwen3_moe(2048, 48, 32, 6144, 768)
_QWEN3_235B = _qwen3_moe(4096, 94, 64, 12_288, 1536)
_2507: HfConfig = {"rope_theta": 5e6, "max_position_embeddings": 262_144}

PRESETS: dict[str, HfConfig] = {
    "Qwen/Qwen3-0.6B": _qwen3(1024, 28, 16, 3072, tied=True),
    "Qwen/Qwen3-1.7B": _qwen3(2048, 28, 16, 6144, tied=True),
    "Qwen/Qwen3-4B": _QWEN3_4B,
    "Qwen/Qwen3-4B-Instruct-2507": _QWEN3_4B | _2507,
    "Qwen/Qwen3-4B-Thinking-2507": _QWEN3_4B | _2507,
    "Qwen/Qwen3-8B": _qwen3(4096, 36, 32, 12_288),
    "Qwen/Qwen3-14B": _qwen3(5120, 40, 40, 17_408),
    "Qwen/Qwen3-32B": _qwen3(5120, 64, 64, 25_600),
    "Qwen/Qwen3-30B-A3B": _QWEN3_30B,
    "Qwen/Qwen3-30B-A3B-Instruct-2507": _QWEN3_30B | _2507 | {"rope_theta": 1e7},
    "Qwen/Qwen3-30B-A3B-Thinking-2507": _QWEN3_30B | _2507 | {"rope_theta": 1e7},
    "Qwen/Qwen3-235B-A22B": _QWEN3_235B,
    "Qwen/Qwen3-235B-A22B-Instruct-2507": _QWEN3_235B | _2507,
    "Qwen/Qwen3-235B-A22B-Thinking-2507": _QWEN3_235B | _2507,
    "Qwen/Qwen2.5-0.5B-Instruct": _qwen25(896, 24, (14, 2), 4864, tie_word_embeddings=True),
    "Qwen/Qwen2.5-1.5B-Instruct": _qwen25(1536, 28, (12, 2), 8960, tie_word_embeddings=True),
    "Qwen/Qwen2.5-3B-Instruct": _qwen25(2048, 36, (16, 2), 11_008, tie_word_embeddings=True),
    "Qwen/Qwen2.5-7B-Instruct": _qwen25(3584, 28, (28, 4), 18_944, vocab_size=152_064),
    "Qwen/Qwen2.5-14B-Instruct": _qwen25(5120, 48, (40, 8), 13_824, vocab_size=152_064),
    "Qwen/Qwen2.5-32B-Instruct": _qwen25(5120, 64, (40, 8), 27_648, vocab_size=152_064),
    "Qwen/Qwen2.5-72B-Instruct": _qwen25(8192, 80, (64, 8), 29_568, vocab_size=152_064),
    "meta-llama/Llama-3.2-1B-Instruct": _llama(
        2048, 16, (32, 8), 8192, head_dim=64, **_llama3(32.0, tied=True)
    ),
    "meta-llama/Llama-3.2-3B-Instruct": _llama(
        3072, 28, (24, 8), 8192, head_dim=128, **_llama3(32.0, tied=True)
    ),
    "meta-llama/Llama-3.1-8B-Instruct": _llama(
        4096, 32, (32, 8), 14_336, **_llama3(8.0, tied=False)
    ),
    "meta-llama/Llama-3.1-70B-Instruct": _llama(
        8192, 80, (64, 8), 28_672, **_llama3(8.0, tied=False)
    ),
    "HuggingFaceTB/SmolLM2-135M-Instruct": _llama(576, 30, (9, 3), 1536, **_SMOLLM2),
    "HuggingFaceTB/SmolLM2-360M-Instruct": _llama(960, 32, (15, 5), 2560, **_SMOLLM2),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": _llama(
        2048, 24, (32, 32), 8192, **(_SMOLLM2 | {"rope_theta": 130_000.0})
    ),
}
