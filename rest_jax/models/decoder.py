"""The decoder: a pre-norm transformer with rotary positions, grouped queries and a SwiGLU MLP or experts.

`Decoder(cfg).apply({"params": p}, tokens, positions, layout, cache, return_kv)` -> (hidden, kv): token
ids in, hidden states after the final norm out; logits never exist in here (`head_matrix`, `logits`).
Layers are stacked: one scanned, optionally rematerialised block whose parameters carry a leading
`layers` axis. Every parameter names its logical axes (`distributed.RULES` maps them); parameters are handed
around as plain nested dicts. The KV cache goes in and comes out as a pytree.

Leaves: embed [V D], head [V D] (untied only), final_norm/scale [D]; under blocks:
attention_norm/scale, mlp_norm/scale [L D]; attention/q [L D N H], k, v [L D K H], o [L N H D],
q_bias [L N H], k_bias, v_bias [L K H], q_norm/scale, k_norm/scale [L H]; mlp/gate, up [L D F], down [L F D], or with
experts mlp/router [L D E], gate, up [L E D F], down [L E F D]. In rollouts with `joined` matrices (`join_matrices`) attention/qkv
and, without experts, mlp/gate_up take the place of q, k, v and of gate, up.

Adapters (`DecoderConfig.lora`) are a collection of their own, `lora`, in which a matrix is a pair {a, b}: blocks/attention/q/a
[L D r], b [L r N H]; o/a [L N H r], b [L r D]; mlp/gate/a [L D r], b [L r F]. Functions that take parameters take them as
`params["lora"]` (`with_adapters`); without them the decoder is the base model.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.nn.initializers import Initializer
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Integer, Key

from rest_jax.distributed import (
    gather_positions,
    logical_shardings,
    pin_rows,
    scatter_positions,
    sum_weight_gradient,
)
from rest_jax.errors import UserError
from rest_jax.models.attention import attend, valid_positions
from rest_jax.models.cache import Cache, LayerCache, Layers, Layout, Pool, RowLayout
from rest_jax.models.config import DecoderConfig
from rest_jax.models.elementwise import rms_norm, swiglu
from rest_jax.models.embedding import embed_tokens
from rest_jax.models.moe import ExpertWeights, RouterRecord, mix_experts, record, route
from rest_jax.models.products import float32_einsum
from rest_jax.models.remat import checkpoint, keep
from rest_jax.models.rope import Rope, apply_rope, rope_tables
from rest_jax.types import Params

KeysValues = tuple[Layers, Layers]  # a layer: [B T K H]

_INIT = nn.initializers.normal(0.02)
_HEAD_AXES = {"q": "heads", "k": "kv_heads", "v": "kv_heads"}
_JOINED = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}
LORA = "lora"  # the collection of adapters


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis, in float32, returned in x's dtype."""

    cfg: DecoderConfig

    @nn.compact
    def __call__(self, x) -> Any:
        scale = _param(self, "scale", nn.initializers.ones, (x.shape[-1],), ("norm",))
        return rms_norm(x, scale, self.cfg.norm_eps)


