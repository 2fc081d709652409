"""Groups without advantage are not computed: the same loss and gradient as with them, and updates that happen all the same."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rest_jax.config import LossConfig, OptimizerConfig
from rest_jax.distributed import replicated
from rest_jax.models.decoder import param_shardings
from rest_jax.rl import curriculum, packing
from rest_jax.rl.optimizer import make_optimizer
from rest_jax.rl.step import BatchLengths, StepConfig, active_groups, make_train_step, plan_step
from rest_jax.types import ScoredBatch, TrainState
from tests import tiny

EQUAL = (1, 2, 4, 7)  # prompts whose rewards are made equal

# Keeps the gradient as its state and moves nothing.
RECORD = optax.GradientTransformation(
    init=lambda params: jax.tree.map(jnp.zeros_like, params),
    update=lambda grads, state, params=None: (jax.tree.map(jnp.zeros_like, grads), grads),
)


def everything(scored: ScoredBatch, cfg: StepConfig, ways: int = 1):
    """A plan that skips nothing."""
    e = BatchLengths.of(scored)
    return packing.plan(
        e.prompt_length, e.response_length, e.widths,
        ways=ways, budget=cfg.max_tokens_per_microbatch, updates=cfg.updates,
    )  # fmt: skip


def run(cfg: StepConfig, scored: ScoredBatch, plan=None, shape=(1, 1, 1), tx=RECORD, logp_ref=None):
    """(state after a step, its metrics); without a plan, that of the step itself."""
    mesh = tiny.mesh(*shape)
    start = jax.tree.map(lambda x: x.copy(), tiny.params())
    state = TrainState(
        step=jnp.int32(0),
        params=start,
        opt_state=tx.init(start),
        rng=jax.random.key(0),
        curriculum=curriculum.init(cfg.schedule),
    )
    shardings = jax.tree.map(lambda _: replicated(mesh), state)
    shardings = shardings.replace(params=param_shardings(tiny.decoder().cfg, mesh))
    step = make_train_step(tiny.decoder(), tx, cfg, mesh, shardings)
    new, metrics = step(jax.device_put(state, shardings), scored, None, logp_ref, plan)
    return new, {name: float(value) for name, value in metrics.items()}


def close(a, b, relative: float = 1e-5) -> None:
    """Every leaf within `relative` of the leaf's own norm."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.linalg.norm(np.asarray(x) - np.asarray(y)) <= relative * np.linalg.norm(y)


def identical(a, b) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


def with_equal(scored: ScoredBatch, prompts) -> ScoredBatch:
    """Equal rewards in these groups, of a kind that a mean rounds (0.1 is no float)."""
    reward = scored.reward.copy()
    reward[list(prompts)] = np.float32(0.1)
    return scored.replace(reward=reward)


@pytest.fixture(scope="module")
def scored() -> ScoredBatch:
    return with_equal(tiny.scored(tiny.prompts()), EQUAL)


def picked(plan) -> list[int]:
    return sorted(int(p) for mini in plan for micro in mini for p in micro.pick[micro.pick >= 0])


def test_only_groups_with_advantage_are_in_the_plan(scored):
    cfg = tiny.step_config()
    wanted = active_groups(scored.reward, cfg)
    np.testing.assert_array_equal(wanted, ~np.isin(np.arange(8), EQUAL))
    assert picked(plan_step(BatchLengths.of(scored), cfg, 1)) == [0, 3, 5, 6]
    assert picked(everything(scored, cfg)) == list(range(8))


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 1)], ids=str)
def test_skipping_changes_neither_loss_nor_gradient(scored, shape):
    cfg = tiny.step_config()
    skipped, metrics = run(cfg, scored, shape=shape)
    forced, expected = run(cfg, scored, everything(scored, cfg, shape[0]), shape)
    close(skipped.opt_state, forced.opt_state)
    assert metrics.keys() == expected.keys()
    for (
        name,
        value,
    ) in expected.items():  # also the means over tokens: they are of the groups with advantage
        if name != "update/ratio_max":  # the greatest over what was computed
            assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert metrics["update/grad_norm"] > 0


def test_skipping_adds_no_more_than_exact_zeros(scored):
    """One group a micro-batch: what is skipped would have added 0 to every sum, so all bits stay."""
    cfg = tiny.step_config(max_tokens_per_microbatch=1)
    plan = everything(scored, cfg)
    (mini,) = plan
    assert all(micro.pick.shape == (1, 1) for micro in mini)
    # the first micro-batch of both is the same: only later ones are added to a sum
    first = int(mini[0].pick[0, 0])
    reward = scored.reward.copy()
    reward[first] = np.arange(tiny.GROUP, dtype=np.float32)
    same_start = scored.replace(reward=reward)
    skipped, metrics = run(cfg, same_start)
    forced, expected = run(cfg, same_start, plan)
    assert len(picked(plan_step(BatchLengths.of(same_start), cfg, 1))) < 8
    identical(skipped.opt_state, forced.opt_state)
    identical(skipped.curriculum, forced.curriculum)
    for name in ("update/loss", "update/policy_loss", "update/grad_norm", "update/entropy"):
        assert metrics[name] == expected[name], name


