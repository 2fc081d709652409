"""The load-balance loss against transformers, and steps of a policy with experts: micro-batches, meshes, replay, metrics."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rest_jax import config as config_lib
from rest_jax.config import LossConfig
from rest_jax.errors import UserError
from rest_jax.models.cache import RowLayout
from rest_jax.models.moe import RouterRecord, Routing, record
from rest_jax.rl.balance import balance_loss, check_experts, router_metrics, sum_router
from rest_jax.types import ScoredBatch
from tests import tiny
from tests.rl.stepping import close, logprobs, plan_of, step

E, K, L, P, T = 4, 2, 3, 5, 7
BALANCED = LossConfig(vocab_chunk=5, load_balance_coefficient=0.05)
GROUP_TOKENS = 16 + tiny.GROUP * tiny.TIME  # trunk positions of a padded group of `tiny.prompts`
ROUTER = ("router/load_max", "router/unused_experts", "router/entropy", "router/agreement")


def routers(seed=0) -> tuple[np.ndarray, np.ndarray, RouterRecord]:
    """Logits [L P T E], mask [P T] and the record of routers that take the K best; each row is one completion."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(L, P, T, E)).astype(np.float32)
    mask = np.arange(T) < rng.integers(1, T + 1, P)[:, None]
    until = jnp.asarray(np.where(mask, mask.sum(1, keepdims=True), 0), jnp.int32)
    share = np.random.default_rng(1).dirichlet(np.ones(P)).astype(np.float32)
    weight = mask * (share / mask.sum(1))[:, None]
    layout = RowLayout(until, 1, jnp.asarray(weight, jnp.float32))
    layers = []
    for layer in jnp.asarray(logits):
        chosen = jax.lax.top_k(layer, K)[1]
        routing = Routing(chosen, chosen, jax.nn.softmax(layer), chosen)
        layers.append(record(routing, jnp.asarray(mask), layout))
    return logits, mask, jax.tree.map(lambda *x: jnp.stack(x), *layers)


@pytest.mark.slow
def test_a_completion_has_the_loss_of_transformers():
    torch = pytest.importorskip("torch")
    moe = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")
    logits, mask, record = routers()
    weight = np.random.default_rng(1).dirichlet(np.ones(P)).astype(np.float32)
    expected = 0.0
    for row in range(P):
        layers = [
            moe.load_balancing_loss_func(
                (torch.tensor(layer[row]),), E, K, torch.tensor(mask[row : row + 1])
            )
            for layer in logits
        ]
        expected += weight[row] * float(np.mean(layers))
    assert balance_loss(record) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("chosen", "expected"), [("even", K), ("one pair", E)])
def test_even_loads_have_the_least_loss(chosen, expected):
    """Eight tokens of a completion behind a prompt of two, which does not count."""
    pairs = {"even": [[0, 1], [2, 3]] * 5, "one pair": [[0, 1]] * 10}
    took = jnp.array([pairs[chosen]])
    probability = {"even": [1 / E] * E, "one pair": [0.5, 0.5, 0, 0]}[chosen]
    p = jnp.broadcast_to(jnp.array(probability), (1, 10, E))
    balance = jnp.where(jnp.arange(10) < 2, 0.0, 1 / 8)[None]
    layout = RowLayout(jnp.full((1, 10), 10), 1, balance)
    found = record(Routing(took, p, p, took), layout.valid, layout)
    one_layer = jax.tree.map(lambda x: x[None], found)
    assert balance_loss(one_layer) == pytest.approx(expected)
    without = record(Routing(took, p, p, took), layout.valid, RowLayout(layout.until, 1))
    assert not np.asarray(without.balance).any()


def test_the_metrics_of_routers():
    _, mask, record = routers()
    found = router_metrics(sum_router(record))
    load = np.asarray(record.load).sum(1)
    assert found["router/load_max"] == pytest.approx(np.mean(load.max(-1) / load.mean(-1)))
    assert found["router/unused_experts"] == np.mean(load == 0)
    entropy = np.asarray(record.entropy).sum() / (L * mask.sum())
    assert found["router/entropy"] == pytest.approx(entropy, rel=1e-5)
    assert found["router/agreement"] == 1
    nothing = router_metrics(jax.tree.map(jnp.zeros_like, sum_router(record)))
    assert all(np.isfinite(x) for x in nothing.values())


@pytest.fixture(scope="module")
def scored() -> ScoredBatch:
    """Of a policy with 4 experts, two a token, with the experts that its sampler chose."""
    return tiny.scored(tiny.prompts(), experts=4, record_routes=True)


def forget(scored: ScoredBatch) -> ScoredBatch:
    """The routers of the update choose for themselves."""
    return scored.replace(rollout=scored.rollout.replace(routes=None))


