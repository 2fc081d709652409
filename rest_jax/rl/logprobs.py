"""The vocabulary pass: log-prob, entropy and Gini of given tokens in one sweep over the LM head, chunk by chunk in time.

Full [P, T, V] logits never exist: one chunk's logits are made, reduced and dropped. `vocabulary_pass` makes them again in
the backward pass; `vocabulary_loss`, the update's, knows the loss of a token and so forms the gradient of the logits while
they are there: 6 instead of 8 FLOPs a weight of the head.
    log-prob   of the distribution that was sampled from (temperature, then top-k / top-p, renormalised)
    entropy    -sum p log p at temperature 1 over the full support, nats
    gini       1 - sum p^2 at temperature 1 over the full support
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax.linen import spmd
from jax import named_scope
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, UInt

from rest_jax.distributed import BATCH_AXES, num_data_shards
from rest_jax.models.attention import pack_group, predicting_hidden
from rest_jax.models.decoder import Decoder, apply_routed, head_matrix
from rest_jax.models.moe import RouterRecord
from rest_jax.rl.loss import TokenLoss, TokenStats
from rest_jax.types import Params, ResponseBatch, Routes, Sampling

# (loss, sums, maxima): scalars
LossAndMetrics = tuple[jax.Array, dict[str, jax.Array], dict[str, jax.Array]]

NEG_INF = -1e30  # finite, so that masked logits give zero probability without NaN gradients


def truncate(logits: Float[Array, "*B V"], sampling: Sampling) -> Float[Array, "*B V"]:
    """Applies temperature, then top-k, then top-p; words cut out get -1e30. Ties at the border stay in."""
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        kth = jax.lax.top_k(jax.lax.stop_gradient(logits), sampling.top_k)[0][..., -1:]
        logits = jnp.where(logits >= kth, logits, NEG_INF)
    if sampling.top_p < 1:
        ordered = jax.lax.stop_gradient(jnp.flip(jnp.sort(logits, axis=-1), axis=-1))
        p = jax.nn.softmax(ordered, axis=-1)
        # The word that crosses the threshold is kept.
        kept = jnp.cumsum(p, axis=-1) - p < sampling.top_p
        threshold = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits >= threshold, logits, NEG_INF)
    return logits


def entropy_and_gini(logits: Float[Array, "*B V"]) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
    """Entropy (nats) and 1 - sum p^2 at temperature 1, without probabilities: their terms are divided after the sums."""
    shifted = logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    weight = jnp.exp(shifted)
    total = jnp.sum(weight, axis=-1)
    entropy = jnp.log(total) - sum_of_products(weight, shifted) / total
    return entropy, 1 - sum_of_products(weight, weight) / (total * total)


def sum_of_products(x: Float[Array, "*B V"], y: Float[Array, "*B V"]) -> Float[Array, "*B"]:
    """float32 sum of x y over the vocabulary, as a product of vectors: several times a fused sum's speed on CPU."""
    return jnp.einsum("...v,...v->...", x, y, precision=jax.lax.Precision.HIGHEST)


