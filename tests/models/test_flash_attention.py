"""The kernels, interpreted, against dense attention in float32 and against the blocked attention of the CPU path."""

import dataclasses
import functools
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import types

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from rest_jax import distributed
from rest_jax.config import MeshConfig
from rest_jax.models import attention, flash_attention
from rest_jax.models.attention import ATTENTION, pack_group, prompt_rows, valid_positions
from rest_jax.models.cache import GroupLayout
from rest_jax.models.decoder import Decoder, init_params, param_shardings
from rest_jax.models.policy import attention_of
from tests import tiny

HIGHEST = jax.lax.Precision.HIGHEST


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def make_inputs(batch, time, heads, kv_heads, width=32):
    """q, k, v, and a weight of every output, padding included."""
    counts = (heads, kv_heads, kv_heads, heads)
    return tuple(normal(i, batch, time, n, width) for i, n in enumerate(counts))


def packed_row(width, groups):
    """`until` of a row of groups, each (prompt, its width, [responses], their width)."""
    until = np.zeros(width, np.int32)
    start = 0
    for prompt, prompt_width, responses, response_width in groups:
        end = start + prompt_width + len(responses) * response_width
        until[start : start + prompt] = end
        for i, length in enumerate(responses):
            first = start + prompt_width + i * response_width
            until[first : first + length] = first + length
        start = end
    assert start <= width
    return until


# two groups with an empty response, then padding; a single short prompt; nothing; one that fills the row
PACKED = np.stack(
    [
        packed_row(300, [(70, 75, [40, 0, 17], 40), (5, 5, [31, 9], 31)]),
        packed_row(300, [(11, 11, [], 0)]),
        packed_row(300, []),
        packed_row(300, [(130, 130, [85, 85], 85)]),
    ]
)


def visible_pairs(until):
    """bool `[B T T]`, by the definition."""
    query, key = np.arange(until.shape[1])[:, None], np.arange(until.shape[1])
    valid = until > key
    return (key <= query) & (query < until[:, None]) & valid[:, :, None]


def dense(q, k, v, until):
    """With all scores, in float32."""
    repeats = q.shape[2] // k.shape[2]
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    k, v = (jnp.repeat(x, repeats, axis=2) for x in (k, v))
    seen = visible_pairs(until)[:, None]
    score = jnp.einsum("bqnh,bknh->bnqk", q, k, precision=HIGHEST) * q.shape[-1] ** -0.5
    weight = jnp.where(seen, jax.nn.softmax(jnp.where(seen, score, -1e30), axis=-1), 0)
    return jnp.einsum("bnqk,bknh->bqnh", weight, v, precision=HIGHEST)


def value_and_gradients(attend, q, k, v, weight):
    """Outputs, and the gradients of their weighted sum."""

    def total(q, k, v):
        out = attend(q, k, v)
        return jnp.sum(out.astype(jnp.float32) * weight), out

    (_, out), gradients = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(q, k, v)
    return out, *gradients


