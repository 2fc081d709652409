"""The measurement of gradient variance against brute force: every Jacobian, every gradient, every resample written out."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from rest_jax.analysis.variance.group_gradients import group_gradients, interval, noise, resample
from rest_jax.analysis.variance.measure import (
    inequality,
    measure,
    rule_weights,
    theorem2_weights,
    trim,
)
from rest_jax.analysis.variance.report import Settings
from rest_jax.analysis.variance.token_gradients import (
    Estimate,
    TokenGradients,
    draw_tokens,
    make_token_norms,
    measure_tokens,
    probes,
    token_logits,
)
from rest_jax.config import CurriculumConfig, WeightsConfig
from rest_jax.distributed import replicated
from rest_jax.models.attention import prompt_rows
from rest_jax.models.decoder import logits, param_shardings
from rest_jax.rl import curriculum
from rest_jax.rl.advantages import grpo
from rest_jax.rl.curriculum import Schedule
from rest_jax.rl.step import make_train_batch, make_train_step
from rest_jax.tool_calls import NUM_REGIONS, Region
from rest_jax.types import RolloutBatch, ScoredBatch, TrainState
from tests import tiny

KINDS = (Region.TAG, Region.NAME, Region.THINK)


@functools.cache
def peaked():
    """The tiny policy with larger logits, so that its tokens are certain and uncertain by turns."""
    return tiny.params() | {"embed": tiny.params()["embed"] * 8}


@functools.cache
def scored(prompts: int = 6) -> ScoredBatch:
    """A batch sampled from the peaked policy; the region follows from the place alone; group 1 has equal rewards."""
    batch = tiny.prompts(prompts)
    rollout = tiny.sampler()(peaked(), batch, jax.random.key(1), jnp.int32(0))
    mask = np.arange(tiny.TIME) < rollout.response_length[..., None]
    region = np.where(mask, np.array(KINDS)[np.arange(tiny.TIME) * 3 // tiny.TIME], 0)
    reward = np.random.default_rng(2).normal(size=mask.shape[:2]).astype(np.float32)
    reward[1] = 0.5
    return ScoredBatch(rollout, region.astype(np.int8), reward, np.ones_like(reward))


@jax.jit
def jacobian(params, prompt, prompt_length, response, response_length, t):
    """([V, N] Jacobian of the logits at token t, [V] logits): a backward pass for every word, one after another."""

    def scores(p):
        return token_logits(tiny.decoder(), p, prompt, prompt_length, response, response_length, t)

    z, pull = jax.vjp(scores, params)
    rows = jax.lax.map(lambda v: ravel_pytree(pull(v)[0])[0], jnp.eye(tiny.VOCAB))
    return rows, z


def exact_norms(r: RolloutBatch, p: int, g: int, t: int) -> tuple[float, float, float]:
    """(|J|_F^2, E_a |J^T s|^2 by a sum over all actions, H) of one token, in float64."""
    j, scores = (np.asarray(x, np.float64) for x in jacobian(peaked(), *one_response(r, p, g), t))
    prob = np.exp(scores - scores.max())
    prob /= prob.sum()
    steps = j - prob @ j  # row a: J^T (onehot(a) - p)
    entropy = -np.sum(prob * np.log(np.maximum(prob, 1e-300)))
    return np.sum(j**2), prob @ np.sum(steps**2, axis=1), entropy


def one_response(r: RolloutBatch, p: int, g: int):
    return r.prompt[p], r.prompt_length[p], r.responses[p, g], r.response_length[p, g]


@functools.partial(jax.jit, static_argnames="size")
def row_gradient(params, tokens, start, coefficient, size: int):
    """Gradient, as one vector, of sum_t c_t log pi(token start + t) in one plain row: no packing, no chunks."""

    def objective(params):
        layout, positions = prompt_rows(tokens[None], jnp.array([len(tokens)]))
        hidden, _ = tiny.decoder().apply({"params": params}, tokens[None], positions, layout)
        logp = jax.nn.log_softmax(logits(params, tiny.decoder().cfg, hidden[0]))
        at = start + jnp.arange(len(coefficient))
        chosen = logp[at - 1, tokens[jnp.minimum(at, size - 1)]]
        return jnp.sum(jnp.where(coefficient != 0, coefficient * chosen, 0.0))

    return ravel_pytree(jax.grad(objective)(params))[0]


def whole_row(r: RolloutBatch, p: int, g: int) -> np.ndarray:
    """Prompt and response with nothing between, padded to one length for all."""
    own = [r.prompt[p, : r.prompt_length[p]], r.responses[p, g, : r.response_length[p, g]]]
    tokens = np.concatenate(own)
    return np.pad(tokens, (0, r.prompt.shape[1] + tiny.TIME - len(tokens)))


# single tokens


def test_the_score_gradient_is_the_gradient_of_the_log_prob():
    """J^T (onehot(a) - p) from the Jacobian is jax.grad of log pi(a), one token at a time, in a plain row."""
    r = scored().rollout
    for p, g, t in ((0, 0, 0), (2, 1, 1), (3, 3, 0)):
        j, z = jacobian(peaked(), *one_response(r, p, g), t)
        score = jax.nn.one_hot(r.responses[p, g, t], tiny.VOCAB) - jax.nn.softmax(z)
        only = np.eye(tiny.TIME, dtype=np.float32)[t]
        row = whole_row(r, p, g)
        plain = row_gradient(peaked(), row, r.prompt_length[p], only, len(row))
        np.testing.assert_allclose(score @ j, plain, atol=1e-4 * np.abs(plain).max())


def test_probes_have_the_two_covariances():
    scores = jnp.array([2.0, 0.0, 0.5, -1.0, -3.0])
    drawn = jax.vmap(lambda k: probes(scores, k))(jax.random.split(jax.random.key(0), 40_000))
    prob = np.asarray(jax.nn.softmax(scores))
    expected = np.eye(5), np.diag(prob) - np.outer(prob, prob)
    for v, covariance in zip(np.asarray(drawn).swapaxes(0, 1), expected, strict=True):
        np.testing.assert_allclose(v.T @ v / len(v), covariance, atol=0.02)


@pytest.mark.parametrize("place", [(0, 0, 0), (2, 1, 1), (3, 3, 0)])
def test_estimates_of_one_token_are_unbiased(place):
    r = scored().rollout
    p, g, t = place
    norms = make_token_norms(tiny.decoder())
    arguments = (*one_response(r, p, g), t)
    keys = jax.random.split(jax.random.key(3), 200)
    found = np.array([norms(peaked(), *arguments, key) for key in keys], np.float64)
    error = found.std(axis=0, ddof=1) / np.sqrt(len(found))
    frobenius, score, entropy = exact_norms(r, p, g, t)
    for mean, e, exact in zip(found.mean(axis=0), error, (frobenius, score), strict=True):
        assert e < 0.2 * exact and abs(mean - exact) < 4 * e, (mean, e, exact)
    assert score <= frobenius * -np.expm1(-entropy) * (1 + 1e-6)


def test_all_basis_vectors_together_give_the_frobenius_norm():
    """sum_i |J^T e_i|^2 over the vocabulary, each by a backward pass of its own, is |J|_F^2 with no noise at all."""
    r = scored().rollout
    arguments = jax.tree.map(jnp.asarray, (*one_response(r, 0, 0), 0))
    _, pull = jax.vjp(lambda p: token_logits(tiny.decoder(), p, *arguments), peaked())
    one = jax.jit(lambda v: sum(jnp.sum(x**2) for x in jax.tree.leaves(pull(v)[0])))
    total = sum(float(one(v)) for v in jnp.eye(tiny.VOCAB))
    assert total == pytest.approx(exact_norms(r, 0, 0, 0)[0], rel=1e-4)


def test_region_means_against_every_token():
    """Importance-drawn tokens against the sum over all of them; the standard errors are of the right size."""
    few = trim(dataclasses.replace(scored(), **_rows(scored(), slice(0, 2))))
    exact = {r: [] for r in KINDS}
    for p, g, t in np.argwhere(few.region > 0):
        frobenius, score, entropy = exact_norms(few.rollout, p, g, t)
        exact[Region(few.region[p, g, t])].append((frobenius * -np.expm1(-entropy), score))
    found = measure_tokens(tiny.decoder(), peaked(), few, tokens=60, seed=4)
    for r in KINDS:
        for estimate, value in zip((found.beta, found.score), np.mean(exact[r], 0), strict=True):
            assert estimate.error[r] < 0.3 * value
            assert abs(estimate.mean[r] - value) < 4 * estimate.error[r]
    assert np.isnan(found.beta.mean[Region.PARAM]) and found.count[Region.PARAM] == 0


def _rows(batch: ScoredBatch, rows: slice) -> dict:
    own = {f: getattr(batch, f)[rows] for f in ("region", "reward", "format_score")}
    return own | {"rollout": jax.tree.map(lambda x: x[rows], batch.rollout)}


def test_draws_follow_the_weight():
    region = np.array([[[1, 1, 1, 3, 0]]], np.int8)
    weight = np.array([[[1.0, 0.0, 3.0, 5.0, 9.0]]])
    drawn = draw_tokens(region, weight, 4000, 0)[:, 2]
    share = np.bincount(drawn, minlength=5) / 4000
    np.testing.assert_allclose(share, [0.25, 0, 0.75, 1, 0], atol=0.03)


# groups


@pytest.fixture(scope="module")
def coefficient():
    """Two weightings; the second leaves group 2 out."""
    batch = scored()
    mask = batch.region > 0
    advantage = np.asarray(grpo(jnp.asarray(batch.reward)))[..., None]
    first = np.where(mask, -advantage, 0.0)
    second = first * np.random.default_rng(0).uniform(0.2, 3, mask.shape)
    second[2] = 0
    return np.stack([first, second]).astype(np.float32)


@pytest.fixture(scope="module")
def gradients(coefficient):
    """float64 [K, P, N], by jax.grad of plain rows, summed."""
    r, found = scored().rollout, []
    for c in coefficient:
        for p in range(len(c)):
            rows = [
                row_gradient(
                    peaked(), whole_row(r, p, g), r.prompt_length[p], c[p, g], 16 + tiny.TIME
                )
                for g in range(tiny.GROUP)
            ]
            found.append(np.sum(rows, axis=0, dtype=np.float64))
    return np.array(found).reshape(len(coefficient), -1, found[0].size)


def test_gram_against_gradients_of_plain_rows(coefficient, gradients):
    found = group_gradients(tiny.decoder(), peaked(), scored().rollout, coefficient, chunk=5)
    expected = np.einsum("kpn,kqn->kpq", gradients, gradients)
    scale = np.sqrt(np.einsum("kpp,kqq->kpq", expected, expected))
    # equal answers cancel within a group: what is left of it is rounding
    assert np.all(np.abs(found.gram - expected) <= 1e-4 * scale + 1e-6 * scale.max())
    assert found.exact and found.dimensions == gradients.shape[2]
    assert not found.gram[:, 1].any() and not found.gram[1, 2].any()
    a, b = gradients.mean(axis=1)
    cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    np.testing.assert_allclose(found.cosine, [1, cosine], atol=1e-4)


def test_sketches_keep_the_inner_products(coefficient, gradients):
    found = group_gradients(
        tiny.decoder(), peaked(), scored().rollout, coefficient, chunk=5, exact_floats=1
    )
    assert not found.exact
    expected = np.einsum("kpn,kqn->kpq", gradients, gradients)
    norms = np.sqrt(np.einsum("kpp->kp", expected))
    error = np.abs(found.gram - expected)
    scale = norms[:, :, None] * norms[:, None]
    allowed = 5 * np.sqrt(2 / found.dimensions) * scale + 1e-6 * scale.max()
    assert np.all(error <= allowed)
    assert error.max() > 0


# variance


def test_variance_against_an_explicit_bootstrap():
    """Means of resampled gradients, computed as such; the bootstrap's own variance is (P - 1) / P of the unbiased one."""
    rng = np.random.default_rng(0)
    g = rng.normal(1.0, 2.0, (7, 5)) * np.array([1, 2, 3, 0.5, 1])
    found = noise(g @ g.T)
    means = g[rng.integers(0, 7, (200_000, 7))].mean(axis=1)
    assert found.variance * 6 / 7 == pytest.approx(means.var(axis=0).sum(), rel=0.01)
    assert found.variance == pytest.approx(np.cov(g.T).trace() / 7)
    assert found.mean_square == pytest.approx(np.sum(g.mean(axis=0) ** 2))
    assert found.share == pytest.approx(found.variance / found.mean_square)


