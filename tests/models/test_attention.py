"""Attention of rows by every kernel: over a mesh, with huge scores, in the decoder; layouts."""

import dataclasses
import json
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rest_jax import distributed
from rest_jax.config import MeshConfig
from rest_jax.errors import UserError
from rest_jax.models import attention
from rest_jax.models.attention import KERNELS, attend, prompt_rows, valid_positions
from rest_jax.models.cache import RowLayout
from rest_jax.models.decoder import Decoder, init_params, param_shardings
from rest_jax.models.policy import attention_of
from rest_jax.planning import topology
from rest_jax.types import ResponseBatch
from tests import tiny
from tests.conftest import REPOSITORY
from tests.models.rows import (
    PACKED,
    assert_close,
    assert_dense,
    by_kernel,
    make_inputs,
    normal,
    packed_row,
    value_and_gradients,
    visible_pairs,
)

IN_PALLAS = ["flash", "triton"]


@pytest.mark.parametrize("kernel", KERNELS)
def test_prompts_attend_causally_up_to_their_length(kernel):
    """NumPy oracle, grouped queries included."""
    length = np.array([5, 4])
    q, k, v = (np.asarray(normal(i, 2, 6, heads, 8)) for i, heads in enumerate((4, 2, 2)))
    expected = np.zeros_like(q)
    for b, t, n in np.ndindex(2, 6, 4):
        if t < length[b]:
            weight = np.exp(k[b, : t + 1, n // 2] @ q[b, t, n] / np.sqrt(8))
            expected[b, t, n] = weight / weight.sum() @ v[b, : t + 1, n // 2]
    layout, _ = prompt_rows(jnp.zeros((2, 6), jnp.int32), jnp.asarray(length))
    cfg = dataclasses.replace(tiny.decoder().cfg, attention=kernel)
    out = jax.jit(lambda q, k, v: attend(q, (k, v), layout, None, cfg))(q, k, v)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", IN_PALLAS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (2, 2), (4, 1), (6, 2), (16, 1)])
def test_packed_rows_equal_dense_attention(kernel, heads, kv_heads):
    """Padding, of which every output has a gradient here, is zero in value and gradients."""
    inputs = make_inputs(*PACKED.shape, heads, kv_heads)
    found = value_and_gradients(by_kernel(KERNELS[kernel], PACKED), *inputs)
    assert_dense(found, inputs, PACKED)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", IN_PALLAS)
@pytest.mark.parametrize("time", [1, 128, 513, 1500])
def test_rows_of_any_length(kernel, time):
    """Queries and keys in blocks of different sizes."""
    half = time // 2
    until = np.stack([packed_row(time, [(time - half, time - half, [half], half)])] * 2)
    inputs = make_inputs(2, time, 8, 2)
    found = value_and_gradients(by_kernel(KERNELS[kernel], until), *inputs)
    assert_dense(found, inputs, until)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", IN_PALLAS)
@pytest.mark.parametrize("width", [24, 64])
def test_bfloat16(kernel, width):
    """Products of rounded numbers, sums in float32."""
    *inputs, weight = make_inputs(*PACKED.shape, 4, 2, width)
    inputs = [x.astype(jnp.bfloat16) for x in inputs]
    found = value_and_gradients(by_kernel(KERNELS[kernel], PACKED), *inputs, weight)
    assert all(x.dtype == jnp.bfloat16 for x in found)
    assert_dense(found, (*inputs, weight), PACKED, tolerance=2e-2)


@pytest.mark.aot
@pytest.mark.parametrize("name", ["v5e:2x2", "v5p:2x2x1", "h100:4"])
def test_kernels_compile_for_accelerators(name, tmp_path):
    """Forward and backward, under fsdp 2 x tensor 2: three kernels each, that say their FLOPs, and no array of all scores."""
    where = topology.parse(name)
    try:
        topology.check_compiler(where)
    except UserError as error:
        pytest.skip(str(error))
    command = [sys.executable, "-m", "tests.programs.compiled_attention", name]
    environment = topology.child_environment(where, tmp_path)
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for found in json.loads(done.stdout):
        assert found["kernels"] == 3
        assert found["flops"] == found["expected_flops"]
        assert found["temporaries"] < 0.1 * found["scores"]


SHARED_BY_TWO = {"fsdp": 2, "tensor": 4}, 8, 2


@pytest.mark.parametrize(
    ("kernel", "mesh", "heads", "kv_heads"),
    [
        ("blocks", {"fsdp": 2, "tensor": 2}, 4, 2),
        ("blocks", *SHARED_BY_TWO),
        ("wide_blocks", {"data": 2, "tensor": 2}, 4, 1),
        ("flash", {"fsdp": 2, "tensor": 2}, 4, 1),
        pytest.param("flash", {"fsdp": 2, "tensor": 2}, 4, 2, marks=pytest.mark.slow),
        pytest.param("flash", *SHARED_BY_TWO, marks=pytest.mark.slow),
        ("triton", {"fsdp": 2, "tensor": 2}, 4, 2),
        pytest.param("triton", *SHARED_BY_TWO, marks=pytest.mark.slow),
    ],
)
def test_over_a_mesh(kernel, mesh, heads, kv_heads):
    """Rows over data and fsdp, heads over tensor; of fewer kv heads, each is on several devices."""
    inputs = make_inputs(*PACKED.shape, heads, kv_heads)
    with distributed.activate(made := tiny.mesh(**mesh)):
        assert attention._divides(made, *inputs[:2])
        rows = distributed.batch_sharding(made)
        placed = (jax.device_put(x, rows) for x in inputs)
        found = value_and_gradients(by_kernel(KERNELS[kernel], PACKED), *placed)
    assert_dense(found, inputs, PACKED)


@pytest.mark.wide
@pytest.mark.parametrize("kernel", ["blocks", "flash"])
def test_what_a_mesh_does_not_divide_is_attended_as_without_it(kernel):
    mesh = distributed.make_mesh(MeshConfig(fsdp=2, tensor=4), jax.devices()[:8])
    sizes = [(2, 4, 1), (2, 4, 2), (2, 8, 4), (3, 4, 4), (2, 6, 3), (2, 2, 1)]
    divides = [attention._divides(mesh, *make_inputs(b, 4, n, k)[:2]) for b, n, k in sizes]
    assert divides == [True] * 3 + [False] * 3
    inputs = make_inputs(3, PACKED.shape[1], 4, 4, 8)
    with distributed.activate(mesh):
        found = value_and_gradients(by_kernel(KERNELS[kernel], PACKED[:3]), *inputs)
    assert_dense(found, inputs, PACKED[:3])


@pytest.mark.parametrize(
    "kernel",
    ["blocks", "wide_blocks", *(pytest.param(k, marks=pytest.mark.slow) for k in IN_PALLAS)],
)
def test_huge_scores_stay_finite(kernel):
    q, k, v, weight = make_inputs(*PACKED.shape, 2, 1)
    found = value_and_gradients(by_kernel(KERNELS[kernel], PACKED), 1e4 * q, 1e4 * k, v, weight)
    assert all(np.all(np.isfinite(x)) for x in found)


def test_the_layout_of_prompts():
    """What the compiler is told of the cost of a row is that of the longest prompt."""
    layout, positions = prompt_rows(jnp.zeros((3, 5), jnp.int32), jnp.array([5, 1, 3]))
    until = [[5, 5, 5, 5, 5], [1, 0, 0, 0, 0], [3, 3, 3, 0, 0]]
    np.testing.assert_array_equal(layout.until, until)
    np.testing.assert_array_equal(positions, [range(5)] * 3)
    assert layout.pairs == visible_pairs(np.array(until))[0].sum()


def test_valid_positions():
    """A token that does not see itself is padding, wherever it lies; a decode slot is none."""
    layout = RowLayout(jnp.array([[6, 0, 3, 6, 6, 6], [1, 0, 0, 0, 0, 0]]), 1)
    np.testing.assert_array_equal(
        valid_positions(layout, (2, 6)), [[1, 0, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0]]
    )
    keys = jnp.zeros((1, 2, 4, 2, 8))
    given = tiny.empty_cache((keys, keys), jnp.array([4, 1]), 3, 5)
    assert np.all(valid_positions(given.layout, (2, 3)))


def test_what_a_layout_needs_is_named():
    cfg, q = tiny.decoder().cfg, jnp.zeros((2, 4, 4, 8))
    layout, _ = prompt_rows(jnp.zeros((2, 4), jnp.int32), jnp.array([4, 4]))
    with pytest.raises(ValueError, match="RowLayout needs keys and values"):
        attend(q, None, layout, None, cfg)
    keys = jnp.zeros((1, 2, 4, 4, 8))
    decode = tiny.empty_cache((keys, keys), jnp.array([4, 1]), 4, 5).layout
    with pytest.raises(ValueError, match="DecodeLayout needs a cache"):
        attend(q, (q, q), decode, None, cfg)


def test_platform_chooses():
    assert attention_of(tiny.mesh()) == "blocks"
    for name, device in [
        ("flash", {"platform": "tpu"}),
        ("triton", {"platform": "gpu", "compute_capability": "8.0"}),
        ("triton", {"platform": "gpu", "compute_capability": "12.0"}),
        ("wide_blocks", {"platform": "gpu", "compute_capability": "7.5"}),
        ("wide_blocks", {"platform": "gpu", "compute_capability": "gfx942"}),
    ]:
        devices = np.array([types.SimpleNamespace(**device)])
        assert attention_of(types.SimpleNamespace(devices=devices)) == name
        cfg = dataclasses.replace(tiny.decoder().cfg, attention=name)
        assert cfg.reads_pages == (name == "flash")


@pytest.mark.wide
@pytest.mark.parametrize(
    ("kernel", "remat", "kv_heads", "mesh"),
    [
        ("wide_blocks", "block", 2, {"fsdp": 2, "tensor": 2}),
        pytest.param("flash", "block", 2, None, marks=pytest.mark.slow),
        pytest.param("flash", "none", 2, None, marks=pytest.mark.slow),
        pytest.param("flash", "block", 2, {"fsdp": 2, "tensor": 2}, marks=pytest.mark.slow),
        pytest.param("flash", "dots", 1, {"fsdp": 2, "tensor": 2}, marks=pytest.mark.slow),
        pytest.param("triton", "block", 2, None, marks=pytest.mark.slow),
        pytest.param("triton", "dots", 2, {"fsdp": 2, "tensor": 2}, marks=pytest.mark.slow),
    ],
)
def test_every_kernel_gives_the_decoder_the_same_gradients(kernel, remat, kv_heads, mesh):
    """Layers scanned and rematerialised, split over a mesh or not; two rows of one group."""
    cfg = dataclasses.replace(tiny.decoder(remat).cfg, n_kv_heads=kv_heads)
    params = init_params(cfg, jax.random.key(0))
    ids = np.random.default_rng(1).integers(0, cfg.vocab_size, (2, 47), np.int32)
    lengths = np.array([20, 11], np.int32), np.array([[9, 1, 4], [2, 0, 9]], np.int32)
    responses = ids[:, 20:].reshape(2, 3, 9)
    batch = ResponseBatch(ids[:, :20], lengths[0], responses, lengths[1])
    rows = tiny.packed(batch, rows=2)
    tokens, layout = rows.tokens(batch), rows.layout
    weight = jnp.where(layout.valid[..., None], normal(0, *tokens.shape, cfg.d_model), 0)

    def gradient(name):
        decoder = Decoder(dataclasses.replace(cfg, attention=name))

        def total(params):
            hidden, _ = decoder.apply({"params": params}, tokens, rows.position, layout)
            return jnp.sum(hidden * weight)

        return jax.jit(jax.grad(total))

    if mesh is None:
        found = gradient(kernel)(params)
    else:
        with distributed.activate(made := tiny.mesh(**mesh)):
            found = gradient(kernel)(jax.device_put(params, param_shardings(cfg, made)))
    assert_close(found, gradient("blocks")(params))
