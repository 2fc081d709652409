"""The optimiser update on the device: its gradient is exact, however it is cut, and so are its metrics and its noise."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rest_jax.config import CurriculumConfig, LossConfig, OptimizerConfig, WeightsConfig
from rest_jax.rl import curriculum, loss, weights
from rest_jax.rl.curriculum import Schedule
from rest_jax.rl.logprobs import PassSpec, response_logprobs
from rest_jax.rl.optimizer import Optimizer, make_optimizer
from rest_jax.rl.packing import BatchLengths, MicroBatch, make_rows
from rest_jax.rl.update import (
    Totals,
    UpdateSpec,
    add_gradient,
    apply_gradient,
    gradient_noise,
    policy_loss,
    zero_gradient,
)
from rest_jax.types import TrainState
from tests import tiny
from tests.rl.stepping import RECORD, close, logprobs, plan_of, prepare_of, rows_of, step

PROMPTS = 8
GROUP_TOKENS = 16 + tiny.GROUP * tiny.TIME  # trunk positions of a padded group of `tiny.prompts`
HALF_TOKENS = 4 * GROUP_TOKENS
EQUAL = (1, 2, 4, 7)  # groups whose rewards are equal in `partly_equal`


@pytest.fixture(scope="module")
def scored():
    return tiny.scored(tiny.prompts(PROMPTS))


@pytest.fixture(scope="module")
def partly_equal(scored):
    reward = scored.reward.copy()
    reward[list(EQUAL)] = np.float32(0.1)
    return scored.replace(reward=reward)


@pytest.fixture(scope="module")
def plain(scored):
    """(gradient, metrics) of one update in one micro-batch on one device."""
    return gradient_of(tiny.step_config(), scored)


def gradient_of(cfg, scored, **options):
    """(gradient as a tree, metrics) of a step's last update."""
    state, metrics = step(cfg, scored, **options)
    return jax.tree.map(np.asarray, state.opt_state), metrics


def mask_of(scored) -> np.ndarray:
    return np.arange(tiny.TIME) < scored.rollout.response_length[..., None]


def test_loss_and_gradient_against_an_oracle(scored, plain):
    """The definition written out: full logits, one sum, no packing."""
    cfg, r, mask = tiny.step_config(), scored.rollout, mask_of(scored)
    stats = weights.region_stats(*map(jnp.asarray, (scored.region, r.entropy, r.gini)))
    moved = curriculum.update(
        curriculum.init(cfg.schedule), stats, jnp.mean(scored.format_score), cfg.schedule
    )
    weight = np.asarray(moved.weight)[scored.region]
    weight = weight / (weight.sum(-1, keepdims=True) / mask.sum(-1, keepdims=True) + 1e-8) * mask
    centred = scored.reward - scored.reward.mean(1, keepdims=True)
    advantage = centred / (scored.reward.std(1, ddof=1, keepdims=True) + 1e-6)

    def objective(params):
        batch = jax.tree.map(jnp.asarray, r)
        logp, _, _ = response_logprobs(
            tiny.decoder(), params, batch, rows_of(r), PassSpec(cfg.sampling, 100)
        )
        ratio = jnp.exp(logp - jnp.where(mask, r.logp, logp))
        a, clipped = advantage[..., None], jnp.clip(ratio, 0.8, 1.2)
        terms = jnp.where(mask, weight * -jnp.minimum(ratio * a, clipped * a), 0)
        return jnp.sum(terms) / weight.sum()

    value, gradient = jax.jit(jax.value_and_grad(objective))(tiny.params())
    assert plain[1]["update/loss"] == pytest.approx(float(value), rel=1e-4, abs=1e-6)
    close(plain[0], gradient, 2e-5)


def off_policy(scored):
    """The same rollout as if another policy had sampled it, so that clips and ratios matter."""
    noise = np.random.default_rng(9).normal(0, 0.3, mask_of(scored).shape).astype(np.float32)
    logp = scored.rollout.logp + noise * mask_of(scored)
    return scored.replace(rollout=scored.rollout.replace(logp=logp))


