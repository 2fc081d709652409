"""Experts against a loop over tokens, on any mesh, with padding, replayed; what the routers report."""

import dataclasses
import functools
import importlib.util
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from rest_jax import distributed
from rest_jax.config import MeshConfig
from rest_jax.errors import UserError
from rest_jax.models import moe
from rest_jax.models.cache import RowLayout
from rest_jax.models.config import DecoderConfig
from rest_jax.models.decoder import (
    Decoder,
    abstract_params,
    apply_routed,
    logits,
    param_shardings,
)
from rest_jax.models.moe import ExpertWeights, compact, mix_experts, record, route
from rest_jax.planning import topology
from rest_jax.rl.packing import Rows
from rest_jax.types import ResponseBatch
from tests import tiny
from tests.conftest import REPOSITORY

CFG = DecoderConfig(
    "qwen3_moe", 64, 32, 2, 4, 4, 8, 16, qk_norm=True, tied=False,
    n_experts=4, experts_per_token=2, norm_topk=True,
)  # fmt: skip
P, G, TP, TR = 8, 2, 5, 4


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@functools.cache
def make_params(cfg=CFG):
    rng = np.random.default_rng(0)
    shapes = nn.meta.unbox(abstract_params(cfg))
    return jax.tree.map(lambda x: jnp.asarray(0.2 * rng.normal(size=x.shape), jnp.float32), shapes)


def batch() -> ResponseBatch:
    """Ragged groups; the last one is empty, as rows of a micro-batch can be."""
    rng = np.random.default_rng(1)
    prompt, responses = (
        jnp.asarray(rng.integers(0, 64, shape), jnp.int32) for shape in ((P, TP), (P, G, TR))
    )
    lengths = rng.integers(1, TP + 1, P), rng.integers(1, TR + 1, (P, G))
    lengths[0][-1], lengths[1][-1] = 1, 0
    return ResponseBatch(prompt, jnp.asarray(lengths[0]), responses, jnp.asarray(lengths[1]))


def packed() -> Rows:
    """A group a row, with a weight of every completion in the load-balance loss."""
    rows, weight = tiny.packed(batch(), P), normal(5, P, G) ** 2
    return rows.replace(balance=rows.completions(weight, TR))


def loss(params, batch, rows, cfg=CFG):
    """(a loss with a load-balance term, what the routers did)."""
    inputs = rows.tokens(batch), rows.position, rows.layout
    hidden, _, router = apply_routed(Decoder(cfg), params, *inputs)
    logp = jax.nn.log_softmax(logits(params, cfg, hidden))
    chosen = jnp.take_along_axis(logp, rows.targets(batch.responses)[..., None], axis=-1)[..., 0]
    policy = -jnp.sum(jnp.where(rows.predicts, chosen, 0.0))
    assert router is not None
    return policy + jnp.sum(router.balance), router


@functools.cache
def single_device(cfg=CFG):
    run = jax.jit(jax.value_and_grad(functools.partial(loss, cfg=cfg), has_aux=True))
    return run(make_params(), batch(), packed())


def assert_close(found, expected, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        np.testing.assert_allclose(a, b, atol=tolerance * max(np.abs(b).max(), 1e-6), rtol=0)


# data, fsdp, expert, tensor
MESHES = [(1, 1, 2, 1), (1, 1, 4, 1), (1, 2, 4, 1), (1, 1, 4, 2), (2, 1, 2, 2), (1, 2, 1, 2)]


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param((1, 2, 2, 2), marks=pytest.mark.wide),
        *(pytest.param(m, marks=pytest.mark.slow) for m in MESHES),
    ],
    ids=str,
)
@pytest.mark.parametrize("remat", ["block", pytest.param("dots", marks=pytest.mark.slow)])
def test_value_and_gradient_do_not_depend_on_the_mesh(sizes, remat):
    params, cfg = make_params(), dataclasses.replace(CFG, remat=remat)
    names = dict(zip(distributed.AXES, sizes, strict=True))
    mesh = distributed.make_mesh(MeshConfig(**names), jax.devices()[: int(np.prod(sizes))])
    placed, rows = param_shardings(cfg, mesh), distributed.batch_sharding(mesh)
    with distributed.activate(mesh):
        run = jax.jit(
            jax.value_and_grad(functools.partial(loss, cfg=cfg), has_aux=True),
            in_shardings=(placed, rows, rows),
            out_shardings=(None, placed),
        )
        found = run(jax.device_put(params, placed), *jax.device_put((batch(), packed()), rows))
    (value, router), gradient = found
    (expected, expected_router), expected_gradient = single_device()
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_array_equal(router.load, expected_router.load)
    assert_close(gradient, expected_gradient)
    assert_close(router, expected_router)


