"""The host side of a step: which groups are computed, consecutive mini-batches, metrics of several updates, log-probs."""

import dataclasses
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rest_jax import config as config_lib
from rest_jax.config import CurriculumConfig, LossConfig, OptimizerConfig, WeightsConfig
from rest_jax.distributed import activate
from rest_jax.errors import UserError
from rest_jax.rl import curriculum
from rest_jax.rl.curriculum import Schedule
from rest_jax.rl.optimizer import make_optimizer
from rest_jax.rl.packing import BatchLengths, MicroBatch, make_rows
from rest_jax.rl.prepare import Recomputed, active_groups
from rest_jax.rl.step import (
    abstract_state,
    combine_updates,
    copy_to_host,
    init_state,
    make_advance,
    make_step,
    policy_metrics,
)
from rest_jax.rl.update import Totals
from rest_jax.train import check_sizes
from rest_jax.types import ScoredBatch
from tests import tiny
from tests.rl.stepping import (
    RECORD,
    close,
    fresh_state,
    logprobs,
    plan_everything,
    plan_of,
    prepare_of,
    step,
    update_of,
)

EQUAL = (1, 2, 4, 7)  # groups whose rewards are made equal
GROUP_TOKENS = 16 + tiny.GROUP * tiny.TIME  # trunk positions of a padded group of `tiny.prompts`


def identical(a, b) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


def with_equal(scored: ScoredBatch, groups) -> ScoredBatch:
    """Equal rewards in these groups, of a kind that a mean rounds (0.1 is no float)."""
    reward = scored.reward.copy()
    reward[list(groups)] = np.float32(0.1)
    return scored.replace(reward=reward)


@pytest.fixture(scope="module")
def full() -> ScoredBatch:
    return tiny.scored(tiny.prompts())


@pytest.fixture(scope="module")
def scored(full) -> ScoredBatch:
    return with_equal(full, EQUAL)


def picked(plan) -> list[int]:
    return sorted(
        piece.group for mini in plan for micro in mini for row in micro.rows for piece in row
    )


def one_by_one(scored, groups) -> list[list[MicroBatch]]:
    """A plan of these groups in this order, one a micro-batch, all rows equally long."""
    lengths = BatchLengths.of(scored.rollout)
    return [[MicroBatch(((lengths.whole(p),),), 64, lengths) for p in groups]]


def test_only_active_groups_are_in_the_plan(scored):
    cfg = tiny.step_config()
    assert picked(plan_of(scored, cfg, tiny.mesh())) == [0, 3, 5, 6]
    assert picked(plan_everything(scored, cfg)) == list(range(8))


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), pytest.param((2, 1, 1), marks=pytest.mark.slow)], ids=str
)
def test_skipping_changes_neither_loss_nor_gradient(scored, shape):
    """Nor the means over tokens, which are of the active groups anyway."""
    cfg = tiny.step_config()
    skipped, metrics = step(cfg, scored, shape=shape)
    forced, expected = step(cfg, scored, plan_everything(scored, cfg, shape[0]), shape)
    close(skipped.opt_state, forced.opt_state)
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        if not name.endswith("/ratio_max"):  # the largest of what was computed
            assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert metrics["update/grad_norm"] > 0


def test_skipping_adds_no_more_than_exact_zeros(scored):
    """One group a micro-batch: what is skipped would have added 0 to every sum, so all bits stay."""
    cfg = tiny.step_config()
    skipped, metrics = step(cfg, scored, one_by_one(scored, [0, 3, 5, 6]))
    forced, expected = step(cfg, scored, one_by_one(scored, range(8)))
    identical(skipped.opt_state, forced.opt_state)
    identical(skipped.curriculum, forced.curriculum)
    for name in ("update/loss", "update/policy_loss", "update/grad_norm", "update/entropy"):
        assert metrics[name] == expected[name], name


@pytest.mark.parametrize(
    "changes", [{"kl_coefficient": 0.1}, {"entropy_coefficient": 0.01}], ids=str
)
def test_a_kl_term_or_entropy_bonus_needs_every_group(scored, changes):
    cfg = tiny.step_config(loss=LossConfig(vocab_chunk=5, **changes))
    assert active_groups(scored, cfg).all()
    assert picked(plan_of(scored, cfg, tiny.mesh())) == list(range(8))
    flat = with_equal(scored, range(8))  # nothing but the other term is left
    reference = flat.rollout.logp - 0.5 if "kl_coefficient" in changes else None
    new, metrics = step(cfg, flat, logp_ref=reference)
    assert metrics["update/grad_norm"] > 0 and metrics["update/policy_loss"] == 0
    assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves(new.opt_state))


