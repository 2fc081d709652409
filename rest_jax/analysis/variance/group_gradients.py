"""Gradients of single prompt groups, and what they say of the mini-batch gradient: its variance, its noise.

On the policy that sampled (ratio 1) the ResT loss has the gradient of -(1/T) sum_t w_t A_t log pi(a_t), T the number of
tokens, sum_t w_t = T. With g_p = -(P/T) sum over the tokens of group p, the mini-batch gradient is the mean of the g_p, and
over fresh groups its variance is tr Cov(g) / P. All of it follows from the inner products <g_p, g_q>, so gradients
are kept only until the Gram matrix is made; those too large to keep are kept as a count sketch.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from rest_jax.models.decoder import Decoder
from rest_jax.rl.forward import response_logprobs
from rest_jax.types import Params, RolloutBatch, Sampling

EXACT_FLOATS = 2**29  # gradients are kept whole up to 2 GiB of them
SKETCH = 2**17  # buckets of a sketched gradient: its inner products err by about 0.4 % of the norms


@dataclasses.dataclass(frozen=True)
class GroupGradients:
    """Inner products of the groups' gradients under K weightings."""

    gram: np.ndarray  # float64 [K, P, P], <g_p, g_q> under each
    cosine: np.ndarray  # float64 [K], of the mean gradient with that of the first weighting
    exact: bool  # False: from count sketches
    dimensions: int  # floats kept of a gradient


def group_gradients(
    decoder: Decoder,
    params: Params,
    rollout: RolloutBatch,
    coefficient: np.ndarray,
    *,
    chunk: int,
    exact_floats: int = EXACT_FLOATS,
    seed: int = 0,
) -> GroupGradients:
    """Gram matrices of the gradients of sum_t c_t log pi(a_t) over each group, for coefficients `[K, P, G, T]`.

    Groups whose coefficients are all zero have gradient zero and are not computed. A group costs one forward and K
    backward passes; one gradient exists on the device at a time, the kept ones lie in host memory.
    """
    kinds, groups = coefficient.shape[:2]
    active = np.flatnonzero(np.any(coefficient != 0, axis=(0, 2, 3)))
    size = sum(x.size for x in jax.tree.leaves(params))
    exact = kinds * len(active) * size <= exact_floats
    features = make_group_features(decoder, chunk, flat if exact else sketch(seed))
    kept = np.empty((kinds, len(active), size if exact else SKETCH), np.float32)
    for place, p in enumerate(active):
        row = slice(p, p + 1)
        kept[:, place] = features(
            params, rollout.prompt[row], rollout.prompt_length[row], rollout.responses[row],
            rollout.response_length[row], coefficient[:, row],
        )  # fmt: skip
    gram = np.zeros((kinds, groups, groups))
    gram[:, active[:, None], active] = [rows @ rows.T for rows in kept]
    means = kept.sum(axis=1, dtype=np.float64)
    along = np.linalg.norm(means, axis=1) * np.linalg.norm(means[0])
    cosine = means @ means[0] / np.where(along > 0, along, np.nan)
    return GroupGradients(gram, cosine, exact, kept.shape[-1])


def make_group_features(
    decoder: Decoder, chunk: int, project: Callable[[Params], jax.Array]
) -> Callable[..., jax.Array]:
    """Jitted (params, one group: prompt [1 Tp], .., responses [1 G T], .., coefficient [K 1 G T]) -> [K, D]."""

    def features(params, prompt, prompt_length, responses, response_length, coefficient):
        def logp(params):
            group = (prompt, prompt_length, responses, response_length)
            return response_logprobs(decoder, params, *group, Sampling(), chunk)[0]

        _, pull = jax.vjp(logp, params)
        return jax.lax.map(lambda c: project(pull(c)[0]), coefficient)

    return jax.jit(features)


def flat(tree: Params) -> jax.Array:
    """The whole gradient, as one vector."""
    return ravel_pytree(tree)[0]


def sketch(seed: int, buckets: int = SKETCH) -> Callable[[Params], jax.Array]:
    """Count sketch (Charikar, Chen, Farach-Colton 2002): every entry is added with a random sign to a random bucket.

    Inner products of sketches are unbiased, with a standard error of at most sqrt(2 / buckets) times the norms.
    `buckets` is a power of two.
    """

    def project(tree: Params) -> jax.Array:
        out = jnp.zeros(buckets, jnp.float32)
        for place, leaf in enumerate(jax.tree.leaves(tree)):
            key = jax.random.fold_in(jax.random.key(seed), place)
            bits = jax.random.bits(key, leaf.shape, jnp.uint32)
            signed = jnp.where(bits >> 31 == 1, leaf, -leaf).astype(jnp.float32)
            out = out.at[(bits & (buckets - 1)).ravel()].add(signed.ravel())
        return out

    return project


@dataclasses.dataclass(frozen=True)
class Noise:
    """Of the mini-batch gradient g, the mean of P groups: floats, or arrays over resamples."""

    variance: Any  # tr Cov(g), unbiased
    mean_square: Any  # |g|^2 of this batch; its expectation is `signal` + `variance`
    signal: Any  # |E g|^2, unbiased; below zero when noise hides it

    @property
    def share(self) -> Any:
        """variance / |g|^2: the part of the squared gradient that is noise. Free of the gradient's scale. Infinite in a
        resample whose |g|^2 came out below zero, NaN for a gradient of zero.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.divide(self.variance, np.maximum(self.mean_square, 0.0))


def noise(gram: np.ndarray, count: np.ndarray | None = None) -> Noise:
    """From the Gram matrix [P, P]; `count` [..., P] says how often each group was drawn, P times in all (None: once).

    With d = mean <g_p, g_p> and u = mean <g_p, g_q> over p != q:  |E g|^2 ~ u,  tr Cov = (d - u) / P,  |g|^2 = u + tr Cov.
    A group drawn twice is not a pair with itself, so resamples are centred on the estimate of the whole batch.
    """
    groups = len(gram)
    count = np.ones(groups) if count is None else count
    own = np.diag(gram)
    square = np.einsum("...p,pq,...q->...", count, gram, count, optimize=True)
    pairs = groups**2 - np.sum(count**2, axis=-1)
    signal = (square - count**2 @ own) / pairs
    variance = (count @ own / groups - signal) / groups
    return Noise(variance, signal + variance, signal)


def resample(groups: int, resamples: int, seed: int) -> np.ndarray:
    """float64 [resamples, P]: how often each of P groups is drawn in P draws with replacement.

    A draw of one and the same group P times, which says nothing of a variance, is drawn again.
    """
    rng = np.random.default_rng(seed)
    found = rng.multinomial(groups, np.full(groups, 1 / groups), size=resamples)
    while (single := found.max(axis=1) == groups).any():
        found[single] = rng.multinomial(groups, np.full(groups, 1 / groups), size=single.sum())
    return found.astype(np.float64)


def interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of resampled values."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
