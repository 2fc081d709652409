"""The chunked vocabulary pass against full logits, and truncation against a NumPy oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rest_jax.rl.logprobs import chosen_logp, entropy_and_gini, truncate, vocabulary_pass
from rest_jax.types import Sampling

RNG = np.random.default_rng(0)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def truncated(logits, s):
    """Probabilities after temperature, top-k, top-p: one row at a time."""
    out = []
    for row in logits:
        p = softmax(row / s.temperature)
        order = np.argsort(-p, kind="stable")
        keep = np.ones(len(p), bool)
        if s.top_k:
            keep[order[s.top_k :]] = False
        p = np.where(keep, p, 0) / p[keep].sum()
        if s.top_p < 1:
            before = np.cumsum(p[order]) - p[order]
            keep[order[before >= s.top_p]] = False
        p = np.where(keep, p, 0)
        out.append(p / p.sum())
    return np.array(out)


@pytest.mark.parametrize(
    "s", [Sampling(), Sampling(0.7), Sampling(1.3, 5), Sampling(1.0, 0, 0.8), Sampling(0.8, 7, 0.6)]
)
def test_chosen_logp_is_of_the_distribution_sampled_from(s):
    logits = RNG.normal(0, 2, (6, 23)).astype(np.float32)
    p = truncated(logits, s)
    kept = np.asarray(jax.nn.softmax(truncate(jnp.asarray(logits), s)))
    np.testing.assert_allclose(kept, p, atol=1e-6)
    token = p.argmax(-1).astype(np.int32)
    got = chosen_logp(jnp.asarray(logits), jnp.asarray(token), s)
    np.testing.assert_allclose(got, np.log(p[np.arange(6), token]), atol=1e-5)


def test_entropy_and_gini():
    logits = RNG.normal(0, 2, (6, 23)).astype(np.float32)
    p = softmax(logits)
    entropy, gini = entropy_and_gini(jnp.asarray(logits))
    np.testing.assert_allclose(entropy, -(p * np.log(p)).sum(-1), rtol=1e-5)
    np.testing.assert_allclose(gini, 1 - (p * p).sum(-1), rtol=1e-5)
    assert (np.asarray(gini) <= 1 - np.exp(-np.asarray(entropy)) + 1e-6).all()  # Lemma 2


@pytest.mark.parametrize("chunk", [1, 4, 7, 64])
def test_chunks_change_neither_values_nor_gradients(chunk):
    hidden = jnp.asarray(RNG.normal(size=(3, 13, 8)), jnp.float32)
    head = jnp.asarray(RNG.normal(size=(29, 8)), jnp.float32)
    tokens = jnp.asarray(RNG.integers(0, 29, (3, 13)), jnp.int32)
    s = Sampling(0.9)

    def at_once(hidden, head):
        logits = hidden @ head.T
        return chosen_logp(logits, tokens, s), *entropy_and_gini(logits)

    def chunked(hidden, head):
        return vocabulary_pass(hidden, head, tokens, s, chunk)

    def scalar(f):
        return lambda *a: sum((i + 1) * jnp.sum(jnp.sin(x)) for i, x in enumerate(f(*a)))

    for a, b in zip(at_once(hidden, head), chunked(hidden, head), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    for a, b in zip(
        *(jax.grad(scalar(f), (0, 1))(hidden, head) for f in (at_once, chunked)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_full_logits_never_exist():
    """The largest buffer of the compiled pass is far below [P, T, V]."""
    p, t, v, d = 2, 512, 4096, 16
    args = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((p, t, d), (v, d))]
    tokens = jax.ShapeDtypeStruct((p, t), jnp.int32)

    def f(hidden, head, tokens):
        return sum(jnp.sum(x) for x in vocabulary_pass(hidden, head, tokens, Sampling(), 16))

    memory = jax.jit(jax.grad(f, (0, 1))).lower(*args, tokens).compile().memory_analysis()
    assert memory.temp_size_in_bytes < p * t * v * 4 / 4
