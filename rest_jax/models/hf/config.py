"""A Hugging Face config.json -> DecoderConfig. Whatever this decoder does not compute is refused by name.

Both spellings are read: rope_theta / rope_scaling and the rope_parameters of newer files; where a file has both, rope_scaling
counts, as in transformers. null means the default. Pure functions of a dict.
"""

from typing import Any, cast, get_args

from rest_jax.errors import UserError
from rest_jax.models.config import DecoderConfig, Family, RopeScaling

FAMILIES = get_args(Family)
_QWEN3 = ("qwen3", "qwen3_moe")
_MAX_INTEGER = 2**31  # of a size; products of a few of them are taken before anything is read
_MAX_NUMBER = float(2**63)
_SHOWN = 80  # characters of a value


class ConversionError(UserError):
    """A model folder that cannot be read or written as it is; the text names the thing and the remedy."""


def decoder_config(hf: dict[str, Any]) -> DecoderConfig:
    """The decoder of a config.json.

    ConversionError names an unknown family, a missing key or an unsupported feature.
    """
    hf = {key: value for key, value in hf.items() if value is not None}
    family = hf.get("model_type")
    if family not in FAMILIES:
        raise ConversionError(
            f"model_type {_shown(family)} is not supported; known: {', '.join(FAMILIES)}"
        )
    _refuse_unsupported(hf)
    theta, scaling = _rope(hf)
    heads = _integer(hf, "num_attention_heads")
    d_model = _integer(hf, "hidden_size")
    if "head_dim" not in hf and (family in _QWEN3 or d_model % heads):
        raise ConversionError(
            f"config.json: head_dim is missing (hidden_size {d_model}, {heads} heads)"
        )
    moe = family == "qwen3_moe"
    try:
        return DecoderConfig(
            family=cast(Family, family),
            vocab_size=_integer(hf, "vocab_size"),
            d_model=d_model,
            n_layers=_integer(hf, "num_hidden_layers"),
            n_heads=heads,
            n_kv_heads=_integer(hf, "num_key_value_heads", heads),
            head_dim=_integer(hf, "head_dim", d_model // heads),
            d_ff=_integer(hf, "moe_intermediate_size" if moe else "intermediate_size"),
            rope_theta=theta,
            rope_scaling=scaling,
            norm_eps=_positive(hf, "rms_norm_eps", 1e-6),
            qk_norm=family in _QWEN3,
            qkv_bias=family == "qwen2",
            tied=_flag(hf, "tie_word_embeddings"),
            max_positions=_integer(hf, "max_position_embeddings"),
            n_experts=_integer(hf, _experts_key(hf)) if moe else 0,
            experts_per_token=_integer(hf, "num_experts_per_tok") if moe else 0,
            norm_topk=moe and _flag(hf, "norm_topk_prob"),
        )
    except UserError as error:
        raise ConversionError(f"config.json: {str(error).removeprefix('config.json: ')}") from error


def _refuse_unsupported(hf: dict[str, Any]) -> None:
    refused = []
    if hf.get("use_sliding_window") or "sliding_attention" in str(hf.get("layer_types")):
        refused.append("sliding-window attention (use_sliding_window, layer_types)")
    if hf.get("attention_bias"):
        refused.append("attention_bias true (a bias on the output projection)")
    if hf.get("mlp_bias"):
        refused.append("mlp_bias true")
    if hf.get("hidden_act", "silu") != "silu":
        refused.append(f"hidden_act {_shown(hf['hidden_act'])} (known: silu)")
    if hf.get("attention_dropout"):
        refused.append(f"attention_dropout {_shown(hf['attention_dropout'])}")
    if hf.get("quantization_config"):
        refused.append("quantization_config (convert the weights to bfloat16 or float32 first)")
    if hf.get("transformers_weights"):
        refused.append("transformers_weights (call the file model.safetensors)")
    if hf.get("mlp_only_layers"):
        refused.append(
            f"mlp_only_layers {_shown(hf['mlp_only_layers'])} (known: experts in every layer)"
        )
    if hf.get("decoder_sparse_step", 1) != 1:
        refused.append(
            f"decoder_sparse_step {_shown(hf['decoder_sparse_step'])} (known: 1, experts in every layer)"
        )
    partial = _rope_parameters(hf).get("partial_rotary_factor", hf.get("partial_rotary_factor", 1))
    if partial != 1:
        refused.append(f"partial_rotary_factor {_shown(partial)}")
    if refused:
        raise ConversionError(
            f"config.json ({hf['model_type']}) asks for {'; '.join(refused)}: not supported"
        )


def _experts_key(hf: dict[str, Any]) -> str:
    """Published files say num_experts; transformers 5 writes num_local_experts."""
    return "num_experts" if "num_experts" in hf else "num_local_experts"


def _rope(hf: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    parameters = _rope_parameters(hf)
    theta = _positive({**hf, **parameters}, "rope_theta", 10_000.0)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if any(isinstance(value, dict) for value in parameters.values()):
        raise ConversionError("config.json: rope_parameters by layer type are not supported")
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ConversionError(
            f"config.json: rope type {_shown(kind)} is not supported; known: default, llama3"
        )
    keys = ("factor", "low_freq_factor", "high_freq_factor")
    if missing := [key for key in keys if key not in parameters]:
        raise ConversionError(f"config.json: rope type llama3 lacks {', '.join(missing)}")
    factor, low, high = (_positive(parameters, key) for key in keys)
    # It was trained at the positions that the file names, when it names no others.
    original = {"original_max_position_embeddings": hf.get("max_position_embeddings"), **parameters}
    if low >= high:
        raise ConversionError(
            f"config.json: low_freq_factor {low} is not below high_freq_factor {high}"
        )
    trained = _integer(original, "original_max_position_embeddings")
    return theta, RopeScaling(factor, low, high, trained)


def _rope_parameters(hf: dict[str, Any]) -> dict[str, Any]:
    """The one that counts of rope_scaling and rope_parameters, without nulls."""
    key = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"
    found = hf.get(key) or {}
    if not isinstance(found, dict):
        raise ConversionError(f"config.json: {key} is {_shown(found)}; an object is needed")
    return {name: value for name, value in found.items() if value is not None}


def _integer(hf: dict[str, Any], key: str, default: int | None = None) -> int:
    value = hf.get(key, default)
    if type(value) is not int or not 1 <= value < _MAX_INTEGER:
        raise ConversionError(
            f"config.json: {key} is {_shown(value)}; a positive integer is needed"
        )
    return value


def _positive(hf: dict[str, Any], key: str, default: float | None = None) -> float:
    value = hf.get(key, default)
    if type(value) not in (int, float) or not 0 < value < _MAX_NUMBER:
        raise ConversionError(f"config.json: {key} is {_shown(value)}; a positive number is needed")
    return float(value)


def _flag(hf: dict[str, Any], key: str) -> bool:
    value = hf.get(key, False)
    if type(value) is not bool:
        raise ConversionError(f"config.json: {key} is {_shown(value)}; true or false is needed")
    return value


def _shown(value: Any) -> str:
    """A value of a file, which may be of any length."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}.."
