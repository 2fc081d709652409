"""Squared gradient norms of single tokens: what Theorem 1 is made of (METHOD section 3), measured on sampled tokens.

J_t is the Jacobian of token t's logits in the parameters, s_t = onehot(a_t) - p_t, so J_t^T s_t = grad log pi(a_t), and
    beta_t = |J_t|_F^2 (1 - exp(-H_t))  >=  x_t = E_{a ~ p_t} |J_t^T s_t|^2 = tr J_t J_t^T (diag p_t - p_t p_t^T)
Both traces are estimated without bias by |J_t^T v|^2, one backward pass each (Hutchinson 1989): v of independent signs e has
E v v^T = I; v = u - p sum(u) with u = sqrt(p) e has E v v^T = diag p - p p^T.

Tokens of a region are drawn with probability proportional to b_t = 1 - exp(-H_t), since nearly all of the sum lies in the
few tokens that are uncertain:  mean beta = mean b * E_drawn |J|^2,  mean x = mean b * E_drawn x / b  (and x / b <= |J|^2).
In: a scored batch (NumPy) and the parameters. Out: means by region with their standard errors.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rest_jax.models.decoder import Decoder, logits
from rest_jax.rl.forward import response_hidden
from rest_jax.tool_calls import NUM_REGIONS
from rest_jax.types import Params, ScoredBatch

_LEAST = 1e-12  # added to every b: a region of certain tokens is drawn from evenly


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Mean over the tokens of each region, and its standard error: float64 [R], NaN for a region without tokens."""

    mean: np.ndarray
    error: np.ndarray


@dataclasses.dataclass(frozen=True)
class TokenGradients:
    """By region. The errors hold both the draw of tokens and that of probes."""

    count: np.ndarray  # int [R], tokens looked at
    bound: np.ndarray  # float64 [R], mean 1 - exp(-H) over all tokens
    jacobian: Estimate  # |J|_F^2, the mean weighted by 1 - exp(-H): beta / bound
    beta: Estimate  # |J|_F^2 (1 - exp(-H))
    score: Estimate  # E_a |J^T s|^2


def measure_tokens(
    decoder: Decoder, params: Params, scored: ScoredBatch, *, tokens: int, seed: int = 0
) -> TokenGradients:
    """Looks at `tokens` tokens of each region that occurs, drawn with replacement.

    A token costs a forward and two backward passes over its prompt and response; one gradient exists at a time.
    """
    r, key = scored.rollout, jax.random.key(seed)
    weight = -np.expm1(-r.entropy.astype(np.float64)) + _LEAST
    where = draw_tokens(scored.region, weight, tokens, seed)
    norms = make_token_norms(decoder)
    found = [
        norms(
            params, r.prompt[p], r.prompt_length[p], r.responses[p, g], r.response_length[p, g],
            t, jax.random.fold_in(key, i),
        )
        for i, (p, g, t) in enumerate(where)
    ]  # fmt: skip
    jacobian, score = np.array(jax.device_get(found), np.float64).reshape(-1, 2).T
    index = tuple(where.T)
    region = scored.region[index]
    mean = by_region(weight.ravel(), scored.region.ravel()).mean
    jacobian = by_region(jacobian, region)
    score = by_region(score / weight[index], region)
    return TokenGradients(
        count=np.bincount(region, minlength=NUM_REGIONS),
        bound=mean,
        jacobian=jacobian,
        beta=Estimate(mean * jacobian.mean, mean * jacobian.error),
        score=Estimate(mean * score.mean, mean * score.error),
    )


def draw_tokens(region: np.ndarray, weight: np.ndarray, tokens: int, seed: int) -> np.ndarray:
    """int [M, 3] places (p, g, t): `tokens` of each region but NONE, with probability proportional to `weight`."""
    rng = np.random.default_rng(seed)
    parts = [np.zeros((0, 3), np.int64)]
    for r in range(1, NUM_REGIONS):
        places = np.argwhere(region == r)
        if len(places):
            own = weight[tuple(places.T)]
            parts.append(places[rng.choice(len(places), tokens, p=own / own.sum())])
    return np.concatenate(parts)


def make_token_norms(decoder: Decoder) -> Callable[..., Any]:
    """Jitted (params, prompt [Tp], prompt_length, response [Tr], response_length, t, key) -> unbiased estimates, float32,
    of (|J|_F^2, E_a |J^T s|^2) at token t.
    """

    def norms(params, prompt, prompt_length, response, response_length, t, key):
        scores, pull = jax.vjp(
            lambda p: token_logits(decoder, p, prompt, prompt_length, response, response_length, t),
            params,
        )
        # one after another, so that one gradient exists at a time
        squares = jax.lax.map(
            lambda v: optax.tree.norm(pull(v)[0], squared=True), probes(scores, key)
        )
        return squares[0], squares[1]

    return jax.jit(norms)


def probes(scores: jax.Array, key: jax.Array) -> jax.Array:
    """float32 [2 V]: v with E v v^T = I, and v with E v v^T = diag p - p p^T, p the softmax of `scores`."""
    signs = jax.random.rademacher(key, (2, scores.size), jnp.float32)
    p = jax.nn.softmax(scores)
    u = jnp.sqrt(p) * signs[1]
    return jnp.stack([signs[0], u - p * jnp.sum(u)])


def token_logits(
    decoder: Decoder, params: Params, prompt, prompt_length, response, response_length, t
) -> jax.Array:
    """float32 [V]: the scores that token t of one response was drawn from."""
    hidden = response_hidden(
        decoder,
        params,
        prompt[None],
        prompt_length[None],
        response[None, None],
        response_length[None, None],
    )
    return logits(params, decoder.cfg, hidden[0, t])


def by_region(values: np.ndarray, region: np.ndarray) -> Estimate:
    """Mean of the values of each region, and the standard error of a mean of independent draws."""
    mean, error = np.full((2, NUM_REGIONS), np.nan)
    for r in np.unique(region):
        own = values[region == r]
        mean[r] = own.mean()
        if len(own) > 1:
            error[r] = own.std(ddof=1) / np.sqrt(len(own))
    return Estimate(mean, error)
