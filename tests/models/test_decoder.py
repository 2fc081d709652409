"""The decoder's layouts against each other: rows, packed groups, cached decoding; padding; remat."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from rest_jax.models.attention import prompt_rows
from rest_jax.models.config import DecoderConfig, RopeScaling
from rest_jax.models.decoder import Decoder, abstract_params, head_matrix, init_params, logits
from rest_jax.models.rope import apply_rope, frequencies, rope_tables
from rest_jax.types import ResponseBatch, response_mask
from tests import tiny

VOCAB, PAD = 61, 60
TP, TR, G = 7, 6, 3
PROMPT_LENGTH = jnp.array([4, 7, 1, 2])
RESPONSE_LENGTH = jnp.array([[6, 1, 3], [2, 6, 0], [5, 5, 5], [1, 2, 6]])
P = len(PROMPT_LENGTH)

NORMED = DecoderConfig(
    "qwen3", VOCAB, 24, 2, 6, 2, 10, 32, rope_theta=1e4, qk_norm=True, tied=True, remat="none"
)
BIASED = dataclasses.replace(
    NORMED,
    family="qwen2",
    n_kv_heads=6,
    qk_norm=False,
    qkv_bias=True,
    tied=False,
    rope_scaling=RopeScaling(8.0, 1.0, 4.0, 16),
)
EXPERTS = dataclasses.replace(
    NORMED, family="qwen3_moe", d_ff=12, n_experts=4, experts_per_token=2, norm_topk=True
)
CONFIGS = {"normed": NORMED, "biased": BIASED, "experts": EXPERTS}
KINDS = pytest.mark.parametrize(
    "kind",
    ["normed", *(pytest.param(kind, marks=pytest.mark.wide) for kind in ("biased", "experts"))],
)


@functools.cache
def make_params(cfg):
    """Large enough weights that attention is far from uniform; norms and biases away from their start."""
    rng = np.random.default_rng(0)
    shapes = nn.meta.unbox(abstract_params(cfg))
    draw = {
        True: lambda x: 1 + 0.25 * rng.normal(size=x.shape),
        False: lambda x: 0.15 * rng.normal(size=x.shape),
    }
    return jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.asarray(draw[path[-1].key == "scale"](x), jnp.float32), shapes
    )


@functools.cache
def make_batch() -> ResponseBatch:
    """Ragged groups; padding holds an id that occurs nowhere else."""
    rng = np.random.default_rng(2)
    prompt, responses = (rng.integers(0, PAD, shape) for shape in ((P, TP), (P, G, TR)))
    prompt[np.arange(TP) >= np.asarray(PROMPT_LENGTH)[:, None]] = PAD
    responses[np.arange(TR) >= np.asarray(RESPONSE_LENGTH)[..., None]] = PAD
    prompt, responses = (jnp.asarray(x, jnp.int32) for x in (prompt, responses))
    return ResponseBatch(prompt, PROMPT_LENGTH, responses, RESPONSE_LENGTH)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def grouped_hidden(cfg, params, batch, padding=PAD):
    """[P, G, Tr, D]: what predicts each response token, from two rows of two groups, which read `padding` behind them."""
    rows = tiny.packed(make_batch(), 2)
    tokens = jnp.where(rows.layout.valid, rows.tokens(batch), padding)
    hidden, _ = Decoder(cfg).apply({"params": params}, tokens, rows.position, rows.layout)
    return tiny.predicting(rows, hidden, batch)


def separate_hidden(cfg, params, batch):
    """The same from one contiguous row a response, its prompt repeated, nothing shared and no padding inside."""
    prompt, responses = np.asarray(batch.prompt), np.asarray(batch.responses)
    lengths, spoken = np.asarray(PROMPT_LENGTH), np.asarray(RESPONSE_LENGTH)
    rows = np.full((P * G, TP + TR), PAD)
    starts, ends = np.zeros(P * G, int), np.zeros(P * G, int)
    for i, (p, g) in enumerate(np.ndindex(P, G)):
        starts[i], ends[i] = lengths[p], lengths[p] + spoken[p, g]
        rows[i, : starts[i]] = prompt[p, : starts[i]]
        rows[i, starts[i] : ends[i]] = responses[p, g, : ends[i] - starts[i]]
    layout, positions = prompt_rows(jnp.asarray(rows), jnp.asarray(ends))
    hidden, _ = Decoder(cfg).apply({"params": params}, jnp.asarray(rows), positions, layout)
    picked = (starts - 1)[:, None] + np.arange(TR)
    return jnp.take_along_axis(hidden, picked[..., None], axis=1).reshape(P, G, TR, -1)


def probe_loss(hidden):
    """A non-linear scalar of the predicting states on the policy's tokens only."""
    score = jnp.sin(hidden @ normal(9, hidden.shape[-1], 5))
    return jnp.sum(jnp.where(response_mask(RESPONSE_LENGTH, TR)[..., None], score**2, 0.0))