def test_variance_and_signal_are_unbiased():
    rng = np.random.default_rng(1)
    mean, scale = np.array([0.3, -0.2, 0.1]), np.array([1.0, 2.0, 0.5])
    draws = [rng.normal(mean, scale, (5, 3)) for _ in range(20_000)]
    found = [noise(g @ g.T) for g in draws]
    assert np.mean([f.variance for f in found]) == pytest.approx(np.sum(scale**2) / 5, rel=0.02)
    signal = np.array([f.signal for f in found])
    assert abs(signal.mean() - mean @ mean) < 4 * signal.std() / np.sqrt(len(signal))


def test_resamples_count_and_centre():
    """Counts weigh groups as repeated rows would; their variance and signal have the batch's own as mean."""
    rng = np.random.default_rng(2)
    g = rng.normal(0.5, 1.0, (6, 4))
    gram, count = g @ g.T, resample(6, 50_000, 0)
    assert (count.sum(axis=1) == 6).all() and (count.max(axis=1) < 6).all()
    found = noise(gram, count)
    for i in range(5):
        rows = np.repeat(np.arange(6), count[i].astype(int))
        different = rows[:, None] != rows
        assert found.signal[i] == pytest.approx(gram[np.ix_(rows, rows)][different].mean())
    whole = noise(gram)
    assert found.signal.mean() == pytest.approx(whole.signal, abs=0.02)
    assert found.variance.mean() == pytest.approx(whole.variance, rel=0.02)
    low, high = interval(found.variance)
    assert np.mean((found.variance >= low) & (found.variance <= high)) == pytest.approx(
        0.95, abs=0.01
    )


