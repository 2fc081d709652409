"""Routing of tokens to experts, and the experts' MLPs over a mesh, as pure functions of arrays.

    p_te = softmax_e(x_t . router_e)                                  float32
    S_t  = the k experts of largest p_t (or those that are replayed)
    g_te = p_te, divided by the sum over S_t if `norm_topk`
    y_t  = sum over e in S_t of g_te down_e(silu(gate_e x_t) * up_e x_t)

(Qwen3-MoE; transformers, modeling_qwen3_moe.py.) No expert has a capacity and no token is dropped, so that the output of a
token depends on that token alone. Rows are sorted by expert and multiplied group by group (`jax.lax.ragged_dot`).

Over a mesh the experts are split over its expert axis and each expert's width over the tensor axis. The devices of an expert
group gather each other's tokens, compute what goes to their own experts, and sum and scatter the results. Gathering moves
(X - 1) rows a token for X devices, sending to k experts at most k, so gathering is the cheaper one up to X = k.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Integer, UInt

from rest_jax.distributed import BATCH_AXES, num_data_shards, scatter_sum
from rest_jax.models.cache import Layout, RowLayout
from rest_jax.models.config import DecoderConfig
from rest_jax.models.elementwise import swiglu
from rest_jax.models.products import float32_einsum
from rest_jax.models.remat import checkpoint, keep

# Rows of one product over the gathered tokens. All tokens may go to the experts of one device, so its buffers have a row for
# every choice of every device; in parts they are no larger than without an expert axis. A few rows (decoding) go at once: each
# part reads the weights again.
_ROWS = 1 << 16
# Rows and columns of both operands that the kernel of `_sum_outer` has on the chip at once: with a float32 sum of 1024 x 768,
# and everything twice, 13 of the 16 MB that a kernel gets.
_TILE = (256, 1024, 768)


class Routing(NamedTuple):
    """Where the tokens of a layer go."""

    chosen: Int[Array, "B T k"]  # experts, int32
    weight: Float[Array, "B T k"]  # g, float32
    probability: Float[Array, "B T E"]  # p, float32
    own: Int[Array, "B T k"]  # the router's own choice: `chosen` unless that is replayed


class RouterRecord(NamedTuple):
    """What the routers of a pass did, with a leading axis L over all layers. Sums are over a row's tokens without padding."""

    chosen: Int[Array, "*L B T k"]  # int32
    tokens: Float[Array, "*L B"]
    load: Float[Array, "*L B E"]  # tokens that went to each expert
    entropy: Float[Array, "*L B"]  # sum of the entropy of p, nats
    agreement: Float[Array, "*L B"]  # experts of the router's own choice that were chosen
    balance: Float[
        Array, "*L B"
    ]  # sum of the load-balance loss (`rl/balance.py`); zero unless `RowLayout.balance` is given


class ExpertWeights(NamedTuple):
    """Matrices of all experts of a layer, in their stored dtype."""

    gate: Float[Array, "E D F"]
    up: Float[Array, "E D F"]
    down: Float[Array, "E F D"]


class Matrices(NamedTuple):
    """The experts' matrices as they are multiplied, and as they are stored, which have the gradient and are not read."""

    cast: ExpertWeights
    stored: ExpertWeights


def route(
    x: Float[Array, "B T D"],
    router: Float[Array, "D E"],
    replayed: Integer[Array, "B T k"] | None,
    cfg: DecoderConfig,
) -> Routing:
    """The experts of every token and their weights. `replayed` takes the place of the router's own choice; weights are the
    router's in any case, and alone carry gradient.
    """
    logits = float32_einsum("btd,de->bte", x, router)
    probability = jax.nn.softmax(logits, axis=-1)
    _, own = jax.lax.top_k(jax.lax.stop_gradient(probability), cfg.experts_per_token)
    chosen = own if replayed is None else replayed.astype(jnp.int32)
    weight = jnp.take_along_axis(probability, chosen, axis=-1)
    if cfg.norm_topk:
        weight = weight / jnp.sum(weight, axis=-1, keepdims=True)
    return Routing(chosen, weight, probability, own)


def compact(chosen: Int[Array, "L *B k"], cfg: DecoderConfig) -> UInt[Array, "*B L k"]:
    """Chosen experts as they are kept for replay: layers behind the tokens, in the least unsigned integers."""
    dtype = jnp.uint8 if cfg.n_experts <= 256 else jnp.uint16
    return jnp.moveaxis(chosen, 0, -2).astype(dtype)


def record(routing: Routing, valid: Bool[Array, "B T"], layout: Layout) -> RouterRecord:
    """What a router did with the tokens that are no padding."""
    chosen, p = routing.chosen, routing.probability
    took, own = (
        jnp.any(ids[..., None] == jnp.arange(p.shape[-1]), axis=-2) for ids in (chosen, routing.own)
    )
    p = jnp.where(valid[..., None], p, 0.0)
    entropy = -jnp.sum(jax.scipy.special.xlogy(p, p), axis=(1, 2))
    took = took & valid[..., None]
    return RouterRecord(
        chosen=chosen,
        tokens=jnp.sum(valid, axis=1).astype(jnp.float32),
        load=jnp.sum(took, axis=1).astype(jnp.float32),
        entropy=jax.lax.stop_gradient(entropy),
        agreement=jnp.sum(took & own, axis=(1, 2)).astype(jnp.float32),
        balance=_balance(took, p, layout),
    )


