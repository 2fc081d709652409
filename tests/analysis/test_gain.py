"""One-step gain: coefficients by hand, gradients however they are packed, slopes, intervals, the command."""

import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from rest_jax import cli
from rest_jax.analysis.arms import make_arms
from rest_jax.analysis.gain import (
    PARTS,
    Measured,
    _along,
    _cosine,
    gain_rows,
    make_ascend,
    measure,
    reinforce,
    table,
)
from rest_jax.config import Config, ConfigError
from rest_jax.rl.view import centre
from rest_jax.types import RolloutBatch, ScoredBatch
from tests import tiny

TOKENIZER: Any = None  # that of rules which read phrases


@pytest.fixture(scope="module")
def config() -> Config:
    return Config.model_validate(
        {"name": "x", "model": {"source": "x"}, "loss": {"vocab_chunk": 8}}
    )


@pytest.fixture(scope="module")
def scored() -> ScoredBatch:
    """Four groups of random tokens, regions and rewards."""
    rng, shape = np.random.default_rng(0), (4, tiny.GROUP, tiny.TIME)
    prompts = tiny.prompts(4)
    length = rng.integers(3, tiny.TIME + 1, shape[:2]).astype(np.int32)
    mask = np.arange(tiny.TIME) < length[..., None]

    def inside(x):
        return np.where(mask, x, 0)

    entropy = rng.uniform(0.05, 1, shape).astype(np.float32)
    values = (inside(x).astype(np.float32) for x in (-entropy, entropy, entropy / 2))
    ids = inside(rng.integers(6, tiny.VOCAB, shape)).astype(np.int32)
    rollout = RolloutBatch(prompts.tokens, prompts.length, ids, length, *values)
    reward = rng.normal(size=shape[:2]).astype(np.float32)
    parts = np.stack([reward, 0 * reward, 0 * reward, 0 * reward], axis=-1)
    region = inside(rng.integers(1, 8, shape)).astype(np.int8)
    return ScoredBatch(rollout, region, reward, np.ones_like(reward), parts, exact=reward > 0)


def test_reinforce_leaves_one_out():
    reward = np.random.default_rng(0).normal(size=(3, 4))
    found = reinforce(reward)
    for p, g in np.ndindex(3, 4):
        others = [reward[p, j] for j in range(4) if j != g]
        assert found[p, g] == pytest.approx((reward[p, g] - np.mean(others)) / 12, rel=1e-5)


def test_coefficients_of_grpo_are_advantages_over_tokens(config, scored):
    (arm,) = make_arms(config, ["dr_grpo"], groups=4)
    weight, coefficient = arm(scored, TOKENIZER)
    mask = np.asarray(scored.rollout.mask)
    np.testing.assert_array_equal(weight, mask)
    advantage = np.asarray(centre(jnp.asarray(scored.reward)))[..., None]
    count = scored.reward.size * config.rollout.max_response_tokens
    np.testing.assert_allclose(coefficient, mask * advantage / count, rtol=1e-5, atol=1e-9)


def test_a_method_with_a_curriculum_has_two_arms_and_a_placebo_more(config, scored):
    arms = make_arms(config, ["grpo", "rest"], ["shuffle"], groups=4)
    names = ["grpo", *(f"rest{kind}, nu {n}" for kind in ("", "+shuffle") for n in (0, 1))]
    assert [arm.name for arm in arms] == names
    assert [arm.placebo_of for arm in arms] == [None, None, None, "rest, nu 0", "rest, nu 1"]
    weight = {arm.name: arm(scored, TOKENIZER)[0] for arm in arms}
    assert np.abs(weight["rest, nu 1"] - weight["rest, nu 0"]).max() > 0.01
    for own, other in ((weight["rest, nu 0"], weight["rest+shuffle, nu 0"]),):
        np.testing.assert_allclose(np.sort(own, axis=-1), np.sort(other, axis=-1), rtol=1e-6)


@pytest.mark.parametrize("method", ["sft", "rests"])
def test_what_is_no_method_of_reinforcement_learning_is_refused(config, method):
    with pytest.raises(ConfigError, match=method):
        make_arms(config, [method])


@pytest.mark.parametrize("methods", [["rest"], ["grpo"]])
def test_what_is_no_placebo_is_refused(config, methods):
    with pytest.raises(ConfigError, match="placebo: 'shufle': Input should be 'none', 'shuffle'"):
        make_arms(config, methods, ["shuffle", "shufle"])