class Attention(nn.Module):
    """Projections, head norms, rotation and the layout's attention -> (out, (k, v) or, unrolled, those of the layer's cache)."""

    cfg: DecoderConfig

    @nn.compact
    def __call__(self, x, cache, rope: Rope, layout: Layout):
        cfg = self.cfg
        heads = {"q": cfg.n_heads, "k": cfg.n_kv_heads, "v": cfg.n_kv_heads}
        if cfg.joined:
            widths = [n * cfg.head_dim for n in heads.values()]
            products = _joined_products(self, x, "qkv", widths)
        else:
            products = [self._project(x, name, n) for name, n in heads.items()]
        q, k, v = (
            self._by_head(y, name, n) for y, (name, n) in zip(products, heads.items(), strict=True)
        )
        if cfg.qk_norm:
            q = RMSNorm(cfg, name="q_norm")(q)
            k = RMSNorm(cfg, name="k_norm")(k)
        q, k = apply_rope(q, rope), apply_rope(k, rope)
        if isinstance(cache, LayerCache) and cfg.layers == "unroll":
            # Written before it is read, so that XLA does so in place; under `scan` the caller writes all layers at once.
            cache = cache.write(layout.time, k, v)  # type: ignore[union-attr]
            out = attend(q, None, layout, cache, cfg)
            kv = cache.recent_k, cache.recent_v
        else:
            out = attend(q, (k, v), layout, cache, cfg)
            kv = k, v
        o = _matrix(
            self, "o", {"heads": cfg.n_heads, "head_dim": cfg.head_dim, "embed": cfg.d_model}
        )
        return _times(out.reshape(*x.shape[:2], -1), o, cfg), kv

    def _project(self, x, name: str, heads: int):
        cfg = self.cfg
        axes = {"embed": cfg.d_model, _HEAD_AXES[name]: heads, "head_dim": cfg.head_dim}
        y = _times(x, _matrix(self, name, axes), cfg)
        # A product that is fused with what is done by head wants its matrix transposed, and libtpu copies that for it.
        return jax.lax.optimization_barrier(y) if cfg.flat_heads else y

    def _by_head(self, y, name: str, heads: int):
        """A projection [B T N*H] as [B T N H], with its bias."""
        cfg = self.cfg
        y = y.reshape(*y.shape[:2], heads, cfg.head_dim)
        if cfg.qkv_bias:
            shape, axes = (heads, cfg.head_dim), (_HEAD_AXES[name], "head_dim")
            bias = _param(self, f"{name}_bias", nn.initializers.zeros, shape, axes)
            # in float32, as the sum over tokens and devices that is its gradient
            y = (y.astype(jnp.float32) + bias.astype(jnp.float32)).astype(cfg.dtype)
        return y


class Mlp(nn.Module):
    """down(silu(gate x) * up x)."""

    cfg: DecoderConfig

    @nn.compact
    def __call__(self, x):
        cfg = self.cfg
        wide = {"embed": cfg.d_model, "mlp": cfg.d_ff}
        if cfg.joined:
            gate, up = _joined_products(self, x, "gate_up", [cfg.d_ff] * 2)
        else:
            gate, up = (_matrix(self, name, wide) for name in ("gate", "up"))
            gate, up = (keep(_times(x, w, cfg)) for w in (gate, up))
        down = _matrix(self, "down", {"mlp": cfg.d_ff, "embed": cfg.d_model})
        return _times(swiglu(gate, up), down, cfg)


class Experts(nn.Module):
    """The mixture of experts; what its router did is sown as `record` of the collection `router`."""

    cfg: DecoderConfig

    @nn.compact
    def __call__(self, x, layout: Layout, replayed):
        cfg = self.cfg
        e, d, f = cfg.n_experts, cfg.d_model, cfg.d_ff
        router = _param(self, "router", _INIT, (d, e), ("embed", "router")).astype(cfg.dtype)
        wide, narrow = ("expert", "expert_embed", "mlp"), ("expert", "mlp", "expert_embed")
        experts = ExpertWeights(
            gate=_param(self, "gate", _INIT, (e, d, f), wide),
            up=_param(self, "up", _INIT, (e, d, f), wide),
            down=_param(self, "down", _INIT, (e, f, d), narrow),
        )
        valid = valid_positions(layout, x.shape[:2])
        routing = route(x, router, replayed, cfg)
        done: Any = record(routing, valid, layout)
        self.sow("router", "record", done, reduce_fn=lambda _, new: new)
        return mix_experts(x, routing, valid, experts, cfg)


class Block(nn.Module):
    """One layer as scan wants it: (carry, its cache, rope, layout, replayed experts) -> (carry, keys and values or None)."""

    cfg: DecoderConfig
    return_kv: bool

    @nn.compact
    def __call__(self, x, cache, rope: Rope, layout: Layout, replayed):
        gather, scatter = _exchange(layout, self.cfg)
        normed = gather(RMSNorm(self.cfg, name="attention_norm")(x))
        y, kv = Attention(self.cfg, name="attention")(normed, cache, rope, layout)
        x = keep(x + scatter(y))
        normed = gather(RMSNorm(self.cfg, name="mlp_norm")(x))
        if self.cfg.n_experts:
            x = x + scatter(Experts(self.cfg, name="mlp")(normed, layout, replayed))
        else:
            x = x + scatter(Mlp(self.cfg, name="mlp")(normed))
        return x, kv if self.return_kv else None


