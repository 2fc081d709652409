"""What the updates read: denominators over each global mini-batch, old values, corrections, and the metrics of the step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rest_jax.config import CurriculumConfig, LossConfig, WeightsConfig
from rest_jax.rl import curriculum, loss, weights
from rest_jax.rl.prepare import (
    Recomputed,
    active_groups,
    change_metrics,
    prepare,
)
from rest_jax.rl.rules import choose
from rest_jax.rl.step import make_prepare
from rest_jax.tool_calls import Region
from tests import tiny

EQUAL = (1, 2, 4, 7)  # groups whose rewards are equal


@pytest.fixture(scope="module")
def scored():
    batch = tiny.scored(tiny.prompts())
    reward = batch.reward.copy()
    reward[list(EQUAL)] = np.float32(0.1)  # a mean of equal rewards of this size is rounded
    return batch.replace(reward=reward)


def prepared(cfg, scored, recomputed=None, minibatch=None, logp_ref=None):
    """(batch, metrics), NumPy."""
    if minibatch is None:
        minibatch = np.zeros(len(scored.reward), np.int32)
    state = curriculum.init(cfg.schedule)
    made = jax.jit(lambda *args: prepare(*args, state=state, cfg=cfg))
    batch, _, metrics, _ = made(scored, recomputed, logp_ref, minibatch)
    return jax.tree.map(np.asarray, (batch, metrics))


def mask_of(scored) -> np.ndarray:
    return np.arange(tiny.TIME) < scored.rollout.response_length[..., None]


def token_weights(cfg, scored) -> np.ndarray:
    r = scored.rollout
    stats = weights.region_stats(*map(jnp.asarray, (scored.region, r.entropy, r.gini)))
    state = curriculum.init(cfg.schedule)
    moved = curriculum.update(state, stats, jnp.mean(scored.format_score), cfg.schedule)
    found = weights.token_weights(jnp.asarray(scored.region), moved.weight, cfg.schedule.normalizer)
    return np.asarray(found)


def denominator(aggregation: str, weight, mask):
    """What the weights of one mini-batch are divided by."""
    groups, group_size = weight.shape[:2]
    return {
        "weighted_token_mean": weight.sum(),
        "token_mean": mask.sum(),
        "sequence_mean": weight.sum(-1, keepdims=True) * groups * group_size,
        "fixed_length": groups * group_size * tiny.TIME,
    }[aggregation]


ASSIGNMENTS = {
    "one": (np.zeros(8, np.int32), 1),
    "alternating": (np.arange(8, dtype=np.int32) % 2, 2),
    "permuted": (np.array([2, 0, 3, 3, 1, 2, 0, 1], np.int32), 4),
    "unequal": (np.array([1, 0, 1, 1, 1, 0, 1, 1], np.int32), 2),
}


@pytest.mark.parametrize("aggregation", sorted(loss.AGGREGATIONS))
@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_denominators_are_those_of_the_global_mini_batch(scored, aggregation, assignment):
    minibatch, count = ASSIGNMENTS[assignment]
    cfg = tiny.step_config(updates=count, loss=LossConfig(aggregation=aggregation))
    batch, _ = prepared(cfg, scored, minibatch=minibatch)
    weight, mask = token_weights(cfg, scored), mask_of(scored)
    active = ~np.isin(np.arange(8), EQUAL)
    for index in range(count):
        here = minibatch == index
        expected = weight[here] / denominator(aggregation, weight[here], mask[here])
        np.testing.assert_allclose(batch.loss_weight[here], expected, rtol=1e-5)
        counted = mask[here] & active[here][:, None, None]
        np.testing.assert_allclose(batch.regulariser[here], counted / max(counted.sum(), 1))
    assert (batch.loss_weight[~mask] == 0).all() and (batch.regulariser[~mask] == 0).all()


@pytest.mark.parametrize("changes", [{"kl_coefficient": 0.1}, {"entropy_coefficient": 0.1}])
def test_a_kl_term_or_entropy_bonus_is_a_mean_over_every_group(scored, changes):
    batch, _ = prepared(tiny.step_config(loss=LossConfig(**changes)), scored)
    mask = mask_of(scored)
    np.testing.assert_allclose(batch.regulariser, mask / mask.sum(), rtol=1e-6)


UNIFORM = curriculum.Schedule(WeightsConfig(rule="uniform"), CurriculumConfig(), 10)


def test_uniform_weights_are_grpo_bit_for_bit(scored):
    """So are token weights by a rule that is switched off."""
    batch, _ = prepared(tiny.step_config(schedule=UNIFORM), scored)
    mask = mask_of(scored)
    np.testing.assert_array_equal(batch.loss_weight, mask / np.float32(mask.sum()))
    off = choose("weight", "ar", (("alpha", 0),), "")
    other, _ = prepared(tiny.step_config(schedule=UNIFORM, weight_rule=off), scored)
    jax.tree.map(np.testing.assert_array_equal, other, batch)


def test_a_rule_multiplies_the_weights_of_regions(scored):
    """Those zeroed by name stay zero."""
    weights_config = WeightsConfig(rule="uniform", zero=("think",), normalizer="none")
    schedule = curriculum.Schedule(weights_config, CurriculumConfig(), 10)
    rule = choose("weight", "ar", (("alpha", 0.5),), "")
    batch, metrics = prepared(tiny.step_config(schedule=schedule, weight_rule=rule), scored)
    weight = (0.5 * np.exp(scored.rollout.logp) + 0.5) * mask_of(scored)
    weight[scored.region == Region.THINK] = 0
    np.testing.assert_allclose(batch.loss_weight, weight / weight.sum(), rtol=1e-5)
    assert metrics["region/think/weight_share"] == 0


@pytest.mark.parametrize("name", ["grpo", "entropy"])
def test_advantages_of_completions_and_of_tokens(scored, name):
    cfg = tiny.step_config(loss=LossConfig(advantage=name), shown_groups=(3, 1))
    state, minibatch = curriculum.init(cfg.schedule), np.zeros(8, np.int32)
    made = jax.jit(lambda *args: prepare(*args, state=state, cfg=cfg))
    batch, _, _, shown = made(scored, None, None, minibatch)
    mask, found = mask_of(scored), np.asarray(batch.advantage)
    assert found.shape == (mask.shape if name == "entropy" else mask.shape[:2])
    if name == "entropy":
        assert (found[~mask] == 0).all()
        found = found.sum(-1) / mask.sum(-1)
    assert shown.advantage.shape == (2, tiny.GROUP)
    np.testing.assert_allclose(shown.advantage, found[[3, 1]], rtol=1e-5)


def test_the_gradient_of_groups_without_an_exact_completion(scored):
    """Its share, by |weight x advantage|."""
    exact = np.zeros(scored.reward.shape, bool)
    exact[0, 1] = exact[4, 2] = True  # the fourth group has no gradient at all
    batch, metrics = prepared(tiny.step_config(), scored.replace(exact=exact))
    size = np.abs(batch.loss_weight * batch.advantage[..., None]).sum((1, 2))
    expected = 1 - size[0] / size.sum()
    assert metrics["update/phantom_gradient"] == pytest.approx(expected, rel=1e-5)
    assert 0 < expected < 1
    assert prepared(tiny.step_config(), scored.replace(exact=~exact))[1][
        "update/phantom_gradient"
    ] == pytest.approx(0)


@pytest.mark.parametrize("rule", [None, choose("weight", "top_entropy", (("share", 0.3),), "")])
def test_the_effective_number_of_tokens(scored, rule):
    """Of weight x advantage; with equal ones it is the number of tokens."""
    batch, metrics = prepared(tiny.step_config(weight_rule=rule), scored)
    size = np.abs(batch.loss_weight * batch.advantage[..., None]).astype(np.float64)
    expected = size.sum() ** 2 / (size**2).sum() / mask_of(scored).sum()
    assert metrics["update/effective_tokens"] == pytest.approx(expected, rel=1e-5)
    assert 0 < expected < 1


def test_equal_coefficients_have_all_tokens(scored):
    even = np.where(np.arange(tiny.GROUP) % 2 == 0, 1.0, -1.0).astype(np.float32)
    reward = np.broadcast_to(even, scored.reward.shape)
    cfg = tiny.step_config(schedule=UNIFORM)
    _, metrics = prepared(cfg, scored.replace(reward=reward))
    assert metrics["update/effective_tokens"] == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("advantage", ["grpo", "entropy"])
def test_the_change_of_log_probs_by_region_and_sign(scored, advantage):
    """Against sums token by token."""
    batch, _ = prepared(tiny.step_config(loss=LossConfig(advantage=advantage)), scored)
    mask = mask_of(scored)
    logp = batch.logp_old + np.random.default_rng(0).normal(size=mask.shape).astype(np.float32)
    found = jax.jit(change_metrics)(logp, batch, scored.region, mask)
    sign = np.sign(batch.advantage if batch.advantage.ndim == 3 else batch.advantage[..., None])
    sign = np.broadcast_to(sign, mask.shape)
    for region in Region:
        if region is Region.NONE:
            continue
        for name, wanted in (("change_positive", 1), ("change_negative", -1)):
            there = [
                logp[i] - batch.logp_old[i]
                for i in zip(*np.nonzero(mask), strict=True)
                if scored.region[i] == region and sign[i] == wanted
            ]
            expected = np.mean(there) if there else 0.0
            value = found.pop(f"region/{region.name.lower()}/{name}")
            assert value == pytest.approx(expected, abs=1e-6)
    assert not found


def test_the_share_of_marked_tokens_is_a_metric_of_rules_that_read_them(scored):
    cfg = tiny.step_config(loss=LossConfig(advantage="hicra"))
    marked = np.zeros(scored.region.shape, bool)
    marked[0, 0, :2] = True
    _, metrics = prepared(cfg, scored.replace(marked=marked))
    assert metrics["rollout/marked"] == pytest.approx(2 / scored.rollout.mask.sum())
    assert "rollout/marked" not in prepared(tiny.step_config(), scored)[1]


@pytest.mark.parametrize("name", ["grpo", "entropy", "reinforce_pp"])
def test_groups_of_one_kind_of_completions_can_be_left_out(scored, name):
    """Beside those that the rule leaves out; host and device agree, and no gradient is left without an exact completion."""
    exact = np.zeros(scored.reward.shape, bool)
    exact[0, 1], exact[3] = True, True
    exact[5, :2] = exact[7, 0] = True  # the seventh's rewards are equal
    cfg = tiny.step_config(loss=LossConfig(advantage=name, group_filter="exact"))
    given = scored.replace(exact=exact)
    batch, metrics = prepared(cfg, given)
    active = active_groups(given, cfg)
    left = [0, 5, 7] if name == "reinforce_pp" else [0, 5]
    np.testing.assert_array_equal(np.flatnonzero(active), left)
    np.testing.assert_array_equal(batch.regulariser.any(axis=(1, 2)), active)
    np.testing.assert_array_equal(
        batch.advantage.any(axis=tuple(range(1, batch.advantage.ndim))), active
    )
    assert metrics["update/phantom_gradient"] == 0
    plain, _ = prepared(tiny.step_config(loss=LossConfig(advantage=name)), given)
    np.testing.assert_array_equal(batch.advantage[[0, 5]], plain.advantage[[0, 5]])


def test_active_groups(scored):
    """The host's plan and the device's denominators are of the same groups."""
    cfg = tiny.step_config()
    active = active_groups(scored, cfg)
    np.testing.assert_array_equal(active, ~np.isin(np.arange(8), EQUAL))
    batch, _ = prepared(cfg, scored)
    np.testing.assert_array_equal(batch.regulariser.any(axis=(1, 2)), active)
    np.testing.assert_array_equal(batch.advantage.any(axis=1), active)
    for changes in ({"kl_coefficient": 0.1}, {"entropy_coefficient": 0.1}):
        assert active_groups(scored, tiny.step_config(loss=LossConfig(**changes))).all()


def test_the_fields_of_the_rollout_are_handed_on(scored):
    reference = scored.rollout.logp - np.float32(1)
    batch, _ = prepared(tiny.step_config(), scored, logp_ref=reference)
    for name in ("prompt", "prompt_length", "responses", "response_length"):
        np.testing.assert_array_equal(getattr(batch, name), getattr(scored.rollout, name))
    np.testing.assert_array_equal(batch.logp_old, scored.rollout.logp)
    np.testing.assert_array_equal(batch.logp_ref, reference)
    assert prepared(tiny.step_config(), scored)[0].logp_ref is None


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("again", [False, True], ids=["sampler", "recomputed"])
def test_values_of_tokens_are_those_of_the_groups_asked_for(scored, shape, again):
    rows = (5, 0, 2)
    cfg = tiny.step_config(shown_groups=rows)
    old = recompute(scored) if again else None
    minibatch = np.zeros(len(scored.reward), np.int32)
    made = make_prepare(cfg, tiny.mesh(*shape))
    batch, _, _, shown = made(scored, old, None, minibatch, curriculum.init(cfg.schedule))
    assert all(x.is_fully_replicated for x in jax.tree.leaves(shown))
    assert np.array_equal(shown.advantage, np.asarray(batch.advantage)[list(rows)])
    if again:
        assert np.array_equal(shown.logp, old.logp[list(rows)])
    else:
        assert shown.logp is None
        expected = token_weights(cfg, scored)[list(rows)]
        np.testing.assert_allclose(shown.weight, expected, rtol=1e-5)


def recompute(scored, shift: float = 0.4) -> Recomputed:
    """Values that differ from the sampler's by up to `shift`."""
    rng, r = np.random.default_rng(3), scored.rollout
    noise = rng.uniform(-shift, shift, r.logp.shape).astype(np.float32) * mask_of(scored)
    return Recomputed(r.logp + noise, r.entropy * (1 + noise), r.gini * (1 - noise / 2))