def decayed(tx_cfg: OptimizerConfig, params):
    """Weight decay alone: matrices shrink, norms stay."""
    factor = 1 - tx_cfg.learning_rate * tx_cfg.weight_decay

    def one(path, x):
        return x if path[-1].key == "scale" else x * np.float32(factor)

    return jax.tree_util.tree_map_with_path(one, params)


def test_without_any_advantage_the_optimiser_still_moves(scored):
    """No micro-batch at all: the update counts, decays the weights, its metrics are finite, and it has none of tokens."""
    tx_cfg = OptimizerConfig(learning_rate=1e-2, weight_decay=0.5, max_grad_norm=1.0)
    cfg = tiny.step_config(updates=2)
    flat = with_equal(scored, range(8))
    assert plan_of(flat, cfg, tiny.mesh()) == [[], []]
    new, metrics = step(cfg, flat, tx=make_optimizer(tx_cfg, 10))
    forced, computed = step(cfg, flat, plan_everything(flat, cfg), tx=make_optimizer(tx_cfg, 10))
    identical(new.params, forced.params)
    means = {"entropy", "logp_difference", "approx_kl", "ratio_mean", "ratio_max", "clip_fraction"}
    means |= {f"{side}_fraction" for side in ("clip_low", "clip_high", "dual_clip")}
    missing = {f"update/{name}" for name in means}
    missing |= {"rollout/logp_mismatch", "rollout/ratio_max"}
    assert (computed.keys() - metrics.keys(), metrics.keys() - computed.keys()) == (missing, set())
    assert int(optax.tree.get(new.opt_state, "count", filtering=is_adam)) == 2
    expected = decayed(tx_cfg, decayed(tx_cfg, tiny.params()))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=1e-6),
        new.params, expected,
    )  # fmt: skip
    assert all(np.isfinite(value) for value in metrics.values()), metrics
    assert metrics["update/loss"] == metrics["update/grad_norm"] == 0
    assert metrics["update/update_norm"] > 0 and metrics["reward/equal_groups"] == 1


def is_adam(path, value) -> bool:
    """The count of Adam's moments, not that of a schedule."""
    return any(getattr(part, "tuple_name", "") == "ScaleByAdamState" for part in path)


@pytest.mark.parametrize("empty", [0, pytest.param(1, marks=pytest.mark.wide)])
def test_a_mini_batch_without_advantage_among_others(full, empty):
    """Groups p % 2 == `empty` have none: that mini-batch's update goes on with the moments alone."""
    cfg = tiny.step_config(updates=2)
    half = with_equal(full, range(empty, 8, 2))
    plan = plan_of(half, cfg, tiny.mesh())
    assert plan[empty] == [] and len(picked(plan)) == 4
    new, metrics = step(cfg, half, tx=tiny.optimizer())
    forced, _ = step(cfg, half, plan_everything(half, cfg), tx=tiny.optimizer())
    close(new.params, forced.params, 1e-6)
    assert int(optax.tree.get(new.opt_state, "count", filtering=is_adam)) == 2
    assert all(np.isfinite(value) for value in metrics.values()), metrics
    assert metrics["update/grad_norm"] > 0
    assert metrics["update/ratio_mean"] == pytest.approx(1, abs=0.2)
    assert ("rollout/logp_mismatch" in metrics) == (empty == 1)


@pytest.mark.parametrize(
    "shape",
    [(2, 1, 1), *(pytest.param(x, marks=pytest.mark.wide) for x in [(1, 1, 1), (4, 1, 1)])],
    ids=str,
)
def test_a_data_shard_without_work_goes_along(full, shape):
    """Only one group has advantage: the other shards compute an empty row, which gives no gradient and no NaN."""
    one = with_equal(full, [p for p in range(8) if p != 5])
    cfg = tiny.step_config()
    new, metrics = step(cfg, one, shape=shape)
    forced, expected = step(cfg, one, plan_everything(one, cfg))
    close(new.opt_state, forced.opt_state)
    assert all(np.isfinite(value) for value in metrics.values()), metrics
    assert metrics["update/loss"] == pytest.approx(expected["update/loss"], rel=1e-4, abs=1e-7)


