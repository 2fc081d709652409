"""The curriculum against a NumPy oracle of docs/method.md section 5."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rest_jax.config import CurriculumConfig, WeightsConfig
from rest_jax.rl import curriculum
from rest_jax.tool_calls import Region
from tests.rl.regional import ENTROPY, GINI, stats


def released():
    return curriculum.Schedule(
        WeightsConfig(
            rule="constant", w_min=0.001, w_max=8, scaffold=0, response=0, other=0,
            allow_zero_constants=True, normalizer="positive_tokens",
        ),
        CurriculumConfig(alpha_format=0, alpha_param=0.6, alpha_think=0.6, param_max=1.2, think_max=1.0, steps=300),
        105,
    )  # fmt: skip


@pytest.mark.parametrize("step", [0, 1, 57, 104, 199, 200, 250, 299, 300, 400])
def test_released_preset(step):
    cfg = released()
    state = dataclasses.replace(curriculum.init(cfg), step=jnp.int32(step))
    weight = curriculum.update(state, stats(), jnp.float32(0.5), cfg).weight
    param, think = min(1.2, 0.6 + 0.002 * step), min(1.0, 0.6 + 0.002 * step)
    expected = {
        "TAG": 1.0,
        "NAME": 1.2,
        "PARAM": param,
        "THINK": think,
        "SCAFFOLD": 0,
        "RESPONSE": 0,
        "OTHER": 0,
    }
    for name, value in expected.items():
        assert float(weight[Region[name]]) == pytest.approx(value, abs=1e-5), name


def test_weight_target_moves_as_written():
    cfg = curriculum.Schedule(WeightsConfig(rule="constant"), CurriculumConfig(steps=10), 99)
    state = curriculum.init(cfg)
    for step in range(13):
        state = curriculum.update(state, stats(), jnp.float32(1.0), cfg)
        nu = min(1.0, step / 10)
        assert float(state.nu) == pytest.approx(nu)
        assert float(state.weight[Region.TAG]) == pytest.approx(max(0.1, 1.0 - 0.4 * nu), abs=1e-6)
        assert float(state.weight[Region.PARAM]) == pytest.approx(
            min(4.0, 0.6 + 0.6 * nu), abs=1e-6
        )
        assert float(state.weight[Region.THINK]) == pytest.approx(
            min(4.0, 0.6 + 0.6 * nu), abs=1e-6
        )
        assert float(state.weight[Region.NAME]) == pytest.approx(1.2)


SHAPE_ORACLES = {
    "linear": lambda x: x,
    "cosine": lambda x: 0.5 - 0.5 * math.cos(math.pi * x),
    "sqrt": math.sqrt,
    "step": lambda x: min(math.floor(4 * x), 3) / 3,
    "constant": lambda x: 0.0,
}


@pytest.mark.parametrize("shape", sorted(SHAPE_ORACLES))
def test_progress_shapes(shape):
    cfg = curriculum.Schedule(WeightsConfig(), CurriculumConfig(shape=shape), 8)
    state = curriculum.init(cfg)
    for step in range(12):
        state = curriculum.update(state, stats(), jnp.float32(0.0), cfg)
        assert float(state.nu) == pytest.approx(SHAPE_ORACLES[shape](min(1, step / 8)), abs=1e-6)


def test_adaptive_follows_the_format_score():
    cfg = curriculum.Schedule(
        WeightsConfig(), CurriculumConfig(shape="adaptive", format_ema_decay=0.5), 8
    )
    state, ema = curriculum.init(cfg), None
    for score in (0.2, 0.6, 0.9, 1.0, 1.0, 1.0, 1.0):
        state = curriculum.update(state, stats(), jnp.float32(score), cfg)
        ema = score if ema is None else 0.5 * ema + 0.5 * score
        assert float(state.nu) == pytest.approx(min(max((ema - 0.5) / 0.45, 0), 1), abs=1e-5)


def test_target_mass_holds_its_shares():
    cfg = curriculum.Schedule(
        WeightsConfig(w_min=1e-6, normalizer="none"), CurriculumConfig(target="mass", steps=4), 4
    )
    count = np.array([0, 30, 50, 10, 60, 300, 0, 0], np.float32)
    state = curriculum.init(cfg)
    for step in range(6):
        state = curriculum.update(state, stats(count=count), jnp.float32(1.0), cfg)
        nu = min(1, step / 4)
        found = np.asarray(state.weight) * count
        found /= found.sum()
        share = {r: a + (b - a) * nu for r, (a, b) in
                 {"fmt": (0.2, 0.05), "name": (0.25, 0.25), "param": (0.25, 0.3), "think": (0.3, 0.4)}.items()}  # fmt: skip
        total = sum(share.values())  # RESPONSE and OTHER do not occur: their part goes to the rest
        assert found[Region.TAG] + found[Region.SCAFFOLD] == pytest.approx(
            share["fmt"] / total, rel=1e-4
        )
        for name in ("name", "param", "think"):
            assert found[Region[name.upper()]] == pytest.approx(share[name] / total, rel=1e-4)


def test_absent_region_keeps_its_averages():
    cfg = curriculum.Schedule(WeightsConfig(ema_decay=0.9), CurriculumConfig(), 8)
    state = curriculum.update(curriculum.init(cfg), stats(), jnp.float32(1.0), cfg)
    absent = np.array([0, 30, 40, 0, 50, 200, 20, 5], np.float32)
    new = curriculum.update(state, stats(ENTROPY * 2, GINI, absent), jnp.float32(1.0), cfg)
    assert float(new.entropy[Region.NAME]) == float(state.entropy[Region.NAME])
    assert float(new.entropy[Region.THINK]) == pytest.approx(0.9 * 1.5 + 0.1 * 3.0)


def test_a_region_whose_entropy_is_not_finite_keeps_its_averages():
    cfg = curriculum.Schedule(WeightsConfig(), CurriculumConfig(), 8)
    state = curriculum.update(curriculum.init(cfg), stats(), jnp.float32(1.0), cfg)
    for broken in (np.nan, np.inf):
        new = curriculum.update(state, stats(ENTROPY * broken, GINI), jnp.float32(1.0), cfg)
        np.testing.assert_array_equal(new.entropy, state.entropy)
        np.testing.assert_array_equal(new.gini, state.gini)
        assert np.isfinite(new.weight).all() and int(new.step) == int(state.step) + 1


def test_every_policy_token_keeps_a_weight_unless_zeroed_by_name():
    cfg = curriculum.Schedule(WeightsConfig(), CurriculumConfig(alpha_format=50.0, steps=1), 1)
    state = curriculum.init(cfg)
    for _ in range(3):
        state = curriculum.update(state, stats(), jnp.float32(1.0), cfg)
    assert float(jnp.min(state.weight[1:])) >= 0.1 - 1e-7
    ablated = dataclasses.replace(cfg, weights=WeightsConfig(zero=("think",)))
    weight = curriculum.region_weights(state, ablated)
    assert float(weight[Region.THINK]) == 0.0
    assert float(weight[Region.PARAM]) > 0.0


def test_tuned_preset_starts_where_it_says():
    cfg = curriculum.Schedule(
        WeightsConfig(), CurriculumConfig(start_param=1.0, start_think=0.9, steps=5), 50
    )
    state = curriculum.update(curriculum.init(cfg), stats(), jnp.float32(1.0), cfg)
    assert float(state.weight[Region.PARAM]) == pytest.approx(1.0)
    assert float(state.weight[Region.THINK]) == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("options", "steps"),
    [({}, 105), ({"run_fraction": 0.5}, 52), ({"run_fraction": 0.001}, 1), ({"steps": 7}, 7)],
)
def test_length_of_the_ramp(options, steps):
    assert curriculum.Schedule(WeightsConfig(), CurriculumConfig(**options), 105).steps == steps


def test_state_is_a_fixed_point_of_jit():
    cfg = curriculum.Schedule(WeightsConfig(), CurriculumConfig(), 8)
    eager = curriculum.update(curriculum.init(cfg), stats(), jnp.float32(0.3), cfg)
    jitted = jax.jit(curriculum.update, static_argnums=3)(
        curriculum.init(cfg), stats(), jnp.float32(0.3), cfg
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), eager, jitted)


def test_the_share_of_a_region_that_pauses_or_comes_late_does_not_grow():
    cfg = curriculum.Schedule(
        WeightsConfig(w_min=1e-6), CurriculumConfig(target="mass", shape="constant"), 9
    )
    full = np.array([0, 30, 50, 10, 60, 300, 5, 5], np.float32)
    without = full.copy()
    without[Region.NAME] = 0
    state = curriculum.update(curriculum.init(cfg), stats(count=full), jnp.float32(1.0), cfg)
    before = float(state.weight[Region.NAME] / state.weight[Region.THINK])
    for _ in range(20):
        state = curriculum.update(state, stats(count=without), jnp.float32(1.0), cfg)
    assert float(state.weight[Region.NAME] / state.weight[Region.THINK]) == pytest.approx(
        before, rel=1e-4
    )
    late = curriculum.update(curriculum.init(cfg), stats(count=without), jnp.float32(1.0), cfg)
    late = curriculum.update(late, stats(count=full), jnp.float32(1.0), cfg)
    assert float(late.weight[Region.NAME] / late.weight[Region.THINK]) == pytest.approx(
        before, rel=1e-4
    )


@pytest.mark.parametrize("target", ["weight", "mass"])
def test_no_curriculum_moves_uniform_weights(target):
    cfg = curriculum.Schedule(
        WeightsConfig(rule="uniform"), CurriculumConfig(target=target, steps=2), 2
    )
    state = curriculum.init(cfg)
    for _ in range(4):
        state = curriculum.update(state, stats(), jnp.float32(1.0), cfg)
    assert float(state.nu) == 1.0
    np.testing.assert_array_equal(state.weight, [0, 1, 1, 1, 1, 1, 1, 1])
