"""Region weights against a NumPy oracle of docs/method.md section 4."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rest_jax.config import WeightsConfig
from rest_jax.rl import weights
from rest_jax.tool_calls import NUM_REGIONS, Region
from tests.rl.regional import COUNT, ENTROPY, GINI, stats


def oracle(rule, entropy, gini, count, cfg):
    raw = {
        "inverse_bound": lambda h, g: 1 / (1 - math.exp(-max(h, cfg.entropy_floor))),
        "inverse_entropy": lambda h, g: 1 / max(h, cfg.entropy_floor),
        "inverse_gini": lambda h, g: 1 / max(g, 1 - math.exp(-cfg.entropy_floor)),
    }[rule]
    followed = [Region[name.upper()] for name in cfg.entropy_regions]
    weight = {r: raw(float(entropy[r]), float(gini[r])) for r in followed if count[r] > 0}
    mean = sum(weight[r] * count[r] for r in weight) / sum(count[r] for r in weight)
    scaled = [weight[r] / mean if r in weight else 1.0 for r in Region]
    return [0.0] + [min(max(x, cfg.w_min), cfg.w_max) for x in scaled[1:]]


@pytest.mark.parametrize("rule", ["inverse_bound", "inverse_entropy", "inverse_gini"])
def test_entropy_rules(rule):
    cfg = WeightsConfig(rule=rule)
    got = jax.jit(weights.base_weights, static_argnums=1)(stats(), cfg)
    np.testing.assert_allclose(got, oracle(rule, ENTROPY, GINI, COUNT, cfg), rtol=2e-5)
    assert float(np.dot(got, COUNT)) == pytest.approx(COUNT.sum())  # the mean is one
    assert got[Region.RESPONSE] == got[Region.OTHER] == 1


@pytest.mark.parametrize("regions", [("name",), ("think", "other"), ()])
def test_the_regions_that_follow_their_entropy(regions):
    cfg = WeightsConfig(entropy_regions=regions, w_min=1e-6)
    got = weights.base_weights(stats(), cfg)
    if regions:
        expected = oracle("inverse_bound", ENTROPY, GINI, COUNT, cfg)
        np.testing.assert_allclose(got, expected, rtol=2e-5)
    others = [r for r in Region if r and r.name.lower() not in regions]
    assert all(got[r] == 1 for r in others)


def test_clips():
    cfg = WeightsConfig(w_min=0.5, w_max=3.0)
    got = np.asarray(weights.base_weights(stats(), cfg))
    np.testing.assert_allclose(got, oracle("inverse_bound", ENTROPY, GINI, COUNT, cfg), rtol=2e-5)
    assert {0.5, 3.0} <= set(got.tolist())


def test_entropy_floor_bounds_the_weight_of_a_certain_region():
    sure = ENTROPY.at[Region.NAME].set(0.0)
    cfg = WeightsConfig(w_max=1000.0, w_min=1e-6)
    got = weights.base_weights(stats(sure), cfg)
    ratio = float(got[Region.NAME] / got[Region.THINK])
    assert ratio == pytest.approx((1 - math.exp(-1.5)) / (1 - math.exp(-1e-3)), rel=1e-4)


def test_constant_and_uniform():
    got = weights.base_weights(stats(), WeightsConfig(rule="uniform"))
    np.testing.assert_array_equal(got, [0, 1, 1, 1, 1, 1, 1, 1])
    got = weights.base_weights(stats(), WeightsConfig(rule="constant"))
    np.testing.assert_allclose(got, [0, 1.0, 1.0, 1.2, 0.6, 0.6, 0.6, 1.0])


def test_a_region_not_yet_measured_has_weight_one_and_does_not_enter_the_mean():
    count = COUNT.copy()
    count[Region.NAME] = 0
    cfg = WeightsConfig()
    got = weights.base_weights(stats(count=count), cfg)
    assert got[Region.NAME] == 1
    expected = oracle("inverse_bound", ENTROPY, GINI, count, cfg)
    np.testing.assert_allclose(got, expected, rtol=2e-5)
    got = weights.base_weights(stats(count=0 * COUNT), cfg)
    np.testing.assert_array_equal(got, [0, 1, 1, 1, 1, 1, 1, 1])


@pytest.fixture
def tokens():
    rng = np.random.default_rng(0)
    length = np.array([[12, 5, 1], [7, 12, 3]])
    region = rng.integers(1, NUM_REGIONS, (2, 3, 12))
    region = np.where(np.arange(12) < length[..., None], region, 0).astype(np.int8)
    table = np.array([0, 1.0, 0.5, 1.2, 0.6, 0.7, 0.0, 0.3], np.float32)
    return region, table


@pytest.mark.parametrize("normalizer", ["all_tokens", "positive_tokens", "batch", "none"])
def test_token_weights(tokens, normalizer):
    region, table = tokens
    got = np.asarray(weights.token_weights(jnp.asarray(region), jnp.asarray(table), normalizer))
    for p, g in np.ndindex(2, 3):
        w = table[region[p, g]]
        mean = {
            "all_tokens": w.sum() / (region[p, g] != 0).sum(),
            "positive_tokens": w.sum() / max((w > 0).sum(), 1) + 1e-8,
            "batch": table[region].sum() / (region != 0).sum(),
            "none": 1.0,
        }[normalizer]
        np.testing.assert_allclose(got[p, g], w / mean, rtol=1e-5)
    assert (got[region == 0] == 0).all()


def test_region_stats_and_realised_weight_shares(tokens):
    region, table = tokens
    rng = np.random.default_rng(1)
    entropy, gini = (rng.random(region.shape).astype(np.float32) for _ in range(2))
    found = weights.region_stats(jnp.asarray(region), jnp.asarray(entropy), jnp.asarray(gini))
    weight = table[region]
    mean, share = weights.realised(jnp.asarray(region), jnp.asarray(weight))
    for r in range(1, NUM_REGIONS):
        here = region == r
        assert float(found.count[r]) == here.sum()
        np.testing.assert_allclose(found.entropy[r], entropy[here].mean(), rtol=1e-5)
        np.testing.assert_allclose(found.gini[r], gini[here].mean(), rtol=1e-5)
        np.testing.assert_allclose(mean[r], weight[here].mean(), rtol=1e-5)
        np.testing.assert_allclose(share[r], weight[here].sum() / weight.sum(), rtol=1e-5)
    assert (region == 0).any() and found.count[0] == found.entropy[0] == 0  # padding is no token


def test_weights_carry_no_gradient(tokens):
    region, table = tokens
    gradient = jax.grad(
        lambda t: weights.token_weights(jnp.asarray(region), t, "all_tokens").sum()
    )(jnp.asarray(table))
    np.testing.assert_array_equal(gradient, 0.0)
