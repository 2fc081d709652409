"""The decoder's layouts against each other: rows, packed groups, cached decoding; padding; remat."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from rest_jax.models.attention import (
    attend,
    pack_group,
    predicting_hidden,
    prompt_rows,
    split_group,
)
from rest_jax.models.cache import PromptLayout
from rest_jax.models.config import DecoderConfig, RopeScaling
from rest_jax.models.decoder import Decoder, abstract_params, head_matrix, init_params, logits
from rest_jax.models.rope import apply_rope, frequencies, rope_tables
from rest_jax.types import response_mask
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


def make_batch():
    """Ragged groups; padding holds an id that occurs nowhere else."""
    rng = np.random.default_rng(2)
    prompt, responses = (rng.integers(0, PAD, shape) for shape in ((P, TP), (P, G, TR)))
    prompt[np.arange(TP) >= np.asarray(PROMPT_LENGTH)[:, None]] = PAD
    responses[np.arange(TR) >= np.asarray(RESPONSE_LENGTH)[..., None]] = PAD
    return jnp.asarray(prompt, jnp.int32), jnp.asarray(responses, jnp.int32)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def grouped_hidden(cfg, params, prompt, responses):
    """[P, G, Tr, D]: what predicts each response token, in the packed layout."""
    group = prompt, PROMPT_LENGTH, responses, RESPONSE_LENGTH
    tokens, positions, layout = pack_group(*group)
    hidden, _ = Decoder(cfg).apply({"params": params}, tokens, positions, layout)
    return predicting_hidden(hidden, layout)


def separate_hidden(cfg, params, prompt, responses):
    """The same from one contiguous row a response, its prompt repeated, nothing shared and no padding inside."""
    prompt, responses = np.asarray(prompt), np.asarray(responses)
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
    prompt, responses = make_batch()
    run = jax.jit(
        jax.value_and_grad(lambda p: probe_loss(grouped_hidden(cfg, p, prompt, responses)))
    )
    return run(make_params(cfg))


@pytest.mark.parametrize("kind", CONFIGS)
def test_group_equals_separate_rows(kind):
    cfg, (prompt, responses) = CONFIGS[kind], make_batch()
    separate = jax.jit(
        jax.value_and_grad(lambda p: probe_loss(separate_hidden(cfg, p, prompt, responses)))
    )
    loss, grads = grouped_gradient(cfg)
    expected_loss, expected_grads = separate(make_params(cfg))
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    grads, expected_grads = dict(grads), dict(expected_grads)
    if not cfg.tied:  # the trunk never reads the head
        assert not np.any(grads.pop("head")) and not np.any(expected_grads.pop("head"))
    assert all(np.abs(g).max() > 1e-3 for path, g in flat(expected_grads) if "k_bias" not in path)
    assert_relative(grads, expected_grads)


@pytest.mark.parametrize("kind", CONFIGS)
def test_cached_decode_equals_full_forward(kind):
    cfg, (prompt, responses) = CONFIGS[kind], make_batch()
    params = make_params(cfg)
    apply = jax.jit(Decoder(cfg).apply, static_argnames="return_kv")
    layout, positions = prompt_rows(prompt, PROMPT_LENGTH)
    hidden, kv = apply({"params": params}, prompt, positions, layout, return_kv=True)
    assert kv[0].shape == (cfg.n_layers, P, TP, cfg.n_kv_heads, cfg.head_dim)
    last = jnp.take_along_axis(hidden, (PROMPT_LENGTH - 1)[:, None, None], axis=1)
    states, cache = (
        [jnp.broadcast_to(last, (P, G, cfg.d_model))],
        tiny.empty_cache(kv, PROMPT_LENGTH, G, TR),
    )
    for t in range(TR - 1):
        hidden, cache = apply(
            {"params": params}, responses[:, :, t], cache.positions, cache.layout, cache
        )
        states.append(hidden)
    assert np.all(cache.index == TR - 1)
    mask = np.asarray(response_mask(RESPONSE_LENGTH, TR))
    expected = jax.jit(lambda p: grouped_hidden(cfg, p, prompt, responses))(params)
    np.testing.assert_allclose(
        np.stack(states, axis=2)[mask], np.asarray(expected)[mask], rtol=1e-5, atol=2e-5
    )


def test_rows_may_be_at_different_positions_in_the_cache():
    """A row's result depends on its own index only; writes beyond the last position are dropped."""
    cfg, (prompt, responses) = NORMED, make_batch()
    params = make_params(cfg)
    apply = jax.jit(Decoder(cfg).apply, static_argnames="return_kv")
    layout, positions = prompt_rows(prompt, PROMPT_LENGTH)
    _, kv = apply({"params": params}, prompt, positions, layout, return_kv=True)
    even = tiny.empty_cache(kv, PROMPT_LENGTH, G, 4)
    for t in range(2):
        _, even = apply({"params": params}, responses[:, :, t], even.positions, even.layout, even)
    late = even
    for t in range(2, 4):
        before, late = apply(
            {"params": params}, responses[:, :, t], late.positions, late.layout, late
        )
    # rewinding some rows by two positions leaves stale keys there, which must not be seen
    behind = jnp.array([[True, False, False]])
    mixed = dataclasses.replace(late, index=jnp.where(behind, 2, 3 + 0 * late.index))
    token = jnp.where(behind, responses[:, :, 2], responses[:, :, 3])
    hidden, after = apply({"params": params}, token, mixed.positions, mixed.layout, mixed)
    alone, _ = apply({"params": params}, responses[:, :, 2], even.positions, even.layout, even)
    np.testing.assert_allclose(hidden[:, 0], alone[:, 0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(hidden[:, 1:], before[:, 1:], rtol=1e-5, atol=1e-5)
    full = late.append(kv[0][:, :, :G] + 1, kv[1][:, :, :G] + 1)
    np.testing.assert_array_equal(full.response_k, late.response_k)
    assert np.all(after.index == mixed.index + 1)


def test_padding_changes_nothing_and_gets_no_gradient():
    cfg, (prompt, responses) = NORMED, make_batch()
    params = make_params(cfg)

    @jax.jit
    def run(prompt, responses):
        return jax.value_and_grad(lambda p: probe_loss(grouped_hidden(cfg, p, prompt, responses)))(
            params
        )

    loss, grads = run(prompt, responses)
    assert np.all(np.asarray(grads["embed"][PAD]) == 0) and np.any(np.asarray(grads["embed"][:PAD]))
    other = run(jnp.where(prompt == PAD, 0, prompt), jnp.where(responses == PAD, 1, responses))
    assert loss == other[0]
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(other[1]), strict=True):
        assert np.all(np.isfinite(a))
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["rows", "groups"])
def test_attention_of_padding_is_zero_in_value_and_gradient(kind):
    prompt, responses = make_batch()
    if kind == "rows":
        layout, _ = prompt_rows(prompt, PROMPT_LENGTH)
        valid = response_mask(PROMPT_LENGTH, TP)
    else:
        *_, layout = pack_group(prompt, PROMPT_LENGTH, responses, RESPONSE_LENGTH)
        spoken = response_mask(RESPONSE_LENGTH, TR).reshape(P, -1)
        valid = jnp.concatenate([response_mask(PROMPT_LENGTH, TP), spoken], axis=1)
    q = normal(0, *valid.shape, 4, 6)
    k, v = normal(1, *valid.shape, 2, 6), normal(2, *valid.shape, 2, 6)

    def total(q, k, v):
        out = attend(q, (k, v), layout, None, jax.lax.Precision.HIGHEST)
        return jnp.sum(jnp.sin(out)), out  # padded outputs get a gradient of one each

    run = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))
    (_, out), grads = run(q, k, v)
    assert np.all(np.asarray(out)[~np.asarray(valid)] == 0)
    for grad in grads:
        assert np.any(grad)
        assert np.all(np.asarray(grad)[~np.asarray(valid)] == 0)
        assert np.all(np.isfinite(grad))


