"""Schedules and the weight-decay mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rest_jax.config import OptimizerConfig
from rest_jax.models.config import DecoderConfig
from rest_jax.models.decoder import init_params
from rest_jax.rl.optimizer import decay_mask, learning_rate, make_optimizer


def test_only_matrices_decay():
    cfg = DecoderConfig("qwen2", 32, 16, 2, 2, 2, 8, 32, qkv_bias=True, qk_norm=True, tied=False)
    mask = jax.tree_util.tree_leaves_with_path(decay_mask(init_params(cfg, jax.random.key(0))))
    decayed = {str(path[-1].key) for path, value in mask if value}
    spared = {str(path[-1].key) for path, value in mask if not value}
    assert decayed == {"embed", "head", "q", "k", "v", "o", "gate", "up", "down"}
    assert spared == {"scale", "q_bias", "k_bias", "v_bias"}


@pytest.mark.parametrize("schedule, end", [("constant", 1.0), ("cosine", 0.1), ("linear", 0.1)])
def test_warm_up_peak_and_end(schedule, end):
    cfg = OptimizerConfig(
        learning_rate=2.0, schedule=schedule, warmup_fraction=0.1, final_fraction=0.1
    )
    rate = learning_rate(cfg, 100)
    assert [float(rate(i)) for i in range(10)] == pytest.approx([0.2 * i for i in range(1, 11)])
    assert float(rate(10)) == pytest.approx(2.0)
    assert float(rate(100)) == pytest.approx(2.0 * end)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
@pytest.mark.parametrize("updates", [1, 2, 7, 30])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.5, 1.0])
def test_every_update_has_an_effect(schedule, updates, warmup):
    """Also the first one, and the last one of a decay to 0."""
    cfg = OptimizerConfig(learning_rate=2.0, schedule=schedule, warmup_fraction=warmup)
    rates = np.array([learning_rate(cfg, updates)(i) for i in range(updates)])
    assert (rates > 0).all() and rates.max() == pytest.approx(2.0)


def test_the_first_update_of_a_warm_up_changes_the_weights():
    cfg = OptimizerConfig(learning_rate=2.0, warmup_fraction=0.25, weight_decay=0.0)
    tx, params = make_optimizer(cfg, 8), {"up": jnp.ones((2, 2))}
    updates, _ = tx.update(params, tx.init(params), params)
    np.testing.assert_allclose(
        updates["up"], -1.0, rtol=1e-4
    )  # half of the peak: AdamW's first step is the rate


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
@pytest.mark.parametrize("warmup", [0.0, 0.1])
def test_the_rate_that_a_state_tells_is_that_of_its_next_update(schedule, warmup):
    cfg = OptimizerConfig(learning_rate=2.0, schedule=schedule, warmup_fraction=warmup)
    tx, params = make_optimizer(cfg, 30), {"up": jnp.ones((2, 2))}
    opt_state = tx.init(params)
    for i in range(30):
        assert float(tx.rate(opt_state)) == pytest.approx(float(learning_rate(cfg, 30)(i)))
        _, opt_state = tx.update(params, opt_state, params)