@pytest.mark.parametrize(
    "aggregation", ["weighted_token_mean", pytest.param("sequence_mean", marks=pytest.mark.wide)]
)
def test_the_aggregations_keep_the_skipped_tokens_in_their_denominators(full, aggregation):
    """Halving the active groups halves no denominator: gradients of two halves add up to that of both."""
    left, right = with_equal(full, range(4)), with_equal(full, range(4, 8))
    cfg = tiny.step_config(loss=LossConfig(vocab_chunk=5, aggregation=aggregation))
    parts = [step(cfg, part)[0].opt_state for part in (full, left, right)]
    close(jax.tree.map(jnp.add, *parts[1:]), parts[0], 2e-5)


def test_mini_batches_are_consecutive_updates(full):
    """Two updates of a step move the parameters one after the other, with the same curriculum."""
    new, metrics = step(tiny.step_config(updates=2), full, tx=tiny.optimizer())
    counts = optax.tree.get_all_with_path(new.opt_state, "count")
    assert counts and all(int(count) == 2 for _, count in counts)
    assert metrics["update/logp_difference"] > metrics["rollout/logp_mismatch"]
    assert metrics["update/ratio_max"] > 1.01 > metrics["rollout/ratio_max"]
    once = step(tiny.step_config(), full)[0]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-6),
        new.curriculum, once.curriculum,
    )  # fmt: skip


@pytest.mark.parametrize("max_tokens", [None, pytest.param(1, marks=pytest.mark.slow)])
def test_a_mini_batch_of_any_groups_is_an_update_of_these_alone(full, max_tokens):
    """Whatever groups it has: denominators and metrics are those of its own groups."""
    uniform = Schedule(WeightsConfig(rule="uniform"), CurriculumConfig(shape="constant"), 10)
    cfg = tiny.step_config(schedule=uniform, max_tokens_per_microbatch=max_tokens)
    both = dataclasses.replace(cfg, updates=2)
    minibatch = np.array([1, 0, 0, 1, 1, 1, 0, 0], np.int32)
    plan = plan_everything(full, both, minibatch=minibatch)
    last, metrics = step(both, full, plan, minibatch=minibatch)
    alone = [step(cfg, jax.tree.map(lambda x, i=i: x[minibatch == i], full)) for i in (0, 1)]
    close(last.opt_state, alone[1][0].opt_state)
    # of all groups together, not means over updates
    of_step = {"update/phantom_gradient", "update/effective_tokens"}
    for name in {name for name in metrics if name.startswith("update/")} - of_step:
        values = [found[name] for _, found in alone]
        expected = max(values) if name == "update/ratio_max" else np.mean(values)
        assert metrics[name] == pytest.approx(expected, rel=1e-4, abs=1e-6), name


def totals(**values) -> Totals:
    sums = {f"update/{name}": np.float32(x) for name, x in values.items() if name != "ratio_max"}
    return Totals(sums, {"update/ratio_max": np.float32(values["ratio_max"])})


def test_metrics_of_several_updates():
    """Means of sums; of the maxima the largest, not their mean."""
    updates = [totals(loss=1.0, ratio_max=1.5), totals(loss=2.0, ratio_max=9.0)]
    updates.append(totals(loss=6.0, ratio_max=3.0))
    found = combine_updates(updates)
    assert found == {"update/loss": 3.0, "update/ratio_max": 9.0}


def test_updates_without_tokens_are_in_no_mean_over_tokens():
    computed = totals(loss=1.0, ratio_mean=1.5, ratio_max=1.5)
    empty = totals(loss=0.0, ratio_mean=0.0, ratio_max=0.0).without_tokens()
    expected = {"update/loss": 0.5, "update/ratio_mean": 1.5, "update/ratio_max": 1.5}
    assert combine_updates([empty, computed]) == expected
    assert policy_metrics({}, [empty, computed]) == expected
    assert policy_metrics({}, [empty]) == {"update/loss": 0.0}


def test_the_first_update_tells_how_far_the_sampler_is_from_the_trainer():
    """Unless that was measured with recomputed log-probs."""
    updates = [totals(logp_difference=d, ratio_max=m) for d, m in ((1e-6, 1.25), (0.5, 4.0))]
    found = policy_metrics({"reward/mean": 2.0}, updates)
    assert found["reward/mean"] == 2.0
    assert found["rollout/logp_mismatch"] == np.float32(1e-6)
    assert found["rollout/ratio_max"] == 1.25 and found["update/ratio_max"] == 4.0
    measured = {"rollout/logp_mismatch": 0.1, "rollout/ratio_max": 1.1}
    found = policy_metrics(measured, updates)
    assert {name: found[name] for name in measured} == measured


