"""The measurement of gradient variance: weights of the rules, the inequality, intervals, the report of one batch."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rest_jax import cli
from rest_jax.analysis.variance.gradients import TokenGradients, gram_noise
from rest_jax.analysis.variance.measure import (
    inequality,
    measure_batch,
    relative_intervals,
    rule_weights,
    theorem2_weights,
)
from rest_jax.config import Config, CurriculumConfig, WeightsConfig
from rest_jax.errors import UserError
from rest_jax.rl import curriculum
from rest_jax.rl.curriculum import Schedule
from rest_jax.rl.prepare import prepare
from rest_jax.tool_calls import NUM_REGIONS, Region
from tests import tiny
from tests.analysis.variance.conftest import KINDS
from tests.rl import stepping


def config_with(**sections) -> Config:
    """Ten steps, chunks that do not divide the responses."""
    fixed = {"name": "test", "model": {"source": "none"}, "train": {"steps": 10}}
    return Config.model_validate(fixed | {"loss": {"vocab_chunk": 5}} | sections)


@pytest.mark.wide
@pytest.mark.parametrize("rule", ["uniform", "inverse_bound"])
def test_variance_is_that_of_the_trainers_own_gradient(peaked, scored, report, rule):
    """The update of training measures its noise from its micro-batches: same gradient, same variance."""
    schedule = Schedule(WeightsConfig(rule=rule), CurriculumConfig(shape="constant"), 10)
    cfg = tiny.step_config(schedule=schedule, noise_groups=6)
    _, metrics = stepping.step(cfg, scored, tx=tiny.optimizer(), params=peaked)
    row = report["rules"]["uniform" if rule == "uniform" else "paper"]
    assert metrics["update/grad_norm"] ** 2 == pytest.approx(row["mean_square"], rel=1e-3)
    assert metrics["update/grad_variance"] == pytest.approx(row["variance"], rel=1e-3)


# weights


def fake_tokens(rng) -> TokenGradients:
    mean = np.full(NUM_REGIONS, np.nan)
    mean[list(KINDS)] = rng.uniform(0.1, 5, len(KINDS))
    zero, bound = np.zeros(NUM_REGIONS), np.where(np.isnan(mean), np.nan, 0.5)
    return TokenGradients(
        bound, 2 * mean, beta=mean, beta_error=zero, score=mean, score_error=zero
    )  # fmt: skip


def test_theorem2_weights_minimise_the_bound(scored):
    """No weights with the same sum have a smaller sum_t beta_t w_t^2, and the least value is T^2 / sum 1/beta."""
    rng = np.random.default_rng(3)
    region = scored.region
    own = region > 0
    beta = np.where(np.arange(NUM_REGIONS) > 0, rng.uniform(0.05, 4, NUM_REGIONS), np.nan)
    w, per_token = theorem2_weights(region, beta)[own], beta[region[own]]
    least = np.sum(per_token * w**2)
    assert w.sum() == pytest.approx(own.sum())
    assert least == pytest.approx(own.sum() ** 2 / np.sum(1 / per_token))
    for size in (1e-3, 0.1, 1.0):
        for _ in range(50):
            step = rng.normal(size=w.shape)
            other = w + size * w.mean() * (step - step.mean())
            assert np.sum(per_token * other**2) > least


def test_rules_sum_to_the_tokens_and_paper_is_the_trainers(scored):
    own = scored.region > 0
    tokens = fake_tokens(np.random.default_rng(0))
    rules = rule_weights(scored, tokens, config_with())
    assert list(rules) == ["uniform", "paper", "exact", "theorem2", "inverse_score"]
    for weight in rules.values():
        assert weight[own].sum() == pytest.approx(own.sum()) and not weight[~own].any()
    cfg = tiny.step_config()
    on_device = jax.tree.map(jnp.asarray, scored)
    groups = jnp.zeros(len(scored.reward), jnp.int32)
    trained, *_ = prepare(on_device, None, None, groups, curriculum.init(cfg.schedule), cfg)
    paper = rules["paper"] / rules["paper"].sum()
    np.testing.assert_allclose(paper, trained.loss_weight, rtol=1e-4)
    name, think = (rules["theorem2"][scored.region == r][0] for r in (Region.NAME, Region.THINK))
    beta = tokens.beta
    assert name / think == pytest.approx(beta[Region.THINK] / beta[Region.NAME])


def test_a_config_with_weights_of_its_own_is_compared_too(scored):
    mass = config_with(curriculum={"target": "mass"})
    rules = rule_weights(scored, fake_tokens(np.random.default_rng(0)), mass)
    share = rules["configured"][scored.region == Region.NAME].sum() / rules["configured"].sum()
    present = 0.20 + 0.25 + 0.30  # format, name and think; param does not occur
    assert share == pytest.approx(0.25 / present, rel=1e-3)


def test_so_is_one_with_a_rule_of_single_tokens(scored):
    entropy = config_with(weights={"rule": "top_entropy", "normalizer": "none"})
    rules = rule_weights(scored, fake_tokens(np.random.default_rng(0)), entropy)
    kept, own = rules["configured"] > 0, scored.region > 0
    # first tokens of a group have one entropy, and ties stay in
    assert kept.sum() == pytest.approx(0.2 * own.sum(), abs=tiny.GROUP)
    assert scored.rollout.entropy[kept].min() > scored.rollout.entropy[own & ~kept].max()


# the inequality


def test_the_inequality_holds_and_the_actions_agree(scored):
    found = inequality(scored, scored.region > 0)
    assert found["violations"] == 0 and found["largest_ratio"] <= 1
    assert 0.05 < found["gini"] < found["bound"]
    assert found["sampled_error"] < 0.1
    assert abs(found["sampled"] - found["gini"]) < 4 * found["sampled_error"]


def test_a_broken_inequality_is_counted(scored):
    gini = scored.rollout.gini.copy()
    gini[0, 0, 0] = -np.expm1(-scored.rollout.entropy[0, 0, 0]) + 1e-3
    broken = dataclasses.replace(scored, rollout=dataclasses.replace(scored.rollout, gini=gini))
    found = inequality(broken, scored.region > 0)
    assert found["violations"] == 1


# intervals


def test_intervals_are_those_of_resampled_gradients():
    """Quantiles of the relative noise shares of groups drawn again, each share from the gradients themselves."""
    rng = np.random.default_rng(4)
    g = rng.normal(1.0, 1.0, (2, 7, 5))
    shares = []
    while len(shares) < 2000:
        rows = rng.integers(0, 7, 7)
        different = rows[:, None] != rows
        if different.any():
            gram = np.einsum("kpn,kqn->kpq", g[:, rows], g[:, rows])
            square = gram[:, different].mean(axis=1)
            variance = (np.einsum("kpp->k", gram) / 7 - square) / 7
            shares.append(variance / (square + variance))
    own = np.array(shares)
    found = relative_intervals(np.einsum("kpn,kqn->kpq", g, g), 0)
    for kind in range(2):
        low, high = np.quantile(own[:, kind] / own[:, 0], [0.025, 0.975])
        width = max(high - low, 1e-6)
        np.testing.assert_allclose(found[kind], [low, high], atol=0.1 * width)


def test_intervals_of_two_groups_leave_out_the_resamples_of_one():
    gram = np.array([[[1.0, 0.2], [0.2, 1.0]], [[1.0, 0.5], [0.5, 1.0]]])
    ratio = gram_noise(gram[1]).share / gram_noise(gram[0]).share
    assert relative_intervals(gram, 0)[1].tolist() == pytest.approx([ratio] * 2)


@pytest.mark.filterwarnings("error")
def test_intervals_of_few_groups_say_nothing_on_the_terminal():
    g = np.random.default_rng(1).normal(size=(2, 3, 2))
    assert relative_intervals(np.einsum("kpn,kqn->kpq", g, g), 0).shape == (2, 2)


# one batch


@pytest.fixture(scope="module")
def report(peaked, scored):
    return measure_batch(tiny.decoder(), peaked, scored, config_with(), tokens=4)


def test_report_is_plain_and_its_parts_agree(scored, report):
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert list(report["regions"]) == ["tag", "name", "think"]
    assert report["groups_with_advantage"] == 5 and report["exact_gradients"]
    total = sum(row["tokens"] for row in report["regions"].values())
    assert report["overall"]["tokens"] == total == (scored.region > 0).sum()
    uniform, *_ = report["rules"].values()
    assert uniform["relative"] == 1 and uniform["relative_interval"] == [1, 1]
    assert uniform["cosine"] == pytest.approx(1) and uniform["bound"] == 1
    least = min(row["bound"] for row in report["rules"].values())
    assert report["rules"]["theorem2"]["bound"] == least


def test_without_a_gradient_there_is_nothing_to_measure(peaked, scored):
    equal = dataclasses.replace(scored, reward=np.ones_like(scored.reward))
    with pytest.raises(UserError, match="none of 6 groups"):
        measure_batch(tiny.decoder(), peaked, equal, config_with(), tokens=4)


# the command


def refused(capsys, *words: str) -> str:
    assert cli.main(["variance", "configs/quickstart_policy", *words]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    return line


def test_what_cannot_be_measured_is_refused(capsys, tmp_path):
    out = ["--output", str(tmp_path / "out")]
    assert "temperature 0.7" in refused(capsys, "synthetic:eval", "rollout.temperature=0.7", *out)
    assert "--prompts 1" in refused(capsys, "synthetic:eval", "--prompts", "1", *out)
    assert "has 3 that fit" in refused(capsys, "synthetic:eval", "--limit", "3", *out)
    assert "synthetic:nowhere" in refused(capsys, "synthetic:nowhere", *out)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_shipped_policy_end_to_end(capsys, tmp_path):
    words = [
        "synthetic:eval",
        "--prompts",
        "8",
        "--limit",
        "24",
        "--tokens",
        "2",
        "data.brief_prompt=true",
    ]
    words += ["rollout.group_size=4", "rollout.max_response_tokens=64"]
    command = ["variance", "configs/quickstart_policy", *words, "--output", str(tmp_path)]
    assert cli.main(command) == 0
    assert "1 - sum p^2 <= 1 - exp(-H) holds" in capsys.readouterr().out
    found = json.loads((tmp_path / "variance.json").read_text())
    assert found["overall"]["violations"] == 0 and found["rules"]["paper"]["variance"] > 0
    assert abs(found["overall"]["sampled"] - found["overall"]["gini"]) < 0.03
