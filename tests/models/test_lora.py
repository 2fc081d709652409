"""Adapters in the decoder against merged weights and the chain rule, and which matrices may have them."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from rest_jax.config import LoraConfig
from rest_jax.distributed import activate
from rest_jax.errors import UserError
from rest_jax.models.cache import RowLayout
from rest_jax.models.config import Lora
from rest_jax.models.decoder import (
    Decoder,
    abstract_adapters,
    adapter_shardings,
    apply_routed,
    init_adapters,
    param_shardings,
    with_adapters,
)
from rest_jax.models.lora import make_lora, merge, merge_all, pair_up
from tests import tiny

ALL = ("q", "k", "v", "o", "gate", "up", "down")


def adapted(targets=ALL, experts: int = 0, **changes) -> Decoder:
    """The tiny decoder with adapters of rank 3."""
    cfg = tiny.decoder(experts=experts).cfg
    return Decoder(dataclasses.replace(cfg, lora=Lora(3, 6.0, targets), **changes))


def random_adapters(decoder: Decoder):
    """Both factors random, so that the adapters say something."""
    fresh = init_adapters(decoder.cfg, jax.random.key(1))
    leaves, tree = jax.tree.flatten(fresh)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    return tree.unflatten(
        0.2 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)
    )


@functools.partial(jax.jit, static_argnums=0)
def hidden(decoder: Decoder, params):
    tokens = jnp.arange(24).reshape(2, 12) % tiny.VOCAB
    positions = jnp.broadcast_to(jnp.arange(12), tokens.shape)
    layout = RowLayout(jnp.full(tokens.shape, 12), 78)
    return apply_routed(decoder, params, tokens, positions, layout)[0]


def loss(decoder: Decoder, params):
    return jnp.sum(jnp.sin(3 * hidden(decoder, params).astype(jnp.float32)))


def merged(decoder: Decoder, params, adapters):
    """Weights with their adapters, in NumPy and float64."""

    def one(operands):
        if len(operands) == 1:
            return operands[0]
        w, a, b = (np.asarray(x, np.float64) for x in operands)
        layers = (np.tensordot(x, y, 1) for x, y in zip(a, b, strict=True))
        return jnp.asarray(w + decoder.cfg.lora.scale * np.stack(list(layers)), jnp.float32)

    return jax.tree.map(one, pair_up(params, adapters), is_leaf=lambda x: isinstance(x, tuple))


@pytest.mark.parametrize(
    "experts, targets",
    [
        (0, ("q", "down")),
        pytest.param(0, ALL, marks=pytest.mark.wide),
        pytest.param(4, ("q", "k", "v", "o"), marks=pytest.mark.wide),
    ],
    ids=str,
)
def test_a_decoder_with_adapters_is_one_of_merged_weights(experts, targets):
    decoder, params = adapted(targets, experts), tiny.params(experts)
    adapters = random_adapters(decoder)
    found = hidden(decoder, with_adapters(adapters, params))
    expected = hidden(tiny.decoder(experts=experts), merged(decoder, params, adapters))
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5)
    assert np.max(np.abs(found - hidden(decoder, params))) > 0.1


def test_fresh_adapters_are_the_base_model():
    """Without adapters it is that bit for bit; with some, XLA fuses its products otherwise."""
    decoder, params = adapted(), tiny.params()
    fresh = init_adapters(decoder.cfg, jax.random.key(0))
    base = hidden(tiny.decoder(), params)
    np.testing.assert_array_equal(hidden(decoder, params), base)
    found = hidden(decoder, with_adapters(fresh, params))
    np.testing.assert_allclose(found, base, rtol=1e-4, atol=1e-5)
    w, a, b = pair_up(params, fresh)["blocks"]["attention"]["q"]
    np.testing.assert_array_equal(merge(w, (a, b), decoder.cfg.lora.scale), w)
    a = fresh["blocks"]["attention"]["o"]["a"]
    inputs = a.shape[1] * a.shape[2]
    assert 0.5 * inputs**-0.5 < np.max(np.abs(a)) <= inputs**-0.5
    assert not np.any(np.asarray(fresh["blocks"]["mlp"]["down"]["b"]))


def test_gradients_follow_from_that_of_the_merged_matrix():
    """d A = s d W B^T and d B = s A^T d W."""
    decoder, params = adapted(), tiny.params()
    adapters, scale = random_adapters(decoder), decoder.cfg.lora.scale

    found = jax.jit(jax.grad(lambda x, p: loss(decoder, with_adapters(x, p))))(adapters, params)
    full = jax.jit(jax.grad(lambda p: loss(tiny.decoder(), p)))(merged(decoder, params, adapters))
    for part, names in (("attention", "qkvo"), ("mlp", ("gate", "up", "down"))):
        for name in names:
            pair = {key: np.asarray(x) for key, x in adapters["blocks"][part][name].items()}
            layers, rank = len(pair["a"]), pair["a"].shape[-1]
            a, b = pair["a"].reshape(layers, -1, rank), pair["b"].reshape(layers, rank, -1)
            d_w = np.asarray(full["blocks"][part][name]).reshape(layers, a.shape[1], b.shape[2])
            expected = {
                "a": scale * np.einsum("lio,lro->lir", d_w, b),
                "b": scale * np.einsum("lir,lio->lro", a, d_w),
            }
            for key, x in expected.items():
                own = np.asarray(found["blocks"][part][name][key]).reshape(x.shape)
                np.testing.assert_allclose(own, x, rtol=2e-3, atol=2e-4 * np.abs(x).max())


@pytest.mark.wide
def test_bfloat16_computes_with_float32_adapters():
    """Gradients of the masters stay float32; frozen weights kept in bfloat16 give the same bits as float32 ones."""
    decoder, params = adapted(dtype="bfloat16"), tiny.params()
    adapters = random_adapters(decoder)

    @jax.jit
    def run(adapters, frozen):
        return jax.value_and_grad(lambda x: loss(decoder, with_adapters(x, frozen)))(adapters)

    narrow = jax.tree_util.tree_map_with_path(
        lambda path, x: x if path[-1].key == "scale" else x.astype(jnp.bfloat16), params
    )
    value, gradient = run(adapters, params)
    assert {x.dtype.name for x in jax.tree.leaves(gradient)} == {"float32"}
    again, same = run(adapters, narrow)
    assert value == again
    jax.tree.map(np.testing.assert_array_equal, gradient, same)


@pytest.mark.parametrize("sizes", [{"fsdp": 2, "tensor": 2}, {"fsdp": 4, "tensor": 1}])
def test_adapters_are_split_as_their_matrices(sizes):
    """And over fsdp where the matrix's side is not."""
    decoder, mesh = adapted(), tiny.mesh(**sizes)
    found = adapter_shardings(decoder.cfg, mesh)["blocks"]
    weights = param_shardings(decoder.cfg, mesh)["blocks"]
    shapes = nn.meta.unbox(abstract_adapters(decoder.cfg))["blocks"]

    def axes(part) -> tuple:
        return part if isinstance(part, tuple) else (part,) if part else ()

    for part, names in (("attention", "qkvo"), ("mlp", ("gate", "up", "down"))):
        for name in names:
            layers, *split = weights[part][name].spec
            a, b = (tuple(found[part][name][key].spec) for key in "ab")
            assert (a[0], a[-1], b[:2]) == (layers, None, (layers, None))
            for own, side in (
                (a[1:-1], split[: len(a) - 2]),
                (b[2:], split[len(a) - 2 :]),
            ):
                joined = [axis for dimension in own for axis in axes(dimension)]
                of_matrix = [axis for dimension in side for axis in axes(dimension)]
                assert [axis for axis in joined if axis in of_matrix] == of_matrix
                assert "fsdp" in joined and len(joined) == len(set(joined))
            for key in "ab":
                shape, where = shapes[part][name][key].shape, found[part][name][key]
                assert math.prod(where.shard_shape(shape)) * mesh.shape["fsdp"] <= math.prod(shape)