class Decoder(nn.Module):
    """The trunk, from token ids to the hidden states after the final norm."""

    cfg: DecoderConfig

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        layout: Layout,
        cache: Cache | Pool | None = None,
        return_kv: bool = False,
        replayed: Integer[Array, "L B T k"] | None = None,
    ) -> tuple[Float[Array, "B T D"], KeysValues | Cache | None]:
        """Hidden states in the compute dtype, and the cache with the token written, (k, v) on `return_kv`, or None.

        A token id outside the vocabulary gives NaN. With a cache, tokens are `[W, N]` and the layout is a DecodeLayout; with a
        pool, they continue what is in it, and the layout is PrefixedRows.
        `replayed` experts take the place of the routers' own choice.
        """
        cfg = self.cfg
        shape, axes = (cfg.vocab_size, cfg.d_model), ("vocab", "embed")
        embed = _param(self, "embed", _INIT, shape, axes)
        if not cfg.tied:
            _param(self, "head", _INIT, shape, axes)  # read by `head_matrix`, not by the trunk
        rope = rope_tables(positions, cfg.head_dim, cfg.rope_theta, cfg.rope_scaling)
        return_kv = return_kv or isinstance(cache, Cache)
        gather, scatter = _exchange(layout, cfg)
        x = scatter(embed_tokens(embed, tokens, cfg.dtype))
        if cfg.layers == "scan":
            layers: Any = cache
            if isinstance(cache, Cache):
                number = jnp.arange(cfg.n_layers)
                layers = LayerCache(cache.pool, number, cache.recent_k, cache.recent_v)
            blocks = _stacked(cfg, isinstance(cache, Cache))(cfg, return_kv, name="blocks")
            x, kv = blocks(x, layers, rope, layout, replayed)
        else:
            x, kv = self._unrolled(x, cache, (rope, layout, replayed), return_kv)
        hidden = gather(RMSNorm(cfg, name="final_norm")(x))
        if not isinstance(cache, Cache):
            return hidden, kv
        if cfg.layers == "scan":
            return hidden, cache.append(layout.time, *kv)  # type: ignore[union-attr]
        return hidden, dataclasses.replace(cache, recent_k=kv[0], recent_v=kv[1])

    def _unrolled(self, x, cache: Cache | Pool | None, inputs: tuple, return_kv: bool):
        """Layer by layer: parameters, cache and keys and values come and go as one tree a layer (`unstack_layers`)."""
        (rope, layout, replayed), outputs = inputs, []
        for i in range(self.cfg.n_layers):
            own: Any = None
            if isinstance(cache, Pool):
                own = Pool(cache.k[i], cache.v[i])
            elif cache is not None:
                pool = Pool(cache.pool.k[i], cache.pool.v[i])
                own = LayerCache(pool, None, cache.recent_k[i], cache.recent_v[i])
            block = _rematerialised(self.cfg)(self.cfg, return_kv, name=f"block_{i}")
            x, kv = block(x, own, rope, layout, None if replayed is None else replayed[i])
            outputs.append(kv)
        k_and_v: Any = tuple(zip(*outputs, strict=True)) if return_kv else None
        return x, k_and_v


def apply_routed(
    decoder: Decoder, params: Params, *inputs: Any, **options: Any
) -> tuple[Any, Any, RouterRecord | None]:
    """What `decoder.apply` returns for these inputs, and what the routers of all layers did; None without experts."""
    apply: Any = decoder.apply
    own = {name: value for name, value in params.items() if name != LORA}
    variables = {"params": own} | ({LORA: params[LORA]} if LORA in params else {})
    if not decoder.cfg.n_experts:
        return *apply(variables, *inputs, **options), None
    (hidden, kv), state = apply(variables, *inputs, **options, mutable=["router"])
    sown = state["router"]
    if decoder.cfg.layers == "scan":
        return hidden, kv, sown["blocks"]["mlp"]["record"]
    layers = [sown[f"block_{i}"]["mlp"]["record"] for i in range(decoder.cfg.n_layers)]
    return hidden, kv, jax.tree.map(lambda *x: jnp.stack(x), *layers)


def unstack_layers(params: Params) -> Params:
    """Parameters of `layers: scan` as those of `layers: unroll`: `blocks` becomes `block_0`, `block_1`, .. A parameter in it is
    an array [L ...] or a tuple of layers.
    """
    rest = {name: value for name, value in params.items() if name != "blocks"}

    def layer(i: int) -> Params:
        return jax.tree.map(
            lambda x: x[i], params["blocks"], is_leaf=lambda x: isinstance(x, tuple)
        )

    count = len(params["blocks"]["attention"]["o"])
    return rest | {f"block_{i}": layer(i) for i in range(count)}