@pytest.mark.parametrize(
    "aggregation",
    [
        "weighted_token_mean",
        *(
            pytest.param(name, marks=pytest.mark.wide)
            for name in sorted(loss.AGGREGATIONS)
            if name != "weighted_token_mean"
        ),
    ],
)
@pytest.mark.parametrize("micro", [pytest.param(2, marks=pytest.mark.slow), 8])
def test_micro_batches_change_nothing(scored, micro, aggregation):
    """Neither the gradient nor any metric."""
    cfg = tiny.step_config(
        loss=LossConfig(aggregation=aggregation, vocab_chunk=5, entropy_coefficient=0.01)
    )
    cut = dataclasses.replace(cfg, max_tokens_per_microbatch=GROUP_TOKENS * 8 // micro)
    moved = off_policy(scored)
    assert len(plan_of(moved, cut, tiny.mesh())[0]) >= micro
    (gradient, metrics), (expected, values) = (gradient_of(c, moved) for c in (cut, cfg))
    close(gradient, expected)
    assert metrics.keys() == values.keys()
    for name, value in values.items():
        assert metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    assert values["update/clip_fraction"] > 0.1 and values["update/ratio_max"] > 1.5


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((1, 4, 1), marks=pytest.mark.wide),
        (1, 2, 2),
        *(
            pytest.param(x, marks=pytest.mark.slow)
            for x in [(4, 1, 1), (2, 2, 1), (2, 1, 2), (1, 1, 4)]
        ),
    ],
    ids=str,
)
def test_meshes_change_nothing(scored, plain, shape):
    state, metrics = step(tiny.step_config(), scored, shape=shape)
    close(state.opt_state, plain[0])
    for name, value in plain[1].items():
        assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    expected = step(tiny.step_config(), scored)[0].curriculum
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5),
        state.curriculum, expected,
    )  # fmt: skip


@pytest.mark.parametrize("remat", ["block", pytest.param("dots", marks=pytest.mark.wide)])
def test_remat_changes_nothing(scored, plain, remat):
    close(gradient_of(tiny.step_config(), scored, remat=remat)[0], plain[0])


def uniform_weights(**options) -> Schedule:
    return Schedule(
        WeightsConfig(rule="uniform", **options), CurriculumConfig(shape="constant"), 10
    )


def test_uniform_weights_are_grpo_bit_for_bit(scored):
    rest = gradient_of(tiny.step_config(schedule=uniform_weights()), scored)[0]
    grpo = tiny.step_config(
        schedule=uniform_weights(normalizer="none"),
        loss=LossConfig(aggregation="token_mean", vocab_chunk=5),
    )
    jax.tree.map(np.testing.assert_array_equal, rest, gradient_of(grpo, scored)[0])


def test_equal_rewards_give_no_gradient(scored):
    same = scored.replace(reward=np.full_like(scored.reward, 1.7))
    gradient, metrics = gradient_of(tiny.step_config(), same)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient))
    assert metrics["reward/equal_groups"] == 1.0


def test_a_group_without_advantage_only_enters_the_denominator(scored):
    """Its tokens count in the mean; changing them changes nothing else."""
    reward = scored.reward.copy()
    reward[3] = 0.5
    flat = scored.replace(reward=reward)
    other = scored.rollout.responses.copy()
    other[3] = np.where(other[3] > 5, (other[3] - 6 + 11) % (tiny.VOCAB - 6) + 6, other[3])
    changed = flat.replace(rollout=scored.rollout.replace(responses=other))
    gradients = [gradient_of(tiny.step_config(), batch)[0] for batch in (changed, flat)]
    close(*gradients, 1e-6)