def mask_of(scored) -> np.ndarray:
    return np.arange(tiny.TIME) < scored.rollout.response_length[..., None]


@pytest.mark.parametrize("max_tokens", [None, GROUP_TOKENS * 4, 1])
def test_log_probs_of_a_rollout(full, max_tokens):
    """The trainer's values are the sampler's, and zero behind the responses."""
    found = logprobs(tiny.step_config(max_tokens_per_microbatch=max_tokens), full)
    mask = mask_of(full)
    for name in ("logp", "entropy", "gini"):
        value, expected = np.asarray(getattr(found, name)), getattr(full.rollout, name)
        np.testing.assert_allclose(value[mask], expected[mask], atol=2e-5, err_msg=name)
        assert (value[~mask] == 0).all()


def test_recomputed_values_and_importance_correction(full):
    cfg = tiny.step_config(max_tokens_per_microbatch=GROUP_TOKENS * 4, tis_cap=1.5)
    old, mask = logprobs(cfg, full), mask_of(full)
    new, metrics = step(cfg, full, recomputed=old)
    close(new.opt_state, step(tiny.step_config(), full)[0].opt_state, 1e-4)
    assert metrics["rollout/logp_mismatch"] < 1e-5
    # A sampler that was more certain than the trainer by a factor of 2: ratio 0.5 on every token.
    logp = np.asarray(old.logp) + np.float32(np.log(2)) * mask
    biased = full.replace(rollout=full.rollout.replace(logp=logp))
    halved = step(cfg, biased, recomputed=Recomputed(old.logp, old.entropy, old.gini))[0]
    close(halved.opt_state, jax.tree.map(lambda g: g / 2, new.opt_state), 1e-4)