def test_rows_attend_causally_up_to_their_length():
    """NumPy oracle, grouped queries included."""
    length = np.array([5, 4])
    q, k, v = (np.asarray(normal(i, 2, 6, heads, 8)) for i, heads in enumerate((4, 2, 2)))
    expected = np.zeros_like(q)
    for b, t, n in np.ndindex(2, 6, 4):
        if t < length[b]:
            weight = np.exp(k[b, : t + 1, n // 2] @ q[b, t, n] / np.sqrt(8))
            expected[b, t, n] = weight / weight.sum() @ v[b, : t + 1, n // 2]
    layout = PromptLayout(jnp.asarray(length))
    run = jax.jit(lambda q, k, v: attend(q, (k, v), layout, None, jax.lax.Precision.HIGHEST))
    out = run(q, k, v)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def test_attention_survives_huge_scores():
    prompt, responses = make_batch()
    *_, layout = pack_group(prompt, PROMPT_LENGTH, responses, RESPONSE_LENGTH)
    q = 1e4 * normal(0, P, TP + G * TR, 2, 4)
    run = jax.value_and_grad(
        lambda x: jnp.sum(attend(x, (x, x), layout, None, jax.lax.Precision.HIGHEST))
    )
    out, grad = jax.jit(run)(q)
    assert np.isfinite(out) and np.all(np.isfinite(grad))


def test_group_never_builds_a_mask_over_the_packed_row():
    """The largest intermediate grows with G, not G^2."""
    cfg = dataclasses.replace(NORMED, n_layers=1)
    params = jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))

    def biggest(group_size):
        prompt, responses = jnp.zeros((1, 16), int), jnp.zeros((1, group_size, 16), int)
        length, spoken = jnp.full(1, 16), jnp.full((1, group_size), 16)

        def run(p):
            packed = pack_group(prompt, length, responses, spoken)
            return Decoder(cfg).apply({"params": p}, *packed)[0]

        return max(size_of(jax.make_jaxpr(run)(params).jaxpr))

    def size_of(jaxpr):
        for eqn in jaxpr.eqns:
            yield from (int(np.prod(v.aval.shape)) for v in eqn.outvars)
            for value in eqn.params.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    yield from size_of(inner)

    assert biggest(32) < 2.2 * biggest(16)


@pytest.mark.parametrize("remat", ["block", "dots"])
def test_remat_does_not_change_the_gradient(remat):
    assert_relative(
        grouped_gradient(dataclasses.replace(NORMED, remat=remat)), grouped_gradient(NORMED)
    )


def test_bfloat16_computes_in_bfloat16_and_stays_near_float32():
    cfg, (prompt, responses) = NORMED, make_batch()
    half = dataclasses.replace(cfg, dtype="bfloat16")
    params = jax.tree.map(lambda x: 0.1 * x, make_params(cfg))
    a, b = (
        jax.jit(lambda p, c=c: grouped_hidden(c, p, prompt, responses))(params) for c in (half, cfg)
    )
    assert a.dtype == jnp.bfloat16 and b.dtype == jnp.float32
    np.testing.assert_allclose(a.astype(jnp.float32), b, atol=0.1)
    assert logits(params, half, a).dtype == jnp.float32
    layout, positions = prompt_rows(prompt, PROMPT_LENGTH)
    _, (k, v) = jax.eval_shape(
        lambda p: Decoder(half).apply({"params": p}, prompt, positions, layout, return_kv=True),
        params,
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


def test_packing_and_splitting():
    prompt, responses = make_batch()
    group = prompt, PROMPT_LENGTH, responses, RESPONSE_LENGTH
    tokens, positions, layout = pack_group(*group)
    back = split_group(tokens, layout)
    np.testing.assert_array_equal(back[0], prompt)
    np.testing.assert_array_equal(back[1], responses)
    own = split_group(positions, layout)[1]
    np.testing.assert_array_equal(own[0, 2], 4 + np.arange(TR))
    assert tokens.dtype == positions.dtype == jnp.int32


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
        ({"remat": "some"}, "remat 'some'"),
    ],
)
def test_impossible_configs_are_named(change, named):
    with pytest.raises(ValueError, match=named):
        dataclasses.replace(NORMED, **change)


def test_decoding_without_a_cache_is_named():
    empty = jnp.zeros((1, P, TP, 2, 10))
    cache = tiny.empty_cache((empty, empty), PROMPT_LENGTH, G, 2)
    token = jnp.zeros((P, G), jnp.int32)
    with pytest.raises(ValueError, match="DecodeLayout needs a cache"):
        jax.eval_shape(
            lambda p: Decoder(NORMED).apply({"params": p}, token, cache.positions, cache.layout),
            make_params(NORMED),
        )


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
