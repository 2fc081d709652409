"""Rollout weights: those of the train layout in another form, with which the same tokens are drawn."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rest_jax.distributed import activate
from rest_jax.models.config import Lora
from rest_jax.models.decoder import init_adapters, init_params, param_shardings
from rest_jax.models.lora import merge_all
from rest_jax.rollout import cast
from rest_jax.rollout.engine import RolloutSettings, make_engine
from rest_jax.rollout.scheduler import Sampler
from tests import tiny


def policy_of(shape=(1, 1, 1), experts=0, **changes):
    """What the cast reads of a policy."""
    mesh, cfg = tiny.mesh(*shape), dataclasses.replace(tiny.decoder(experts=experts).cfg, **changes)
    params = tiny.params(experts)
    if changes:
        params = jax.tree.map(lambda x: 2 * x, init_params(cfg, jax.random.key(0)))
    return types.SimpleNamespace(
        config=cfg, mesh=mesh, rollout_mesh=mesh, params=params, frozen=None
    )


def rollout(policy):
    settings = RolloutSettings(tiny.GROUP, tiny.TIME, (tiny.STOP,), tiny.PAD, tiny.FULL)
    engine = make_engine(cast.rollout_decoder(policy), settings, policy.rollout_mesh)
    sample = Sampler(engine, settings, policy.rollout_mesh)
    with activate(policy.rollout_mesh):
        weights = cast.rollout_cast(policy)(policy.params)
        return sample(weights, tiny.prompts(), jax.random.key(7), jnp.int32(0))


@pytest.mark.wide
@pytest.mark.parametrize(
    ("platform", "shape", "changes"),
    [
        ("gpu", (1, 1, 1), {}),
        pytest.param("tpu", (1, 1, 2), {}, marks=pytest.mark.slow),
        pytest.param("tpu", (1, 1, 1), {"experts": 4}, marks=pytest.mark.slow),
        pytest.param("gpu", (1, 1, 2), {"experts": 4}, marks=pytest.mark.slow),
        pytest.param("gpu", (2, 1, 2), {}, marks=pytest.mark.slow),
        pytest.param("tpu", (1, 2, 4), {"family": "qwen2", "qk_norm": False, "qkv_bias": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)  # fmt: skip
def test_joined_matrices_draw_the_same_tokens(monkeypatch, platform, shape, changes):
    policy = policy_of(shape, **changes)
    expected = rollout(policy)
    assert not cast.rollout_decoder(policy).cfg.joined
    monkeypatch.setattr(cast, "platform", lambda mesh: platform)
    cfg = cast.rollout_decoder(policy).cfg
    assert cfg.joined == shape[2] and (cfg.layers == "scan") == (platform == "tpu")
    found = rollout(policy)
    np.testing.assert_array_equal(found.responses, expected.responses)
    np.testing.assert_allclose(found.logp, expected.logp, atol=1e-5)


def test_a_tensor_axis_that_divides_no_kv_heads_leaves_them_apart(monkeypatch):
    monkeypatch.setattr(cast, "platform", lambda mesh: "gpu")
    assert cast.rollout_decoder(policy_of((1, 1, 4))).cfg.joined == 4
    assert cast.rollout_decoder(policy_of((1, 1, 8))).cfg.joined == 0  # of four kv heads


@pytest.mark.parametrize(
    ("tensor", "experts"),
    [(2, 0), *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in [(1, 0), (1, 4), (2, 4)])],
)
def test_joined_matrices_lie_where_their_products_are(monkeypatch, tensor, experts):
    """The shard of a device has the columns that it has of each of them apart, and the sharding is that of `param_shardings`."""
    monkeypatch.setattr(cast, "platform", lambda mesh: "tpu")
    policy = policy_of((1, 1, tensor), experts)
    policy.config = dataclasses.replace(policy.config, dtype="bfloat16")
    joined = cast.rollout_cast(policy)(policy.params)
    where = param_shardings(cast.rollout_decoder(policy).cfg, policy.mesh, layout="rollout")
    jax.tree.map(
        lambda x, sharding: x.sharding.is_equivalent_to(sharding, x.ndim) or 1 / 0, joined, where
    )
    own = policy.params["blocks"]["attention"]
    shards = sorted(
        joined["blocks"]["attention"]["qkv"].addressable_shards, key=lambda s: s.device.id
    )
    for i, shard in enumerate(shards):
        heads = (np.split(np.asarray(own[name]), tensor, axis=2)[i] for name in "qkv")
        flat = [x.reshape(*x.shape[:2], -1) for x in heads]
        np.testing.assert_array_equal(
            shard.data[:, :, 0], np.concatenate(flat, axis=-1).astype(jnp.bfloat16)
        )
    assert ("gate_up" in joined["blocks"]["mlp"]) == (not experts)


@pytest.mark.wide
def test_adapters_are_merged_into_joined_matrices(monkeypatch):
    monkeypatch.setattr(cast, "platform", lambda mesh: "gpu")
    policy = policy_of(lora=Lora(2, 4.0, ("q", "v", "up", "down")))
    adapters = init_adapters(policy.config, jax.random.key(1))
    adapters = jax.tree.map(lambda x: x + 0.1, adapters)
    lora = types.SimpleNamespace(**vars(policy) | {"frozen": policy.params})
    found = cast.rollout_cast(lora)(adapters)
    merged = merge_all(
        policy.params, adapters, policy.config.lora.scale, (jnp.float32, jnp.float32)
    )
    expected = cast.rollout_cast(policy)(merged)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), found, expected)