def stand_in(mesh, params):
    """What a fresh state is made of: a policy of which all weights are trained."""
    cfg = tiny.decoder().cfg
    return types.SimpleNamespace(
        config=cfg, mesh=mesh, params=params, trained=params, adapters=None
    )


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_a_fresh_state(shape):
    """Starts at step 0 from the policy's weights; optimiser moments are sharded as the weights."""
    cfg, mesh = tiny.step_config(), tiny.mesh(*shape)
    params = jax.tree.map(lambda x: x.copy(), tiny.params())
    policy = stand_in(mesh, params)
    tx = tiny.optimizer()
    abstract, shardings = abstract_state(policy, tx, cfg.schedule)
    state = init_state(policy, tx, cfg.schedule, 5, shardings)
    identical(state.params, tiny.params())
    identical(state.curriculum, curriculum.init(cfg.schedule))
    assert int(state.step) == 0 and state.rng == jax.random.key(5)
    moments = optax.tree.get(state.opt_state, "mu")
    for moment, weight in zip(jax.tree.leaves(moments), jax.tree.leaves(state.params), strict=True):
        assert moment.sharding == weight.sharding and not np.asarray(moment).any()
    for x, described, sharding in zip(
        *map(jax.tree.leaves, (state, abstract, shardings)), strict=True
    ):
        assert (described.shape, described.dtype) == (x.shape, x.dtype)
        assert described.sharding == x.sharding == sharding
    assert int(make_advance(mesh)(state.step)) == 1


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((1, 1, 1), marks=pytest.mark.wide),
        pytest.param((2, 2, 2), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_moments_in_host_memory_change_nothing(shape, scored):
    """Two updates with AdamW give the same bits; the moments come and go, and are where they were put."""
    cfg, mesh = tiny.step_config(), tiny.mesh(*shape)
    tx = make_optimizer(OptimizerConfig(learning_rate=1e-2), 2)
    states = {}
    for moments in ("device", "host"):
        params = jax.tree.map(lambda x: x.copy(), tiny.params())
        policy = stand_in(mesh, params)
        abstract, shardings = abstract_state(policy, tx, cfg.schedule, moments)
        state = init_state(policy, tx, cfg.schedule, 5, shardings)
        made = make_step(tiny.decoder(), tx, cfg, mesh, shardings)
        (plan,) = plan_of(scored, cfg, mesh)
        minibatch = jnp.zeros(len(scored.reward), jnp.int32)
        batch, *_ = made.prepare(
            jax.tree.map(jnp.asarray, scored), None, None, minibatch, state.curriculum
        )
        for _ in range(2):
            state, _ = made.update(state, batch, plan)
        kinds = {
            x.sharding.memory_kind for x in jax.tree.leaves(state.opt_state) if jnp.ndim(x) > 0
        }
        assert kinds == {"pinned_host" if moments == "host" else "device"}
        assert {x.sharding.memory_kind for x in jax.tree.leaves(state.params)} == {"device"}
        for x, described in zip(*map(jax.tree.leaves, (state, abstract)), strict=True):
            assert described.sharding == x.sharding
        states[moments] = state
    identical(states["host"].params, states["device"].params)
    identical(states["host"].opt_state, states["device"].opt_state)


@pytest.mark.parametrize("experts", [0, pytest.param(4, marks=pytest.mark.slow)])
def test_no_sum_of_an_update_depends_on_its_order_on_a_gpu(full, experts):
    """There a scatter adds atomically, unless it is said that no place is written twice."""
    cfg, mesh = tiny.step_config(), tiny.mesh()
    update, shardings = update_of(tiny.decoder(experts=experts), RECORD, cfg, mesh)
    params = jax.tree.map(lambda x: x.copy(), tiny.params(experts))
    state = jax.device_put(fresh_state(params, RECORD, cfg), shardings)
    batch, *_ = prepare_of(cfg, mesh)(full, None, None, np.zeros(8, np.int32), state.curriculum)
    rows = make_rows(plan_of(full, cfg, mesh)[0][0], mesh)
    with activate(mesh):
        traced = update.add.trace(update.zero(state.params, batch), state.params, batch, rows)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    scatters = re.findall(r'"stablehlo.scatter"\(.*?\}\) : ', text, re.DOTALL)
    adding = [x for x in scatters if "stablehlo.add" in x and "unique_indices = false" in x]
    # that of the router's probabilities: the experts of a token are different ones
    assert scatters and len(adding) == (experts > 0)


class StopHere(Exception):
    pass


@pytest.mark.parametrize(
    ("moments", "shape"),
    [("host", (1, 1, 1)), pytest.param("device", (2, 2, 2), marks=pytest.mark.slow)],
    ids=str,
)
def test_an_update_that_is_told_to_stop_leaves_its_state(moments, shape, full):
    """Before each micro-batch; and the copy in host memory outlives an update that comes to its end."""
    cfg, mesh = tiny.step_config(), tiny.mesh(*shape)
    cut = dataclasses.replace(cfg, max_tokens_per_microbatch=GROUP_TOKENS)
    tx = make_optimizer(OptimizerConfig(learning_rate=1e-2), 2)
    policy = stand_in(mesh, jax.tree.map(lambda x: x.copy(), tiny.params()))
    _, shardings = abstract_state(policy, tx, cfg.schedule, moments)
    state = init_state(policy, tx, cfg.schedule, 5, shardings)
    made = make_step(tiny.decoder(), tx, cut, mesh, shardings)
    (plan,) = plan_of(full, cut, mesh)
    batch, *_ = made.prepare(
        jax.tree.map(jnp.asarray, full), None, None, np.zeros(8, np.int32), state.curriculum
    )
    left = 0

    def check() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise StopHere

    assert len(plan) > 1
    for n in range(len(plan)):
        left = n
        with pytest.raises(StopHere):
            made.update(state, batch, plan, check=check)
    kept, before = copy_to_host(state), jax.device_get((state.params, state.opt_state))
    left = len(plan)
    state, _ = made.update(state, batch, plan, check=check)
    assert left == 0 and not np.array_equal(
        *map(np.ravel, (state.params["embed"], before[0]["embed"]))
    )
    identical((kept.params, kept.opt_state), before)
    assert {x.sharding.memory_kind for x in jax.tree.leaves(kept.params)} == {"pinned_host"}


def test_one_micro_batch_has_no_variance_and_is_refused():
    raw = {
        "name": "x", "model": {"source": "x"}, "train": {"measure_noise": True},
        "rollout": {"prompts_per_step": 2},
    }  # fmt: skip
    config = config_lib.from_overrides(raw, [])
    check_sizes(config, types.SimpleNamespace(mesh=tiny.mesh(1), config=tiny.decoder().cfg))
    with pytest.raises(UserError, match=r"measure_noise: rollout\.prompts_per_step 2 on 2 "):
        check_sizes(config, types.SimpleNamespace(mesh=tiny.mesh(2), config=tiny.decoder().cfg))