def _balance(took, p, layout: Layout):
    """float32 [B]: sum_t u_t E sum_e f_e p_te, f the share of the tokens of t's completion that went to e; u the weights."""
    if not isinstance(layout, RowLayout) or layout.balance is None:
        return jnp.zeros(p.shape[0])
    weight, time, experts = layout.balance, *p.shape[1:]
    # the tokens of a completion have its end in common
    end = jnp.where(weight > 0, layout.until, 0)
    ones = (weight > 0).astype(jnp.float32)[..., None]

    def share(took, ones, end):
        sums = jax.ops.segment_sum(jnp.concatenate([took * ones, ones], axis=1), end, time + 1)
        return (sums[:, :experts] / jnp.maximum(sums[:, experts:], 1))[end]

    f = jax.lax.stop_gradient(jax.vmap(share)(took, ones, end))
    return experts * jnp.sum(weight * jnp.sum(f * p, axis=-1), axis=1)


def mix_experts(
    x: Float[Array, "B T D"],
    routing: Routing,
    valid: Bool[Array, "B T"],
    experts: ExpertWeights,
    cfg: DecoderConfig,
) -> Float[Array, "B T D"]:
    """The weighted sum of the chosen experts' MLPs, in x's dtype; zero for padding, which no expert computes.

    Under `distributed.activate` (rows that divide over the data shards) every device computes its own experts; elsewhere this
    is one product over all experts. Matrices are multiplied in x's dtype; their gradients are made and summed over devices
    in their own.
    """
    chosen = jnp.where(valid[..., None], routing.chosen, cfg.n_experts)
    cast = ExpertWeights(*(jax.lax.stop_gradient(w).astype(x.dtype) for w in experts))
    matrices = Matrices(cast, experts)
    mesh = jax.sharding.get_abstract_mesh()
    rows = PartitionSpec(BATCH_AXES)
    if mesh.empty or x.shape[0] % num_data_shards(mesh):
        return _compute_groups(x, chosen, routing.weight, matrices, cfg)
    embed = "fsdp" if _split_over_fsdp(matrices) else None
    wide: Any = PartitionSpec("expert", embed, "tensor")
    narrow: Any = PartitionSpec("expert", "tensor", embed)
    split = ExpertWeights(wide, wide, narrow)
    on_device = jax.shard_map(
        functools.partial(_compute_on_device, cfg=cfg),
        in_specs=(rows, rows, rows, Matrices(split, split)),
        out_specs=rows,
        check_vma=False,  # the kernel of `_sum_outer` does not say over which axes its output varies
    )
    return on_device(x, chosen, routing.weight, matrices)


def _compute_on_device(x, chosen, weight, experts: Matrices, cfg: DecoderConfig):
    """This device's rows, from the experts of all devices of its expert group."""
    x, chosen, weight = (jax.lax.all_gather(a, "expert", tiled=True) for a in (x, chosen, weight))
    if _split_over_fsdp(experts):
        # Of `stored` the gradient alone is computed: this gather in reverse, a sum that is scattered.
        experts = Matrices(*map(_gather_embed, experts))
    chosen = chosen - jax.lax.axis_index("expert") * experts.cast.gate.shape[0]

    def compute(part):
        return _compute_groups(*part, experts=experts, cfg=cfg)

    parts = _count_parts(jax.lax.axis_size("expert"), chosen.size)
    if parts == 1:
        partial = compute((x, chosen, weight))
    else:
        # with the barriers of `prevent_cse`, which a loop does not need, the stored matrices would count as read, and be gathered
        compute = checkpoint(cfg.remat)(compute)
        cut = [a.reshape(parts, -1, *a.shape[1:]) for a in (x, chosen, weight)]
        partial = jax.lax.map(compute, cut).reshape(x.shape)
    mine = jax.lax.psum_scatter(partial, "expert", tiled=True)
    return jax.lax.psum(mine, "tensor")


def _split_over_fsdp(experts: Matrices) -> bool:
    """Whether the matrices are in the layout of training: there they are stored in more bits than they are multiplied in."""
    return experts.stored.gate.dtype != experts.cast.gate.dtype


def _gather_embed(experts: ExpertWeights) -> ExpertWeights:
    gate, up, down = experts
    return ExpertWeights(_gather(gate, 1), _gather(up, 1), _gather(down, 2))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather(x, axis: int):
    return jax.lax.all_gather(x, "fsdp", axis=axis, tiled=True)


_gather.defvjp(
    lambda x, axis: (_gather(x, axis), None),
    lambda axis, _, d_out: (scatter_sum(d_out, "fsdp", axis),),
)


def _count_parts(devices: int, rows: int) -> int:
    """Into how many parts, at most one a device, the gathered rows are cut, so that a product has at most `_ROWS`."""
    fits = (n for n in range(1, devices) if devices % n == 0 and rows <= n * _ROWS)
    return next(fits, devices)