@pytest.mark.parametrize("rule", ["uniform", "inverse_bound"])
def test_variance_is_that_of_the_trainers_own_gradient(rule):
    """The update of training measures its noise from its micro-batches: same gradient, same variance."""
    schedule = Schedule(WeightsConfig(rule=rule), CurriculumConfig(shape="constant"), 10)
    cfg = tiny.step_config(schedule=schedule, noise_groups=6)
    mesh, start = tiny.mesh(), jax.tree.map(jnp.copy, peaked())
    tx = tiny.optimizer()
    state = TrainState(
        jnp.int32(0), start, tx.init(start), jax.random.key(0), curriculum.init(schedule)
    )
    shardings = jax.tree.map(lambda _: replicated(mesh), state)
    shardings = shardings.replace(params=param_shardings(tiny.decoder().cfg, mesh))
    step = make_train_step(tiny.decoder(), tx, cfg, mesh, shardings)
    _, metrics = step(jax.device_put(state, shardings), scored(), None, None)
    row = report().rules["uniform" if rule == "uniform" else "paper"]
    assert float(metrics["update/grad_norm"]) ** 2 == pytest.approx(row.mean_square, rel=1e-3)
    assert float(metrics["update/grad_variance"]) == pytest.approx(row.variance, rel=1e-3)