def test_recomputed_values_replace_the_sampler_s(scored):
    old, cfg = recompute(scored), tiny.step_config()
    batch, metrics = prepared(cfg, scored, old)
    np.testing.assert_array_equal(batch.logp_old, old.logp)
    replaced = scored.replace(
        rollout=scored.rollout.replace(logp=old.logp, entropy=old.entropy, gini=old.gini)
    )
    expected, same = prepared(cfg, replaced)
    np.testing.assert_array_equal(batch.loss_weight, expected.loss_weight)
    for name in (name for name in metrics if name.startswith(("region/", "curriculum/"))):
        np.testing.assert_array_equal(metrics[name], same[name], err_msg=name)
    # What was sampled stays what the metrics of the rollout say.
    plain = prepared(cfg, scored)[1]
    for name in ("rollout/logp", "rollout/entropy", "rollout/gini"):
        np.testing.assert_array_equal(metrics[name], plain[name], err_msg=name)


def test_how_far_the_sampler_is_from_the_trainer(scored):
    old, mask = recompute(scored), mask_of(scored)
    metrics = prepared(tiny.step_config(), scored, old)[1]
    difference = np.abs(old.logp - scored.rollout.logp)[mask]
    assert metrics["rollout/logp_mismatch"] == pytest.approx(difference.mean(), rel=1e-5)
    assert metrics["rollout/ratio_max"] == pytest.approx(np.exp(difference.max()), rel=1e-5)
    assert "rollout/logp_mismatch" not in prepared(tiny.step_config(), scored)[1]