def test_how_many_parts():
    """The least divisor of the number of devices whose parts are small enough."""
    limit = moe._ROWS
    found = [moe._count_parts(4, rows) for rows in (1, limit, limit + 1, 2 * limit + 1, 99 * limit)]
    assert found == [1, 1, 2, 4, 4]
    assert moe._count_parts(1, 99 * limit) == 1


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "block"])
@pytest.mark.parametrize("parts", [2, 4])
def test_gathered_rows_in_parts(parts, remat, monkeypatch):
    rows = packed().token.size * CFG.experts_per_token
    monkeypatch.setattr(moe, "_ROWS", rows // parts)
    assert moe._count_parts(4, rows) == parts
    test_value_and_gradient_do_not_depend_on_the_mesh((1, 1, 4, 1), remat)


def test_each_token_goes_through_its_experts():
    """NumPy, token by token; the gradient of the same sum written with all experts."""
    x = normal(0, 3, 5, 32)
    router, gate, up = normal(1, 32, 4), normal(2, 4, 32, 16), normal(3, 4, 32, 16)
    experts = ExpertWeights(0.2 * gate, 0.2 * up, 0.2 * normal(4, 4, 16, 32))
    valid = jnp.arange(5) < jnp.array([5, 2, 4])[:, None]

    def ours(x, router, experts):
        return mix_experts(x, route(x, router, None, CFG), valid, experts, CFG)

    p = np.exp(np.asarray(x) @ np.asarray(router))
    p /= p.sum(-1, keepdims=True)
    chosen = np.argsort(-p, axis=-1)[..., :2]
    expected = np.zeros(x.shape)
    for b, t in np.argwhere(np.asarray(valid)):
        for e in chosen[b, t]:
            weight = p[b, t, e] / p[b, t, chosen[b, t]].sum()
            h, u = np.asarray(x)[b, t] @ np.stack([experts.gate[e], experts.up[e]])
            expected[b, t] += weight * (h / (1 + np.exp(-h)) * u @ np.asarray(experts.down[e]))
    np.testing.assert_allclose(jax.jit(ours)(x, router, experts), expected, atol=1e-5)

    def dense(x, router, experts):
        p = jax.nn.softmax(jnp.einsum("btd,de->bte", x, router, precision="highest"))
        p = jnp.where(jax.nn.one_hot(chosen, 4).sum(-2) > 0, p, 0)
        h = jnp.einsum("btd,edf->btef", x, experts.gate, precision="highest")
        h = jax.nn.silu(h) * jnp.einsum("btd,edf->btef", x, experts.up, precision="highest")
        y = jnp.einsum("btef,efd->bted", h, experts.down, precision="highest")
        y = jnp.einsum("bte,bted->btd", p / p.sum(-1, keepdims=True), y, precision="highest")
        return jnp.where(valid[..., None], y, 0)

    def gradient(f):
        return jax.jit(jax.grad(lambda *inputs: jnp.sum(jnp.sin(f(*inputs))), (0, 1, 2)))

    assert_close(gradient(ours)(x, router, experts), gradient(dense)(x, router, experts))


def test_padding_influences_nothing():
    """Other tokens behind a row, all of the empty one included: same loss, same gradient, same record, bit for bit."""
    rows, inputs = packed(), batch()
    valid = rows.layout.valid
    token = jnp.where(valid, rows.token, 7 + jnp.arange(rows.token.size).reshape(valid.shape))
    other = rows.replace(token=token, position=jnp.where(valid, rows.position, 3))
    assert not np.array_equal(other.tokens(inputs), rows.tokens(inputs))
    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    ((value, router), gradient) = run(make_params(), inputs, other)
    ((expected, expected_router), expected_gradient) = run(make_params(), inputs, rows)
    np.testing.assert_array_equal(value, expected)
    jax.tree.map(np.testing.assert_array_equal, gradient, expected_gradient)
    for name in ("tokens", "load", "entropy", "agreement", "balance"):
        np.testing.assert_array_equal(getattr(router, name), getattr(expected_router, name), name)
    tokens = np.asarray(inputs.prompt_length) - 1 + np.asarray(inputs.response_length).sum(1)
    np.testing.assert_array_equal(router.tokens, np.broadcast_to(tokens, (2, P)))
    np.testing.assert_array_equal(router.load.sum(-1), 2 * router.tokens)


def test_the_record_of_a_router():
    p = np.array([[[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.15, 0.05], [0.25, 0.25, 0.4, 0.1]]])
    x, router = jnp.eye(3)[None], jnp.asarray(np.log(p[0]), jnp.float32)
    layout = RowLayout(jnp.array([[2, 2, 0]]), 1)
    routing = route(x, router, None, CFG)
    np.testing.assert_allclose(routing.probability, p, rtol=1e-6)
    np.testing.assert_array_equal(routing.chosen[0, :2], [[3, 2], [0, 2]])
    np.testing.assert_allclose(routing.weight[0, 0], [4 / 7, 3 / 7], rtol=1e-6)
    found = record(routing, layout.valid, layout)
    np.testing.assert_array_equal(found.load, [[1, 0, 2, 1]])
    entropy = -(p[0, :2] * np.log(p[0, :2])).sum()
    np.testing.assert_allclose(found.entropy, [entropy], rtol=1e-6)
    assert found.agreement == 4 and found.balance == 0  # which nobody asked for

    chosen = jnp.array([[[3, 1], [0, 2], [0, 1]]], jnp.uint8)
    replayed = record(route(x, router, chosen, CFG), layout.valid, layout)
    np.testing.assert_array_equal(replayed.load, [[1, 1, 1, 1]])
    assert replayed.agreement == 3
    plain = route(x, router, None, dataclasses.replace(CFG, norm_topk=False))
    np.testing.assert_allclose(plain.weight[0, 0], [0.4, 0.3], rtol=1e-6)


def test_the_load_balance_loss_of_completions():
    """sum over completions of c E sum_e f_e P_e, of which P alone carries gradient; prompts and padding are not in it."""
    inputs, c = batch(), np.random.default_rng(5).uniform(1, 2, (P, G))
    rows = tiny.packed(inputs, rows=2)
    weight = jnp.asarray(c / np.maximum(inputs.response_length, 1), jnp.float32)
    layout = rows.replace(balance=rows.completions(weight, TR)).layout
    p = jax.nn.softmax(normal(6, *rows.token.shape, 4))
    _, chosen = jax.lax.top_k(p, 2)

    expected, slope = np.zeros(2), np.zeros(p.shape)
    owner = np.where(rows.predicts, rows.target // TR, -1)
    for n, row in {(n, row) for row, ids in enumerate(owner) for n in ids if n >= 0}:
        own = owner[row] == n
        f = np.array([np.any(chosen[row, own] == e, axis=-1).mean() for e in range(4)])
        expected[row] += c.flat[n] * 4 * np.sum(f * np.asarray(p)[row, own].mean(0))
        slope[row, own] = c.flat[n] * 4 * f / own.sum()

    def balance(p):
        return record(moe.Routing(chosen, p, p, chosen), layout.valid, layout).balance

    np.testing.assert_allclose(balance(p), expected, rtol=1e-5)
    np.testing.assert_allclose(jax.grad(lambda p: jnp.sum(balance(p)))(p), slope, atol=1e-5)


def test_replayed_experts_take_the_place_of_the_routers_choice():
    params, rows = make_params(), packed()
    inputs, valid = (rows.tokens(batch()), rows.position, rows.layout), rows.layout.valid

    @jax.jit
    def run(params, replayed):
        return apply_routed(Decoder(CFG), params, *inputs, replayed=replayed)

    hidden, _, router = run(params, None)
    kept = jnp.moveaxis(compact(router.chosen, CFG), -2, 0)
    assert kept.dtype == jnp.uint8 and kept.shape == (2, *valid.shape, 2)
    same, _, again = run(params, kept)
    np.testing.assert_array_equal(np.asarray(same)[valid], np.asarray(hidden)[valid])
    np.testing.assert_array_equal(again.agreement, router.load.sum(-1))
    moved, _, other = run(params, (kept + 1) % 4)
    assert np.abs(np.asarray(moved - hidden))[valid].max() > 1e-2
    np.testing.assert_array_equal(other.load, np.roll(router.load, 1, axis=-1))
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(run(p, kept)[0] ** 2 * valid[..., None])))(params)
    assert np.abs(gradient["blocks"]["mlp"]["router"]).max() > 1e-3


