"""The vocabulary pass: log-prob, entropy and Gini of given tokens in one sweep over the LM head, chunk by chunk.

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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.linen import spmd
from jax import named_scope
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from rest_jax.distributed import BATCH_AXES, num_data_shards, sum_parts
from rest_jax.models.decoder import Decoder, apply_routed, head_matrix
from rest_jax.models.moe import RouterRecord
from rest_jax.models.products import float32_einsum, row_sums
from rest_jax.rl.loss import TokenLoss, TokenStats
from rest_jax.rl.packing import Rows
from rest_jax.types import Params, ResponseBatch, Sampling

# (loss, sums, maxima): scalars
LossAndMetrics = tuple[jax.Array, dict[str, jax.Array], dict[str, jax.Array]]

NEG_INF = -1e30  # finite, so that masked logits give zero probability without NaN gradients


def truncate(logits: Float[Array, "*B V"], sampling: Sampling) -> Float[Array, "*B V"]:
    """Applies temperature, then top-k, then top-p; words cut out get -1e30. Ties at the border stay in."""
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        kth = jax.lax.top_k(jax.lax.stop_gradient(logits), sampling.top_k)[0][..., -1:]
        logits = jnp.where(logits >= kth, logits, NEG_INF)
    return nucleus(logits, sampling.top_p) if sampling.top_p < 1 else logits


def nucleus(
    logits: Float[Array, "*B V"], top_p: float | Float[Array, "*B 1"]
) -> Float[Array, "*B V"]:
    """Cuts out what lies beyond the likeliest words that hold `top_p` of the probability; the word that crosses it stays in."""
    ordered = jax.lax.stop_gradient(jnp.flip(jnp.sort(logits, axis=-1), axis=-1))
    p = jax.nn.softmax(ordered, axis=-1)
    kept = jnp.cumsum(p, axis=-1) - p < top_p
    threshold = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= threshold, logits, NEG_INF)


def entropy_and_gini(logits: Float[Array, "*B V"]) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
    """Entropy (nats) and 1 - sum p^2 at temperature 1, without probabilities: their terms are divided after the sums."""
    shifted = logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    weight = jnp.exp(shifted)
    total = jnp.sum(weight, axis=-1)
    entropy = jnp.log(total) - row_sums(weight, shifted) / total
    return entropy, 1 - row_sums(weight, weight) / (total * total)


def chosen_logp(
    logits: Float[Array, "*B V"], token: Int[Array, "*B"], sampling: Sampling
) -> Float[Array, "*B"]:
    """Log-prob of each token under the sampled distribution."""
    kept = truncate(logits, sampling)
    chosen = jnp.take_along_axis(kept, token[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(kept, axis=-1)


class PassSpec(NamedTuple):
    """How the pass is made. `chunk`: positions of a row at once."""

    sampling: Sampling
    chunk: int


def vocabulary_pass(
    hidden: Float[Array, "P T D"],
    head: Float[Array, "V D"],
    tokens: Int[Array, "P T"],
    used: Bool[Array, "P T"],
    spec: PassSpec,
) -> tuple[Float[Array, "P T"], Float[Array, "P T"], Float[Array, "P T"]]:
    """(logp, entropy, gini) of `tokens`, float32; hidden[:, t] predicts tokens[:, t]. Zero or any value where not `used`: those
    positions are brought behind the others of their row, and only chunks with others are computed.

    Chunks run along T, so that rows stay on their devices. Peak memory is chunk * V float32 for each row on a device.
    """
    order = jnp.argsort(~used, axis=1, stable=True)
    hidden = jnp.take_along_axis(hidden, order[..., None], axis=1)
    tokens, used = (jnp.take_along_axis(x, order, axis=1) for x in (tokens, used))
    # Whole on every data shard before the loop; the partitioner would bring it for every chunk.
    cast = spmd.with_logical_constraint(head.astype(hidden.dtype), ("vocab", None))

    def compute(head, cast, hidden, tokens):
        scores = _logits(hidden, _read_as(head, cast))
        return chosen_logp(scores, tokens, spec.sampling), *entropy_and_gini(scores)

    def skip(head, cast, hidden, tokens):
        return (jnp.zeros(tokens.shape),) * 3

    @jax.checkpoint  # around the condition, which would keep the head for every chunk
    def one_chunk(head, cast, hidden, tokens, used):
        return jax.lax.cond(jnp.any(used), compute, skip, head, cast, hidden, tokens)

    def body(_, xs):
        return None, one_chunk(head, cast, *xs)

    _, out = jax.lax.scan(body, None, _split_time((hidden, tokens, used), spec.chunk))
    back = jnp.argsort(order, axis=1)
    logp, entropy, gini = (
        jnp.take_along_axis(x, back, axis=1) for x in _join_time(out, tokens.shape)
    )
    return logp, entropy, gini


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
    `needs_entropy_gradient` (which costs a pass over the logits). `chunk`: positions of a device at once.
    """

    token_loss: Callable[[TokenStats, Any], TokenLoss]
    sampling: Sampling
    chunk: int
    needs_entropy_gradient: bool = False


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def vocabulary_loss(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V D"],
    tokens: Int[Array, "B T"],
    inputs: Any,
    used: Bool[Array, "B T"],
    spec: LossSpec,
) -> LossAndMetrics:
    """(sum of the loss of all tokens, sums, maxima), float32; hidden[:, t] predicts tokens[:, t].

    `inputs` is a tree of arrays [B T], zero where not `used`: those positions are brought behind the others, and only chunks
    with others are computed. The loss alone carries gradient, to `hidden` and `head` (in float32). Peak memory is
    chunk * V float32 on a device, and one float32 [V D].
    """
    return _loss_forward(hidden, head, tokens, inputs, used, spec)[0]


