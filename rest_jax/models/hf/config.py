"""A Hugging Face config.json -> DecoderConfig. Whatever this decoder does not compute is refused by name.

Both spellings are read: rope_theta / rope_scaling and the rope_parameters of newer files. Pure functions of a dict.
"""

from typing import Any, cast, get_args

from rest_jax.errors import UserError
from rest_jax.models.config import DecoderConfig, Family, RopeScaling

FAMILIES = get_args(Family)
_QWEN3 = ("qwen3", "qwen3_moe")


class ConversionError(UserError):
    """A model folder that cannot be read or written as it is; the text names the thing and the remedy."""


def decoder_config(hf: dict[str, Any]) -> DecoderConfig:
    """The decoder of a config.json.

    ConversionError names an unknown family, a missing key or an unsupported feature.
    """
    family = hf.get("model_type")
    if family not in FAMILIES:
        raise ConversionError(
            f"model_type {family!r} is not supported; known: {', '.join(FAMILIES)}"
        )
    _refuse_unsupported(hf)
    theta, scaling = _rope(hf)
    heads = _integer(hf, "num_attention_heads")
    d_model = _integer(hf, "hidden_size")
    head_dim = hf.get("head_dim")
    if head_dim is None:
        if family in _QWEN3 or d_model % heads:
            raise ConversionError(
                f"config.json: head_dim is missing (hidden_size {d_model}, {heads} heads)"
            )
        head_dim = d_model // heads
    kv_heads = hf.get("num_key_value_heads")
    moe = family == "qwen3_moe"
    try:
        return DecoderConfig(
            family=cast(Family, family),
            vocab_size=_integer(hf, "vocab_size"),
            d_model=d_model,
            n_layers=_integer(hf, "num_hidden_layers"),
            n_heads=heads,
            n_kv_heads=heads if kv_heads is None else kv_heads,
            head_dim=head_dim,
            d_ff=_integer(hf, "moe_intermediate_size" if moe else "intermediate_size"),
            rope_theta=theta,
            rope_scaling=scaling,
            norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
            qk_norm=family in _QWEN3,
            qkv_bias=family == "qwen2",
            tied=bool(hf.get("tie_word_embeddings", False)),
            max_positions=_integer(hf, "max_position_embeddings"),
            n_experts=_integer(hf, _experts_key(hf)) if moe else 0,
            experts_per_token=_integer(hf, "num_experts_per_tok") if moe else 0,
            norm_topk=moe and bool(hf.get("norm_topk_prob", False)),
        )
    except (TypeError, ValueError) as error:
        raise ConversionError(f"config.json: {error}") from error


def _refuse_unsupported(hf: dict[str, Any]) -> None:
    refused = []
    if hf.get("use_sliding_window") or "sliding_attention" in (hf.get("layer_types") or ()):
        refused.append("sliding-window attention (use_sliding_window, layer_types)")
    if hf.get("attention_bias"):
        refused.append("attention_bias true (a bias on the output projection)")
    if hf.get("mlp_bias"):
        refused.append("mlp_bias true")
    if hf.get("hidden_act", "silu") != "silu":
        refused.append(f"hidden_act {hf['hidden_act']!r} (known: silu)")
    if hf.get("attention_dropout"):
        refused.append(f"attention_dropout {hf['attention_dropout']}")
    if hf.get("quantization_config"):
        refused.append("quantization_config (convert the weights to bfloat16 or float32 first)")
    if hf.get("mlp_only_layers"):
        refused.append(f"mlp_only_layers {hf['mlp_only_layers']} (known: experts in every layer)")
    if hf.get("decoder_sparse_step", 1) != 1:
        refused.append(
            f"decoder_sparse_step {hf['decoder_sparse_step']} (known: 1, experts in every layer)"
        )
    partial = hf.get(
        "partial_rotary_factor", (hf.get("rope_parameters") or {}).get("partial_rotary_factor")
    )
    if partial not in (None, 1, 1.0):
        refused.append(f"partial_rotary_factor {partial}")
    if refused:
        raise ConversionError(
            f"config.json ({hf['model_type']}) asks for {'; '.join(refused)}: not supported"
        )


def _experts_key(hf: dict[str, Any]) -> str:
    """Published files say num_experts; transformers 5 writes num_local_experts."""
    return "num_experts" if "num_experts" in hf else "num_local_experts"


def _rope(hf: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    parameters = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    theta = float(parameters.get("rope_theta", hf.get("rope_theta", 10_000.0)))
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if any(isinstance(value, dict) for value in parameters.values()):
        raise ConversionError("config.json: rope_parameters by layer type are not supported")
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ConversionError(
            f"config.json: rope type {kind!r} is not supported; known: default, llama3"
        )
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    missing = [key for key in keys if parameters.get(key) is None]
    if missing:
        raise ConversionError(f"config.json: rope type llama3 lacks {', '.join(missing)}")
    factor, low, high, original = (parameters[key] for key in keys)
    return theta, RopeScaling(float(factor), float(low), float(high), int(original))


def _integer(hf: dict[str, Any], key: str) -> int:
    value = hf.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConversionError(f"config.json: {key} is {value!r}; a positive integer is needed")
    return value
