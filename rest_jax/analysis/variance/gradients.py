"""Gradients of single tokens and of prompt groups, at the policy that sampled the batch.

`token_gradients`: J_t is the Jacobian of token t's logits in the parameters, s_t = onehot(a_t) - p_t, so that
J_t^T s_t = grad log pi(a_t), and Theorem 1 (docs/method.md section 3) is made of
    beta_t = |J_t|_F^2 (1 - exp(-H_t))  >=  x_t = E_{a ~ p_t} |J_t^T s_t|^2 = tr J_t J_t^T (diag p_t - p_t p_t^T)
Both traces are estimated without bias by |J_t^T v|^2, one backward pass each (Hutchinson 1989): v of independent signs e has
E v v^T = I; v = u - p sum(u) with u = sqrt(p) e has E v v^T = diag p - p p^T.

`group_gradients`: on that policy (ratio 1) the ResT loss has the gradient of -(1/T) sum_t w_t A_t log pi(a_t), T the number of
tokens. With g_p = -(P/T) sum over the tokens of group p, the mini-batch gradient is the mean of the g_p, and over fresh
groups its variance is tr Cov(g) / P. The inner products <g_p, g_q> say all of it, so gradients are kept only until the
Gram matrix is made; those too large to keep are kept as a count sketch.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jax.sharding import Sharding

from rest_jax.distributed import replicated_beside
from rest_jax.models.attention import prompt_rows
from rest_jax.models.decoder import Decoder, logits
from rest_jax.rl.logprobs import PassSpec, response_logprobs
from rest_jax.rl.packing import BatchLengths, MicroBatch, make_rows, row_length
from rest_jax.tool_calls import NUM_REGIONS
from rest_jax.types import Params, ResponseBatch, RolloutBatch, Sampling, ScoredBatch

EXACT_FLOATS = 2**29  # gradients are kept in full up to 2 GiB of them
SKETCH = 2**17  # buckets of a sketched gradient: its inner products err by about 0.4 % of the norms
_LEAST = 1e-12  # added to every 1 - exp(-H): a region of certain tokens is drawn from evenly


@dataclasses.dataclass(frozen=True)
class TokenGradients:
    """Means over the tokens of each region, float64 [R], NaN for a region without tokens.

    The standard errors (`_error`) hold both the draw of tokens and that of probes.
    """

    bound: np.ndarray  # 1 - exp(-H), over all tokens of the region
    jacobian: np.ndarray  # |J|_F^2, weighted by 1 - exp(-H): beta / bound
    beta: np.ndarray  # |J|_F^2 (1 - exp(-H))
    beta_error: np.ndarray
    score: np.ndarray  # E_a |J^T s|^2, at most beta
    score_error: np.ndarray


def token_gradients(
    decoder: Decoder, params: Params, scored: ScoredBatch, tokens: int, seed: int = 0
) -> TokenGradients:
    """Measures `tokens` tokens of each region that occurs in the NumPy batch, drawn with replacement.

    Tokens are drawn with probability proportional to b_t = 1 - exp(-H_t), since nearly all of the sum lies in the few tokens
    that are uncertain: mean beta = mean b * E_drawn |J|^2 and mean x = mean b * E_drawn x / b. A token costs a forward and
    two backward passes over its prompt and response; one gradient exists at a time.
    """
    r, key = scored.rollout, jax.random.key(seed)
    weight = -np.expm1(-r.entropy.astype(np.float64)) + _LEAST
    drawn = draw_tokens(scored.region, weight, tokens, seed)
    estimate = make_token_norms(decoder, replicated_beside(params))
    norms = np.empty((len(drawn), 2))
    for i, (p, g, t) in enumerate(drawn):
        own = r.prompt[p], r.prompt_length[p], r.responses[p, g], r.response_length[p, g]
        # waited for, as in gain.make_ascend
        norms[i] = jax.device_get(estimate(params, *own, t, jax.random.fold_in(key, i)))
    jacobian, score = norms.T
    index = tuple(drawn.T)
    region = scored.region[index]
    bound, _ = region_means(weight.ravel(), scored.region.ravel())
    jacobian, jacobian_error = region_means(jacobian, region)
    score, score_error = region_means(score / weight[index], region)
    return TokenGradients(
        bound=bound,
        jacobian=jacobian,
        beta=bound * jacobian,
        beta_error=bound * jacobian_error,
        score=bound * score,
        score_error=bound * score_error,
    )


def draw_tokens(region: np.ndarray, weight: np.ndarray, tokens: int, seed: int) -> np.ndarray:
    """int [M, 3] indices (p, g, t): `tokens` of each region but NONE, with probability proportional to `weight`."""
    rng = np.random.default_rng(seed)
    parts = [np.zeros((0, 3), np.int64)]
    for r in range(1, NUM_REGIONS):
        own = np.argwhere(region == r)
        if len(own):
            chance = weight[tuple(own.T)]
            parts.append(own[rng.choice(len(own), tokens, p=chance / chance.sum())])
    return np.concatenate(parts)


def make_token_norms(decoder: Decoder, out: Sharding | None = None) -> Callable[..., Any]:
    """Jitted (params, prompt [Tp], prompt_length, response [Tr], response_length, t, key) -> unbiased estimates, float32,
    of (|J|_F^2, E_a |J^T s|^2) at token t.
    """

    def norms(params, *token_and_key):
        *token, key = token_and_key
        scores, pull = jax.vjp(lambda p: token_logits(decoder, p, *token), params)
        # one after another, so that one gradient exists at a time
        squares = jax.lax.map(
            lambda v: optax.tree.norm(pull(v)[0], squared=True), probes(scores, key)
        )
        return squares[0], squares[1]

    return jax.jit(norms, out_shardings=out)


def token_logits(
    decoder: Decoder, params: Params, prompt, prompt_length, response, response_length, t
) -> jax.Array:
    """float32 [V]: the logits that token t of one response was drawn from."""
    time = jnp.arange(prompt.size + response.size)
    own = jnp.take(response, time - prompt_length, mode="clip")
    row = jnp.where(time < prompt_length, jnp.take(prompt, time, mode="clip"), own)[None]
    layout, positions = prompt_rows(row, (prompt_length + response_length)[None])
    apply: Any = decoder.apply
    hidden, _ = apply({"params": params}, row, positions, layout)
    return logits(params, decoder.cfg, hidden[0, prompt_length - 1 + t])


def probes(scores: jax.Array, key: jax.Array) -> jax.Array:
    """float32 [2 V]: v with E v v^T = I, and v with E v v^T = diag p - p p^T, p the softmax of `scores`."""
    signs = jax.random.rademacher(key, (2, scores.size), jnp.float32)
    p = jax.nn.softmax(scores)
    u = jnp.sqrt(p) * signs[1]
    return jnp.stack([signs[0], u - p * jnp.sum(u)])


def region_means(values: np.ndarray, region: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(mean of the values of each region, its standard error for independent draws), float64 [R] each."""
    mean, error = np.full((2, NUM_REGIONS), np.nan)
    for r in np.unique(region):
        own = values[region == r]
        mean[r] = own.mean()
        if len(own) > 1:
            error[r] = own.std(ddof=1) / np.sqrt(len(own))
    return mean, error