def init_params(cfg: DecoderConfig, key: Key[Array, ""]) -> Params:
    """Fresh parameters as a plain nested dict: matrices N(0, 0.02), norms one, biases zero."""
    return nn.meta.unbox(_init_boxed(cfg, key))


@functools.lru_cache(maxsize=16)
def abstract_params(cfg: DecoderConfig) -> Params:
    """Shapes and dtypes of the parameters, still boxed with their logical axes; nothing is computed."""
    return jax.eval_shape(lambda: _init_boxed(cfg, jax.random.key(0)))


def init_adapters(cfg: DecoderConfig, key: Key[Array, ""]) -> Params:
    """Fresh adapters in float32: A uniform within 1 / sqrt(its inputs), as peft has it, and B zero, so that the policy is the
    base model.
    """
    return nn.meta.unbox(_init_boxed(cfg, key, LORA))


@functools.lru_cache(maxsize=16)
def abstract_adapters(cfg: DecoderConfig) -> Params:
    """Shapes of the adapters, boxed as those of `abstract_params`."""
    return jax.eval_shape(lambda: _init_boxed(cfg, jax.random.key(0), LORA))


def with_adapters(trained: Params, frozen: Params | None) -> Params:
    """The parameters of a decoder of which some are trained: all, or with LoRA the adapters of frozen ones."""
    return trained if frozen is None else frozen | {LORA: trained}


def head_matrix(params: Params, cfg: DecoderConfig) -> Float[Array, "V D"]:
    """The output matrix `[V, D]` (row v scores word v) in its stored dtype; tied: the embedding."""
    return params["embed"] if cfg.tied else params["head"]


def logits(
    params: Params, cfg: DecoderConfig, hidden: Float[Array, "... D"]
) -> Float[Array, "... V"]:
    """float32 scores of every word, for few positions; batches take the chunked vocabulary pass (`rl.logprobs`)."""
    head = head_matrix(params, cfg).astype(cfg.dtype)
    return float32_einsum("...d,vd->...v", hidden.astype(cfg.dtype), head)


def _init_boxed(cfg: DecoderConfig, key: jax.Array, collection: str = "params") -> Params:
    token = jnp.zeros((1, 1), jnp.int32)
    keys = {"params": key, LORA: key}
    return Decoder(cfg).init(keys, token, token, RowLayout(token + 1, 1))[collection]


def _param(
    module: Any, name: str, init: Initializer, shape: tuple[int, ...], axes: tuple[str, ...]
) -> jax.Array:
    """A parameter with its logical axes, in its stored dtype."""
    boxed = nn.with_logical_partitioning(init, axes)
    return module.param(name, boxed, shape, module.cfg.param_dtype)


def _joined_products(
    module: Any, x: Float[Array, "B T D"], name: str, widths: Sequence[int]
) -> list[jax.Array]:
    """x times each of the matrices that `join_matrices` has joined, [B T width]."""
    cfg = module.cfg
    shape = x.shape[-1], cfg.joined, sum(widths) // cfg.joined
    w = _param(module, name, _INIT, shape, ("embed", "mlp", "head_dim"))
    w = w.reshape(shape[0], -1).astype(cfg.dtype)
    y = jnp.matmul(x.reshape(-1, shape[0]), w, precision=cfg.precision)
    # As of `_project`.
    y = jax.lax.optimization_barrier(y).reshape(*x.shape[:2], *shape[1:])
    ends = np.cumsum(widths)[:-1] // cfg.joined
    return [part.reshape(*x.shape[:2], -1) for part in jnp.split(y, ends, axis=-1)]


def join_matrices(matrices: Sequence[Float[Array, "*L D _"]], parts: int) -> jax.Array:
    """Matrices [.. D N] with the same input as one [.. D parts M], in which each part has its columns of all of them."""
    cut = [x.reshape(*x.shape[:-1], parts, -1) for x in matrices]
    return jnp.concatenate(cut, axis=-1)


def joined_names(cfg: DecoderConfig) -> dict[str, tuple[str, ...]]:
    """The matrices that lie as one in the parameters, by the name of that one."""
    return {
        name: members
        for name, members in _JOINED.items()
        if cfg.joined and not (cfg.n_experts and name == "gate_up")
    }


