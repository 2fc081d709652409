"""A policy ready to run: decoder, sharded weights, tokenizer, mesh. `run.load.load_policy` loads it from any source,
with a computation in `compute_dtype` and the `attention_of` its devices.
"""

import dataclasses
import pathlib
import re

import jax.numpy as jnp
from jax.sharding import Mesh

from rest_jax.distributed import platform
from rest_jax.errors import UserError
from rest_jax.models.config import Attention, DecoderConfig
from rest_jax.models.decoder import Decoder
from rest_jax.models.tokenizer import Tokenizer
from rest_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Policy:
    """Decoder and float32 master weights in the train layout, with all that goes with them."""

    decoder: Decoder
    params: Params
    tokenizer: Tokenizer
    mesh: Mesh
    rollout_mesh: Mesh  # the same devices in the same order, with the tensor size of rollouts
    files: pathlib.Path  # folder of the HF side files

    @property
    def config(self) -> DecoderConfig:
        """Sizes of the decoder."""
        return self.decoder.cfg


ROLLOUT_KEYS = "data.max_prompt_tokens or rollout.max_response_tokens"


def check_positions(
    config: DecoderConfig, prompt: int, response: int, keys: str = ROLLOUT_KEYS
) -> None:
    """UserError when the longest prompt and response, in tokens, are more than the positions the model was made for.
    `keys` are the config values that make them shorter.
    """
    if prompt + response > config.max_positions:
        raise UserError(
            f"prompt + response {prompt + response:,} ({prompt:,} + {response:,} tokens) exceeds the model's "
            f"{config.max_positions:,} positions (max_position_embeddings); lower {keys}"
        )


def compute_dtype(name: str, mesh: Mesh) -> jnp.dtype:
    """`auto`: float32 on CPU, bfloat16 on accelerators."""
    if name == "auto":
        name = "float32" if platform(mesh) == "cpu" else "bfloat16"
    return jnp.dtype(name)


ATTENTION: dict[str, Attention] = {"cpu": "blocks", "tpu": "flash"}


def attention_of(mesh: Mesh) -> Attention:
    """How rows attend on these devices. Triton is for GPUs of NVIDIA since Ampere, of compute capability 8.0."""
    capability = getattr(mesh.devices.flat[0], "compute_capability", "")
    if re.fullmatch(r"\d+\.\d", capability) and float(capability) >= 8:
        return "triton"
    return ATTENTION.get(platform(mesh), "wide_blocks")