def flat(tree):
    return [
        (jax.tree_util.keystr(path), np.asarray(x))
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    ]


def assert_relative(a, b, tolerance=1e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        scale = np.abs(np.asarray(y)).max()
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), atol=tolerance * scale, rtol=0)


@functools.cache
def grouped_gradient(cfg):
    batch = make_batch()
    run = jax.jit(jax.value_and_grad(lambda p: probe_loss(grouped_hidden(cfg, p, batch))))
    return run(make_params(cfg))


@KINDS
def test_group_equals_separate_rows(kind):
    cfg, batch = CONFIGS[kind], make_batch()
    separate = jax.jit(jax.value_and_grad(lambda p: probe_loss(separate_hidden(cfg, p, batch))))
    loss, grads = grouped_gradient(cfg)
    expected_loss, expected_grads = separate(make_params(cfg))
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    grads, expected_grads = dict(grads), dict(expected_grads)
    if not cfg.tied:  # the trunk never reads the head
        assert not np.any(grads.pop("head")) and not np.any(expected_grads.pop("head"))
    assert all(np.abs(g).max() > 1e-3 for path, g in flat(expected_grads) if "k_bias" not in path)
    assert_relative(grads, expected_grads)


@KINDS
def test_cached_decode_equals_full_forward(kind):
    cfg, batch = CONFIGS[kind], make_batch()
    params = make_params(cfg)
    apply = jax.jit(Decoder(cfg).apply, static_argnames="return_kv")
    layout, positions = prompt_rows(batch.prompt, PROMPT_LENGTH)
    hidden, kv = apply({"params": params}, batch.prompt, positions, layout, return_kv=True)
    assert kv[0].shape == (cfg.n_layers, P, TP, cfg.n_kv_heads, cfg.head_dim)
    last = jnp.take_along_axis(hidden, (PROMPT_LENGTH - 1)[:, None, None], axis=1)
    states, given = (
        [jnp.broadcast_to(last, (P, G, cfg.d_model))],
        tiny.empty_cache(kv, PROMPT_LENGTH, G, TR),
    )
    for t in range(TR - 1):
        hidden, cache = apply({"params": params}, batch.responses[:, :, t], *given)
        states.append(hidden)
        given = tiny.next_token(given, cache)
    mask = np.asarray(batch.mask)
    expected = jax.jit(lambda p: grouped_hidden(cfg, p, batch))(params)
    np.testing.assert_allclose(
        np.stack(states, axis=2)[mask], np.asarray(expected)[mask], rtol=1e-5, atol=2e-5
    )


