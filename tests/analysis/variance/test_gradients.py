"""Gradients of tokens and of groups against brute force: every Jacobian and every gradient written out."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from rest_jax.analysis.variance import gradients as gradients_lib
from rest_jax.analysis.variance.gradients import (
    draw_tokens,
    gram_noise,
    group_gradients,
    make_token_norms,
    probes,
    token_gradients,
    token_logits,
)
from rest_jax.analysis.variance.measure import trim
from rest_jax.models.attention import prompt_rows
from rest_jax.models.decoder import logits
from rest_jax.rl.view import standardise
from rest_jax.tool_calls import Region
from rest_jax.types import RolloutBatch, ScoredBatch
from tests import tiny
from tests.analysis.variance.conftest import KINDS


@jax.jit
def jacobian(params, prompt, prompt_length, response, response_length, t):
    """([V, N] Jacobian of the logits at token t, [V] logits): a backward pass for every word, one after another."""

    def scores(p):
        return token_logits(tiny.decoder(), p, prompt, prompt_length, response, response_length, t)

    z, pull = jax.vjp(scores, params)
    rows = jax.lax.map(lambda v: ravel_pytree(pull(v)[0])[0], jnp.eye(tiny.VOCAB))
    return rows, z


def exact_norms(params, r: RolloutBatch, p: int, g: int, t: int) -> tuple[float, float, float]:
    """(|J|_F^2, E_a |J^T s|^2 by a sum over all actions, H) of one token, in float64."""
    j, scores = (np.asarray(x, np.float64) for x in jacobian(params, *one_response(r, p, g), t))
    prob = np.exp(scores - scores.max())
    prob /= prob.sum()
    steps = j - prob @ j  # row a: J^T (onehot(a) - p)
    entropy = -np.sum(prob * np.log(np.maximum(prob, 1e-300)))
    return np.sum(j**2), prob @ np.sum(steps**2, axis=1), entropy


def one_response(r: RolloutBatch, p: int, g: int):
    return r.prompt[p], r.prompt_length[p], r.responses[p, g], r.response_length[p, g]


@functools.partial(jax.jit, static_argnames="size")
def row_gradient(params, tokens, start, coefficient, size: int):
    """Gradient, as one vector, of sum_t c_t log pi(token start + t) in one plain row: no packing, no chunks."""

    def objective(params):
        layout, positions = prompt_rows(tokens[None], jnp.array([len(tokens)]))
        hidden, _ = tiny.decoder().apply({"params": params}, tokens[None], positions, layout)
        logp = jax.nn.log_softmax(logits(params, tiny.decoder().cfg, hidden[0]))
        at = start + jnp.arange(len(coefficient))
        chosen = logp[at - 1, tokens[jnp.minimum(at, size - 1)]]
        return jnp.sum(jnp.where(coefficient != 0, coefficient * chosen, 0.0))

    return ravel_pytree(jax.grad(objective)(params))[0]


def whole_row(r: RolloutBatch, p: int, g: int) -> np.ndarray:
    """Prompt and response with nothing between, padded to one length for all."""
    own = [r.prompt[p, : r.prompt_length[p]], r.responses[p, g, : r.response_length[p, g]]]
    tokens = np.concatenate(own)
    return np.pad(tokens, (0, r.prompt.shape[1] + tiny.TIME - len(tokens)))


# single tokens


def test_the_score_gradient_is_the_gradient_of_the_log_prob(peaked, scored):
    """J^T (onehot(a) - p) from the Jacobian is jax.grad of log pi(a), one token at a time, in a plain row."""
    r = scored.rollout
    for p, g, t in ((0, 0, 0), (2, 1, 1), (3, 3, 0)):
        j, z = jacobian(peaked, *one_response(r, p, g), t)
        score = jax.nn.one_hot(r.responses[p, g, t], tiny.VOCAB) - jax.nn.softmax(z)
        only = np.eye(tiny.TIME, dtype=np.float32)[t]
        row = whole_row(r, p, g)
        plain = row_gradient(peaked, row, r.prompt_length[p], only, len(row))
        np.testing.assert_allclose(score @ j, plain, atol=1e-4 * np.abs(plain).max())


def test_probes_have_the_two_covariances():
    scores = jnp.array([2.0, 0.0, 0.5, -1.0, -3.0])
    drawn = jax.vmap(lambda k: probes(scores, k))(jax.random.split(jax.random.key(0), 40_000))
    prob = np.asarray(jax.nn.softmax(scores))
    expected = np.eye(5), np.diag(prob) - np.outer(prob, prob)
    for v, covariance in zip(np.asarray(drawn).swapaxes(0, 1), expected, strict=True):
        np.testing.assert_allclose(v.T @ v / len(v), covariance, atol=0.02)


@pytest.mark.parametrize(
    "place", [(2, 1, 1), *(pytest.param(x, marks=pytest.mark.wide) for x in [(0, 0, 0), (3, 3, 0)])]
)
def test_estimates_of_one_token_are_unbiased(peaked, scored, place):
    r = scored.rollout
    p, g, t = place
    norms = make_token_norms(tiny.decoder())
    arguments = (*one_response(r, p, g), t)
    keys = jax.random.split(jax.random.key(3), 200)
    found = np.array([norms(peaked, *arguments, key) for key in keys], np.float64)
    error = found.std(axis=0, ddof=1) / np.sqrt(len(found))
    frobenius, score, entropy = exact_norms(peaked, r, p, g, t)
    for mean, e, exact in zip(found.mean(axis=0), error, (frobenius, score), strict=True):
        assert e < 0.2 * exact and abs(mean - exact) < 4 * e, (mean, e, exact)
    assert score <= frobenius * -np.expm1(-entropy) * (1 + 1e-6)


@pytest.mark.wide
def test_all_basis_vectors_together_give_the_frobenius_norm(peaked, scored):
    """sum_i |J^T e_i|^2 over the vocabulary, each by a backward pass of its own, is |J|_F^2 with no noise at all."""
    r = scored.rollout
    arguments = jax.tree.map(jnp.asarray, (*one_response(r, 0, 0), 0))
    _, pull = jax.vjp(lambda p: token_logits(tiny.decoder(), p, *arguments), peaked)
    one = jax.jit(lambda v: sum(jnp.sum(x**2) for x in jax.tree.leaves(pull(v)[0])))
    total = sum(float(one(v)) for v in jnp.eye(tiny.VOCAB))
    assert total == pytest.approx(exact_norms(peaked, r, 0, 0, 0)[0], rel=1e-4)


@pytest.mark.slow
def test_region_means_against_every_token(peaked, scored):
    """Importance-drawn tokens against the sum over all of them; the standard errors are of the right size."""
    few = trim(dataclasses.replace(scored, **_rows(scored, slice(0, 2))))
    exact = {r: [] for r in KINDS}
    for p, g, t in np.argwhere(few.region > 0):
        frobenius, score, entropy = exact_norms(peaked, few.rollout, p, g, t)
        exact[Region(few.region[p, g, t])].append((frobenius * -np.expm1(-entropy), score))
    found = token_gradients(tiny.decoder(), peaked, few, tokens=60, seed=4)
    for r in KINDS:
        beta, score = np.mean(exact[r], 0)
        for mean, error, value in (
            (found.beta[r], found.beta_error[r], beta),
            (found.score[r], found.score_error[r], score),
        ):
            assert error < 0.3 * value and abs(mean - value) < 4 * error
    assert np.isnan(found.beta[Region.PARAM])


def _rows(batch: ScoredBatch, rows: slice) -> dict:
    own = {f: getattr(batch, f)[rows] for f in ("region", "reward", "format_score")}
    return own | {"rollout": jax.tree.map(lambda x: x[rows], batch.rollout)}


def test_draws_follow_the_weight():
    region = np.array([[[1, 1, 1, 3, 0]]], np.int8)
    weight = np.array([[[1.0, 0.0, 3.0, 5.0, 9.0]]])
    drawn = draw_tokens(region, weight, 4000, 0)[:, 2]
    share = np.bincount(drawn, minlength=5) / 4000
    np.testing.assert_allclose(share, [0.25, 0, 0.75, 1, 0], atol=0.03)


# groups


@pytest.fixture(scope="module")
def coefficient(scored):
    """Two weightings; the second leaves group 2 out."""
    mask = scored.region > 0
    advantage = np.asarray(standardise(jnp.asarray(scored.reward)))[..., None]
    first = np.where(mask, -advantage, 0.0)
    second = first * np.random.default_rng(0).uniform(0.2, 3, mask.shape)
    second[2] = 0
    return np.stack([first, second]).astype(np.float32)


@pytest.fixture(scope="module")
def gradients(peaked, scored, coefficient):
    """float64 [K, P, N], by jax.grad of plain rows, summed."""
    r, found = scored.rollout, []
    for c in coefficient:
        for p in range(len(c)):
            rows = [
                row_gradient(
                    peaked, whole_row(r, p, g), r.prompt_length[p], c[p, g], 16 + tiny.TIME
                )
                for g in range(tiny.GROUP)
            ]
            found.append(np.sum(rows, axis=0, dtype=np.float64))
    return np.array(found).reshape(len(coefficient), -1, found[0].size)


def test_gram_against_gradients_of_plain_rows(peaked, scored, coefficient, gradients):
    found = group_gradients(tiny.decoder(), peaked, scored.rollout, coefficient, 5, 0)
    expected = np.einsum("kpn,kqn->kpq", gradients, gradients)
    scale = np.sqrt(np.einsum("kpp,kqq->kpq", expected, expected))
    # equal answers cancel within a group: what is left of it is rounding
    assert np.all(np.abs(found.gram - expected) <= 1e-4 * scale + 1e-6 * scale.max())
    assert found.exact and found.dimensions == gradients.shape[2]
    assert not found.gram[:, 1].any() and not found.gram[1, 2].any()
    a, b = gradients.mean(axis=1)
    cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    np.testing.assert_allclose(found.cosine, [1, cosine], atol=1e-4)


@pytest.mark.wide
def test_sketches_keep_the_inner_products(monkeypatch, peaked, scored, coefficient, gradients):
    monkeypatch.setattr(gradients_lib, "EXACT_FLOATS", 1)
    found = group_gradients(tiny.decoder(), peaked, scored.rollout, coefficient, 5, 0)
    assert not found.exact
    expected = np.einsum("kpn,kqn->kpq", gradients, gradients)
    norms = np.sqrt(np.einsum("kpp->kp", expected))
    error = np.abs(found.gram - expected)
    scale = norms[:, :, None] * norms[:, None]
    allowed = 5 * np.sqrt(2 / found.dimensions) * scale + 1e-6 * scale.max()
    assert np.all(error <= allowed)
    assert error.max() > 0


# variance


def test_variance_against_an_explicit_bootstrap():
    """Means of resampled gradients, computed as such; the bootstrap's own variance is (P - 1) / P of the unbiased one."""
    rng = np.random.default_rng(0)
    g = rng.normal(1.0, 2.0, (7, 5)) * np.array([1, 2, 3, 0.5, 1])
    found = gram_noise(g @ g.T)
    means = g[rng.integers(0, 7, (200_000, 7))].mean(axis=1)
    assert found.variance * 6 / 7 == pytest.approx(means.var(axis=0).sum(), rel=0.01)
    assert found.variance == pytest.approx(np.cov(g.T).trace() / 7)
    assert found.mean_square == pytest.approx(np.sum(g.mean(axis=0) ** 2))
    assert found.share == pytest.approx(found.variance / found.mean_square)