# weights


def fake_tokens(rng) -> TokenGradients:
    mean = np.full(NUM_REGIONS, np.nan)
    mean[list(KINDS)] = rng.uniform(0.1, 5, len(KINDS))
    one = Estimate(mean, np.zeros(NUM_REGIONS))
    bound = Estimate(np.where(np.isnan(mean), np.nan, 0.5), one.error)
    return TokenGradients(
        np.ones(NUM_REGIONS, int), bound.mean, Estimate(2 * mean, one.error), one, one
    )


def test_theorem2_weights_minimise_the_bound():
    """No weights with the same sum have a smaller sum_t beta_t w_t^2, and the least value is T^2 / sum 1/beta."""
    rng = np.random.default_rng(3)
    region = scored().region
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


def test_rules_sum_to_the_tokens_and_paper_is_the_trainers():
    batch, own = scored(), scored().region > 0
    schedule = Schedule(WeightsConfig(), CurriculumConfig(), 10)
    tokens = fake_tokens(np.random.default_rng(0))
    rules = rule_weights(batch, tokens, schedule)
    assert list(rules) == ["uniform", "paper", "exact", "theorem2", "inverse_score"]
    for weight in rules.values():
        assert weight[own].sum() == pytest.approx(own.sum()) and not weight[~own].any()
    cfg = tiny.step_config(schedule=schedule)
    on_device = jax.tree.map(jnp.asarray, batch)
    trained, _, _ = make_train_batch(on_device, None, None, curriculum.init(schedule), cfg)
    np.testing.assert_allclose(rules["paper"], trained.weight, rtol=1e-4)
    name, think = (rules["theorem2"][batch.region == r][0] for r in (Region.NAME, Region.THINK))
    beta = tokens.beta.mean
    assert name / think == pytest.approx(beta[Region.THINK] / beta[Region.NAME])