def assert_close(found, expected, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        scale = max(np.max(np.abs(b)), 1)
        np.testing.assert_allclose(a, b, atol=tolerance * scale, rtol=0)


@pytest.mark.parametrize(
    ("heads", "kv_heads"),
    [
        (4, 2),
        *(pytest.param(*n, marks=pytest.mark.slow) for n in [(2, 2), (4, 1), (6, 2), (16, 1)]),
    ],
)
def test_packed_rows_equal_dense_attention(heads, kv_heads):
    """Padding, of which every output has a gradient here, is zero in value and gradients."""
    inputs = make_inputs(*PACKED.shape, heads, kv_heads)
    found = value_and_gradients(
        lambda *x: flash_attention.flash_attention(*x, jnp.asarray(PACKED), 1), *inputs
    )
    assert_close(found, value_and_gradients(functools.partial(dense, until=PACKED), *inputs))
    padding = np.arange(PACKED.shape[1]) >= PACKED
    assert all(np.all(np.asarray(x)[padding] == 0) for x in found)


@pytest.mark.slow
@pytest.mark.parametrize("time", [1, 128, 513, 1500])
def test_rows_of_any_length(time):
    """Blocks of 128 to 512 positions, queries and keys of different ones."""
    half = time // 2
    until = np.stack([packed_row(time, [(time - half, time - half, [half], half)])] * 2)
    inputs = make_inputs(2, time, 8, 2)
    found = value_and_gradients(
        lambda *x: flash_attention.flash_attention(*x, jnp.asarray(until), 1), *inputs
    )
    assert_close(found, value_and_gradients(functools.partial(dense, until=until), *inputs))


@pytest.mark.slow
def test_bfloat16():
    """Products of rounded numbers, sums in float32."""
    *inputs, weight = make_inputs(*PACKED.shape, 4, 2)
    inputs = [x.astype(jnp.bfloat16) for x in inputs]
    found = value_and_gradients(
        lambda *x: flash_attention.flash_attention(*x, jnp.asarray(PACKED), 1), *inputs, weight
    )
    assert all(x.dtype == jnp.bfloat16 for x in found)
    expected = value_and_gradients(functools.partial(dense, until=PACKED), *inputs, weight)
    assert_close(found, expected, tolerance=2e-2)


@pytest.mark.slow
def test_huge_scores_stay_finite():
    q, k, v, weight = make_inputs(*PACKED.shape, 2, 1)
    found = value_and_gradients(
        lambda *x: flash_attention.flash_attention(*x, jnp.asarray(PACKED), 1),
        1e4 * q, 1e4 * k, v, weight,
    )  # fmt: skip
    assert all(np.all(np.isfinite(x)) for x in found)


def make_layout(kind) -> attention.Layout:
    """Ragged, with an empty response and an empty group."""
    prompt_length = jnp.array([100, 37, 64, 1])
    if kind == "prompts":
        return prompt_rows(jnp.zeros((4, 140), jnp.int32), prompt_length)[0]
    length = jnp.array([[60, 3, 0], [1, 60, 59], [0, 0, 0], [60, 60, 60]])
    tokens = jnp.zeros((4, 100), jnp.int32), jnp.zeros((4, 3, 60), jnp.int32)
    return pack_group(tokens[0], prompt_length, tokens[1], length)[2]


@pytest.mark.parametrize(
    ("kind", "kv_heads"), [("groups", 1), pytest.param("prompts", 4, marks=pytest.mark.slow)]
)
def test_layouts_equal_blocked_attention(kind, kv_heads):
    layout = make_layout(kind)
    time = 280 if kind == "groups" else 140
    q, k, v, weight = make_inputs(4, time, 4, kv_heads)
    # what the prompt of an empty group attends to is nothing that anybody reads
    valid = valid_positions(layout, (4, time))
    weight = jnp.where(valid[..., None, None], weight, 0)

    def run(name):
        def attend(q, k, v):
            out = ATTENTION[name](q, (k, v), layout, None, HIGHEST)
            return jnp.where(valid[..., None, None], out, 0)

        return value_and_gradients(attend, q, k, v, weight)

    assert_close(run("flash"), run("blocks"))


@pytest.mark.parametrize(
    ("heads", "kv_heads"), [(4, 1), pytest.param(4, 2, marks=pytest.mark.slow)]
)
def test_over_a_mesh(heads, kv_heads):
    """Rows over fsdp, heads over tensor; a single kv head is on both devices of it."""
    mesh = distributed.make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
    inputs = make_inputs(*PACKED.shape, heads, kv_heads)
    with distributed.activate(mesh):
        assert flash_attention.fits(inputs[0], inputs[1])
        found = value_and_gradients(
            lambda *x: flash_attention.flash_attention(*x, jnp.asarray(PACKED), 1),
            *(jax.device_put(x, distributed.batch_sharding(mesh)) for x in inputs),
        )
    assert_close(found, value_and_gradients(functools.partial(dense, until=PACKED), *inputs))


def test_what_a_mesh_does_not_divide_is_attended_in_blocks():
    mesh = distributed.make_mesh(MeshConfig(fsdp=2, tensor=4), jax.devices()[:8])
    layout = prompt_rows(jnp.zeros((3, 20), jnp.int32), jnp.array([20, 7, 1]))[0]
    with distributed.activate(mesh):
        sizes = [(2, 4, 1), (2, 4, 2), (2, 8, 4), (3, 4, 4), (2, 6, 3), (2, 2, 1)]
        found = [flash_attention.fits(*make_inputs(b, 20, n, k, 8)[:2]) for b, n, k in sizes]
        assert found == [True] * 3 + [False] * 3
        q, k, v, _ = make_inputs(3, 20, 4, 4)
        found = ATTENTION["flash"](q, (k, v), layout, None, HIGHEST)
    expected = ATTENTION["blocks"](q, (k, v), layout, None, HIGHEST)
    np.testing.assert_allclose(found, expected, atol=1e-6)


@st.composite
def rows(draw):
    """A row of 512 with any groups, padding between and behind them."""
    groups, used = [], 0
    while used < 512 and draw(st.integers(0, 5)):
        prompt = draw(st.integers(1, 512 - used))
        prompt_width = draw(st.integers(prompt, 512 - used))
        count, width = draw(st.integers(0, 4)), draw(st.integers(1, 200))
        count = min(count, (512 - used - prompt_width) // width)
        lengths = draw(st.lists(st.integers(0, width), min_size=count, max_size=count))
        groups.append((prompt, prompt_width, lengths, width))
        used += prompt_width + count * width
    return packed_row(512, groups)


def visit_set(until, case, by_key):
    visits = flash_attention._list_visits(
        flash_attention._visited_blocks(jnp.asarray(until), case), by_key
    )
    query, key, count = map(np.asarray, visits)
    return [list(zip(query[b, :n], key[b, :n], strict=True)) for b, n in enumerate(count)], visits


@hypothesis.given(st.lists(rows(), min_size=2, max_size=2))
@hypothesis.settings(max_examples=25)
def test_visits_hide_no_visible_pair(tables):
    until = np.stack(tables)
    seen = visible_pairs(until)
    for queries, keys in [(256, 128), (128, 256)]:
        case = flash_attention._Case(queries, keys, 1, HIGHEST)
        blocks = seen.reshape(2, 512 // queries, queries, 512 // keys, keys).any((2, 4))
        for by_key in (False, True):
            found, visits = visit_set(until, case, by_key)
            for b, pairs in enumerate(found):
                assert set(pairs) >= set(zip(*np.nonzero(blocks[b]), strict=True))
                assert pairs == sorted(pairs, key=lambda p: p[::-1] if by_key else p)
                assert len(set(pairs)) == len(pairs)
                # every output is written, and what is behind the list loads nothing
                assert {q for q, _ in pairs} == set(range(512 // queries))
                assert {k for _, k in pairs} == set(range(512 // keys))
                rest = np.stack([visits.query[b], visits.key[b]], axis=1)[len(pairs) :]
                assert np.all(rest == pairs[-1])


def test_blocks_that_nobody_sees_are_not_visited():
    """Two groups, each a prompt of a block and four responses of a block: a response sees its prompt and itself. Of padding the
    diagonal is visited, which writes its zeros.
    """
    group = (128, 128, [128] * 4, 128)
    until = np.stack([packed_row(1408, [group, group]), packed_row(1408, [])])
    case = flash_attention._Case(128, 128, 1, HIGHEST)
    (first, second), _ = visit_set(until, case, by_key=False)
    own = [(n, n) for n in range(11)]
    shared = [(n, n // 5 * 5) for n in range(10) if n % 5]
    assert sorted(first) == sorted(own + shared) and second == own


def test_lists_hold_a_causal_row():
    """Where nothing is left out, they are as long as they may be."""
    until = np.full((1, 1024), 1024, np.int32)
    for queries, keys in [(128, 128), (512, 128), (128, 256)]:
        case = flash_attention._Case(queries, keys, 1, HIGHEST)
        blocks = visible_pairs(until).reshape(1024 // queries, queries, 1024 // keys, keys)
        for by_key in (False, True):
            (found,), visits = visit_set(until, case, by_key)
            assert len(found) == visits.query.shape[1] == blocks.any((1, 3)).sum()


def test_pairs_of_a_full_row():
    """What the compiler is told equals the pairs of the mask."""
    full = GroupLayout(jnp.array([6]), jnp.array([[4, 4, 4]]), 6, 3, 4)
    prompt = prompt_rows(jnp.zeros((1, 9), jnp.int32), jnp.array([9]))[0]
    for layout, width in [(full, 18), (prompt, 9)]:
        until, pairs = attention.seen_until(layout, width)
        assert pairs == visible_pairs(np.asarray(until)).sum()


def test_platform_chooses():
    assert attention_of(tiny.mesh()) == "blocks"
    for platform, name in [("tpu", "flash"), ("cuda", "blocks")]:
        devices = np.array([types.SimpleNamespace(platform=platform)])
        assert attention_of(types.SimpleNamespace(devices=devices)) == name


@pytest.mark.parametrize(
    ("remat", "kv_heads", "mesh"),
    [
        pytest.param("block", 2, None, marks=pytest.mark.slow),
        pytest.param("none", 2, None, marks=pytest.mark.slow),
        pytest.param("block", 2, {"fsdp": 2, "tensor": 2}, marks=pytest.mark.slow),
        pytest.param("dots", 1, {"fsdp": 2, "tensor": 2}, marks=pytest.mark.slow),
    ],
)
def test_decoder_gives_the_same_gradients(remat, kv_heads, mesh):
    """Layers scanned and rematerialised, split over a mesh or not."""
    cfg = dataclasses.replace(tiny.decoder(remat).cfg, n_kv_heads=kv_heads)
    params = init_params(cfg, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 47), 0, cfg.vocab_size)
    lengths = jnp.array([20, 11]), jnp.array([[9, 1, 4], [2, 0, 9]])
    packed = pack_group(tokens[:, :20], lengths[0], tokens[:, 20:].reshape(2, 3, 9), lengths[1])
    valid = valid_positions(packed[2], packed[0].shape)
    weight = jnp.where(valid[..., None], normal(0, *valid.shape, cfg.d_model), 0)

    def gradient(name):
        decoder = Decoder(dataclasses.replace(cfg, attention=name))

        def total(params):
            return jnp.sum(decoder.apply({"params": params}, *packed)[0] * weight)

        return jax.jit(jax.grad(total))

    if mesh is None:
        found = gradient("flash")(params)
    else:
        made = tiny.mesh(**mesh)
        with distributed.activate(made):
            found = gradient("flash")(jax.device_put(params, param_shardings(cfg, made)))
    assert_close(found, gradient("blocks")(params))


@pytest.mark.aot
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is missing")
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1"])
def test_kernels_compile_for_tpus(topology):
    """Forward and backward, under fsdp 2 x tensor 2: three kernels each, and no array of all scores."""
    program = pathlib.Path(__file__).parent.parent / "programs" / "compiles_flash_attention.py"
    environment = os.environ | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1"}
    done = subprocess.run(
        [sys.executable, program, topology], env=environment, stdout=subprocess.PIPE, check=True
    )
    for found in json.loads(done.stdout):
        assert found["kernels"] == 3
        assert found["temporaries"] < 0.05 * found["scores"]