def same_metrics(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert value == pytest.approx(b[name], rel=1e-4, abs=1e-6), name


@pytest.mark.wide
def test_micro_batches_change_neither_loss_nor_gradient(scored):
    """The load-balance loss included, whose gradient is not small."""
    own = forget(scored)
    cfg = tiny.step_config(loss=BALANCED)
    whole, metrics = step(cfg, own, experts=4)
    cut = dataclasses.replace(cfg, max_tokens_per_microbatch=4 * GROUP_TOKENS)
    parts, cut_metrics = step(cut, own, experts=4)
    assert len(plan_of(own, cut, tiny.mesh())[0]) >= 2
    close(parts.opt_state, whole.opt_state)
    same_metrics(cut_metrics, metrics)
    assert 2 <= metrics["update/balance_loss"] < 4
    assert metrics["update/loss"] == pytest.approx(
        metrics["update/policy_loss"] + 0.05 * metrics["update/balance_loss"], rel=1e-4
    )
    plain, without = step(tiny.step_config(), own, experts=4)
    assert "update/balance_loss" not in without and set(ROUTER) <= without.keys()
    router = [s.opt_state["blocks"]["mlp"]["router"] for s in (whole, plain)]
    assert np.abs(np.asarray(router[0] - router[1])).max() > 1e-3


# data, fsdp, tensor, expert
@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 2, 1, 2), (1, 1, 1, 4), (2, 1, 2, 2)], ids=str)
def test_a_step_does_not_depend_on_the_mesh(scored, shape):
    cfg = tiny.step_config(loss=BALANCED, max_tokens_per_microbatch=64)
    one, metrics = step(tiny.step_config(loss=BALANCED), scored, experts=4, remat="block")
    many, found = step(cfg, scored, shape=shape, experts=4, remat="block")
    close(many.opt_state, one.opt_state)
    same_metrics(found, metrics)


def test_replay_of_the_samplers_own_policy_changes_nothing(scored):
    """On the first update of a step the trainer's routers choose as the sampler's did."""
    replayed, metrics = step(tiny.step_config(), scored, experts=4)
    own, expected = step(tiny.step_config(), forget(scored), experts=4)
    close(replayed.opt_state, own.opt_state)
    same_metrics(metrics, expected)
    assert metrics["router/agreement"] == 1 and metrics["rollout/logp_mismatch"] < 1e-5


def test_replay_keeps_the_experts_of_the_sampler_when_the_routers_have_moved(scored):
    params = jax.tree.map(lambda x: x, tiny.params(4))
    mlp = params["blocks"]["mlp"]
    noise = np.random.default_rng(1).normal(size=mlp["router"].shape).astype(np.float32)
    params["blocks"]["mlp"] = mlp | {"router": mlp["router"] + 0.5 * noise}
    _, replayed = step(tiny.step_config(), scored, experts=4, params=params)
    _, own = step(tiny.step_config(), forget(scored), experts=4, params=params)
    _, before = step(tiny.step_config(), scored, experts=4)
    assert replayed["router/agreement"] < 0.95 and own["router/agreement"] == 1
    for name in ("router/load_max", "router/unused_experts"):
        assert replayed[name] == before[name]
    assert own["router/load_max"] != before["router/load_max"]


def test_recomputed_values_replay_as_well(scored):
    mask = np.arange(tiny.TIME) < scored.rollout.response_length[..., None]
    found = logprobs(tiny.step_config(), scored, experts=4)
    np.testing.assert_allclose(np.asarray(found.logp)[mask], scored.rollout.logp[mask], atol=2e-5)
    routes = scored.rollout.routes
    other = dataclasses.replace(routes, responses=(routes.responses + 1) % 4)
    moved = scored.replace(rollout=scored.rollout.replace(routes=other))
    different = logprobs(tiny.step_config(), moved, experts=4)
    assert np.abs(np.asarray(different.logp) - scored.rollout.logp)[mask].max() > 0.1


def test_options_that_need_experts_are_refused_without():
    def config(**sections):
        return config_lib.from_overrides({"name": "x", "model": {"source": "x"}, **sections})

    dense, experts = (tiny.decoder(experts=n).cfg for n in (0, 4))
    for sections, named in (
        ({"rollout": {"replay_routing": True}}, "rollout.replay_routing True"),
        ({"loss": {"load_balance_coefficient": 0.1}}, "loss.load_balance_coefficient 0.1"),
    ):
        check_experts(config(**sections), experts)
        with pytest.raises(UserError, match=named):
            check_experts(config(**sections), dense)
    check_experts(config(), dense)