class GroupGradients(NamedTuple):
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
    chunk: int,
    seed: int,
) -> GroupGradients:
    """Gram matrices of the gradients of sum_t c_t log pi(a_t) over each group, for coefficients `[K, P, G, T]`.

    Groups whose coefficients are all zero have gradient zero and are not computed. A group costs one forward and K
    backward passes; one gradient exists on the device at a time, the kept ones are in host memory.
    """
    kinds, groups = coefficient.shape[:2]
    active = np.flatnonzero(np.any(coefficient != 0, axis=(0, 2, 3)))
    size = sum(x.size for x in jax.tree.leaves(params))
    exact = kinds * len(active) * size <= EXACT_FLOATS
    project = (lambda tree: ravel_pytree(tree)[0]) if exact else make_sketch(seed)
    features = make_group_features(decoder, chunk, project, replicated_beside(params))
    kept = np.empty((kinds, len(active), size if exact else SKETCH), np.float32)
    lengths = BatchLengths.of(rollout)
    pieces = [lengths.whole(int(p)) for p in active]
    longest = row_length(max(map(lengths.positions, pieces)))
    batch = ResponseBatch(
        rollout.prompt, rollout.prompt_length, rollout.responses, rollout.response_length
    )
    for i, piece in enumerate(pieces):
        micro = MicroBatch(((piece,),), longest, lengths)
        kept[:, i] = features(params, coefficient, batch, make_rows(micro))
    gram = np.zeros((kinds, groups, groups))
    gram[:, active[:, None], active] = [rows @ rows.T for rows in kept]
    means = kept.sum(axis=1, dtype=np.float64)
    norms = np.linalg.norm(means, axis=1) * np.linalg.norm(means[0])
    cosine = means @ means[0] / np.where(norms > 0, norms, np.nan)
    return GroupGradients(gram, cosine, exact, kept.shape[-1])