def _compute_groups(x, chosen, weight, experts: Matrices, cfg: DecoderConfig):
    """Rows `[B T D]` through the experts at hand; a chosen number that is none of theirs adds nothing."""
    count, k = experts.cast.gate.shape[0], chosen.shape[-1]
    flat = x.reshape(-1, x.shape[-1])
    expert = chosen.reshape(-1)
    expert = jnp.where((expert >= 0) & (expert < count), expert, count)
    order = jnp.argsort(expert, stable=True)
    inverse = jnp.argsort(order)
    sizes = jnp.sum(expert[:, None] == jnp.arange(count), axis=0, dtype=jnp.int32)
    # Rows behind the last group belong to no expert at hand. What a product leaves there is not defined, in value or gradient.
    used = (jnp.arange(expert.size) < jnp.sum(sizes))[:, None]

    def times(rows, name: str) -> Any:
        cast, stored = (getattr(matrices, name) for matrices in experts)
        return _group_product(rows, cast, stored, sizes, cfg.precision)

    rows = jnp.where(used, _to_experts(flat, order, inverse, k), 0)
    gated, wide = (keep(times(rows, name)) for name in ("gate", "up"))
    out = times(swiglu(gated, wide), "down")
    out = _to_tokens(jnp.where(used, out, 0), order, inverse).reshape(-1, k, x.shape[-1])
    mixed = jnp.sum(out.astype(jnp.float32) * weight.reshape(-1, k, 1), axis=1)
    return mixed.astype(x.dtype).reshape(x.shape)


# The gradient of a gather is a scatter, which is slow everywhere; of a permutation it is the gather by its inverse.


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _to_experts(x, order, inverse, k: int):
    """x `[t D]` -> `[t*k D]`: row r is the token of assignment `order[r]`; token i has the assignments i*k .. i*k + k - 1."""
    return x[order // k]


def _to_experts_forward(x, order, inverse, k):
    return _to_experts(x, order, inverse, k), inverse


def _to_experts_backward(k, inverse, d_rows):
    d_x = d_rows[inverse].reshape(-1, k, d_rows.shape[-1])
    return jnp.sum(d_x.astype(jnp.float32), axis=1).astype(d_rows.dtype), None, None


_to_experts.defvjp(_to_experts_forward, _to_experts_backward)


@jax.custom_vjp
def _to_tokens(rows, order, inverse):
    """Rows `[t*k D]` in the order of the experts -> in that of the tokens."""
    return rows[inverse]


def _to_tokens_forward(rows, order, inverse):
    return _to_tokens(rows, order, inverse), order


def _to_tokens_backward(order, d_out):
    return d_out[order], None, None


_to_tokens.defvjp(_to_tokens_forward, _to_tokens_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _group_product(rows, cast, stored, sizes, precision):
    """Rows `[r I]`, the first `sizes[0]` times matrix 0 of `cast` `[E I O]`, the next `sizes[1]` times matrix 1, ... -> `[r O]`.
    The gradient of the matrices goes to `stored`, in its dtype.
    """
    return jax.lax.ragged_dot(rows, cast, sizes, precision=precision)


def _group_product_forward(rows, cast, stored, sizes, precision):
    # an array without elements stands for the dtype of `stored`
    kept = rows, cast, jnp.zeros(0, stored.dtype), sizes
    return _group_product(rows, cast, stored, sizes, precision), kept


def _group_product_backward(precision, kept, d_out):
    rows, cast, like, sizes = kept
    transposed = jax.lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), (0,), (0,))
    d_rows = jax.lax.ragged_dot_general(d_out, cast, sizes, transposed, precision=precision)
    return d_rows, None, _sum_outer(rows, d_out, sizes, like.dtype, precision), None


_group_product.defvjp(_group_product_forward, _group_product_backward)


def _sum_outer(a, b, sizes, dtype, precision):
    """`[r I]`, `[r O]` -> `[E I O]` in `dtype`: the sum of a_r b_r^T over the rows of each group."""
    summed = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())

    def general(a, b, sizes):
        return jax.lax.ragged_dot_general(
            a, b, sizes, summed, precision=precision, preferred_element_type=dtype
        )

    # libtpu has a kernel for products by group, but none for this sum: it would multiply all rows once a group.
    kernel = functools.partial(_sum_outer_kernel, dtype=dtype)
    return jax.lax.platform_dependent(a, b, sizes, tpu=kernel, default=general)


def _sum_outer_kernel(a, b, sizes, dtype, interpret: bool = False):
    """The same by jax's kernel for TPUs, which takes its products in a's dtype and adds them up in float32."""
    # not part of jax's start, and of no use elsewhere
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    rows, *most = _TILE
    a, b = (jnp.pad(x, ((0, -len(x) % rows), (0, 0))) for x in (a, b))
    tile = (rows, min(a.shape[1], most[0]), min(b.shape[1], most[1]))
    return tgmm(a.T, b, sizes, preferred_element_type=dtype, tiling=tile, interpret=interpret)