@pytest.mark.parametrize("aggregation", sorted(loss.AGGREGATIONS))
def test_the_truncated_importance_weight_multiplies_the_loss_but_no_denominator(
    scored, aggregation
):
    old, mask = recompute(scored), mask_of(scored)
    plain = tiny.step_config(loss=LossConfig(aggregation=aggregation))
    expected, without = prepared(plain, scored, old)
    batch, metrics = prepared(dataclasses.replace(plain, tis_cap=1.2), scored, old)
    tis = np.minimum(np.exp(old.logp - scored.rollout.logp), 1.2)
    assert (tis[mask] == np.float32(1.2)).any() and (tis[mask] < 1).any()
    np.testing.assert_allclose(batch.loss_weight, expected.loss_weight * tis, rtol=1e-5)
    np.testing.assert_array_equal(batch.regulariser, expected.regulariser)
    assert metrics["update/tis_weight_mean"] == pytest.approx(tis[mask].mean(), rel=1e-5)
    assert "update/tis_weight_mean" not in without


def test_metrics_of_rewards_and_lengths(scored):
    metrics = prepared(tiny.step_config(), scored)[1]
    r, reward, mask = scored.rollout, np.float64(scored.reward), mask_of(scored)
    expected = {
        "reward/mean": reward.mean(),
        "reward/std": reward.std(),
        "reward/min": reward.min(),
        "reward/max": reward.max(),
        "reward/group_std": reward.std(axis=1).mean(),
        "reward/format_score": scored.format_score.mean(),
        "reward/equal_groups": len(EQUAL) / 8,
        "rollout/response_tokens": r.response_length.mean(),
        "rollout/response_tokens_max": r.response_length.max(),
        "rollout/prompt_tokens": r.prompt_length.mean(),
        "rollout/logp": r.logp[mask].mean(),
        "rollout/entropy": r.entropy[mask].mean(),
        "rollout/gini": r.gini[mask].mean(),
    }
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-5), name


