"""The policies that are measured, and how they get onto the mesh.

    load(source, vocab, remat)   "model-a", a preset's name, or an HF folder -> Policy on one device
    write_folder(source, out)    the same random weights as an HF folder, for a peer that must have them too

Model A: Qwen3 architecture, 4 layers, hidden 256, FFN 768, 8 heads, 4 KV heads of 32, tied, float32, random weights. Its
tokenizer has a made-up byte-level vocabulary: ids 0 to 255 are the bytes, the others two to six bytes of plain text. The ids
that pad and stop lie outside the vocabulary, so that every response runs to its limit.
"""

import dataclasses
import pathlib
import random
import shutil
import tempfile

import jax
import numpy as np

from rest_jax.config import MeshConfig, RolloutConfig
from rest_jax.distributed import make_mesh
from rest_jax.models.config import DecoderConfig, Remat
from rest_jax.models.decoder import Decoder, init_params, param_shardings
from rest_jax.models.hf.folder import write_json
from rest_jax.models.hf.read import load_model
from rest_jax.models.hf.write import export
from rest_jax.models.policy import Policy, attention_of
from rest_jax.models.presets import PRESETS, preset
from rest_jax.models.tokenizer import Tokenizer
from rest_jax.rollout.scheduler import Sampler, make_sampler
from rest_jax.types import PromptBatch, Sampling

MODEL_A = DecoderConfig(
    family="qwen3",
    vocab_size=8192,
    d_model=256,
    n_layers=4,
    n_heads=8,
    n_kv_heads=4,
    head_dim=32,
    d_ff=768,
    rope_theta=1e6,
    qk_norm=True,
    tied=True,
    max_positions=40_960,
)
NAMED = {"model-a": MODEL_A, **{name: preset(name) for name in PRESETS}}
_ARCHITECTURES = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
}


def load(
    source: str, vocab: int | None = None, remat: Remat = "none", dtype: str = "float32"
) -> Policy:
    """float32 weights in the train layout, computing in `dtype`. ValueError for a source that is neither a name nor a folder."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    if source in NAMED:
        cfg = dataclasses.replace(named(source, vocab, remat), dtype=dtype)
        shardings = param_shardings(cfg, mesh)
        init = jax.jit(lambda key: init_params(cfg, key), out_shardings=shardings)
        params = init(jax.random.key(0))
    elif pathlib.Path(source).is_dir():
        cfg, params, _ = load_model(source, mesh, dtype, remat)
    else:
        raise ValueError(f"{source}: no such folder, and not one of {', '.join(NAMED)}")
    cfg = dataclasses.replace(cfg, attention=attention_of(mesh))
    return Policy(
        Decoder(cfg), params, byte_tokenizer(cfg.vocab_size), mesh, mesh, pathlib.Path(source)
    )


def named(name: str, vocab: int | None = None, remat: Remat = "none") -> DecoderConfig:
    """Sizes of model A or a preset, with another vocabulary if one is given."""
    cfg = NAMED[name]
    return dataclasses.replace(cfg, vocab_size=vocab or cfg.vocab_size, remat=remat)


def byte_tokenizer(vocab: int) -> Tokenizer:
    """Bytes for every id of the vocabulary; pad and stop ids outside of it."""
    rng = random.Random(0)
    alphabet = b'etaoin shrdlu,.:{}"<>/_0123456789\n'
    longer = (bytes(rng.choices(alphabet, k=rng.randint(2, 6))) for _ in range(256, vocab))
    pieces = (*(bytes([byte]) for byte in range(256)), *longer)[:vocab]
    return make_tokenizer(pieces, stop_id=vocab + 1)


def make_tokenizer(pieces: tuple[bytes, ...], stop_id: int) -> Tokenizer:
    """The program's tokenizer over the given bytes of each id, without the text side."""
    lengths = np.fromiter(map(len, pieces), np.int32, len(pieces))
    return Tokenizer("made up", None, pieces, lengths, 0, (stop_id,), stop_id)


def random_prompts(policy: Policy, count: int, length: int) -> PromptBatch:
    """`count` random prompts of the same length."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, policy.config.vocab_size, (count, length)).astype(np.int32)
    rows = np.arange(count, dtype=np.int32)
    return PromptBatch(tokens, np.full(count, length, np.int32), rows)  # type: ignore[arg-type]


def sampler_of(policy: Policy, group: int, new_tokens: int, decode_slots: int) -> Sampler:
    """The program's sampler, at temperature 1 and full support."""
    rollout = RolloutConfig(max_response_tokens=new_tokens, decode_slots=decode_slots)
    return make_sampler(policy, rollout, group, Sampling())


def write_folder(source: str, vocab: int | None, out: pathlib.Path) -> None:
    """The random weights of `load` as safetensors with a config.json, or nothing at all."""
    policy = load(source, vocab)
    side = pathlib.Path(tempfile.mkdtemp())
    try:
        write_json(side / "config.json", hf_config(policy.config))
        export(policy.params, side, out)
    finally:
        shutil.rmtree(side)


def hf_config(cfg: DecoderConfig, dtype: str = "float32") -> dict:
    """config.json of a Qwen or Llama model of these sizes."""
    return {
        "architectures": [_ARCHITECTURES[cfg.family]],
        "model_type": cfg.family,
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.d_model,
        "intermediate_size": cfg.d_ff,
        "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": cfg.n_heads,
        "num_key_value_heads": cfg.n_kv_heads,
        "head_dim": cfg.head_dim,
        "max_position_embeddings": cfg.max_positions,
        "rms_norm_eps": cfg.norm_eps,
        "rope_theta": cfg.rope_theta,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": cfg.tied,
        "dtype": dtype,
    }