def make_group_features(
    decoder: Decoder,
    chunk: int,
    project: Callable[[Params], jax.Array],
    out: Sharding | None = None,
) -> Callable[..., jax.Array]:
    """Jitted (params, coefficient [K P G T], batch, rows with one group of it) -> [K, D]."""

    def features(params, coefficient, batch, rows):
        def logp(params):
            return response_logprobs(decoder, params, batch, rows, PassSpec(Sampling(), chunk))[0]

        _, pull = jax.vjp(logp, params)
        return jax.lax.map(lambda c: project(pull(c)[0]), coefficient)

    return jax.jit(features, out_shardings=out)


def make_sketch(seed: int, buckets: int = SKETCH) -> Callable[[Params], jax.Array]:
    """Count sketch (Charikar, Chen, Farach-Colton 2002): every entry is added with a random sign to a random bucket.

    Inner products of sketches are unbiased, with a standard error of at most sqrt(2 / buckets) times the norms.
    `buckets` is a power of two.
    """

    def sketch(tree: Params) -> jax.Array:
        out = jnp.zeros(buckets, jnp.float32)
        for i, leaf in enumerate(jax.tree.leaves(tree)):
            key = jax.random.fold_in(jax.random.key(seed), i)
            bits = jax.random.bits(key, leaf.shape, jnp.uint32)
            signed = jnp.where(bits >> 31 == 1, leaf, -leaf).astype(jnp.float32)
            out = out.at[(bits & (buckets - 1)).ravel()].add(signed.ravel())
        return out

    return sketch


class Noise(NamedTuple):
    """Of the mini-batch gradient g, the mean of P groups: floats, or arrays over resamples."""

    variance: Any  # tr Cov(g), unbiased
    mean_square: Any  # |g|^2 of this batch; its expectation is `signal` + `variance`
    signal: Any  # |E g|^2, unbiased; below zero when noise hides it

    @property
    def share(self) -> Any:
        """variance / |g|^2: the part of the squared gradient that is noise, whatever the gradient's scale. Infinite in a
        resample whose |g|^2 came out below zero, NaN for a gradient of zero.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.divide(self.variance, np.maximum(self.mean_square, 0.0))


def gram_noise(gram: np.ndarray, count: np.ndarray | None = None) -> Noise:
    """From the Gram matrix [P, P]; `count` [..., P] says how often each group was drawn, P times in all (None: once).

    With d = mean <g_p, g_p> and u = mean <g_p, g_q> over p != q:  |E g|^2 ~ u,  tr Cov = (d - u) / P,  |g|^2 = u + tr Cov.
    A group drawn twice is not a pair with itself, so resamples are centred on the estimate of the full batch. A draw of
    one and the same group says nothing of a variance: it gives NaN.
    """
    groups = len(gram)
    count = np.ones(groups) if count is None else count
    own = np.diag(gram)
    square = np.einsum("...p,pq,...q->...", count, gram, count, optimize=True)
    pairs = groups**2 - np.sum(count**2, axis=-1)
    signal = (square - count**2 @ own) / np.where(pairs > 0, pairs, np.nan)
    variance = (count @ own / groups - signal) / groups
    return Noise(variance, signal + variance, signal)