def test_a_config_with_weights_of_its_own_is_compared_too():
    mass = Schedule(WeightsConfig(), CurriculumConfig(target="mass"), 10)
    rules = rule_weights(scored(), fake_tokens(np.random.default_rng(0)), mass)
    share = rules["configured"][scored().region == Region.NAME].sum() / rules["configured"].sum()
    present = 0.20 + 0.25 + 0.30  # format, name and think; param does not occur
    assert share == pytest.approx(0.25 / present, rel=1e-3)


# the inequality


def test_the_inequality_holds_and_the_actions_agree():
    batch = scored()
    found = inequality(batch, batch.region > 0)
    assert found.violations == 0 and found.largest_ratio is not None and found.largest_ratio <= 1
    assert 0.05 < found.gini < found.bound
    assert found.sampled_error < 0.1 and abs(found.sampled - found.gini) < 4 * found.sampled_error


def test_a_broken_inequality_is_counted():
    batch = scored()
    gini = batch.rollout.gini.copy()
    gini[0, 0, 0] = -np.expm1(-batch.rollout.entropy[0, 0, 0]) + 1e-3
    broken = dataclasses.replace(batch, rollout=dataclasses.replace(batch.rollout, gini=gini))
    found = inequality(broken, batch.region > 0)
    assert found.violations == 1 and found.largest_excess == pytest.approx(1e-3, rel=1e-2)


# the whole


@functools.cache
def report():
    schedule = Schedule(WeightsConfig(), CurriculumConfig(), 10)
    settings = Settings(tokens=4, resamples=200, chunk=5)
    return measure(tiny.decoder(), peaked(), scored(), schedule, settings=settings)


def test_report_is_whole_and_plain():
    found = report().to_json()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert list(found["regions"]) == ["tag", "name", "think"]
    assert found["groups_with_advantage"] == 5 and found["exact_gradients"]
    total = sum(row["tokens"] for row in found["regions"].values())
    assert found["overall"]["tokens"] == total == (scored().region > 0).sum()
    uniform = found["rules"]["uniform"]
    assert uniform["relative"] == 1 and uniform["relative_interval"] == [1, 1]
    assert uniform["cosine"] == pytest.approx(1) and uniform["bound"] == 1
    assert found["rules"]["theorem2"]["bound"] == min(r["bound"] for r in found["rules"].values())


def test_without_a_gradient_there_is_nothing_to_measure():
    flat = dataclasses.replace(scored(), reward=np.ones_like(scored().reward))
    with pytest.raises(ValueError, match="0 of them with an advantage"):
        measure(tiny.decoder(), peaked(), flat, tiny.step_config().schedule)
