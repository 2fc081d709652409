"""What a GGUF file becomes: a config.json, tensors under Hugging Face's names, and the files of a tokenizer.

llama.cpp stores the rows of Llama's query and key matrices in another order (`GgufTensor.heads`), makes factors of the rotary
frequencies of Llama 3's scaling, and leaves out a head that is the embedding.
"""

import dataclasses
import math
import pathlib
from typing import Any

import numpy as np
from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

from rest_jax.models.gguf import tokenizer
from rest_jax.models.gguf.file import GgufFile, GgufTensor, read_header, shown
from rest_jax.models.hf.config import decoder_config
from rest_jax.models.hf.folder import write_json
from rest_jax.models.hf.table import expected_shapes

# GGUF architecture -> class of the model; its model_type is the architecture
_CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_ROPE_FACTORS = "rope_freqs.weight"
# Of Llama 3.1, 3.2 and 3.3; the factor is the largest of the file's own.
_LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclasses.dataclass(frozen=True)
class GgufModel:
    """A model in a GGUF file."""

    file: GgufFile
    config: dict[str, Any]  # of config.json
    tensors: dict[str, GgufTensor]  # by Hugging Face's names; those that have none by their own

    def write_side_files(self, folder: pathlib.Path) -> None:
        """Writes config.json, generation_config.json and the files of the tokenizer into `folder`."""
        write_json(folder / "config.json", self.config)
        tokenizer.write(self.file, folder)


def read_model(path: pathlib.Path) -> GgufModel:
    """A GGUF file's model; no weights are read. ConversionError names an architecture or a feature that is not supported."""
    file = read_header(path)
    config = _config(file)
    cfg = decoder_config(config)
    heads = {"attn_q": cfg.n_heads, "attn_k": cfg.n_kv_heads} if cfg.family == "llama" else {}
    arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == cfg.family)
    names = get_tensor_name_map(arch, cfg.n_layers)
    left, tensors = dict(file.tensors), {}
    left.pop(_ROPE_FACTORS, None)
    for hf_name, shape in expected_shapes(cfg):
        stem, _, ending = hf_name.rpartition(".")
        name = f"{names.get_name(stem)}.{ending}"
        if name not in left:
            continue
        tensor = left.pop(name)
        count = heads.get(name.split(".")[-2], 0)
        # A matrix of another shape is refused by its name, before it is read.
        tensors[hf_name] = dataclasses.replace(tensor, heads=count if tensor.shape == shape else 0)
    return GgufModel(file, config, tensors | left)


def _config(file: GgufFile) -> dict[str, Any]:
    """The config.json of the model."""
    family = file.get("general.architecture", str)
    if family not in _CLASSES:
        known = ", ".join(_CLASSES)
        raise file.fault(f"general.architecture {shown(family)} is not supported; known: {known}")
    layers = file.get(f"{family}.block_count", int)
    if layers > len(file.tensors):
        raise file.fault(f"{family}.block_count is {layers}, it has {len(file.tensors)} tensors")
    width = file.get(f"{family}.embedding_length", int)
    heads = file.get(f"{family}.attention.head_count", int)
    if not 0 < heads <= width:
        raise file.fault(f"{family}.attention.head_count is {heads}, the width is {width}")
    head_dim = file.get(f"{family}.attention.key_length", int, width // heads)
    _refuse_unsupported(file, family, head_dim)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise file.fault("tensor token_embd.weight is missing")
    theta = _decimal(file.get(f"{family}.rope.freq_base", float, 10_000.0))
    return {
        "architectures": [_CLASSES[family]],
        "model_type": family,
        "vocab_size": embedding.shape[0],
        "hidden_size": width,
        "intermediate_size": file.get(f"{family}.feed_forward_length", int),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": file.get(f"{family}.attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": file.get(f"{family}.context_length", int),
        "rms_norm_eps": _decimal(file.get(f"{family}.attention.layer_norm_rms_epsilon", float)),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(file, theta, head_dim),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "dtype": "float32",
        **tokenizer.special_ids(file),
    }


def _decimal(value: float) -> float:
    """A float32 as the shortest decimal that means it: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _refuse_unsupported(file: GgufFile, family: str, head_dim: int) -> None:
    """ConversionError for what the decoder does not compute, or what is not in this file."""
    # key -> the values that mean nothing special
    plain = {
        "general.type": ("model",),
        "split.count": (0, 1),
        f"{family}.expert_count": (0,),
        f"{family}.rope.scaling.type": ("none",),
        f"{family}.rope.scale_linear": (1.0,),
        f"{family}.attention.sliding_window": (0,),
        f"{family}.rope.dimension_count": (head_dim,),
        f"{family}.attention.value_length": (head_dim,),
    }
    for key, values in plain.items():
        if key in file.metadata and file.metadata[key] not in values:
            hint = (
                "; join the parts first (llama-gguf-split --merge)" if key == "split.count" else ""
            )
            raise file.fault(
                f"{key} {shown(file.metadata[key])} is not supported (known: {values[0]}){hint}"
            )


def _rope_scaling(file: GgufFile, theta: float, head_dim: int) -> dict[str, Any] | None:
    """Llama 3's scaling, where the file has the factors by which it divides the frequencies; they must be those it gives."""
    stored = file.tensors.get(_ROPE_FACTORS)
    if stored is None:
        return None
    if stored.shape != (head_dim // 2,) or stored.dtype != "F32":
        raise file.fault(f"tensor {_ROPE_FACTORS} is {stored.dtype} of shape {stored.shape}")
    factors = stored.read()
    scaling = {"rope_type": "llama3", "factor": float(factors.max()), **_LLAMA3_ROPE}
    low, high, length = _LLAMA3_ROPE.values()
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    share = np.clip((length / wavelengths - low) / (high - low), 0, 1)  # of the plain frequency
    if not np.allclose(factors, 1 / ((1 - share) / scaling["factor"] + share), rtol=1e-4):
        raise file.fault(
            f"tensor {_ROPE_FACTORS} has factors of another rope scaling than Llama 3's; not supported"
        )
    return scaling
