"""The policy as rollouts have it: the decoder that samples, and the cast of its weights from the train layout."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from rest_jax.distributed import platform
from rest_jax.models.decoder import Decoder, flatten_heads, param_shardings, unstack_layers
from rest_jax.models.lora import merge, pair_up
from rest_jax.models.policy import Policy
from rest_jax.types import Params


def rollout_decoder(policy: Policy) -> Decoder:
    """The decoder of rollouts. On CPU and GPU its layers are unrolled: a loop over stacked weights would copy each layer's
    weights and caches for every token. On TPU it is the other way round (docs/performance.md).
    """
    layers = "scan" if platform(policy.mesh) == "tpu" else "unroll"
    own = {"layers": layers, "remat": "none", "flat_heads": True, "lora": None}
    return Decoder(dataclasses.replace(policy.config, **own))


def rollout_cast(policy: Policy) -> Callable[[Params], Params]:
    """The cast from what a policy trains (float32 masters, train layout) to its rollout weights: in the compute dtype, in
    the rollout layout on the rollout mesh, with the layers of an unrolled decoder apart, and with adapters merged into the
    frozen weights. `cast_programs` is what it runs.
    """
    programs = cast_programs(policy)
    unrolled = rollout_decoder(policy).cfg.layers == "unroll"

    def cast(params: Params) -> Params:
        frozen = policy.frozen
        weights = pair_up(params) if frozen is None else pair_up(frozen, params)
        params = jax.tree.map(lambda program, x: program(*x), programs, weights)
        return unstack_layers(params) if unrolled else params

    return cast


def cast_programs(policy: Policy) -> Any:
    """The jitted cast of each parameter (and its adapters, where it has them), in the tree of the train weights; of an unrolled
    decoder a stacked parameter becomes a tuple of layers. One program for all would hold a second copy of the weights on every
    device.
    """
    cfg, mesh = rollout_decoder(policy).cfg, policy.rollout_mesh
    scale = policy.config.lora.scale if policy.config.lora else None
    stacked = dataclasses.replace(cfg, layers="scan")

    def program(path: tuple[Any, ...], sharding: NamedSharding) -> Callable[[jax.Array], Any]:
        cast = functools.partial(_cast_leaf, cfg.dtype, path, scale)
        if cfg.layers == "scan" or path[0].key != "blocks":
            return jax.jit(cast, out_shardings=sharding)
        layer = NamedSharding(mesh, PartitionSpec(*sharding.spec[1:]))
        return jax.jit(lambda *x: tuple(cast(*x)), out_shardings=(layer,) * cfg.n_layers)

    where = param_shardings(stacked, mesh, layout="rollout")
    return jax.tree_util.tree_map_with_path(program, where)


def _cast_leaf(
    dtype: Any, path: tuple[Any, ...], scale: float | None, x: jax.Array, *adapters: jax.Array
) -> jax.Array:
    """Norm scales stay float32: the trainer multiplies by them in float32 too."""
    if adapters and scale is not None:
        x = merge(x, adapters, scale)
    return x if path[-1].key == "scale" else flatten_heads(path, x.astype(dtype))
