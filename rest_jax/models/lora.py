"""LoRA as functions of trees: which matrices have adapters, and weights with their adapters merged.

    W' = W + alpha / rank A B            float32; A [L I r], B [L r O] with the axes that W [L I O] has on each side

The decoder adds the product itself while it trains (`decoder._times`); all else takes merged weights: rollouts, exports, and
whoever loads a run. (LoRA, arXiv:2106.09685.)
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rest_jax.config import LoraConfig
from rest_jax.errors import UserError
from rest_jax.models.config import DecoderConfig, Lora
from rest_jax.models.hf.placement import Weights
from rest_jax.models.hf.table import Slices
from rest_jax.types import Params

ATTENTION, MLP = ("q", "k", "v", "o"), ("gate", "up", "down")


def make_lora(cfg: LoraConfig, model: DecoderConfig) -> Lora | None:
    """The adapters that a config asks for on this model; None: it asks for none. UserError for matrices that cannot have any."""
    if cfg.rank is None:
        return None
    targets = ATTENTION + MLP if "all" in cfg.targets else tuple(cfg.targets)
    experts = [name for name in MLP if name in targets]
    if model.n_experts and experts:
        raise UserError(
            f"lora.targets {', '.join(cfg.targets)}: {', '.join(experts)} of a {model.family} model are experts, which have no "
            f"adapters; set lora.targets=[{','.join(ATTENTION)}]"
        )
    return Lora(cfg.rank, cfg.alpha, tuple(name for name in ATTENTION + MLP if name in targets))


def stays_float32(path: tuple[str, ...]) -> bool:
    """Whether a parameter is read in float32 whatever the compute dtype: a norm's scale, or a bias."""
    return path[-1] == "scale" or path[-1].endswith("bias")


def pair_up(weights: Params, adapters: Params | None = None) -> Any:
    """The tree of weights with (w,), or (w, a, b) where there are adapters, in place of each."""
    if not isinstance(weights, dict):
        return (weights,) if adapters is None else (weights, adapters["a"], adapters["b"])
    return {name: pair_up(x, (adapters or {}).get(name)) for name, x in weights.items()}


def merge(w: jax.Array, adapters: Sequence[jax.Array], scale: float) -> jax.Array:
    """float32 W + scale A B of all layers."""
    a, b = adapters
    contracted = (((a.ndim - 1,), (1,)), ((0,), (0,)))
    product = jax.lax.dot_general(a, b, contracted, precision=jax.lax.Precision.HIGHEST)
    return w.astype(jnp.float32) + scale * product


def merge_all(weights: Params, adapters: Params, scale: float, dtypes: tuple[Any, Any]) -> Params:
    """Weights with their adapters merged, matrix by matrix, in the sharding of each. `dtypes`: of the matrices that the adapters
    belong to, and of those returned. float32 weights are donated.
    """

    def one(path: tuple[Any, ...], operands: tuple[jax.Array, ...]) -> jax.Array:
        names = tuple(key.key for key in path)
        if stays_float32(names) or (len(operands) == 1 and dtypes == (jnp.float32, jnp.float32)):
            return operands[0]
        donated = 2 if dtypes[1] == operands[0].dtype else ()
        where = operands[0].sharding
        program = jax.jit(
            _merge_rounded, static_argnums=(0, 1), donate_argnums=donated, out_shardings=where
        )
        return program(scale, dtypes, *operands)

    operands = pair_up(weights, adapters)
    return jax.tree_util.tree_map_with_path(one, operands, is_leaf=lambda x: isinstance(x, tuple))


def _merge_rounded(scale, dtypes, w, *adapters):
    kept = w.astype(dtypes[0])
    return (merge(kept, adapters, scale) if adapters else kept).astype(dtypes[1])


def merge_opened(
    weights: Sequence[Weights], adapters: Sequence[Weights], scale: float, dtype: Any
) -> list[Weights]:
    """The same of weights that are read in parts on the host, as float32; `dtype`: of those that the adapters belong to."""
    found = {one.spec.path: one for one in adapters}

    def one(w: Weights) -> Weights:
        pair = [found[path] for path in ((*w.spec.path, key) for key in "ab") if path in found]
        kept = np.dtype(np.float32 if stays_float32(w.spec.path) else dtype)

        def read(index: Slices) -> np.ndarray:
            values = w.read(index).astype(kept).astype(np.float32)
            return values + scale * _products(w, pair, index) if pair else values

        return dataclasses.replace(w, dtype=np.dtype(np.float32), read=read)

    return [one(w) for w in weights]


def _products(w: Weights, pair: Sequence[Weights], index: Slices) -> np.ndarray:
    """float32 A B at a part of the weights, in their layout."""
    layers, *part = index
    factors = (x.read((layers, *map(slice, x.shape[1:]))) for x in pair)
    products = [np.tensordot(a, b, 1) for a, b in zip(*factors, strict=True)]
    if w.in_hf_layout:
        products = [w.spec.to_hf(one) for one in products]
    return np.stack([one[tuple(part)] for one in products])
