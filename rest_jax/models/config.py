"""Static description of a decoder: sizes, architecture switches and how it computes.

`DecoderConfig` is frozen and hashable, so it is a module attribute and a static argument of jit. It knows nothing of HF
files; `hf.config.decoder_config` makes one from a config.json.
"""

import dataclasses
import typing
from typing import Any, Literal

import jax
import jax.numpy as jnp

from rest_jax.errors import UserError
from rest_jax.models.products import precision_of

Family = Literal["qwen3", "qwen3_moe", "qwen2", "llama"]
Remat = Literal["none", "dots", "block"]
Attention = Literal["blocks", "wide_blocks", "flash", "triton"]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1 frequency scaling: long wavelengths are stretched by `factor`, the middle ones interpolated."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank adapters of frozen matrices: x W + alpha / rank (x A) B (LoRA, arXiv:2106.09685)."""

    rank: int
    alpha: float
    targets: tuple[str, ...]  # names of matrices: q, k, v, o, gate, up, down

    @property
    def scale(self) -> float:
        """Factor of the adapters' product."""
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder of the Qwen3, Qwen3-MoE, Qwen2 or Llama 3 family; `family` picks the HF names, the switches the maths."""

    family: Family
    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int  # width of the MLP, of one expert where there are experts
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    qk_norm: bool = False  # RMS norm of every query and key head (Qwen3)
    qkv_bias: bool = False  # biases on q, k and v, none on o (Qwen2)
    tied: bool = True  # the output matrix is the embedding
    max_positions: int = 32_768
    n_experts: int = 0  # of every layer; 0: one dense MLP
    experts_per_token: int = 0
    norm_topk: bool = False  # the weights of a token's experts are divided by their sum
    dtype: Any = "float32"  # of matmuls and activations
    param_dtype: Any = "float32"  # of freshly initialised parameters
    # one block looped over stacked parameters, or one block after the other
    layers: Literal["scan", "unroll"] = "scan"
    # q, k, v and o are stored as plain matrices, [D, N*H] and [N*H, D], so that decoding changes no layout
    flat_heads: bool = False
    # q, k and v are one matrix of so many parts (one a tensor device), as are gate and up: few large products are faster where
    # the rows are few. 0: they are apart
    joined: int = 0
    # what is kept for the backward pass, from everything to nothing but the inputs of blocks (`models/remat.py`)
    remat: Remat = "block"
    # of rows (`attention.KERNELS`): blocks in XLA's operations, small or large, or the kernels of TPUs or GPUs
    attention: Attention = "blocks"
    lora: Lora | None = (
        None  # the adapters that it takes beside its parameters, where they are given
    )

    def __post_init__(self):
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        object.__setattr__(self, "param_dtype", jnp.dtype(self.param_dtype))
        if self.n_heads % self.n_kv_heads:
            raise UserError(
                f"DecoderConfig: n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}"
            )
        if self.head_dim % 2:
            raise UserError(
                f"DecoderConfig: head_dim {self.head_dim} is odd; rotary positions need pairs"
            )
        if self.n_experts and not 0 < self.experts_per_token <= self.n_experts:
            raise UserError(
                f"DecoderConfig: experts_per_token {self.experts_per_token} is not in 1 .. n_experts {self.n_experts}"
            )
        if self.remat not in typing.get_args(Remat):
            raise UserError(
                f"DecoderConfig: remat {self.remat!r} is none of {', '.join(typing.get_args(Remat))}"
            )

    @property
    def precision(self) -> jax.lax.Precision:
        """Of matrix products."""
        return precision_of(self.dtype)

    @property
    def reads_pages(self) -> bool:
        """Whether decoding reads the pages of its cache where they are, by kernels; else they are gathered first."""
        return self.attention == "flash"