def test_variance_and_signal_are_unbiased():
    rng = np.random.default_rng(1)
    mean, scale = np.array([0.3, -0.2, 0.1]), np.array([1.0, 2.0, 0.5])
    draws = [rng.normal(mean, scale, (5, 3)) for _ in range(20_000)]
    found = [gram_noise(g @ g.T) for g in draws]
    assert np.mean([f.variance for f in found]) == pytest.approx(np.sum(scale**2) / 5, rel=0.02)
    signal = np.array([f.signal for f in found])
    assert abs(signal.mean() - mean @ mean) < 4 * signal.std() / np.sqrt(len(signal))


def test_resamples_are_centred_on_the_batch():
    """Counts weigh groups as repeated rows would; their variance and signal have the batch's own as mean."""
    rng = np.random.default_rng(2)
    g = rng.normal(0.5, 1.0, (6, 4))
    gram, count = g @ g.T, rng.multinomial(6, np.full(6, 1 / 6), size=50_000)
    count = count[count.max(axis=1) < 6]
    found = gram_noise(gram, count)
    for i in range(5):
        rows = np.repeat(np.arange(6), count[i])
        different = rows[:, None] != rows
        assert found.signal[i] == pytest.approx(gram[np.ix_(rows, rows)][different].mean())
    every = gram_noise(gram)
    assert found.signal.mean() == pytest.approx(every.signal, abs=0.02)
    assert found.variance.mean() == pytest.approx(every.variance, rel=0.02)


def test_one_group_drawn_alone_says_nothing():
    one = gram_noise(np.eye(3), np.array([[0, 3, 0], [1, 1, 1]]))
    assert np.isnan(one.variance[0]) and np.isfinite(one.variance[1])
