"""Steps of a policy under every rule: the same on one device and on four, in micro-batches and at once."""

import jax
import numpy as np
import pytest

from rest_jax.config import CurriculumConfig, LossConfig, WeightsConfig, rule_names
from rest_jax.rl import curriculum
from rest_jax.rl.prepare import Recomputed
from rest_jax.rl.rules import choose
from rest_jax.types import ScoredBatch
from tests import tiny
from tests.rl.stepping import close, step

SCHEDULE = curriculum.Schedule(WeightsConfig(rule="uniform"), CurriculumConfig(), 10)
RULES = [(kind, name) for kind in ("weight", "advantage", "loss") for name in rule_names(kind)]


def marked(scored: ScoredBatch) -> ScoredBatch:
    """With every third token in a phrase."""
    marks = np.zeros(scored.region.shape, bool)
    marks[..., ::3] = True
    return scored.replace(marked=marks)


def step_config(kind: str, name: str, **changes):
    loss = {"advantage": {"advantage": name}, "loss": {"policy": name}}.get(kind, {})
    rule = choose("weight", name, (), "") if kind == "weight" else None
    given = {"loss": LossConfig(vocab_chunk=5, **loss), "weight_rule": rule, "schedule": SCHEDULE}
    return tiny.step_config(**given | changes)


def moved(scored: ScoredBatch) -> Recomputed:
    """Old log-probs off the policy's own, so that ratios differ from 1."""
    rng, r = np.random.default_rng(3), scored.rollout
    mask = np.arange(tiny.TIME) < r.response_length[..., None]
    shift = rng.uniform(-0.2, 0.2, r.logp.shape).astype(np.float32) * mask
    return Recomputed(r.logp + shift, r.entropy, r.gini)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), RULES, ids=["-".join(rule) for rule in RULES])
def test_three_steps_are_the_same_on_one_device_and_on_four(kind, name):
    cfg = step_config(kind, name, placebo="shuffle" if name == "gtpo" else "none", seed=3)
    for seed in range(3):
        scored = marked(tiny.scored(tiny.prompts(seed=seed), seed=seed))
        old = moved(scored)
        one, metrics = step(cfg, scored, recomputed=old)
        four, expected = step(cfg, scored, shape=(2, 2, 1), recomputed=old)
        close(four.opt_state, one.opt_state, 1e-4)
        assert metrics["update/grad_norm"] > 0
        for key, value in expected.items():
            assert metrics[key] == pytest.approx(value, rel=1e-3, abs=1e-5), key


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gspo", "cispo", "sapo"])
def test_micro_batches_do_not_change_a_policy_loss(name):
    """That of gspo looks at complete completions, which micro-batches never cut."""
    scored = tiny.scored(tiny.prompts())
    old = moved(scored)
    options = {"low": 0.05, "high": 0.05} if name == "gspo" else {}
    loss = LossConfig(vocab_chunk=5, policy=name, policy_options=options)
    whole, metrics = step(tiny.step_config(loss=loss), scored, recomputed=old)
    cut = tiny.step_config(loss=loss, max_tokens_per_microbatch=48)
    parts, expected = step(cut, scored, recomputed=old)
    close(parts.opt_state, whole.opt_state, 1e-4)
    assert metrics["update/clip_fraction"] == pytest.approx(expected["update/clip_fraction"])


@pytest.mark.slow
@pytest.mark.parametrize("limit", [None, 48])
def test_gspo_takes_the_ratio_of_each_completion(limit):
    """The policy that trains is the one that sampled, so that its log-probs are those of the rollout."""
    scored, low, high = tiny.scored(tiny.prompts()), 0.02, 0.03
    old, length = moved(scored), scored.rollout.response_length
    loss = LossConfig(vocab_chunk=5, policy="gspo", policy_options={"low": low, "high": high})
    cfg = tiny.step_config(loss=loss, schedule=SCHEDULE, max_tokens_per_microbatch=limit)
    _, metrics = step(cfg, scored, recomputed=old)
    s = np.exp((scored.rollout.logp - old.logp).sum(-1) / length)
    r = scored.reward
    a = (r - r.mean(1, keepdims=True)) / r.std(1, ddof=1, keepdims=True)
    tokens = length / length.sum()
    expected = np.sum(-tokens * np.minimum(s * a, np.clip(s, 1 - low, 1 + high) * a))
    assert metrics["update/policy_loss"] == pytest.approx(expected, rel=1e-3)
    cut = (a > 0) & (s > 1 + high) | (a < 0) & (s < 1 - low)
    assert cut.any() and not cut.all()
    assert metrics["update/clip_fraction"] == pytest.approx(np.sum(tokens * cut), rel=1e-4)


@pytest.mark.slow
def test_gspo_with_one_update_is_the_mean_over_completions():
    """Its ratios are 1, so its gradient is that of the clipped loss."""
    scored = tiny.scored(tiny.prompts())
    found, expected = (
        step(
            tiny.step_config(
                schedule=SCHEDULE,
                loss=LossConfig(vocab_chunk=5, policy=policy, aggregation="sequence_mean"),
            ),
            scored,
        )[0].opt_state
        for policy in ("gspo", "clip")
    )
    close(found, expected, 1e-4)
    assert all(np.asarray(x).any() for x in jax.tree.leaves(expected))
