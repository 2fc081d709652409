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
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rest_jax.types import Sampling

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
        kept = (
            jnp.cumsum(p, axis=-1) - p < sampling.top_p
        )  # the word that crosses the threshold is kept
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

    @jax.checkpoint
    def one_chunk(head, hidden, tokens):
        # the cast is in here, so that chunks add up their gradients in float32
        scores = _logits(hidden, head.astype(hidden.dtype))
        return chosen_logp(scores, tokens, sampling), *entropy_and_gini(scores)

    def body(_, xs):
        return None, one_chunk(head, *xs)

    _, out = jax.lax.scan(body, None, _chunks((hidden, tokens), chunk))
    return _whole(out, tokens.shape)


TokenLoss = Callable[[jax.Array, jax.Array, Any], jax.Array]  # (logp, entropy, extra) -> loss


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def vocabulary_loss(
    hidden: Float[Array, "P T D"],
    head: Float[Array, "V D"],
    tokens: Int[Array, "P T"],
    extra: Any,
    token_loss: TokenLoss,
    sampling: Sampling,
    chunk: int,
    entropy_counts: bool = False,
) -> tuple[Float[Array, ""], Float[Array, "P T"], Float[Array, "P T"]]:
    """(sum of `token_loss(logp, entropy, extra)`, logp, entropy), float32; hidden[:, t] predicts tokens[:, t].

    `extra` is a tree of arrays [P T]; `token_loss` works element by element, and depends on the entropy only if
    `entropy_counts` (its gradient costs a pass over the logits). The sum alone carries gradient, to `hidden`
    and `head` (in float32). Memory as in `vocabulary_pass`, and one float32 [V D].
    """

    def body(total, xs):
        hidden, tokens, extra, inside = xs
        seen = _look(_logits(hidden, head.astype(hidden.dtype)), tokens, sampling)
        each = token_loss(seen.logp, seen.entropy, extra)
        return total + jnp.sum(jnp.where(inside, each, 0.0)), seen.values

    inside = jnp.ones(tokens.shape, bool)  # False in what `_chunks` pads
    xs = _chunks((hidden, tokens, extra, inside), chunk)
    total, values = jax.lax.scan(body, jnp.float32(0), xs)
    return total, *_whole(values, tokens.shape)


def _loss_forward(hidden, head, tokens, extra, token_loss, sampling, chunk, entropy_counts):
    compute = head.astype(hidden.dtype)

    def body(carry, xs):
        total, d_head = carry
        hidden, tokens, extra, inside = xs
        seen = _look(_logits(hidden, compute), tokens, sampling)

        def loss(logp, entropy):
            return jnp.sum(jnp.where(inside, token_loss(logp, entropy, extra), 0.0))

        value, slopes = jax.value_and_grad(loss, (0, 1))(seen.logp, seen.entropy)
        d_logits = _logp_gradient(seen, tokens, slopes[0], sampling)
        if entropy_counts:
            d_logits = d_logits + _entropy_gradient(seen, slopes[1])
        d_logits = d_logits.astype(hidden.dtype)
        d_logits = d_logits.reshape(-1, d_logits.shape[-1])
        flat = hidden.reshape(-1, hidden.shape[-1])
        matmul = functools.partial(
            jnp.einsum, precision=_precision(hidden), preferred_element_type=jnp.float32
        )
        d_hidden = matmul("tv,vd->td", d_logits, compute).astype(hidden.dtype)
        d_head = d_head + matmul("td,tv->dv", flat, d_logits)
        return (total + value, d_head), (*seen.values, d_hidden.reshape(hidden.shape))

    # [D V]: XLA's CPU backend is twice as fast at this product than at the one for [V D]; turned once at the end
    start = (jnp.float32(0), jnp.zeros(head.shape[::-1], jnp.float32))
    xs = _chunks((hidden, tokens, extra, jnp.ones(tokens.shape, bool)), chunk)
    (total, d_head), out = jax.lax.scan(body, start, xs)
    *values, d_hidden = _whole(out, tokens.shape)
    d_head = jax.lax.optimization_barrier(d_head.T)  # a transposition fused into others is slow
    return (total, *values), (d_hidden, d_head.astype(head.dtype))


def _loss_backward(token_loss, sampling, chunk, entropy_counts, kept, cotangents):
    scale = cotangents[0]
    d_hidden, d_head = kept
    return (d_hidden * scale).astype(d_hidden.dtype), d_head * scale, None, None


vocabulary_loss.defvjp(_loss_forward, _loss_backward)


@dataclasses.dataclass(frozen=True)
class _Seen:
    """A chunk's logits and what they say of the chosen tokens; p = weight / total at temperature 1."""

    shifted: jax.Array  # [P c V] logits minus their maximum
    weight: jax.Array  # [P c V] exp of it
    total: jax.Array  # [P c 1]
    sampled: jax.Array  # [P c V] probabilities of the distribution sampled from
    logp: jax.Array
    entropy: jax.Array

    @property
    def values(self) -> tuple[jax.Array, jax.Array]:
        return self.logp, self.entropy


def _look(logits, tokens, sampling: Sampling) -> _Seen:
    shifted = logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    weight = jnp.exp(shifted)
    total = jnp.sum(weight, axis=-1, keepdims=True)
    entropy, _ = entropy_and_gini(logits)
    if sampling == Sampling():
        sampled = weight / total
        chosen = jnp.take_along_axis(shifted, tokens[..., None], axis=-1)[..., 0]
        return _Seen(shifted, weight, total, sampled, chosen - jnp.log(total[..., 0]), entropy)
    sampled = jax.nn.softmax(truncate(logits, sampling), axis=-1)
    return _Seen(shifted, weight, total, sampled, chosen_logp(logits, tokens, sampling), entropy)


def _logp_gradient(seen: _Seen, tokens, slope, sampling: Sampling):
    slope = (slope / sampling.temperature)[..., None]
    word = jax.lax.broadcasted_iota(tokens.dtype, seen.sampled.shape, seen.sampled.ndim - 1)
    return slope * (jnp.where(word == tokens[..., None], 1.0, 0.0) - seen.sampled)


def _entropy_gradient(seen: _Seen, slope):
    logp = seen.shifted - jnp.log(seen.total)
    return -slope[..., None] * (seen.weight / seen.total) * (logp + seen.entropy[..., None])


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


def _chunks(tree, chunk: int):
    """Leaves [P T ...] -> [T/chunk P chunk ...], padded with zeros."""

    def one(x):
        size = min(chunk, x.shape[1])
        count = -(-x.shape[1] // size)
        pad = [(0, 0), (0, count * size - x.shape[1])] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, pad).reshape(x.shape[0], count, size, *x.shape[2:])
        return x.swapaxes(0, 1)

    return jax.tree.map(one, tree)


def _whole(tree, shape: tuple[int, ...]):
    """The inverse of `_chunks`."""

    def one(x):
        return x.swapaxes(0, 1).reshape(shape[0], -1, *x.shape[3:])[:, : shape[1]]

    return jax.tree.map(one, tree)