@pytest.mark.wide
def test_several_devices_compute_what_one_does():
    decoder, params = adapted(remat="block"), tiny.params()
    adapters = random_adapters(decoder)

    def gradient(adapters, params):
        return jax.grad(lambda x: loss(decoder, with_adapters(x, params)))(adapters)

    expected, mesh = jax.jit(gradient)(adapters, params), tiny.mesh(fsdp=2, tensor=2)
    where = adapter_shardings(decoder.cfg, mesh), param_shardings(decoder.cfg, mesh)
    with activate(mesh):
        run = jax.jit(gradient, in_shardings=where, out_shardings=where[0])
        found = run(*jax.device_put((adapters, params), where))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4 * np.abs(y).max()),
        found,
        expected,
    )


def test_merging_is_that_of_numpy():
    decoder, params = adapted(), tiny.params()
    adapters, scale = random_adapters(decoder), decoder.cfg.lora.scale
    expected = merged(decoder, params, adapters)
    copies = jax.tree.map(jnp.copy, params)
    found = merge_all(copies, adapters, scale, (jnp.float32, jnp.float32))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), found, expected)
    q = pair_up(params, adapters)["blocks"]["attention"]["q"]
    np.testing.assert_allclose(
        merge(q[0], q[1:], scale), expected["blocks"]["attention"]["q"], atol=1e-6
    )


def test_matrices_are_chosen_by_name():
    dense, experts = tiny.decoder().cfg, tiny.decoder(experts=4).cfg
    assert make_lora(LoraConfig(), dense) is None
    assert make_lora(LoraConfig(rank=4, targets="all"), dense).targets == ALL
    assert make_lora(LoraConfig(rank=4, targets=["down", "q"]), dense).targets == (
        "q",
        "down",
    )
    assert make_lora(LoraConfig(rank=4, targets=["o"]), experts).targets == ("o",)
    with pytest.raises(UserError, match=r"gate, up, down .* are experts.*targets=\[q,k,v,o\]"):
        make_lora(LoraConfig(rank=4), experts)
