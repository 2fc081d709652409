"""The curriculum against a NumPy oracle of docs/method.md section 5, and what it is said to do."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rest_jax.config import CurriculumConfig, WeightsConfig
from rest_jax.rl import curriculum, weights
from rest_jax.tool_calls import NUM_REGIONS, Region
from tests.rl.regional import COUNT, ENTROPY, GINI, stats

FORMAT = [Region.TAG, Region.SCAFFOLD]
GAINING = [Region.PARAM, Region.THINK]
CONSTANT = [Region.NAME, Region.RESPONSE, Region.OTHER]


def after(cfg, *batches, format_score=1.0):
    """The state when these batches have been taken in."""
    state = curriculum.init(cfg)
    for batch in batches:
        state = curriculum.update(state, batch, jnp.float32(format_score), cfg)
    return state


def without(*regions, count=COUNT):
    """Counts of a batch in which these regions do not occur."""
    count = count.copy()
    count[list(regions)] = 0
    return count


def shares(state, count=COUNT):
    """What each region gets of the total weight of a batch with these counts."""
    total = np.asarray(state.weight, np.float64) * count
    return total / total.sum()


def schedule(target="share", steps=10, weight=None, **options):
    """A schedule whose clips do not bind unless given."""
    weight = {"w_min": 1e-6, "w_max": 1e6} | (weight or {})
    return curriculum.Schedule(
        WeightsConfig(**weight), CurriculumConfig(target=target, steps=steps, **options), 99
    )


def released():
    return curriculum.Schedule(
        WeightsConfig(
            rule="constant", w_min=0.001, w_max=8, scaffold=0, response=0, other=0,
            allow_zero_constants=True, normalizer="positive_tokens",
        ),
        CurriculumConfig(target="weight", alpha_format=0, alpha_param=0.6, alpha_think=0.6,
                         param_max=1.2, think_max=1.0, steps=300),
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
    cfg = curriculum.Schedule(
        WeightsConfig(rule="constant", w_min=0.1),
        CurriculumConfig(target="weight", alpha_format=1.2, param_max=1.0, steps=10),
        99,
    )
    for step in range(13):
        state = after(cfg, *[stats()] * (step + 1))
        nu = min(1.0, step / 10)
        expected = {
            "TAG": max(0.1, 1.0 - 1.2 * nu),
            "SCAFFOLD": max(0.1, 1.0 - 1.2 * nu),
            "NAME": 1.2,
            "PARAM": min(1.0, 0.6 + 0.6 * nu),
            "THINK": 0.6 + 0.6 * nu,
            "RESPONSE": 0.6,
            "OTHER": 1.0,
        }
        assert float(state.nu) == pytest.approx(nu)
        np.testing.assert_allclose(state.weight, [0, *expected.values()], atol=1e-6)


def share_oracle(batches, steps, alpha, decay):
    """Region weights after each batch (entropy, count): docs/method.md sections 4 and 5, entropies of the first batch."""
    entropy, first = batches[0]
    followed = range(1, 6)  # TAG to THINK
    base = np.ones(NUM_REGIONS)
    base[followed] = [1 / (1 - math.exp(-max(entropy[r], 1e-3))) for r in followed]
    base[followed] *= first[followed].sum() / (base * first)[followed].sum()
    start = base * first / (base * first).sum()
    average = first.astype(np.float64)
    for step, (_, count) in enumerate(batches):
        average = average if step == 0 else decay * average + (1 - decay) * count
        nu = min(1, step / steps)
        share = start.copy()
        share[FORMAT] *= 1 - alpha * nu
        freed = alpha * nu * start[FORMAT].sum()
        share[GAINING] += freed * start[GAINING] / start[GAINING].sum()
        yield share[1:] / (average[1:] / average.sum())


def drifting_batches(steps, rng):
    """(entropy, count) by step: entropies fall, that of JSON most; completions grow and their regions move apart."""
    drift = np.array([0, 0.0, -0.3, 0.1, 0.2, 0.8, -0.2, -0.5])
    for step in range(steps):
        x = step / steps
        fall = np.array([0, 0.5, 0.99, 0.2, 0.3, 0.5, 0, 0]) * min(1, 2 * x)
        entropy = np.asarray(ENTROPY) * (1 - fall)
        count = rng.poisson(20 * COUNT * np.exp(drift * x))
        yield entropy.astype(np.float32), count.astype(np.float32)


def test_share_target_is_the_formula():
    cfg = schedule(steps=6)
    batches = list(drifting_batches(10, np.random.default_rng(0)))
    state = curriculum.init(cfg)
    for (entropy, count), expected in zip(
        batches, share_oracle(batches, 6, 0.75, 0.5), strict=True
    ):
        state = curriculum.update(state, stats(entropy, GINI, count), jnp.float32(1.0), cfg)
        np.testing.assert_allclose(state.weight[1:], expected, rtol=2e-5)


def realised_shares(cfg, steps):
    """[steps, R]: of the weights that the tokens of drifting batches get, normaliser and clips included."""

    @jax.jit
    def step(state, region, batch):
        state = curriculum.update(state, batch, jnp.float32(1.0), cfg)
        weight = weights.token_weights(region, state.weight, cfg.normalizer)
        return state, weights.realised(region, weight)[1]

    rng, state, found = np.random.default_rng(1), curriculum.init(cfg), []
    for entropy, count in drifting_batches(steps, rng):
        region = np.zeros(16_000, np.int8)
        placed = np.repeat(np.arange(NUM_REGIONS), count.astype(int))
        region[: len(placed)] = rng.permutation(placed)
        region = jnp.asarray(region.reshape(4, 4, 1000))
        state, share = step(state, region, stats(entropy, GINI, count))
        found.append(share)
    return np.array(found)


def test_what_is_said_of_rest_holds_of_the_realised_shares():
    """Format falls, parameters and reasoning rise, names stay within 5 %, though entropies and counts move."""
    steps = 24
    found = realised_shares(curriculum.Schedule(WeightsConfig(), CurriculumConfig(), steps), steps)
    first, last = found[:6].mean(0), found[-6:].mean(0)
    assert last[FORMAT].sum() < 0.6 * first[FORMAT].sum()
    assert (last[GAINING] > 1.2 * first[GAINING]).all()
    names = found[:, Region.NAME].reshape(6, 4).mean(1)
    np.testing.assert_allclose(names, names[0], rtol=0.05)


def test_running_entropies_do_the_opposite():
    """What becomes certain is weighted up: JSON, whose entropy falls most, holds more at the end, without a curriculum."""
    options = CurriculumConfig(shape="constant")
    running = curriculum.Schedule(WeightsConfig(entropy="running"), options, 24)
    fixed = curriculum.Schedule(WeightsConfig(), options, 24)
    moved, stayed = (realised_shares(cfg, 24)[:, Region.SCAFFOLD] for cfg in (running, fixed))
    assert moved[-1] > 1.5 * moved[0]
    assert stayed[-1] == pytest.approx(stayed[0], rel=0.15)


@pytest.mark.parametrize(
    ("freed_to", "absent", "parts"),
    [
        (None, (), None),
        ((1, 3), (), (0.25, 0.75)),
        ((0, 2), (), (0, 1)),
        (None, (Region.THINK,), (1, 0)),
        ((1, 3), (Region.THINK,), (1, 0)),
        ((0, 2), (Region.THINK,), (0, 0)),  # the one that is to gain has not been seen
        (None, (Region.THINK, Region.PARAM), (0, 0)),
        ((1, 3), (Region.NAME, Region.TAG), (0.25, 0.75)),
    ],
)
def test_who_gets_what_format_gives_up(freed_to, absent, parts):
    cfg = schedule(steps=1, freed_to=freed_to)
    count = without(*absent)
    first, last = (after(cfg, *[stats(count=count)] * n) for n in (1, 2))
    before, now = shares(first, count), shares(last, count)
    if parts is None:
        parts = before[GAINING] / before[GAINING].sum()
    fall = 0.75 if sum(parts) else 0.0
    np.testing.assert_allclose(now[FORMAT], (1 - fall) * before[FORMAT], rtol=1e-5)
    np.testing.assert_allclose(now[CONSTANT], before[CONSTANT], rtol=1e-5)
    freed = fall * before[FORMAT].sum()
    np.testing.assert_allclose(now[GAINING], before[GAINING] + freed * np.array(parts), rtol=1e-5)
    assert all(float(state.weight[r]) == 1 for state in (first, last) for r in absent)


def test_the_start_shares_are_those_of_the_base_weights():
    cfg = curriculum.Schedule(WeightsConfig(), CurriculumConfig(), 9)
    base = np.asarray(weights.base_weights(stats(), cfg.weights))
    np.testing.assert_allclose(after(cfg, stats()).weight, base, rtol=1e-5)
    total = base * COUNT
    np.testing.assert_allclose(shares(after(cfg, stats())), total / total.sum(), rtol=1e-5)


def test_a_region_that_comes_late_is_measured_then_and_takes_its_share_from_all():
    cfg = schedule(shape="constant")
    early = stats(ENTROPY, GINI, without(Region.NAME, Region.OTHER))
    late = after(cfg, early, early, stats())
    at_once = after(cfg, stats())
    np.testing.assert_array_equal(late.entropy, at_once.entropy)
    np.testing.assert_allclose(shares(late), shares(at_once), rtol=1e-5)
    again = curriculum.update(late, stats(ENTROPY * 2), jnp.float32(1.0), cfg)
    np.testing.assert_array_equal(again.entropy, late.entropy)


@pytest.mark.parametrize("target", ["share", "mass"])
def test_the_weight_of_a_region_that_pauses_or_comes_late_does_not_grow(target):
    cfg = schedule(target, shape="constant")
    full, paused = stats(), stats(count=without(Region.NAME))
    state = after(cfg, full)
    before = float(state.weight[Region.NAME] / state.weight[Region.THINK])
    for state in (after(cfg, full, *[paused] * 20), after(cfg, paused, full)):
        found = float(state.weight[Region.NAME] / state.weight[Region.THINK])
        assert found == pytest.approx(before, rel=1e-4)


def test_entropies_of_the_start_are_means_over_the_tokens_of_the_first_steps():
    cfg = schedule(weight={"entropy_steps": 2})
    paused = without(Region.NAME)
    batches = [stats(), stats(3 * ENTROPY, GINI / 2, 2 * paused), stats(5 * ENTROPY, GINI, COUNT)]
    state = after(cfg, *batches, stats(9 * ENTROPY))
    expected = (1 * 1 + 3 * 2) / 3 * np.asarray(ENTROPY)  # twice the tokens in the second
    expected[Region.NAME] = (1 + 5) / 2 * ENTROPY[Region.NAME]  # its second batch is the third
    np.testing.assert_allclose(state.entropy, expected, rtol=1e-5)
    gini = (1 * 1 + 0.5 * 2) / 3 * np.asarray(GINI)
    gini[Region.NAME] = GINI[Region.NAME]
    np.testing.assert_allclose(state.gini, gini, rtol=1e-5)
    count = 1.5 * COUNT
    count[Region.NAME] = COUNT[Region.NAME]
    np.testing.assert_allclose(state.base_count, count, rtol=1e-5)
    assert state.seen.tolist() == [0, 4, 4, 3, 4, 4, 4, 4]


def test_a_run_that_starts_anew_measures_anew():
    """As the tuned preset does on the policy that a supervised run made."""
    cfg = schedule()
    np.testing.assert_array_equal(curriculum.init(cfg).seen, 0)
    np.testing.assert_array_equal(after(cfg, stats(2 * ENTROPY)).entropy, 2 * ENTROPY)


def test_running_entropies_are_moving_averages():
    cfg = schedule(weight={"entropy": "running", "ema_decay": 0.9})
    state = after(cfg, stats(), stats(ENTROPY * 2, GINI * 2, without(Region.NAME, count=2 * COUNT)))
    assert float(state.entropy[Region.NAME]) == float(ENTROPY[Region.NAME])
    assert float(state.entropy[Region.THINK]) == pytest.approx(0.9 * 1.5 + 0.1 * 3.0)
    assert float(state.gini[Region.THINK]) == pytest.approx(0.9 * 0.6 + 0.1 * 1.2)
    assert float(state.base_count[Region.THINK]) == pytest.approx(0.9 * 200 + 0.1 * 400)
    assert float(state.count[Region.THINK]) == pytest.approx(0.5 * 200 + 0.5 * 400)


SHAPE_ORACLES = {
    "linear": lambda x: x,
    "cosine": lambda x: 0.5 - 0.5 * math.cos(math.pi * x),
    "sqrt": math.sqrt,
    "step": lambda x: min(math.floor(4 * x), 3) / 3,
    "constant": lambda x: 0.0,
}


@pytest.mark.parametrize("shape", sorted(SHAPE_ORACLES))
def test_progress_shapes(shape):
    cfg = schedule(steps=8, shape=shape)
    state = curriculum.init(cfg)
    for step in range(12):
        state = curriculum.update(state, stats(), jnp.float32(0.0), cfg)
        assert float(state.nu) == pytest.approx(SHAPE_ORACLES[shape](min(1, step / 8)), abs=1e-6)


def test_adaptive_follows_the_format_score():
    cfg = schedule(shape="adaptive", format_ema_decay=0.5)
    state, ema = curriculum.init(cfg), None
    for score in (0.2, 0.6, 0.9, 1.0, 1.0, 1.0, 1.0):
        state = curriculum.update(state, stats(), jnp.float32(score), cfg)
        ema = score if ema is None else 0.5 * ema + 0.5 * score
        assert float(state.nu) == pytest.approx(min(max((ema - 0.5) / 0.45, 0), 1), abs=1e-5)


def test_target_mass_holds_its_shares():
    cfg = schedule("mass", steps=4)
    count = without(Region.RESPONSE, Region.OTHER)
    for step in range(6):
        found = shares(after(cfg, *[stats(count=count)] * (step + 1)), count)
        nu = min(1, step / 4)
        expected = {Region.NAME: (0.25, 0.25), Region.PARAM: (0.25, 0.3), Region.THINK: (0.3, 0.4)}
        for region, (start, end) in expected.items():
            assert found[region] == pytest.approx(start + (end - start) * nu, rel=1e-4)
        assert found[FORMAT].sum() == pytest.approx(0.2 - 0.15 * nu, rel=1e-4)


@pytest.mark.parametrize("entropy", ["start", "running"])
def test_a_region_whose_entropy_is_not_finite_keeps_what_was_measured(entropy):
    cfg = schedule(weight={"entropy": entropy, "entropy_steps": 5})
    state = after(cfg, stats())
    for broken in (np.nan, np.inf):
        new = curriculum.update(state, stats(ENTROPY * broken, GINI), jnp.float32(1.0), cfg)
        for name in ("entropy", "gini", "base_count", "seen", "count"):
            np.testing.assert_array_equal(getattr(new, name), getattr(state, name))
        assert np.isfinite(new.weight).all() and int(new.step) == int(state.step) + 1


@pytest.mark.parametrize("target, alpha", [("share", 1.0), ("weight", 50.0), ("mass", 0.0)])
def test_every_policy_token_keeps_a_weight_unless_zeroed_by_name(target, alpha):
    cfg = curriculum.Schedule(
        WeightsConfig(), CurriculumConfig(target=target, alpha_format=alpha, steps=1), 1
    )
    state = after(cfg, *[stats()] * 3)
    assert float(jnp.min(state.weight[1:])) >= 0.02 - 1e-7
    ablated = dataclasses.replace(cfg, weights=WeightsConfig(zero=("think",)))
    weight = curriculum.region_weights(state, ablated)
    np.testing.assert_array_equal(weight, state.weight.at[Region.THINK].set(0.0))


@pytest.mark.parametrize(
    ("options", "steps"),
    [({}, 105), ({"run_fraction": 0.5}, 52), ({"run_fraction": 0.001}, 1), ({"steps": 7}, 7)],
)
def test_length_of_the_ramp(options, steps):
    assert curriculum.Schedule(WeightsConfig(), CurriculumConfig(**options), 105).steps == steps


@pytest.mark.parametrize("target", ["share", "weight", "mass"])
def test_state_is_a_fixed_point_of_jit(target):
    cfg = schedule(target)
    eager = after(cfg, stats(), format_score=0.3)
    jitted = jax.jit(curriculum.update, static_argnums=3)(
        curriculum.init(cfg), stats(), jnp.float32(0.3), cfg
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), eager, jitted)
    like = jax.tree.map(lambda x: (x.shape, x.dtype), (curriculum.init(cfg), jitted))
    assert like[0] == like[1]


@pytest.mark.parametrize("target", ["share", "weight", "mass"])
def test_no_curriculum_moves_uniform_weights(target):
    cfg = schedule(target, steps=2, weight={"rule": "uniform"})
    state = after(cfg, *[stats()] * 4)
    assert float(state.nu) == 1.0
    np.testing.assert_array_equal(state.weight, [0, 1, 1, 1, 1, 1, 1, 1])