def test_experts_that_do_not_fit_a_mesh():
    def mesh(expert):
        return distributed.make_mesh(MeshConfig(expert=expert, fsdp=1), jax.devices()[:expert])

    dense = dataclasses.replace(CFG, family="qwen3", n_experts=0, experts_per_token=0)
    with pytest.raises(UserError, match=r"mesh\.expert 2: a qwen3 model has no experts"):
        param_shardings(dense, mesh(2))
    with pytest.raises(
        UserError, match=r"expert dimension 4 does not divide over mesh axis expert 3"
    ):
        param_shardings(CFG, mesh(3))
    with pytest.raises(UserError, match=r"experts_per_token 5 is not in 1 \.\. n_experts 4"):
        dataclasses.replace(CFG, experts_per_token=5)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(100, 0, 156, 77, 3), (0, 0, 0, 0, 0), (336, 0, 0, 0, 0)])
def test_the_tpu_kernel_of_the_gradient_is_the_general_product(sizes):
    """Groups that are empty, that share a tile, and rows behind the last group; interpreted."""
    a, b = (0.1 * normal(seed, 340, width) for seed, width in ((0, 128), (1, 256)))
    sizes = jnp.array(sizes, jnp.int32)
    expected = moe._sum_outer(a, b, sizes, jnp.float32, jax.lax.Precision.HIGHEST)
    found = moe._sum_outer_kernel(a, b, sizes, jnp.float32, interpret=True)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    ends = np.cumsum(sizes)
    for e, (start, end) in enumerate(zip(ends - np.asarray(sizes), ends, strict=True)):
        np.testing.assert_allclose(found[e], a[start:end].T @ b[start:end], atol=1e-5)