def _loss_forward(hidden, head, tokens, inputs, used, spec):
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
            in_specs=(rows, PartitionSpec(), rows, rows, rows),
            out_specs=(PartitionSpec(), PartitionSpec(), rows, scattered),
            axis_names=set(axes),
        )
    total, metrics, d_hidden, d_head = on_device(hidden, compute, tokens, inputs, used)
    d_head = jax.lax.optimization_barrier(d_head.T)  # a transposition fused into others is slow
    return (total, *metrics), (d_hidden, d_head.astype(head.dtype))


def _loss_on_device(hidden, head, tokens, inputs, used, spec: "LossSpec", axes: tuple[str, ...]):
    """(loss, (sums, maxima), d_hidden, d_head [D V] float32) of the rows of a data shard, summed over `axes`."""
    hidden = jnp.where(used[..., None], hidden, 0)  # what stands elsewhere may be anything
    order = jnp.argsort(~used.reshape(-1), stable=True)
    size = min(spec.chunk, order.size)
    xs = jax.tree.map(
        lambda x: _pad_rows(x.reshape(order.size, *x.shape[2:])[order], size),
        (hidden, tokens, inputs),
    )
    shape, count = hidden.shape, jnp.sum(used)
    if axes:
        count = jax.lax.pmax(count, axes)  # all devices make equally many rounds

    def body(i, carry):
        total, d_head, metrics, d_hidden = carry
        part = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, i * size, size), xs)
        loss, new, d_part, d_logits = _differentiate(part, head, spec)
        d_head = d_head + float32_einsum("td,tv->dv", part[0], d_logits)
        d_hidden = jax.lax.dynamic_update_slice_in_dim(d_hidden, d_part, i * size, axis=0)
        return total + loss, d_head, _join_metrics(metrics, new), d_hidden

    first = jax.tree.map(lambda x: x[:size], xs)
    _, metrics, *_ = jax.eval_shape(lambda part: _differentiate(part, head, spec), first)
    sums, maxima = metrics
    none = (
        jax.tree.map(lambda _: jnp.float32(0), sums),
        jax.tree.map(lambda _: jnp.float32(-jnp.inf), maxima),
    )
    # [D V]: XLA's CPU backend is twice as fast at this product than at the one for [V D]; turned once at the end
    start = jnp.float32(0), jnp.zeros(head.shape[::-1], jnp.float32), none
    start = *start, jnp.zeros(xs[0].shape, xs[0].dtype)
    if axes:
        start = jax.tree.map(lambda x: _vary(x, axes), start)
    rounds = (count + size - 1) // size
    total, d_head, (sums, maxima), d_hidden = jax.lax.fori_loop(0, rounds, body, start)
    # back by the inverse of the permutation: a scatter is slow everywhere
    d_hidden = d_hidden[jnp.argsort(order)].reshape(shape)
    if axes:
        total, sums = jax.lax.psum((total, sums), axes)
        maxima = jax.lax.pmax(maxima, axes)
        d_head = sum_parts(d_head, axes, [_head_axes(axes, head.shape[1])])
    return total, (sums, maxima), d_hidden, d_head