def test_methods_have_names_of_their_own(config, tmp_path):
    """Results are known by them; the same file under another word is the same method."""
    words = ["grpo", "rest", "method/rest", "configs/method/grpo.yaml", "rest"]
    names = [arm.name for arm in make_arms(config, words, ["random", "none", "random"])]
    assert names == ["grpo", *(f"rest{kind}, nu {n}" for kind in ("", "+random") for n in (0, 1))]
    own = tmp_path / "rest.yaml"
    own.write_text("weights: {rule: constant}\n")
    assert [arm.name for arm in make_arms(config, [str(own)])] == ["rest, nu 0", "rest, nu 1"]
    with pytest.raises(ConfigError, match=rf"methods rest, {own}: two of the name rest; rename"):
        make_arms(config, ["rest", str(own)])


@pytest.mark.slow
def test_gradients_do_not_depend_on_micro_batches(config, scored):
    """Of every arm at once, and whatever rows hold: the sum of what each group has alone."""
    rng = np.random.default_rng(1)
    coefficient = rng.normal(size=(2, *scored.region.shape)).astype(np.float32)
    coefficient = np.where(scored.region != 0, coefficient, 0.0)
    coefficient[0, 1] = 0

    def gradients(most, own):
        train = config.train.model_copy(update={"max_tokens_per_microbatch": most})
        ascend = make_ascend(
            tiny.decoder(), tiny.params(), config.model_copy(update={"train": train})
        )
        return [ravel_pytree(tree)[0] for tree in ascend(own, scored.rollout)]

    together = gradients(None, coefficient)
    for found, expected in zip(gradients(64, coefficient), together, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    alone = []
    for p in range(4):
        only = np.zeros_like(coefficient)
        only[:, p] = coefficient[:, p]
        alone.append(gradients(None, only))
    for k, expected in enumerate(together):
        total = sum(rows[k] for rows in alone)
        np.testing.assert_allclose(total, expected, atol=1e-5 * np.abs(expected).max())
    assert not np.any(alone[1][0])


def test_slopes():
    part = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[-4.0]])}
    gain, adam = _along(part, [part, jax.tree.map(jnp.negative, part)])
    np.testing.assert_allclose(gain, [5, -5])
    np.testing.assert_allclose(adam, np.array([7, -7]) / np.sqrt(2), rtol=1e-6)
    zero = jax.tree.map(jnp.zeros_like, part)
    np.testing.assert_array_equal(_along(zero, [part]), np.zeros((2, 1)))
    assert float(optax.tree.norm(part)) == 5


def test_the_cosine_of_two_gradients():
    one = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[4.0]])}
    assert float(_cosine(one, jax.tree.map(lambda x: -2 * x, one))) == pytest.approx(-1)
    other = {"a": jnp.array([0.0, 2.0]), "b": jnp.array([[2.0]])}
    assert float(_cosine(one, other)) == pytest.approx(8 / (5 * np.sqrt(8)))
    assert np.isnan(_cosine(one, jax.tree.map(jnp.zeros_like, one)))


def test_rows_compare_arms_on_the_same_resamples():
    """Of two arms that share the noise, one twice as large, the ratio is certain where neither slope is."""
    rng = np.random.default_rng(2)
    noise = 1 + 0.5 * rng.normal(size=(2, 20, 8))
    free = 1 + 0.5 * rng.normal(size=(2, 20, 8))
    cosine = np.array([[1.0, np.nan, 1.0], [0.9, np.nan, 0.7], [0.0, np.nan, -0.2]])
    found = Measured(np.stack([noise, 2 * noise, free], axis=1), cosine)
    rows = gain_rows(found, ["one", "two", "free"], seed=0)
    assert [row["cosine"] for row in rows.values()] == pytest.approx([1, 0.8, -0.1])
    for quantity in ("gain", "adam"):
        assert rows["one"][f"{quantity}_relative"] == 0
        assert rows["two"][f"{quantity}_relative"] == pytest.approx(1)
        np.testing.assert_allclose(rows["two"][f"{quantity}_relative_interval"], 1)
        low, high = rows["free"][f"{quantity}_relative_interval"]
        assert low < 0 < high
        low, high = rows["one"][f"{quantity}_interval"]
        assert low < 1 < high


def test_arms_that_are_equal_are_computed_once(scored):
    """And have equal slopes, each at its own place."""
    ones = np.ones_like(scored.region, np.float32)
    asked = []

    def ascend(coefficient, rollout):
        asked.append(len(coefficient))
        for own in coefficient:
            yield {"w": jnp.array([own.sum(), 1.0])}

    weighed = np.stack([ones, 2 * ones, ones, 3 * ones, 2 * ones])
    found = measure(ascend, lambda prompts, number: scored, lambda scored: weighed, 2, 8)
    assert asked == [1] * PARTS + [3] * 2
    np.testing.assert_array_equal(found.slopes[:, 0], found.slopes[:, 2])
    np.testing.assert_array_equal(found.slopes[:, 1], found.slopes[:, 4])
    assert len(set(found.slopes[0, :, 0, 0].tolist())) == 3
    assert found.cosine[0] == pytest.approx(1) and found.cosine.shape == (5, 2)


