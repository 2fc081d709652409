"""The strict table between Hugging Face tensors and our parameters.

One `Spec` a parameter: the HF name (with `{}` for the layer number when it is stacked, and another for the
number of the expert), our path, and the transform. HF stores matrices `[out, in]` with heads fused: `groups`
lists the axes behind each HF dimension, `order` lists which of them are our axes. The transform is a reshape
and a transpose, so it is exact both ways.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, TypeVar

import numpy as np

from rest_jax.models.config import DecoderConfig

Slices = tuple[slice, ...]
Array = TypeVar("Array", bound=Any)  # NumPy or jax
_LINE_BYTES = 64

EMBED, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


@dataclasses.dataclass(frozen=True)
class Spec:
    """One parameter and where HF keeps it."""

    hf_name: str
    path: tuple[str, ...]
    groups: tuple[tuple[int, ...], ...]  # sizes of the axes behind each HF dimension
    order: tuple[int, ...]  # our axis i is flat axis order[i]
    layers: int | None  # None: not stacked
    experts: int | None = None  # of every layer; None: the tensor of a layer is one

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """Shape of one HF tensor."""
        return tuple(math.prod(group) for group in self.groups)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of our parameter, the axes of layers and experts included."""
        flat = [size for group in self.groups for size in group]
        return (*self.stack, *(flat[axis] for axis in self.order))

    @property
    def stack(self) -> tuple[int, ...]:
        """Sizes of the leading axes over which HF has one tensor each: none, layers, or layers and experts."""
        return tuple(size for size in (self.layers, self.experts) if size is not None)

    def hf_names(self) -> list[str]:
        """The HF tensors, in the order of the leading axes."""
        return [self.hf_name.format(*index) for index in np.ndindex(*self.stack)]

    @property
    def as_in_hf(self) -> bool:
        """Whether our parameter is the HF tensors as they are."""
        return self.shape == (*self.stack, *self.hf_shape) and self.order == tuple(
            range(len(self.order))
        )

    def to_ours(self, x: Array) -> Array:
        """HF tensors, behind any leading axes, in our layout; NumPy makes no copy of them."""
        lead = x.ndim - len(self.groups)
        flat = [size for group in self.groups for size in group]
        axes = (*range(lead), *(lead + axis for axis in self.order))
        return x.reshape(*x.shape[:lead], *flat).transpose(axes)

    def to_hf(self, x: np.ndarray) -> np.ndarray:
        """One tensor of our parameter -> the HF tensor."""
        return copy_in_order(np.transpose(x, np.argsort(self.order))).reshape(self.hf_shape)


def copy_in_order(x: np.ndarray) -> np.ndarray:
    """A transposed array as a contiguous one; `x` itself when it is contiguous.

    It is copied a cache line at a time and as integers, seven times as fast as NumPy copies a transposed bfloat16 matrix.
    """
    if x.flags.c_contiguous:
        return x
    bits = np.dtype(f"u{x.itemsize}")
    out = np.empty(x.shape, x.dtype)
    axis = int(np.argmax(x.strides))  # rows of the memory that is read
    items = max(1, _LINE_BYTES // x.itemsize)
    for start in range(0, x.shape[axis], items):
        part = (*[slice(None)] * axis, slice(start, start + items))
        out.view(bits)[part] = x.view(bits)[part]
    return out


def table(cfg: DecoderConfig) -> list[Spec]:
    """Every parameter of this decoder."""
    d, f, v = cfg.d_model, cfg.d_ff, cfg.vocab_size
    n, k, h = cfg.n_heads, cfg.n_kv_heads, cfg.head_dim
    specs = [Spec(EMBED, ("embed",), ((v,), (d,)), (0, 1), None)]
    if not cfg.tied:
        specs.append(Spec(HEAD, ("head",), ((v,), (d,)), (0, 1), None))
    specs.append(Spec(NORM, ("final_norm", "scale"), ((d,),), (0,), None))

    def layer(
        name: str,
        path: str,
        groups: tuple[tuple[int, ...], ...],
        order: tuple[int, ...],
        experts: int | None = None,
    ) -> None:
        keys = ("blocks", *path.split("."))
        specs.append(Spec("model.layers.{}." + name, keys, groups, order, cfg.n_layers, experts))

    layer("input_layernorm.weight", "attention_norm.scale", ((d,),), (0,))
    layer("post_attention_layernorm.weight", "mlp_norm.scale", ((d,),), (0,))
    for letter, heads in (("q", n), ("k", k), ("v", k)):
        hf_name, path = f"self_attn.{letter}_proj", f"attention.{letter}"
        layer(f"{hf_name}.weight", path, ((heads, h), (d,)), (2, 0, 1))
        if cfg.qkv_bias:
            layer(f"{hf_name}.bias", f"{path}_bias", ((heads, h),), (0, 1))
    layer("self_attn.o_proj.weight", "attention.o", ((d,), (n, h)), (1, 2, 0))
    if cfg.qk_norm:
        layer("self_attn.q_norm.weight", "attention.q_norm.scale", ((h,),), (0,))
        layer("self_attn.k_norm.weight", "attention.k_norm.scale", ((h,),), (0,))
    experts, prefix = (cfg.n_experts, "mlp.experts.{}") if cfg.n_experts else (None, "mlp")
    if cfg.n_experts:
        layer("mlp.gate.weight", "mlp.router", ((cfg.n_experts,), (d,)), (1, 0))
    layer(f"{prefix}.gate_proj.weight", "mlp.gate", ((f,), (d,)), (1, 0), experts)
    layer(f"{prefix}.up_proj.weight", "mlp.up", ((f,), (d,)), (1, 0), experts)
    layer(f"{prefix}.down_proj.weight", "mlp.down", ((d,), (f,)), (1, 0), experts)
    return specs


def adapter_table(cfg: DecoderConfig) -> list[Spec]:
    """A and B of every matrix that `cfg.lora` names, under peft's names."""
    lora, specs = cfg.lora, []
    assert lora is not None
    for spec in table(cfg):
        if spec.path[-1] not in lora.targets:
            continue
        (outputs, inputs), rank = spec.groups, (lora.rank,)
        name = "base_model.model." + spec.hf_name.removesuffix("weight")
        own = (
            ("a", (rank, inputs), (*range(1, len(inputs) + 1), 0)),
            ("b", (outputs, rank), (len(outputs), *range(len(outputs)))),
        )
        for key, groups, order in own:
            hf_name = f"{name}lora_{key.upper()}.weight"
            specs.append(Spec(hf_name, (*spec.path, key), groups, order, spec.layers))
    return specs


def expected_shapes(cfg: DecoderConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every HF tensor name this decoder needs, with its shape."""
    for spec in table(cfg):
        for name in spec.hf_names():
            yield name, spec.hf_shape
