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
    """Decoder and float32 master weights in the train layout, with all that goes with them. With LoRA the weights are frozen
    and of any dtype, and `adapters` are the float32 masters that a run begins with.
    """

    decoder: Decoder
    params: Params
    tokenizer: Tokenizer
    mesh: Mesh
    rollout_mesh: Mesh  # the same devices in the same order, with the tensor size of rollouts
    files: pathlib.Path  # folder of the HF side files
    adapters: Params | None = None
    digest: str | None = (
        None  # of weights that were merged at load; None: it is that of their values
    )

    @property
    def trained(self) -> Params:
        """What a run trains, and begins with: all weights, or the adapters."""
        return self.params if self.adapters is None else self.adapters

    @property
    def frozen(self) -> Params | None:
        """The weights that a run does not train; None without LoRA."""
        return None if self.adapters is None else self.params

    def with_trained(self, trained: Params) -> "Policy":
        """The policy with these in the place of `trained`."""
        name = "params" if self.adapters is None else "adapters"
        return dataclasses.replace(self, **{name: trained})

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