class _Matrix(NamedTuple):
    """A parameter as a matrix, in its stored dtype: `_times` casts it."""

    value: Float[Array, "I O"]
    axes: tuple[str, str]  # logical ones, and what the mesh must divide
    sizes: tuple[int, int]
    adapters: "tuple[_Matrix, _Matrix] | None" = None  # A [I r] and B [r O]


def _matrix(module: Any, name: str, sizes: dict[str, int]) -> _Matrix:
    """A parameter with these logical axes; `head_dim` is joined to the one before it, in memory too with `flat_heads`."""
    width = module.cfg.head_dim if "head_dim" in sizes else 1
    own = {axis: size for axis, size in sizes.items() if axis != "head_dim"}
    flat = tuple(n * width if axis.endswith("heads") else n for axis, n in own.items())
    stored = dict(zip(own, flat, strict=True)) if module.cfg.flat_heads else sizes
    w = _param(module, name, _INIT, tuple(stored.values()), tuple(stored))
    (first, second), (rows, columns) = own, own.values()
    adapters = _adapters(module, name, sizes)
    return _Matrix(w.reshape(flat), (first, second), (rows, columns), adapters)


def _adapters(module: Any, name: str, sizes: dict[str, int]) -> tuple[_Matrix, _Matrix] | None:
    """A and B of the matrix of that name and these axes, which each has on its side; None where there are none."""
    lora = module.cfg.lora
    if lora is None or name not in lora.targets:
        return None
    if not (module.is_initializing() or module.has_variable(LORA, name)):
        return None
    own = [axis for axis in sizes if axis != "head_dim"]
    cut = list(sizes).index(own[1])
    axes, shape = tuple(sizes), tuple(sizes.values())

    def make() -> dict[str, Any]:
        key = module.make_rng(LORA)
        a = nn.with_logical_partitioning(_init_a, (*axes[:cut], "rank"))
        b = nn.with_logical_partitioning(nn.initializers.zeros, ("rank", *axes[cut:]))
        return {
            "a": a(key, (*shape[:cut], lora.rank), jnp.float32),
            "b": b(key, (lora.rank, *shape[cut:]), jnp.float32),
        }

    pair = module.variable(LORA, name, make).value
    return (
        _Matrix(pair["a"].reshape(-1, lora.rank), (own[0], "rank"), (sizes[own[0]], lora.rank)),
        _Matrix(pair["b"].reshape(lora.rank, -1), ("rank", own[1]), (lora.rank, sizes[own[1]])),
    )