def test_metrics_of_the_curriculum(scored):
    cfg = tiny.step_config()
    metrics = prepared(cfg, scored)[1]
    weight, r = token_weights(cfg, scored), scored.rollout
    for region in (region for region in Region if region is not Region.NONE):
        here, prefix = scored.region == region, f"region/{region.name.lower()}"
        expected = {
            "entropy": r.entropy[here].mean(),
            "gini": r.gini[here].mean(),
            "count": here.sum(),
            "weight": weight[here].mean(),
            "weight_share": weight[here].sum() / weight.sum(),
        }
        for name, value in expected.items():
            assert metrics[f"{prefix}/{name}"] == pytest.approx(value, rel=1e-5), name
        assert metrics[f"{prefix}/base"] > 0
    assert not any(name.startswith("region/none") for name in metrics)
    assert metrics["curriculum/nu"] == 0
    assert metrics["curriculum/format_score"] == pytest.approx(scored.format_score.mean())


@pytest.mark.parametrize("garbage", [np.nan, 50.0])
def test_nothing_behind_the_end_of_a_response_enters(scored, garbage):
    """Neither metrics nor what the loss multiplies with."""
    r, mask = scored.rollout, mask_of(scored)
    assert not mask.all()

    def spoiled(x):
        return np.where(mask, x, garbage).astype(np.float32)

    changed = r.replace(
        responses=np.where(mask, r.responses, 17).astype(np.int32),
        logp=spoiled(r.logp),
        entropy=spoiled(r.entropy),
        gini=spoiled(r.gini),
    )
    old = recompute(scored)
    for recomputed, other in (
        (None, None),
        (old, Recomputed(*map(spoiled, (old.logp, old.entropy, old.gini)))),
    ):
        batch, metrics = prepared(tiny.step_config(), scored, recomputed)
        found, values = prepared(tiny.step_config(), scored.replace(rollout=changed), other)
        jax.tree.map(np.testing.assert_array_equal, values, metrics)
        for name in ("loss_weight", "regulariser", "advantage"):
            np.testing.assert_array_equal(getattr(found, name), getattr(batch, name))
