"""A policy ready to run: decoder, sharded weights, tokenizer, mesh.

`load_pretrained` reads an HF folder, a hub id, or a folder made by `rest-jax convert`; `run.policy.load_policy` reads the
folder of a run as well.
"""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rest_jax.config import ModelConfig
from rest_jax.models.config import DecoderConfig
from rest_jax.models.decoder import Decoder
from rest_jax.models.hf.read import load_model
from rest_jax.models.tokenizer import Tokenizer
from rest_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Policy:
    """Decoder and float32 master weights in the train layout, with all that goes with them."""

    decoder: Decoder
    params: Params
    tokenizer: Tokenizer
    mesh: Mesh
    files: pathlib.Path  # folder of the HF side files

    @property
    def config(self) -> DecoderConfig:
        """Sizes of the decoder."""
        return self.decoder.cfg


def compute_dtype(name: str) -> jnp.dtype:
    """`auto`: float32 on CPU, bfloat16 on accelerators."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def load_pretrained(model: ModelConfig, mesh: Mesh) -> Policy:
    """Loads weights straight into their shards. UserError for a source that cannot be used."""
    dtype = compute_dtype(model.dtype)
    config, params, files = load_model(model.source, mesh, dtype, model.remat)
    return make_policy(config, params, model.tokenizer, mesh, files)


def make_policy(
    config: DecoderConfig, params: Params, tokenizer: str | None, mesh: Mesh, files: pathlib.Path
) -> Policy:
    """The policy of loaded weights; `tokenizer` None: the one among `files`."""
    loaded = Tokenizer.load(tokenizer or files, vocab_size=config.vocab_size)
    return Policy(Decoder(config), params, loaded, mesh, files)