def _differentiate(part, head, spec: "LossSpec"):
    """(loss, (sums, maxima), d_hidden, d_logits) of a chunk: hidden states `[c D]`, tokens and inputs `[c]`."""
    hidden, tokens, inputs = part
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
    d_hidden = float32_einsum("tv,vd->td", d_logits, head).astype(hidden.dtype)
    return loss, metrics, d_hidden, d_logits


def _join_metrics(metrics, new):
    (sums, maxima), (more, other) = metrics, new
    return jax.tree.map(jnp.add, sums, more), jax.tree.map(jnp.maximum, maxima, other)


def _pad_rows(x, size: int):
    """With zeros behind the rows, to a multiple of `size`."""
    return jnp.pad(x, [(0, -len(x) % size)] + [(0, 0)] * (x.ndim - 1))


def _vary(x, axes: tuple[str, ...]):
    """x as a value that differs over `axes`."""
    return jax.lax.pcast(x, axes, to="varying")


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
    return (d_hidden * scale).astype(d_hidden.dtype), d_head * scale, None, None, None


vocabulary_loss.defvjp(_loss_forward, _loss_backward)


def _sum_losses(chunk: "_Chunk", logp, entropy, inputs, token_loss: Callable[..., TokenLoss]):
    """(loss, metrics) of a chunk; of the metrics, sums and maxima over its tokens."""
    out = token_loss(TokenStats(logp, entropy, chunk.is_argmax), inputs)
    sums = {name: jnp.sum(value) for name, value in out.sums.items()}
    maxima = {name: jnp.max(value) for name, value in out.maxima.items()}
    return jnp.sum(out.loss), jax.lax.stop_gradient((sums, maxima))


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
    flat = float32_einsum("td,vd->tv", hidden.reshape(-1, hidden.shape[-1]), head)
    return flat.reshape(*hidden.shape[:-1], head.shape[0])


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
    decoder: Decoder, params: Params, batch: ResponseBatch, rows: Rows
) -> tuple[Float[Array, "W T D"], RouterRecord | None]:
    """The trunk's hidden states of packed rows, and what the routers did (None without experts).

    A position of a completion predicts its target; those that read the last prompt token are one for each completion, so that
    their gradient is the sum over all of them, as in separate rows.
    """
    with named_scope("trunk"):
        replayed = None if batch.routes is None else rows.routes(batch.routes)
        inputs = rows.tokens(batch), rows.position, rows.layout
        hidden, _, router = apply_routed(decoder, params, *inputs, replayed=replayed)
        return hidden, router


def response_logprobs(
    decoder: Decoder, params: Params, batch: ResponseBatch, rows: Rows, spec: PassSpec
) -> tuple[Float[Array, "P G Tr"], Float[Array, "P G Tr"], Float[Array, "P G Tr"]]:
    """(logp, entropy, gini) of the responses that lie in these rows, float32; zero elsewhere."""
    hidden, _ = response_hidden(decoder, params, batch, rows)
    tokens, head = rows.targets(batch.responses), head_matrix(params, decoder.cfg)
    with named_scope("vocabulary"):
        out = vocabulary_pass(hidden, head, tokens, rows.predicts, spec)
    zeros = jnp.zeros(batch.responses.shape, jnp.float32)
    logp, entropy, gini = (rows.put_targets(zeros, x) for x in out)
    return logp, entropy, gini


def response_loss(
    decoder: Decoder,
    params: Params,
    batch: ResponseBatch,
    rows: Rows,
    inputs: Any,
    spec: LossSpec,
    look_ahead: Callable[[Any, Array], Any] | None = None,
) -> tuple[LossAndMetrics, RouterRecord | None]:
    """(loss, sums, maxima) of the responses; the loss alone carries gradient. `inputs`: tree of arrays [W T]. See
    `vocabulary_loss`. Also what the routers did. `look_ahead` completes the inputs by the log-probs of all tokens [W T], which
    are without gradient and cost a second pass over the head.
    """
    hidden, router = response_hidden(decoder, params, batch, rows)
    head, tokens = head_matrix(params, decoder.cfg), rows.targets(batch.responses)
    with named_scope("vocabulary"):
        if look_ahead is not None:
            given = jax.lax.stop_gradient((hidden, head))
            once = PassSpec(spec.sampling, spec.chunk)
            inputs = look_ahead(inputs, vocabulary_pass(*given, tokens, rows.predicts, once)[0])
        return vocabulary_loss(hidden, head, tokens, inputs, rows.predicts, spec), router