@pytest.mark.parametrize(
    "changes", [{"kl_coefficient": 0.1}, {"entropy_coefficient": 0.01}], ids=str
)
def test_a_kl_term_or_entropy_bonus_needs_every_group(scored, changes):
    cfg = tiny.step_config(loss=LossConfig(vocab_chunk=5, **changes))
    assert active_groups(scored.reward, cfg).all()
    assert picked(plan_step(BatchLengths.of(scored), cfg, 1)) == list(range(8))
    flat = with_equal(scored, range(8))  # nothing but the other term is left
    reference = flat.rollout.logp - 0.5 if "kl_coefficient" in changes else None
    new, metrics = run(cfg, flat, logp_ref=reference)
    assert metrics["update/grad_norm"] > 0 and metrics["update/policy_loss"] == 0
    assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves(new.opt_state))


def decayed(tx_cfg: OptimizerConfig, params):
    """Weight decay alone: matrices shrink, norms stay."""
    factor = 1 - tx_cfg.learning_rate * tx_cfg.weight_decay

    def one(path, x):
        return x if path[-1].key == "scale" else x * np.float32(factor)

    return jax.tree_util.tree_map_with_path(one, params)


def test_without_any_advantage_the_optimiser_still_moves(scored):
    """No micro-batch at all: the update counts, decays the weights, and its metrics are finite."""
    tx_cfg = OptimizerConfig(learning_rate=1e-2, weight_decay=0.5, max_grad_norm=1.0)
    cfg = tiny.step_config(updates=2)
    flat = with_equal(scored, range(8))
    assert plan_step(BatchLengths.of(flat), cfg, 1) == [[], []]
    new, metrics = run(cfg, flat, tx=make_optimizer(tx_cfg, 10))
    forced, _ = run(cfg, flat, everything(flat, cfg), tx=make_optimizer(tx_cfg, 10))
    identical(new.params, forced.params)
    assert int(optax.tree.get(new.opt_state, "count", filtering=is_adam)) == 2
    expected = decayed(tx_cfg, decayed(tx_cfg, tiny.params()))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=1e-6),
        new.params, expected,
    )  # fmt: skip
    assert all(np.isfinite(value) for value in metrics.values()), metrics
    assert metrics["update/loss"] == metrics["update/grad_norm"] == 0
    assert metrics["update/update_norm"] > 0 and metrics["reward/equal_groups"] == 1
    assert int(new.step) == 1


def is_adam(path, value) -> bool:
    """The count of Adam's moments, not that of a schedule."""
    return any(getattr(part, "tuple_name", "") == "ScaleByAdamState" for part in path)


@pytest.mark.parametrize("empty", [0, 1])
def test_a_mini_batch_without_advantage_among_others(scored, empty):
    """Prompts p % 2 == `empty` have none: that mini-batch's update goes on with the moments alone."""
    cfg = tiny.step_config(updates=2)
    half = with_equal(tiny.scored(tiny.prompts()), range(empty, 8, 2))
    plan = plan_step(BatchLengths.of(half), cfg, 1)
    assert plan[empty] == [] and len(picked(plan)) == 4
    new, metrics = run(cfg, half, tx=tiny.optimizer())
    forced, _ = run(cfg, half, everything(half, cfg), tx=tiny.optimizer())
    close(new.params, forced.params, 1e-6)
    assert int(optax.tree.get(new.opt_state, "count", filtering=is_adam)) == 2
    assert all(np.isfinite(value) for value in metrics.values()), metrics
    assert metrics["update/grad_norm"] > 0


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 1), (4, 1, 1)], ids=str)
def test_a_way_without_work_goes_along(scored, shape):
    """Only one group has advantage: the other ways compute an empty row, which gives no gradient and no NaN."""
    one = with_equal(tiny.scored(tiny.prompts()), [p for p in range(8) if p != 5])
    cfg = tiny.step_config()
    new, metrics = run(cfg, one, shape=shape)
    forced, expected = run(cfg, one, everything(one, cfg))
    close(new.opt_state, forced.opt_state)
    assert all(np.isfinite(value) for value in metrics.values()), metrics
    assert metrics["update/loss"] == pytest.approx(expected["update/loss"], rel=1e-4, abs=1e-7)


def test_the_aggregations_keep_the_skipped_tokens_in_their_denominators(scored):
    """Halving the groups with advantage halves no denominator: gradients of two halves add up to that of the whole."""
    full = tiny.scored(tiny.prompts())
    left, right = with_equal(full, range(4)), with_equal(full, range(4, 8))
    for aggregation in ("weighted_token_mean", "sequence_mean"):
        loss = LossConfig(vocab_chunk=5, aggregation=aggregation)
        cfg = dataclasses.replace(tiny.step_config(), loss=loss)
        parts = [run(cfg, part)[0].opt_state for part in (full, left, right)]
        close(jax.tree.map(jnp.add, *parts[1:]), parts[0], 2e-5)
