"""Small GGUF files, written by the package that comes with the format, as llama.cpp's converter would write them."""

import json
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, dequantize, quantize

from rest_jax.models.hf.config import decoder_config
from rest_jax.models.hf.table import EMBED, HEAD, NORM, expected_shapes
from tests.conftest import REPOSITORY

WIDTH, LAYERS, HEADS, KV_HEADS, MLP = 256, 2, 4, 2, 512
Kind = GGMLQuantizationType
_WITHOUT_QUANTIZER = (Kind.Q4_K, Kind.Q6_K)
_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def vocabulary() -> tuple[list[str], list[str], list[int]]:
    """Tokens, merges and token types: the quickstart's, whose <tool_call> is a user's token, and three rows behind them."""
    state = json.loads((REPOSITORY / "configs/quickstart_policy/tokenizer.json").read_text())
    words = sorted(state["model"]["vocab"], key=state["model"]["vocab"].get)
    types = [1] * len(words) + [5] * 3
    for token in state["added_tokens"]:
        types[token["id"]] = 4 if "tool_call" in token["content"] else 3
    pads = [f"[PAD{i}]" for i in range(3)]
    return words + pads, [" ".join(pair) for pair in state["model"]["merges"]], types


def write_gguf(
    path: pathlib.Path,
    family: str = "llama",
    kind: Kind = Kind.F32,
    changes: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray] | None = None,
    absent: Collection[str] = (),
    tied: bool = True,
) -> dict[str, np.ndarray]:
    """Writes a random model; `changes` of the metadata (None: without the key), further `tensors`, names `absent` of it.

    Returns the values that its tensors have, by Hugging Face's names.
    """
    rng = np.random.default_rng(0)
    words, merges, types = vocabulary()
    metadata = {
        "general.type": "model",
        f"{family}.block_count": LAYERS,
        f"{family}.context_length": 512,
        f"{family}.embedding_length": WIDTH,
        f"{family}.feed_forward_length": MLP,
        f"{family}.attention.head_count": HEADS,
        f"{family}.attention.head_count_kv": KV_HEADS,
        f"{family}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{family}.rope.freq_base": 10_000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2" if family == "qwen2" else "smollm",
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.chat_template": (REPOSITORY / "configs/quickstart_policy/chat_template.jinja").read_text(),
    } | (changes or {})  # fmt: skip
    writer = GGUFWriter(path, family)
    for key, value in metadata.items():
        if value is not None:
            _add(writer, key, value)
    sizes = decoder_config(
        {
            "model_type": family, "vocab_size": len(words), "hidden_size": WIDTH, "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": WIDTH // HEADS,
            "intermediate_size": MLP, "max_position_embeddings": 512, "tie_word_embeddings": tied,
        }
    )  # fmt: skip
    values: dict[str, np.ndarray] = {}
    for name, shape in expected_shapes(sizes):
        if name in absent:
            continue
        used = kind if len(shape) > 1 else Kind.F32
        stored = rng.normal(0, 0.1, shape).astype(np.float32)
        if family == "llama" and (heads := {"q": HEADS, "k": KV_HEADS}.get(name[-13:-12])):
            stored = _permute(stored, heads) if "_proj" in name else stored
        else:
            heads = 0
        if used in _WITHOUT_QUANTIZER:
            items, size = GGML_QUANT_SIZES[used]
            # Small bytes, so that those which are halves of a float16 scale are numbers.
            raw = rng.integers(0, 0x3C, (shape[0], shape[1] // items * size)).astype(np.uint8)
        elif used in (Kind.F32, Kind.F16):
            raw = stored.astype(np.float32 if used == Kind.F32 else np.float16)
        else:
            raw = quantize(stored, used)
        writer.add_tensor(_gguf_name(name), raw, raw_dtype=used)
        value = dequantize(raw, used).reshape(shape)
        values[name] = _permute(value, heads, back=True) if heads else value
    for name, array in (tensors or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def _permute(weights: np.ndarray, heads: int, back: bool = False) -> np.ndarray:
    """llama.cpp's order of the rows of Llama's query and key matrices (`permute` of its convert_hf_to_gguf.py)."""
    order = np.arange(weights.shape[0]).reshape(heads, 2, -1).swapaxes(1, 2).ravel()
    return weights[np.argsort(order)] if back else weights[order]


def _gguf_name(name: str) -> str:
    fixed = {EMBED: "token_embd.weight", NORM: "output_norm.weight", HEAD: "output.weight"}
    if name in fixed:
        return fixed[name]
    _, _, layer, rest = name.split(".", 3)
    stem, _, ending = rest.rpartition(".")
    return f"blk.{layer}.{_NAMES[stem]}.{ending}"


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