def test_a_response_may_begin_where_another_has_ended():
    """It sees nothing of what the other has drawn in its slot, nor do those that continue see anything of it."""
    cfg, prompt, responses = NORMED, make_batch().prompt, make_batch().responses
    params = make_params(cfg)
    apply = jax.jit(Decoder(cfg).apply, static_argnames="return_kv")
    layout, positions = prompt_rows(prompt, PROMPT_LENGTH)
    _, kv = apply({"params": params}, prompt, positions, layout, return_kv=True)
    first = jnp.array([True, False, False])

    def decode(given, tokens, begun=None):
        """With the first response begun anew before that token."""
        states = []
        for t in range(tokens.shape[2]):
            if t == begun:
                keys = given.layout.keys
                keys = keys._replace(recent=keys.recent & ~first[:, None])
                layout = dataclasses.replace(given.layout, keys=keys)
                at = jnp.where(first, PROMPT_LENGTH[:, None], given.positions)
                given = given._replace(layout=layout, positions=at)
            token = tokens[:, :, t]
            hidden, cache = apply({"params": params}, token, *given)
            states.append(hidden)
            given = tiny.next_token(given, cache)
        return np.stack(states, axis=2)

    empty = tiny.empty_cache(kv, PROMPT_LENGTH, G, 5)
    plain = decode(empty, responses[:, :, :5])
    again = jnp.concatenate([responses[:, :, :2], responses[:, :, :3]], axis=2)
    tokens = jnp.where(first[:, None], again, responses[:, :, :5])
    mixed = decode(empty, tokens, begun=2)
    np.testing.assert_allclose(mixed[:, 1:], plain[:, 1:], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(mixed[:, 0, 2:], plain[:, 0, :3], rtol=1e-5, atol=1e-5)


def test_padding_changes_nothing_and_gets_no_gradient():
    cfg, batch = NORMED, make_batch()
    assert not tiny.packed(batch, 2).layout.valid[:, -1].any()

    @jax.jit
    def run(batch, padding):
        def loss(params):
            return probe_loss(grouped_hidden(cfg, params, batch, padding))

        return jax.value_and_grad(loss)(make_params(cfg))

    loss, grads = run(batch, PAD)
    assert np.all(np.asarray(grads["embed"][PAD]) == 0) and np.any(np.asarray(grads["embed"][:PAD]))
    prompt, responses = (jnp.where(x == PAD, 1, x) for x in (batch.prompt, batch.responses))
    other = run(batch.replace(prompt=prompt, responses=responses), 2)
    assert loss == other[0]
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(other[1]), strict=True):
        assert np.all(np.isfinite(a))
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("remat", ["block", pytest.param("dots", marks=pytest.mark.wide)])
def test_remat_does_not_change_the_gradient(remat):
    assert_relative(
        grouped_gradient(dataclasses.replace(NORMED, remat=remat)), grouped_gradient(NORMED)
    )


def test_bfloat16_computes_in_bfloat16_and_stays_near_float32():
    cfg, batch = NORMED, make_batch()
    half = dataclasses.replace(cfg, dtype="bfloat16")
    params = jax.tree.map(lambda x: 0.1 * x, make_params(cfg))
    a, b = (jax.jit(lambda p, c=c: grouped_hidden(c, p, batch))(params) for c in (half, cfg))
    assert a.dtype == jnp.bfloat16 and b.dtype == jnp.float32
    np.testing.assert_allclose(a.astype(jnp.float32), b, atol=0.1)
    assert logits(params, half, a).dtype == jnp.float32
    inputs = batch.prompt, *reversed(prompt_rows(batch.prompt, PROMPT_LENGTH))
    _, (k, v) = jax.eval_shape(
        lambda p: Decoder(half).apply({"params": p}, *inputs, return_kv=True), params
    )
    assert k.dtype == v.dtype == jnp.bfloat16


def test_head_and_logits():
    for cfg in (NORMED, BIASED):
        params = make_params(cfg)
        head = head_matrix(params, cfg)
        assert head is params["embed" if cfg.tied else "head"]
        hidden = normal(1, 2, 3, cfg.d_model)
        np.testing.assert_allclose(
            logits(params, cfg, hidden),
            np.asarray(hidden) @ np.asarray(head).T,
            rtol=1e-5,
            atol=1e-5,
        )