def test_padding_changes_neither_gradient_nor_metrics(scored):
    """Ids behind the end of a response, and what is said of them, do not matter."""
    r, mask = scored.rollout, mask_of(scored)
    noise = r.replace(
        responses=np.where(mask, r.responses, 17).astype(np.int32),
        logp=np.where(mask, r.logp, 9).astype(np.float32),
    )
    cfg = tiny.step_config(
        loss=LossConfig(vocab_chunk=5, kl_coefficient=0.1, entropy_coefficient=0.01)
    )
    (gradient, metrics), (expected, values) = (
        gradient_of(cfg, scored.replace(rollout=rollout), logp_ref=rollout.logp - np.float32(0.1))
        for rollout in (noise, r)
    )
    close(gradient, expected, 1e-6)
    for name, value in values.items():
        assert metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name


def test_tokens_of_a_region_zeroed_by_name_get_no_gradient(scored):
    nothing = scored.replace(region=np.where(mask_of(scored), 5, 0).astype(np.int8))
    zero = Schedule(WeightsConfig(zero=("think",)), CurriculumConfig(), 10)
    gradient = gradient_of(tiny.step_config(schedule=zero), nothing)[0]
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient))


def test_kl_term(scored, plain):
    cfg = tiny.step_config(loss=LossConfig(kl_coefficient=0.5, kl_estimator="k2", vocab_chunk=5))
    same = logprobs(cfg, scored).logp
    gradient, metrics = gradient_of(cfg, scored, logp_ref=same)
    close(gradient, plain[0], 2e-5)
    assert metrics["update/kl"] == pytest.approx(0, abs=1e-8)
    far = gradient_of(cfg, scored, logp_ref=same - 1.0)[1]
    assert far["update/kl"] == pytest.approx(0.5, rel=1e-3)
    assert far["update/loss"] == pytest.approx(metrics["update/loss"] + 0.25, rel=1e-3)


def test_metrics_of_the_ratio_against_an_oracle(scored):
    moved, mask = off_policy(scored), mask_of(scored)
    cfg = tiny.step_config(loss=LossConfig(dual_clip=1.3, vocab_chunk=5))
    metrics = gradient_of(cfg, moved)[1]
    r = np.exp(np.float64(scored.rollout.logp) - moved.rollout.logp)[mask]
    centred = moved.reward - moved.reward.mean(1, keepdims=True)
    a = np.broadcast_to(centred[..., None], mask.shape)[mask]
    low, high, dual = (a < 0) & (r < 0.8), (a > 0) & (r > 1.2), (a < 0) & (r > 1.3)
    expected = {
        "update/clip_low_fraction": low.mean(),
        "update/clip_high_fraction": high.mean(),
        "update/dual_clip_fraction": dual.mean(),
        "update/clip_fraction": (low | high | dual).mean(),
        "update/ratio_mean": r.mean(),
        "update/approx_kl": (r - 1 - np.log(r)).mean(),
        "update/logp_difference": np.abs(np.log(r)).mean(),
        "update/ratio_max": np.exp(np.abs(np.log(r)).max()),
    }
    for name, value in expected.items():
        assert value > 0 and metrics[name] == pytest.approx(value, rel=1e-3), name


def update_parts(scored, noise_groups=None, tx=RECORD):
    """(spec, batch, state) to call the parts of an update with."""
    cfg, mesh = tiny.step_config(), tiny.mesh()
    state = curriculum.init(cfg.schedule)
    minibatch = np.zeros(PROMPTS, np.int32)
    batch, *_ = prepare_of(cfg, mesh)(scored, None, None, minibatch, state)
    loss_fn = functools.partial(
        policy_loss, decoder=tiny.decoder(), cfg=cfg.loss, sampling=cfg.sampling
    )
    start = TrainState(
        jnp.int32(3), tiny.params(), tx.init(tiny.params()), jax.random.key(0), state
    )
    return UpdateSpec(loss_fn, tx, mesh, noise_groups), batch, start