def test_gradients_of_matrices_keep_their_precision():
    """Of 513 equal tokens it is 513 times that of one, which bfloat16, the dtype of the products, would round to 512."""
    cfg = dataclasses.replace(CFG, dtype="bfloat16")
    experts = ExpertWeights(*(jnp.full(s, 0.25) for s in ((4, 8, 16), (4, 8, 16), (4, 16, 8))))

    def gradient(count):
        weight = jnp.full((1, count, 1), 0.5)
        chosen = jnp.zeros(weight.shape, jnp.int32)
        routing = moe.Routing(chosen, weight, weight, chosen)
        x, valid = jnp.ones((1, count, 8), jnp.bfloat16), jnp.ones((1, count), bool)

        def total(experts):
            return jnp.sum(mix_experts(x, routing, valid, experts, cfg).astype(jnp.float32))

        return jax.grad(total)(experts)

    for many, one in zip(gradient(513), gradient(1), strict=True):
        assert many.dtype == jnp.float32 and np.all(one[0] > 0) and not np.any(many[1:])
        np.testing.assert_array_equal(many, 513 * one)


def test_stored_matrices_are_gathered_and_their_gradients_scattered():
    """float32 matrices split over fsdp, bfloat16 products: the same gradients as on one device, in the same place."""
    cfg = dataclasses.replace(CFG, dtype="bfloat16")
    x = normal(0, 8, 6, 32).astype(jnp.bfloat16)
    router = normal(1, 32, 4)
    routing = route(x.astype(jnp.float32), router, None, CFG)
    valid = jnp.arange(6) < jnp.arange(1, 9)[:, None]
    experts = ExpertWeights(normal(2, 4, 32, 16), normal(3, 4, 32, 16), normal(4, 4, 16, 32))
    experts = jax.tree.map(lambda w: 0.2 * w, experts)

    def total(x, experts):
        y = mix_experts(x, routing, valid, experts, cfg)
        return jnp.sum(jnp.sin(y.astype(jnp.float32)))

    expected = jax.jit(jax.grad(total, argnums=(0, 1)))(x, experts)
    mesh = distributed.make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2), jax.devices()[:8])
    mlp = param_shardings(CFG, mesh)["blocks"]["mlp"]
    layer = (jax.sharding.PartitionSpec(*mlp[name].spec[1:]) for name in ExpertWeights._fields)
    placed = ExpertWeights(*(jax.sharding.NamedSharding(mesh, spec) for spec in layer))
    with distributed.activate(mesh):
        run = jax.jit(jax.grad(total, argnums=(0, 1)), out_shardings=(None, placed))
        found = run(x, jax.device_put(experts, placed))
    assert [w.dtype for w in found[1]] == [jnp.float32] * 3
    assert_close(jax.tree.map(lambda a: a.astype(jnp.float32), found), expected, tolerance=0.02)


@pytest.mark.aot
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_a_tpu_multiplies_chosen_experts_only_and_sums_gradients_in_float32(tmp_path):
    """XLA would multiply every row once an expert for the gradient of the matrices, and add devices up in bfloat16."""
    command = [sys.executable, "-m", "tests.programs.expert_gradient"]
    environment = topology.child_environment(topology.parse("v5p:2x2x2"), tmp_path)
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["flops"] == found["exact"]
    assert found["gathers"] == 3  # once, for both passes, and not of the stored matrices
    kinds, dtypes = zip(*found["sums"], strict=True)
    assert set(dtypes) == {"f32"} and kinds.count("reduce-scatter") == 3