def test_every_parameter_names_its_axes():
    boxed = abstract_params(BIASED)
    leaves = jax.tree.leaves(boxed, is_leaf=lambda x: hasattr(x, "names"))
    assert leaves and all(len(leaf.names) == leaf.value.ndim for leaf in leaves)
    plain = jax.eval_shape(lambda: init_params(BIASED, jax.random.key(0)))
    assert all(
        type(x) is jax.ShapeDtypeStruct and x.dtype == jnp.float32 for x in jax.tree.leaves(plain)
    )


def test_llama_scaling_stretches_long_waves_only():
    scaling = RopeScaling(8.0, 1.0, 4.0, 8192)
    plain, scaled = frequencies(128, 5e5, None), frequencies(128, 5e5, scaling)
    wavelength = 2 * np.pi / plain
    np.testing.assert_array_equal(scaled[wavelength < 8192 / 4], plain[wavelength < 8192 / 4])
    np.testing.assert_allclose(scaled[wavelength > 8192], plain[wavelength > 8192] / 8, rtol=1e-6)
    between = (wavelength > 8192 / 4) & (wavelength < 8192)
    assert between.any() and np.all((scaled < plain)[between] & (scaled > plain / 8)[between])


def test_rope_depends_on_relative_positions_only():
    """Scores of a rotated pair are the same at (3, 1) and at (1003, 1001)."""
    q, k = normal(0, 2, 1, 2, 1, 16)

    def score(shift):
        rope = rope_tables(jnp.array([[3, 1]]) + shift, 16, 1e4, None)
        return jnp.sum(apply_rope(q, rope)[0, 0] * apply_rope(k, rope)[0, 1])

    np.testing.assert_allclose(score(0), score(1000), rtol=1e-4)
    assert abs(score(0) - jnp.sum(q[0, 0] * k[0, 1])) > 1e-2


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"n_kv_heads": 4}, "n_heads 6 is not a multiple of n_kv_heads 4"),
        ({"head_dim": 9}, "head_dim 9 is odd"),
        ({"remat": "some"}, "remat 'some' is none of none, dots, block"),
    ],
)
def test_impossible_configs_are_named(change, named):
    with pytest.raises(ValueError, match=named):
        dataclasses.replace(NORMED, **change)


def test_decoding_without_a_cache_is_named():
    empty = jnp.zeros((1, P, TP, 2, 10))
    given = tiny.empty_cache((empty, empty), PROMPT_LENGTH, G, 2)
    token = jnp.zeros((P, G), jnp.int32)
    with pytest.raises(ValueError, match="DecodeLayout needs a cache"):
        jax.eval_shape(
            lambda p: Decoder(NORMED).apply({"params": p}, token, given.positions, given.layout),
            make_params(NORMED),
        )


@pytest.mark.wide
def test_gradients_of_matrices_are_not_rounded_to_the_compute_dtype():
    """They are added up over devices in float32: a share that was rounded to bfloat16 before would equal itself rounded."""
    cfg = dataclasses.replace(tiny.decoder().cfg, dtype="bfloat16", qkv_bias=True)
    decoder = Decoder(cfg)
    params = init_params(cfg, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, cfg.vocab_size)
    layout, positions = prompt_rows(tokens, jnp.array([9, 7]))
    slope = jax.random.normal(jax.random.key(2), (2, 9, cfg.d_model))

    def loss(params):
        hidden, _ = decoder.apply({"params": params}, tokens, positions, layout)
        return jnp.sum(hidden.astype(jnp.float32) * slope)

    blocks = jax.grad(loss)(params)["blocks"]
    matrices = [
        *blocks["mlp"].values(),
        *(blocks["attention"][n] for n in ("q", "v", "o", "q_bias")),
    ]
    for gradient in matrices:
        assert gradient.dtype == jnp.float32
        rounded = gradient.astype(jnp.bfloat16).astype(jnp.float32)
        assert float(jnp.mean(rounded == gradient)) < 0.2
    decoder = Decoder(dataclasses.replace(cfg, dtype="float32"))
    exact = jax.grad(loss)(params)["blocks"]["mlp"]["down"]
    error = jnp.linalg.norm(blocks["mlp"]["down"] - exact) / jnp.linalg.norm(exact)
    assert float(error) < 0.05