def test_nothing_is_compared_with_a_slope_that_may_be_zero():
    """A ratio to it would change its sign between resamples."""
    slopes = 0.01 + np.random.default_rng(3).normal(size=(2, 2, 16, 8))
    rows = gain_rows(Measured(slopes, np.ones((2, 16))), ["grpo", "rest"], seed=0)
    for row in rows.values():
        assert np.isnan([row["gain_relative"], *row["adam_relative_interval"]]).all()
        assert np.isfinite([row["gain"], *row["gain_interval"]]).all()
    report = {"arms": rows, "batches": 16, "prompts": 2, "group_size": 2, "reference": 8}
    assert "is not shown, so nothing is compared with them" in table(report)
    assert "nan" not in table(report)


def test_the_lead_over_a_placebo_is_measured_on_the_same_resamples():
    """Certain where both share the noise, in points of the first arm's slope."""
    noise = 1 + 0.5 * np.random.default_rng(4).normal(size=(2, 20, 8))
    found = Measured(np.stack([noise, 3 * noise, 2 * noise], axis=1), np.ones((3, 20)))
    rows = gain_rows(found, ["grpo", "rest", "rest+random"], 0, {"rest+random": "rest"})
    assert [name for name in rows if "placebo_of" in rows[name]] == ["rest+random"]
    for quantity in ("gain", "adam"):
        assert rows["rest+random"][f"{quantity}_lead"] == pytest.approx(1)
        np.testing.assert_allclose(rows["rest+random"][f"{quantity}_lead_interval"], 1)
    report = {"arms": rows, "batches": 20, "prompts": 2, "group_size": 2, "reference": 8}
    below = table(report).partition("lead over a placebo")[2]
    assert [word for word in below.split() if word.startswith("rest")] == ["rest+random"]
    assert "+100.0% to +100.0%" in below


def test_an_adaptive_curriculum_is_where_the_batch_puts_it(config):
    names = [arm.name for arm in make_arms(config, ["grpo", "rest_adaptive"], groups=4)]
    assert names == ["grpo", "rest_adaptive"]


@pytest.mark.slow
def test_the_command(tmp_path):
    words = ["rollout.group_size=4", "rollout.max_response_tokens=64", "data.brief_prompt=true"]
    words += ["--prompts", "8", "--batches", "4", "--reference", "64", "--limit", "64"]
    words += ["--methods", "rest,hicra", "--output", str(tmp_path)]
    assert cli.main(["gain", "configs/quickstart_policy", "synthetic:train", *words]) == 0
    report = json.loads((tmp_path / "gain.json").read_text())
    assert list(report["arms"]) == ["grpo", "rest, nu 0", "rest, nu 1", "hicra"]
    assert np.shape(report["slopes"]) == (2, 4, 4, 8) and (tmp_path / "gain.png").exists()
    assert report["arms"]["grpo"]["gain_relative"] == 0
    cosine = {name: row["cosine"] for name, row in report["arms"].items()}
    assert cosine["grpo"] == pytest.approx(1, abs=1e-5)
    assert all(-1 <= cosine[f"rest, nu {n}"] < 0.9999 for n in (0, 1))


def test_too_little_is_refused(capsys):
    words = ["gain", "configs/quickstart_policy", "synthetic:eval", "--batches", "1"]
    assert cli.main(words) == 2
    assert "--batches 1: an interval needs at least 2" in capsys.readouterr().err
    words = ["gain", "configs/quickstart_policy", "synthetic:eval", "--limit", "40"]
    assert cli.main(words) == 2
    said = "--reference 512: 64 prompts are needed; synthetic:eval has 40 that fit; lower it or raise --limit"
    assert said in capsys.readouterr().err


def test_what_is_not_known_is_a_line_in_the_table():
    row = {"gain": 0.0, "cosine": math.nan}
    for name in ("gain_relative", "adam_relative"):
        row |= {name: math.nan, f"{name}_interval": np.array([math.nan] * 2)}
    report = {"arms": {"hicra": row}, "batches": 2, "prompts": 2, "group_size": 2, "reference": 8}
    line = table(report).splitlines()[2]
    assert line.split() == ["hicra", "0", "-", "-", "-", "-", "-"]