def _init_a(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    limit = math.prod(shape[:-1]) ** -0.5
    # Rounded once, in the last product: the same bits on every device.
    return limit * jax.random.uniform(key, shape, dtype, -1, 1)


def _times(x: jax.Array, matrix: _Matrix, cfg: DecoderConfig) -> jax.Array:
    """x `[B T I]` times a matrix `[I O]` in the compute dtype, as one plain matrix product: with one contracted axis, also in
    the backward pass, XLA's CPU backend transposes nothing.
    """
    flat = x.reshape(-1, x.shape[-1])
    y = _product(flat, matrix, cfg)
    if matrix.adapters is not None:
        assert cfg.lora is not None
        a, b = matrix.adapters
        y = y + cfg.lora.scale * _product(_product(flat, a, cfg), b, cfg)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _product(x: jax.Array, matrix: _Matrix, cfg: DecoderConfig) -> Any:
    w, axes, sizes, _ = matrix
    if w.dtype != x.dtype:
        return _mixed_product(x, w, axes, sizes)
    return jnp.matmul(x, w, precision=cfg.precision)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _mixed_product(
    x: Float[Array, "T I"], w: Float[Array, "I O"], axes: tuple[str, str], sizes: tuple[int, int]
) -> Float[Array, "T O"]:
    """x times w cast to x's dtype. The gradient of w stays in w's dtype (float32): autodiff would round each device's share to
    bfloat16 before the shares of all devices are added.
    """
    return jnp.matmul(x, w.astype(x.dtype))


def _mixed_forward(x, w, axes, sizes):
    return _mixed_product(x, w, axes, sizes), (x, w)


def _mixed_backward(axes, sizes, kept, d_y):
    x, w = kept
    product = functools.partial(jnp.einsum, "ti,to->io", preferred_element_type=w.dtype)
    d_w = sum_weight_gradient(product, x, d_y, axes, sizes)
    return jnp.matmul(d_y, w.astype(x.dtype).T), d_w


_mixed_product.defvjp(_mixed_forward, _mixed_backward)


def _exchange(layout: Layout, cfg: DecoderConfig) -> tuple[Any, Any]:
    """What brings hidden states into a part of a block, and what comes out of it back to them. With `remat: block`, which saves
    memory for time, the positions of rows are split over tensor in between.
    """
    split = isinstance(layout, RowLayout) and cfg.remat == "block"
    return (gather_positions, scatter_positions) if split else (pin_rows, pin_rows)


def _rematerialised(cfg: DecoderConfig) -> Any:
    """Block, computed again in the backward pass as `cfg.remat` says."""
    return checkpoint(cfg.remat, nn.remat)(Block)


def _stacked(cfg: DecoderConfig, cached: bool) -> Any:
    """The block scanned over the layers."""
    # The kernel takes a layer's pages itself: to hand it a part would copy them.
    whole: Any = nn.broadcast if cfg.reads_pages else 0
    cache: Any = LayerCache(whole, 0, whole, whole) if cached else 0  # type: ignore[arg-type]
    in_axes: Any = (cache, nn.broadcast, nn.broadcast, 0)  # cache, rope, layout, replayed experts
    return nn.scan(
        _rematerialised(cfg),
        variable_axes={"params": 0, "router": 0, LORA: 0},
        split_rngs={"params": True, LORA: True},
        in_axes=in_axes,
        out_axes=0,
        length=cfg.n_layers,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


def param_shardings(
    cfg: DecoderConfig, mesh: Mesh, *, layout: Literal["train", "rollout"] = "train"
) -> Params:
    """NamedSharding of every parameter: split over fsdp, expert and tensor (`train`), or over tensor, and experts over
    expert (`rollout`). UserError for a mesh that does not fit the sizes.
    """
    if mesh.shape["expert"] > 1 and not cfg.n_experts:
        raise UserError(
            f"mesh.expert {mesh.shape['expert']}: a {cfg.family} model has no experts; set mesh.expert 1 and raise mesh.fsdp"
        )
    # Flat heads are split as they are apart: never within one.
    apart = dataclasses.replace(cfg, flat_heads=False)
    shardings = logical_shardings(abstract_params(apart), mesh, layout=layout)
    if not cfg.flat_heads:
        return shardings

    def flat(path: tuple[Any, ...], sharding: NamedSharding) -> NamedSharding:
        if axis := head_dim_axis(path[-1].key):
            spec = [*sharding.spec]
            del spec[axis]
            return NamedSharding(mesh, PartitionSpec(*spec))
        return sharding

    return jax.tree_util.tree_map_with_path(flat, shardings)


def adapter_shardings(cfg: DecoderConfig, mesh: Mesh) -> Params:
    """NamedSharding of every adapter: each is split as its matrix is on its side, and over fsdp besides where that side is not
    and fsdp divides it. The rank never is.
    """
    boxed = abstract_adapters(cfg)

    def over_fsdp(where: NamedSharding, box: Any) -> NamedSharding:
        spec: list[tuple[str, ...]] = [
            part if isinstance(part, tuple) else (part,) if part else () for part in where.spec
        ]
        if any("fsdp" in part for part in spec):
            return where
        for i, (axis, size) in enumerate(zip(box.names, box.value.shape, strict=True)):
            devices = math.prod(mesh.shape[name] for name in (*spec[i], "fsdp"))
            if axis not in ("layers", "rank") and size % devices == 0:
                spec[i] = (*spec[i], "fsdp")
                break
        return NamedSharding(mesh, PartitionSpec(*(part or None for part in spec)))

    return jax.tree.map(over_fsdp, logical_shardings(boxed, mesh), boxed)


def head_dim_axis(name: str) -> int | None:
    """The axis that flat heads join to the one before it, of a parameter of that name; None: it has none."""
    return {"q": -1, "k": -1, "v": -1, "o": -2}.get(name)


def flatten_heads(name: str, x: jax.Array) -> jax.Array:
    """A parameter of that name as it is with `flat_heads`."""
    axis = head_dim_axis(name)
    if axis is None:
        return x
    end = x.ndim + axis
    return x.reshape(*x.shape[: end - 1], -1, *x.shape[end + 1 :])
