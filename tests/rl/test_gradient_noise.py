"""The measured variance of a gradient is the sample variance of its groups, computed here one group at a time."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from rest_jax import config as config_lib
from rest_jax.errors import UserError
from rest_jax.rl.gradients import gradient_noise
from rest_jax.rl.packing import MicroBatch
from rest_jax.rl.step import BatchLengths, plan_step
from rest_jax.train import check_sizes
from tests import tiny
from tests.rl.test_skipping import EQUAL, RECORD, run, with_equal

PROMPTS = 8


@pytest.fixture(scope="module")
def scored():
    return with_equal(tiny.scored(tiny.prompts(PROMPTS)), EQUAL)


def flat(tree) -> np.ndarray:
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])


def groups_alone(scored) -> np.ndarray:
    """[P, parameters]: the term of each group in the gradient, skipped ones zero."""
    cfg = tiny.step_config()
    rows = []
    for p in range(PROMPTS):
        slots = (scored.rollout.prompt.shape[1], scored.rollout.responses.shape[2])
        alone = [[MicroBatch(np.array([[p]], np.int32), slots, 1, 1)]]
        rows.append(flat(run(cfg, scored, alone)[0].opt_state))
    return np.stack(rows)


def test_equals_the_sample_variance_of_the_groups(scored):
    terms = groups_alone(scored)
    state, metrics = run(tiny.step_config(noise_groups=PROMPTS), scored)
    np.testing.assert_allclose(flat(state.opt_state), terms.sum(0), rtol=1e-4, atol=1e-7)
    expected = PROMPTS * terms.var(axis=0, ddof=1).sum()
    assert metrics["update/grad_variance"] == pytest.approx(expected, rel=1e-4)
    norm = (terms.sum(0) ** 2).sum()
    assert metrics["update/grad_noise"] == pytest.approx(expected / norm, rel=1e-4)


def test_groups_go_one_by_one_and_the_update_is_the_same(scored):
    cfg = tiny.step_config(noise_groups=PROMPTS)
    (plan,) = plan_step(BatchLengths.of(scored), cfg, 1)
    assert all(micro.pick.size == 1 for micro in plan)
    assert len(plan) == PROMPTS - len(EQUAL)
    measured, plain = run(cfg, scored)[0], run(tiny.step_config(), scored)[0]
    np.testing.assert_allclose(
        flat(measured.opt_state), flat(plain.opt_state), rtol=1e-4, atol=1e-7
    )


def test_of_each_mini_batch(scored):
    terms = groups_alone(scored)
    cfg = tiny.step_config(updates=2, noise_groups=PROMPTS // 2)
    _, metrics = run(cfg, scored, tx=RECORD)
    # denominators are per mini-batch: rescale each half's terms from the whole batch's denominator
    weight = np.asarray(scored.rollout.response_length).sum(1)
    halves = [
        terms[half::2] * weight.sum() / weight[half::2].sum() for half in (0, 1)
    ]  # weights average 1 in each response, so denominators are token counts
    expected = np.mean([len(h) * h.var(axis=0, ddof=1).sum() for h in halves])
    assert metrics["update/grad_variance"] == pytest.approx(expected, rel=1e-3)


def test_without_signal_there_is_no_variance(scored):
    equal = scored.replace(reward=np.zeros_like(scored.reward))
    _, metrics = run(tiny.step_config(noise_groups=PROMPTS), equal)
    assert metrics["update/grad_variance"] == metrics["update/grad_noise"] == 0


def test_unequal_parts_are_unbiased():
    """Parts of 1, 2 and 5 groups: over many draws the estimate averages to the true variance of the sum."""
    rng = np.random.default_rng(0)
    mean, spread, sizes = np.array([0.3, -0.2, 0.1]), 0.7, (1, 2, 5)
    found = []
    for _ in range(3000):
        groups = mean + spread * rng.normal(size=(8, 3))
        parts = np.split(groups, np.cumsum(sizes)[:-1])
        squares = sum((part.sum(0) ** 2).sum() for part in parts)
        norm = np.linalg.norm(groups.sum(0))
        counts = float(sum(n * n for n in sizes))
        values = gradient_noise(np.float32(squares), np.float32(counts), np.float32(norm), 8)
        found.append(float(values["update/grad_variance"]))
    expected = 8 * 3 * spread**2
    assert np.mean(found) == pytest.approx(expected, abs=4 * np.std(found) / np.sqrt(len(found)))


def test_several_ways_measure_the_same_order(scored):
    """Two ways: parts of two groups, the same gradient, an estimate of the same variance."""
    cfg = tiny.step_config(noise_groups=PROMPTS)
    one, two = run(cfg, scored)[1], run(cfg, scored, shape=(2, 1, 1))[1]
    assert two["update/grad_norm"] == pytest.approx(one["update/grad_norm"], rel=1e-4)
    assert 0.1 < two["update/grad_variance"] / one["update/grad_variance"] < 10


def test_one_micro_batch_has_no_variance_and_is_refused():
    raw = {
        "name": "x", "model": {"source": "x"}, "train": {"measure_noise": True},
        "rollout": {"prompts_per_step": 2},
    }  # fmt: skip
    config = config_lib.from_overrides(raw)
    check_sizes(config, types.SimpleNamespace(mesh=tiny.mesh(1)))
    with pytest.raises(UserError, match=r"measure_noise: rollout\.prompts_per_step 2 on 2 ways"):
        check_sizes(config, types.SimpleNamespace(mesh=tiny.mesh(2)))


def test_metrics_only_when_asked(scored):
    assert "update/grad_noise" not in run(dataclasses.replace(tiny.step_config()), scored)[1]