@pytest.mark.wide
def test_micro_gradients_add_up(scored, plain):
    """Two halves give the gradient, and the metrics, of both."""
    spec, batch, state = update_parts(scored)
    lengths = BatchLengths.of(scored.rollout)
    add = jax.jit(functools.partial(add_gradient, spec=spec))
    nothing, zero = total = jax.jit(functools.partial(zero_gradient, spec=spec))(
        state.params, batch
    )
    for half in (range(4), range(4, 8)):
        micro = MicroBatch((tuple(map(lengths.whole, half)),), HALF_TOKENS, lengths)
        total = add(total, state.params, batch, make_rows(micro))
    gradient, totals = total
    close(gradient, plain[0])
    for name, value in (totals.sums | totals.maxima).items():
        assert float(value) == pytest.approx(plain[1][name], rel=1e-4, abs=1e-6), name
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves((nothing, zero.sums)))
    assert jax.tree.structure((nothing, zero)) == jax.tree.structure((gradient, totals))


def test_totals_add_sums_and_keep_the_largest():
    one, other = (
        Totals({"a": jnp.float32(x), "b": jnp.float32(2 * x)}, {"m": jnp.float32(-x)})
        for x in (1.0, 3.0)
    )
    joined = one.join(other)
    assert jax.tree.map(float, joined) == Totals({"a": 4.0, "b": 8.0}, {"m": -1.0})


def test_norms_of_an_update(scored):
    """Of the gradient, of the change, and of the parameters after it."""
    spec, _, state = update_parts(
        scored, tx=Optimizer(*optax.sgd(0.5), optax.constant_schedule(0.5))
    )
    gradient = jax.tree.map(jnp.cos, state.params)
    new, found = apply_gradient(state, gradient, Totals({"update/loss": jnp.ones(())}, {}), spec)
    close(new.params, jax.tree.map(lambda p, g: p - 0.5 * g, state.params, gradient), 1e-6)
    norm = np.linalg.norm(flat(gradient))
    assert float(found.sums["update/grad_norm"]) == pytest.approx(norm, rel=1e-5)
    assert float(found.sums["update/update_norm"]) == pytest.approx(norm / 2, rel=1e-5)
    expected = np.linalg.norm(flat(new.params))
    assert float(found.sums["update/param_norm"]) == pytest.approx(expected, rel=1e-5)
    assert int(new.step) == int(state.step)  # a step of training is several updates


@pytest.mark.parametrize("broken", ["a gradient", "the loss"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_update_that_is_not_finite_is_skipped_and_counted(scored, broken, value):
    cfg = OptimizerConfig(learning_rate=0.5, schedule="linear", weight_decay=0.0)
    spec, _, state = update_parts(scored, tx=make_optimizer(cfg, 10))
    gradient, loss = jax.tree.map(jnp.cos, state.params), jnp.ones(())
    moved, found = apply_gradient(state, gradient, Totals({"update/loss": loss}, {}), spec)
    assert found.sums["update/not_finite"] == 0
    assert float(found.sums["update/learning_rate"]) == pytest.approx(0.5)
    if broken == "the loss":
        loss = loss * value
    else:
        gradient["final_norm"]["scale"] = gradient["final_norm"]["scale"].at[0].set(value)
    kept, found = apply_gradient(moved, gradient, Totals({"update/loss": loss}, {}), spec)
    jax.tree.map(
        np.testing.assert_array_equal,
        (kept.params, kept.opt_state),
        (moved.params, moved.opt_state),
    )
    assert found.sums["update/not_finite"] == 1 and found.sums["update/update_norm"] == 0
    # It was not made: the next one has the rate that it would have had.
    for _ in range(2):
        assert float(found.sums["update/learning_rate"]) == pytest.approx(0.45)
        gradient, loss = jax.tree.map(jnp.cos, state.params), jnp.ones(())
        _, found = apply_gradient(kept, gradient, Totals({"update/loss": loss}, {}), spec)


# The noise of a gradient is the sample variance of its groups, computed here one group at a time.


def flat(tree) -> np.ndarray:
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])


@pytest.fixture(scope="module")
def terms(partly_equal) -> np.ndarray:
    """[P, parameters]: the term of each group in the gradient, skipped ones zero."""
    lengths = BatchLengths.of(partly_equal.rollout)
    alone = [[[MicroBatch(((lengths.whole(p),),), 64, lengths)]] for p in range(PROMPTS)]
    return np.stack(
        [flat(step(tiny.step_config(), partly_equal, plan)[0].opt_state) for plan in alone]
    )


