"""The chunked vocabulary pass against full logits, and truncation against a NumPy oracle."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rest_jax.config import MeshConfig
from rest_jax.distributed import activate, batch_sharding, make_mesh
from rest_jax.rl.logprobs import (
    LossSpec,
    PassSpec,
    chosen_logp,
    entropy_and_gini,
    truncate,
    vocabulary_loss,
    vocabulary_pass,
)
from rest_jax.rl.loss import TokenLoss
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


@pytest.mark.parametrize(
    ("chunk", "share"),
    [
        (7, 0.5),
        *(pytest.param(*x, marks=pytest.mark.wide) for x in [(1, 1), (4, 1), (64, 1), (2, 0.3)]),
    ],
)
def test_chunks_change_neither_values_nor_gradients(chunk, share):
    """Of the positions that are used; the others cost nothing but in the last chunk, and have no gradient."""
    hidden = jnp.asarray(RNG.normal(size=(3, 13, 8)), jnp.float32)
    head = jnp.asarray(RNG.normal(size=(29, 8)), jnp.float32)
    tokens = jnp.asarray(RNG.integers(0, 29, (3, 13)), jnp.int32)
    s, used = Sampling(0.9), jnp.asarray(RNG.random((3, 13)) <= share)

    def at_once(hidden, head):
        logits = hidden @ head.T
        return chosen_logp(logits, tokens, s), *entropy_and_gini(logits)

    def chunked(hidden, head):
        return vocabulary_pass(hidden, head, tokens, used, PassSpec(s, chunk))

    def scalar(f):
        return lambda *a: sum((i + 1) * jnp.sum(used * jnp.sin(x)) for i, x in enumerate(f(*a)))

    for a, b in zip(at_once(hidden, head), chunked(hidden, head), strict=True):
        np.testing.assert_allclose(a[used], b[used], rtol=1e-5, atol=1e-5)
    for a, b in zip(
        *(jax.grad(scalar(f), (0, 1))(hidden, head) for f in (at_once, chunked)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_full_logits_never_exist():
    """The largest buffer of the compiled pass is far below [P, T, V]."""
    p, t, v, d = 2, 512, 4096, 16
    args = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((p, t, d), (v, d))]
    tokens = jax.ShapeDtypeStruct((p, t), jnp.int32)

    spec = PassSpec(Sampling(), 16)

    def f(hidden, head, tokens):
        return sum(jnp.sum(x) for x in vocabulary_pass(hidden, head, tokens, tokens >= 0, spec))

    memory = jax.jit(jax.grad(f, (0, 1))).lower(*args, tokens).compile().memory_analysis()
    assert memory.temp_size_in_bytes < p * t * v * 4 / 4


def _policy_like(stats, weight):
    """A loss with all that a chunk gives, and metrics of both kinds."""
    loss = -weight * (stats.logp + 0.1 * stats.entropy)
    maxima = {"logp": jnp.where(weight != 0, stats.logp, -jnp.inf)}
    return TokenLoss(loss, {"entropy": weight * stats.entropy}, maxima)


def _compiled_loss(mesh, dtype):
    """((loss, (sums, maxima)), (d_hidden, d_head)) of a loss on a mesh, and the compiled program."""
    rng = np.random.default_rng(3)
    hidden = jnp.asarray(rng.normal(size=(8, 24, 16)), dtype)
    head = jnp.asarray(rng.normal(size=(40, 16)), jnp.float32)
    tokens = jnp.asarray(rng.integers(0, 40, (8, 24)), jnp.int32)
    # uneven over the rows: one shard has more chunks to compute than another
    used = jnp.arange(24) < jnp.arange(3, 27, 3)[:, None]
    weight = jnp.where(used, jnp.asarray(rng.normal(size=(8, 24)), jnp.float32), 0)
    spec = LossSpec(_policy_like, Sampling(), 8, needs_entropy_gradient=True)

    def loss(hidden, head):
        total, *metrics = vocabulary_loss(hidden, head, tokens, weight, used, spec)
        return total, metrics

    at = batch_sharding(mesh), NamedSharding(mesh, PartitionSpec("tensor", ("fsdp", "expert")))
    with activate(mesh):
        gradient = jax.value_and_grad(loss, (0, 1), has_aux=True)
        program = jax.jit(gradient, in_shardings=at, out_shardings=(None, at))
        program = program.lower(hidden, head).compile()
        return program(hidden, head), program.as_text()


@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.wide)])
@pytest.mark.parametrize("sizes", [{"fsdp": 4}, {"data": 2, "fsdp": 2}, {"fsdp": 2, "expert": 2}])
def test_the_head_comes_once_and_its_gradient_is_reduced_once(sizes, dtype):
    mesh = make_mesh(MeshConfig(**{"fsdp": 1, **sizes}), jax.devices()[:4])
    alone = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    (found, text), (expected, _) = (_compiled_loss(m, dtype) for m in (mesh, alone))
    tolerance = 1e-5 if dtype == jnp.float32 else 1e-2
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        one, other = (np.asarray(x, np.float32) for x in (one, other))
        assert np.abs(one - other).max() <= tolerance * max(1.0, np.abs(other).max())
    collectives = [
        line
        for line in text.splitlines()
        if re.search(r"= .* (all-reduce|all-gather|reduce-scatter)(-start)?\(", line)
    ]
    assert collectives and not [line for line in collectives if "while/body" in line]
    steps = sum(axis in sizes for axis in ("fsdp", "expert"))
    assert sum("reduce-scatter" in line for line in collectives) == steps


def test_a_split_vocabulary():
    """Over the tensor axis the partitioner joins the parts of every softmax."""
    alone = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    expected, _ = _compiled_loss(alone, jnp.float32)
    tensor = make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
    found, _ = _compiled_loss(tensor, jnp.float32)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected
    )
