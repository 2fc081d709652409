"""The vocabulary pass: log-prob, entropy and Gini of given tokens in one sweep over the LM head, chunk by chunk in time.

Full [P, T, V] logits never exist: one chunk's logits are made, reduced and dropped, and made again in the backward pass.
    log-prob   of the distribution that was sampled from (temperature, then top-k / top-p, renormalised)
    entropy    -sum p log p at temperature 1 over the full support, nats
    gini       1 - sum p^2 at temperature 1 over the full support
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

NEG_INF = -1e30  # finite, so that masked logits give zero probability without NaN gradients


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The distribution that tokens are drawn from. `top_k` 0 and `top_p` 1: full support. `greedy`: the argmax."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    greedy: bool = False


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
    """Entropy (nats) and 1 - sum p^2 at temperature 1."""
    logp = jax.nn.log_softmax(logits, axis=-1)
    p = jnp.exp(logp)
    return -jnp.sum(p * logp, axis=-1), 1 - jnp.sum(p * p, axis=-1)


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
    rows, time, width = hidden.shape
    precision = jax.lax.Precision.HIGHEST if hidden.dtype == jnp.float32 else None
    chunk = min(chunk, time)
    count = -(-time // chunk)
    pad = count * chunk - time
    hidden = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0))).reshape(rows, count, chunk, width)
    tokens = jnp.pad(tokens, ((0, 0), (0, pad))).reshape(rows, count, chunk)

    @jax.checkpoint
    def one_chunk(head, hidden, tokens):
        logits = jnp.einsum(
            "pcd,vd->pcv",
            hidden,
            head.astype(hidden.dtype),  # in here, so that chunks add up their gradients in float32
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        return chosen_logp(logits, tokens, sampling), *entropy_and_gini(logits)

    def body(_, xs):
        return None, one_chunk(head, *xs)

    _, out = jax.lax.scan(body, None, (hidden.swapaxes(0, 1), tokens.swapaxes(0, 1)))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(rows, -1)[:, :time], out)