def chosen_logp(
    logits: Float[Array, "*B V"], token: Int[Array, "*B"], sampling: Sampling
) -> Float[Array, "*B"]:
    """Log-prob of each token under the sampled distribution."""
    kept = truncate(logits, sampling)
    chosen = jnp.take_along_axis(kept, token[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(kept, axis=-1)


def vocabulary_pass(
    hidden: Float[Array, "P T D"],
    head: Float[Array, "V D"],
    tokens: Int[Array, "P T"],
    sampling: Sampling,
    chunk: int,
) -> tuple[Float[Array, "P T"], Float[Array, "P T"], Float[Array, "P T"]]:
    """(logp, entropy, gini) of `tokens`, float32; hidden[:, t] predicts tokens[:, t].

    Chunks run along T, so that rows stay on their devices. Peak memory is P * chunk * V float32 a device's share of rows.
    """

    # Whole on every data shard before the loop; the partitioner would bring it for every chunk.
    cast = spmd.with_logical_constraint(head.astype(hidden.dtype), ("vocab", None))

    @jax.checkpoint
    def one_chunk(head, cast, hidden, tokens):
        scores = _logits(hidden, _read_as(head, cast))
        return chosen_logp(scores, tokens, sampling), *entropy_and_gini(scores)

    def body(_, xs):
        return None, one_chunk(head, cast, *xs)

    _, out = jax.lax.scan(body, None, _split_time((hidden, tokens), chunk))
    return _join_time(out, tokens.shape)


@jax.custom_vjp
def _read_as(head, cast):
    """`cast`, the head in the compute dtype. Its gradient goes to `head`: chunks add theirs up in the head's own dtype."""
    return cast


def _read_as_forward(head, cast):
    return cast, jnp.zeros((), head.dtype)


def _read_as_backward(like, d_cast):
    return d_cast.astype(like.dtype), None


_read_as.defvjp(_read_as_forward, _read_as_backward)


@dataclasses.dataclass(frozen=True)
class LossSpec:
    """The loss of a token, `token_loss(stats, inputs)`, and how the pass is made.

    `token_loss` works element by element, is zero where its inputs are, and depends on the entropy only if
    `needs_entropy_gradient` (which costs a pass over the logits). `chunk`: response positions at once.
    """

    token_loss: Callable[[TokenStats, Any], TokenLoss]
    sampling: Sampling
    chunk: int
    needs_entropy_gradient: bool = False


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def vocabulary_loss(
    hidden: Float[Array, "P T D"],
    head: Float[Array, "V D"],
    tokens: Int[Array, "P T"],
    inputs: Any,
    spec: LossSpec,
) -> LossAndMetrics:
    """(sum of the loss of all tokens, sums, maxima), float32; hidden[:, t] predicts tokens[:, t].

    `inputs` is a tree of arrays [P T]. The loss alone carries gradient, to `hidden` and `head` (in float32). Memory as in
    `vocabulary_pass`, and one float32 [V D].
    """

    def body(total, xs):
        hidden, tokens, inputs = xs
        chunk = _read_chunk(_logits(hidden, head.astype(hidden.dtype)), tokens, spec.sampling)
        loss, metrics = _sum_losses(chunk, chunk.logp, chunk.entropy, inputs, spec.token_loss)
        return total + loss, metrics

    total, metrics = jax.lax.scan(
        body, jnp.float32(0), _split_time((hidden, tokens, inputs), spec.chunk)
    )
    return total, *_over_chunks(metrics)


def _loss_forward(hidden, head, tokens, inputs, spec):
    axes = _split_axes(hidden.shape[0])
    compute = head.astype(hidden.dtype)
    on_device = functools.partial(_loss_on_device, spec=spec, axes=axes)
    if axes:
        # The head comes whole to every device, once; the partitioner would bring it for every chunk, and add up d_head there.
        rows, scattered = (
            PartitionSpec(axes),
            PartitionSpec(_head_axes(axes, head.shape[1]) or None),
        )
        on_device = jax.shard_map(
            on_device,
            in_specs=(rows, PartitionSpec(), rows, rows),
            out_specs=(PartitionSpec(), PartitionSpec(), rows, scattered),
            axis_names=set(axes),
        )
    total, metrics, d_hidden, d_head = on_device(hidden, compute, tokens, inputs)
    d_head = jax.lax.optimization_barrier(d_head.T)  # a transposition fused into others is slow
    return (total, *metrics), (d_hidden, d_head.astype(head.dtype))


def _loss_on_device(hidden, head, tokens, inputs, spec: "LossSpec", axes: tuple[str, ...]):
    """(loss, (sums, maxima), d_hidden, d_head [D V] float32) of the rows of a data shard, summed over `axes`."""

    def body(carry, xs):
        total, d_head = carry
        hidden, tokens, inputs = xs
        chunk = _read_chunk(_logits(hidden, head), tokens, spec.sampling)
        (loss, metrics), slopes = jax.value_and_grad(
            lambda logp, entropy: _sum_losses(chunk, logp, entropy, inputs, spec.token_loss),
            (0, 1),
            has_aux=True,
        )(chunk.logp, chunk.entropy)
        d_logits = _logp_gradient(chunk, tokens, slopes[0], spec.sampling)
        if spec.needs_entropy_gradient:
            d_logits = d_logits + _entropy_gradient(chunk, slopes[1])
        d_logits = d_logits.astype(hidden.dtype)
        d_logits = d_logits.reshape(-1, d_logits.shape[-1])
        flat = hidden.reshape(-1, hidden.shape[-1])
        matmul = functools.partial(
            jnp.einsum, precision=_precision(hidden), preferred_element_type=jnp.float32
        )
        d_hidden = matmul("tv,vd->td", d_logits, head).astype(hidden.dtype)
        d_head = d_head + matmul("td,tv->dv", flat, d_logits)
        return (total + loss, d_head), (metrics, d_hidden.reshape(hidden.shape))

    # [D V]: XLA's CPU backend is twice as fast at this product than at the one for [V D]; turned once at the end
    start = (jnp.float32(0), jnp.zeros(head.shape[::-1], jnp.float32))
    if axes:
        start = jax.tree.map(lambda x: jax.lax.pcast(x, axes, to="varying"), start)
    xs = _split_time((hidden, tokens, inputs), spec.chunk)
    (total, d_head), (metrics, d_hidden) = jax.lax.scan(body, start, xs)
    sums, maxima = _over_chunks(metrics)
    d_hidden = _join_time(d_hidden, tokens.shape)
    if axes:
        total, sums = jax.lax.psum((total, sums), axes)
        maxima = jax.lax.pmax(maxima, axes)
        scattered = _head_axes(axes, head.shape[1])
        if scattered:
            d_head = jax.lax.psum_scatter(d_head, scattered, tiled=True)
        if rest := tuple(axis for axis in axes if axis not in scattered):
            d_head = jax.lax.psum(d_head, rest)
    return total, (sums, maxima), d_hidden, d_head


def _split_axes(rows: int) -> tuple[str, ...]:
    """The axes of the ambient mesh that split so many rows; none where they do not divide."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or rows % num_data_shards(mesh):
        return ()
    return tuple(axis for axis in BATCH_AXES if mesh.shape[axis] > 1)


def _head_axes(axes: tuple[str, ...], width: int) -> tuple[str, ...]:
    """Those over which a gradient of the head is split along the model's width, as the head itself is."""
    mesh = jax.sharding.get_abstract_mesh()
    split = tuple(axis for axis in axes if axis != "data")
    while width % math.prod(mesh.shape[axis] for axis in split):
        split = split[:-1]
    return split


def _loss_backward(spec, kept, cotangents):
    scale = cotangents[0]
    d_hidden, d_head = kept
    return (d_hidden * scale).astype(d_hidden.dtype), d_head * scale, None, None


vocabulary_loss.defvjp(_loss_forward, _loss_backward)


def _sum_losses(chunk: "_Chunk", logp, entropy, inputs, token_loss: Callable[..., TokenLoss]):
    """(loss, metrics) of a chunk; of the metrics, sums and maxima over its tokens."""
    out = token_loss(TokenStats(logp, entropy, chunk.is_argmax), inputs)
    sums = {name: jnp.sum(value) for name, value in out.sums.items()}
    maxima = {name: jnp.max(value) for name, value in out.maxima.items()}
    return jnp.sum(out.loss), jax.lax.stop_gradient((sums, maxima))


def _over_chunks(metrics):
    sums, maxima = metrics
    return jax.tree.map(lambda x: jnp.sum(x), sums), jax.tree.map(lambda x: jnp.max(x), maxima)


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """A chunk's logits and what they say of the chosen tokens; p = weight / total at temperature 1."""

    shifted: jax.Array  # [P c V] logits minus their maximum
    weight: jax.Array  # [P c V] exp of it
    total: jax.Array  # [P c 1]
    sampled: jax.Array  # [P c V] probabilities of the distribution sampled from
    logp: jax.Array
    entropy: jax.Array
    is_argmax: jax.Array


def _read_chunk(logits, tokens, sampling: Sampling) -> _Chunk:
    shifted = logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    weight = jnp.exp(shifted)
    total = jnp.sum(weight, axis=-1, keepdims=True)
    entropy, _ = entropy_and_gini(logits)
    chosen = jnp.take_along_axis(shifted, tokens[..., None], axis=-1)[..., 0]
    if sampling == Sampling():
        sampled, logp = weight / total, chosen - jnp.log(total[..., 0])
    else:
        sampled = jax.nn.softmax(truncate(logits, sampling), axis=-1)
        logp = chosen_logp(logits, tokens, sampling)
    return _Chunk(shifted, weight, total, sampled, logp, entropy, chosen >= 0)


def _logp_gradient(chunk: _Chunk, tokens, slope, sampling: Sampling):
    slope = (slope / sampling.temperature)[..., None]
    word = jax.lax.broadcasted_iota(tokens.dtype, chunk.sampled.shape, chunk.sampled.ndim - 1)
    return slope * (jnp.where(word == tokens[..., None], 1.0, 0.0) - chunk.sampled)


def _entropy_gradient(chunk: _Chunk, slope):
    logp = chunk.shifted - jnp.log(chunk.total)
    return -slope[..., None] * (chunk.weight / chunk.total) * (logp + chunk.entropy[..., None])


def _logits(hidden, head):
    """float32 [P c V], as one plain matrix product."""
    flat = jnp.einsum(
        "td,vd->tv",
        hidden.reshape(-1, hidden.shape[-1]),
        head,
        precision=_precision(hidden),
        preferred_element_type=jnp.float32,
    )
    return flat.reshape(*hidden.shape[:-1], head.shape[0])


def _precision(hidden):
    return jax.lax.Precision.HIGHEST if hidden.dtype == jnp.float32 else None


def _split_time(tree, chunk: int):
    """Leaves [P T ...] -> [T/chunk P chunk ...], padded with zeros."""

    def one(x):
        size = min(chunk, x.shape[1])
        count = -(-x.shape[1] // size)
        pad = [(0, 0), (0, count * size - x.shape[1])] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, pad).reshape(x.shape[0], count, size, *x.shape[2:])
        return x.swapaxes(0, 1)

    return jax.tree.map(one, tree)


def _join_time(tree, shape: tuple[int, ...]):
    """The inverse of `_split_time`."""

    def one(x):
        return x.swapaxes(0, 1).reshape(shape[0], -1, *x.shape[3:])[:, : shape[1]]

    return jax.tree.map(one, tree)


def response_hidden(
    decoder: Decoder, params: Params, batch: ResponseBatch
) -> tuple[Float[Array, "P T D"], RouterRecord | None]:
    """What predicts each response token, T = G * Tr, from one packed row a group, and what the routers did (None without
    experts).

    The trunk sees Tp + G Tr tokens a group instead of G (Tp + Tr); the head sees response positions only. The hidden state
    of the last prompt token predicts token 0 of all G responses, so its gradient is the sum over them, as in G separate rows.
    """
    group = batch.prompt, batch.prompt_length, batch.responses, batch.response_length
    with named_scope("trunk"):
        packed = pack_group(*group)
        replayed = None if batch.routes is None else _pack_routes(batch.routes)
        hidden, _, router = apply_routed(decoder, params, *packed, replayed=replayed)
        hidden = predicting_hidden(hidden, packed[-1])
        return hidden.reshape(hidden.shape[0], -1, hidden.shape[-1]), router


def _pack_routes(routes: Routes) -> UInt[Array, "L P packed k"]:
    own = routes.responses
    own = own.reshape(own.shape[0], -1, *own.shape[3:])
    return jnp.moveaxis(jnp.concatenate([routes.prompt, own], axis=1), 2, 0)


def response_logprobs(
    decoder: Decoder, params: Params, batch: ResponseBatch, sampling: Sampling, chunk: int
) -> tuple[Float[Array, "P G Tr"], Float[Array, "P G Tr"], Float[Array, "P G Tr"]]:
    """(logp, entropy, gini) of the responses, float32. Mask them: past response_length they mean nothing."""
    (hidden, _), shape = response_hidden(decoder, params, batch), batch.responses.shape
    tokens = batch.responses.reshape(shape[0], -1)
    with named_scope("vocabulary"):
        out = vocabulary_pass(hidden, head_matrix(params, decoder.cfg), tokens, sampling, chunk)
    logp, entropy, gini = (x.reshape(shape) for x in out)
    return logp, entropy, gini


def response_loss(
    decoder: Decoder, params: Params, batch: ResponseBatch, inputs: Any, spec: LossSpec
) -> tuple[LossAndMetrics, RouterRecord | None]:
    """(loss, sums, maxima) of the responses; the loss alone carries gradient. `inputs`: tree of arrays [P G Tr]. See
    `vocabulary_loss`. Also what the routers did.
    """
    hidden, router = response_hidden(decoder, params, batch)
    head = head_matrix(params, decoder.cfg)
    flat = jax.tree.map(lambda x: x.reshape(x.shape[0], -1), (batch.responses, inputs))
    with named_scope("vocabulary"):
        return vocabulary_loss(hidden, head, *flat, spec), router