def test_noise_equals_the_sample_variance_of_the_groups(partly_equal, terms):
    state, metrics = step(tiny.step_config(noise_groups=PROMPTS), partly_equal)
    np.testing.assert_allclose(flat(state.opt_state), terms.sum(0), rtol=1e-4, atol=1e-7)
    expected = PROMPTS * terms.var(axis=0, ddof=1).sum()
    assert metrics["update/grad_variance"] == pytest.approx(expected, rel=1e-4)
    norm = (terms.sum(0) ** 2).sum()
    assert metrics["update/grad_noise"] == pytest.approx(expected / norm, rel=1e-4)


def test_measured_groups_go_one_by_one_and_the_update_is_the_same(partly_equal):
    cfg = tiny.step_config(noise_groups=PROMPTS)
    (micro_batches,) = plan_of(partly_equal, cfg, tiny.mesh())
    assert all(len(row) == 1 for micro in micro_batches for row in micro.rows)
    assert len(micro_batches) == PROMPTS - len(EQUAL)
    measured, plain = (step(c, partly_equal)[0] for c in (cfg, tiny.step_config()))
    np.testing.assert_allclose(
        flat(measured.opt_state), flat(plain.opt_state), rtol=1e-4, atol=3e-7
    )


@pytest.mark.wide
def test_noise_of_each_mini_batch(partly_equal, terms):
    cfg = tiny.step_config(updates=2, noise_groups=PROMPTS // 2)
    _, metrics = step(cfg, partly_equal)
    # Denominators are per mini-batch: each half's terms are rescaled from the denominator of all. Weights average 1 in each
    # response, so denominators are token counts.
    tokens = BatchLengths.of(partly_equal.rollout).response_length.sum(1)
    halves = [terms[half::2] * tokens.sum() / tokens[half::2].sum() for half in (0, 1)]
    expected = np.mean([len(h) * h.var(axis=0, ddof=1).sum() for h in halves])
    assert metrics["update/grad_variance"] == pytest.approx(expected, rel=1e-3)


def test_without_advantage_there_is_no_variance(scored):
    equal = scored.replace(reward=np.zeros_like(scored.reward))
    _, metrics = step(tiny.step_config(noise_groups=PROMPTS), equal)
    assert metrics["update/grad_variance"] == metrics["update/grad_noise"] == 0


def test_unequal_parts_are_unbiased():
    """Parts of 1, 2 and 5 groups: over many draws the estimate averages to the true variance of the sum."""
    rng = np.random.default_rng(0)
    mean, spread, sizes = np.array([0.3, -0.2, 0.1]), 0.7, (1, 2, 5)
    estimate = jax.jit(gradient_noise, static_argnums=3)
    found = []
    for _ in range(3000):
        groups = mean + spread * rng.normal(size=(8, 3))
        parts = np.split(groups, np.cumsum(sizes)[:-1])
        squares = sum((part.sum(0) ** 2).sum() for part in parts)
        norm = np.linalg.norm(groups.sum(0))
        counts = float(sum(n * n for n in sizes))
        values = estimate(np.float32(squares), np.float32(counts), np.float32(norm), 8)
        found.append(float(values["update/grad_variance"]))
    expected = 8 * 3 * spread**2
    assert np.mean(found) == pytest.approx(expected, abs=4 * np.std(found) / np.sqrt(len(found)))


@pytest.mark.wide
def test_several_data_shards_measure_noise_of_the_same_order(partly_equal):
    """Two data shards: parts of two groups, the same gradient, an estimate of the same variance."""
    cfg = tiny.step_config(noise_groups=PROMPTS)
    one, two = step(cfg, partly_equal)[1], step(cfg, partly_equal, shape=(2, 1, 1))[1]
    assert two["update/grad_norm"] == pytest.approx(one["update/grad_norm"], rel=1e-4)
    assert 0.1 < two["update/grad_variance"] / one["update/grad_variance"] < 10


def test_noise_is_measured_only_when_asked(plain):
    assert "update/grad_noise" not in plain[1]
