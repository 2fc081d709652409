"""The policy as rollouts have it: the decoder that samples, and the cast of its weights from the train layout."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from rest_jax.distributed import platform
from rest_jax.models.config import DecoderConfig
from rest_jax.models.decoder import (
    Decoder,
    flatten_heads,
    join_matrices,
    joined_names,
    param_shardings,
    unstack_layers,
)
from rest_jax.models.lora import merge, pair_up
from rest_jax.models.policy import Policy
from rest_jax.types import Params


def rollout_decoder(policy: Policy) -> Decoder:
    """The decoder of rollouts. On CPU and GPU its layers are unrolled: a loop over stacked weights would copy each layer's
    weights and caches for every token. On TPU it is the other way round. Where decoding is bound by memory, the matrices of an
    input are one (docs/performance.md).
    """
    kind, cfg = platform(policy.mesh), policy.config
    layers = "scan" if kind == "tpu" else "unroll"
    tensor = policy.rollout_mesh.shape["tensor"]
    even = not (cfg.n_kv_heads % tensor or cfg.d_ff % tensor)
    own = {"layers": layers, "remat": "none", "flat_heads": True, "lora": None}
    return Decoder(dataclasses.replace(cfg, **own, joined=tensor if even and kind != "cpu" else 0))


def rollout_cast(policy: Policy) -> Callable[[Params], Params]:
    """The cast from what a policy trains (float32 masters, train layout) to its rollout weights: in the compute dtype, in
    the rollout layout on the rollout mesh, with the layers of an unrolled decoder apart, and with adapters merged into the
    frozen weights. `cast_programs` is what it runs.
    """
    programs, cfg = cast_programs(policy), rollout_decoder(policy).cfg

    def cast(params: Params) -> Params:
        frozen = policy.frozen
        weights = pair_up(params) if frozen is None else pair_up(frozen, params)
        members = group_members(weights, cfg)
        params = jax.tree.map(lambda program, given: program(*given), programs, members)
        return unstack_layers(params) if cfg.layers == "unroll" else params

    return cast


def group_members(weights: Any, cfg: DecoderConfig) -> Any:
    """A tree of weights as `pair_up` makes it, with a list of what each parameter of the rollout is made of."""
    if not isinstance(weights, dict):
        return [weights]
    joined = {name: members for name, members in joined_names(cfg).items() if members[0] in weights}
    taken = {member for members in joined.values() for member in members}
    apart = {name: group_members(x, cfg) for name, x in weights.items() if name not in taken}
    return apart | {name: [weights[m] for m in members] for name, members in joined.items()}


def cast_programs(policy: Policy) -> Any:
    """The jitted cast to each parameter of the rollout, in their tree. Its arguments are tuples, weights and their adapters, of
    the parameters that it is made of (`group_members`); of an unrolled decoder a stacked parameter becomes a tuple of layers.
    One program for all would hold a second copy of the weights on every device.
    """
    cfg, mesh = rollout_decoder(policy).cfg, policy.rollout_mesh
    scale = policy.config.lora.scale if policy.config.lora else None
    stacked = dataclasses.replace(cfg, layers="scan")

    def program(path: tuple[Any, ...], sharding: NamedSharding) -> Callable[..., Any]:
        cast = functools.partial(_cast, cfg, path[-1].key, scale)
        if cfg.layers == "scan" or path[0].key != "blocks":
            return jax.jit(cast, out_shardings=sharding)
        layer = NamedSharding(mesh, PartitionSpec(*sharding.spec[1:]))
        return jax.jit(lambda *x: tuple(cast(*x)), out_shardings=(layer,) * cfg.n_layers)

    where = param_shardings(stacked, mesh, layout="rollout")
    return jax.tree_util.tree_map_with_path(program, where)


def _cast(
    cfg: DecoderConfig, name: str, scale: float | None, *members: tuple[jax.Array, ...]
) -> jax.Array:
    names = joined_names(cfg).get(name, (name,))
    cast = [
        _cast_leaf(cfg.dtype, own, scale, *given) for own, given in zip(names, members, strict=True)
    ]
    return join_matrices(cast, cfg.joined) if len(cast) > 1 else cast[0]


def _cast_leaf(
    dtype: Any, name: str, scale: float | None, x: jax.Array, *adapters: jax.Array
) -> jax.Array:
    """Norm scales stay float32: the trainer multiplies by them in float32 too."""
    if adapters and scale is not None:
        x = merge(x, adapters, scale)
    return x if name == "scale" else flatten_heads(name, x.astype(dtype))
