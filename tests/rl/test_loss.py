"""The loss of a token, its metrics and its denominators against NumPy oracles of docs/method.md section 7."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rest_jax.config import LossConfig
from rest_jax.rl import loss
from rest_jax.rl.loss import MiniBatches, TokenInputs, TokenStats, policy_token_loss

SHAPE = (4, 3, 9)


def stats(logp, entropy=0.0) -> TokenStats:
    logp = jnp.asarray(logp, jnp.float32)
    return TokenStats(logp, jnp.full(logp.shape, entropy), jnp.zeros(logp.shape, bool))


def inputs(logp_old, advantage, **fields) -> TokenInputs:
    """Of weight 1 each, all of them the policy's, unless `fields` say otherwise."""
    ones = np.ones(np.shape(logp_old), np.float32)
    plain = {"loss_weight": ones, "regulariser": ones, "mask": ones > 0, "logp_ref": None}
    found = TokenInputs(logp_old, np.broadcast_to(advantage, ones.shape), **plain | fields)
    return jax.tree.map(jnp.asarray, found)


def draw(seed: int = 0, spread: float = 1.5):
    """(logp, logp_old, advantage) of tokens, far apart as well as near."""
    rng = np.random.default_rng(seed)
    logp, old = rng.normal(-1, spread, (2, *SHAPE)).astype(np.float32)
    advantage = rng.normal(0, 1, (*SHAPE[:2], 1)).astype(np.float32)
    return logp, old, np.broadcast_to(advantage, SHAPE)


def draw_weights(seed: int = 0):
    """(loss_weight, regulariser, mask), both zero outside the mask."""
    rng = np.random.default_rng(seed)
    mask = np.arange(SHAPE[2]) < rng.integers(1, SHAPE[2], SHAPE[:2])[..., None]
    weight, regulariser = rng.random((2, *SHAPE)).astype(np.float32) * mask
    return weight, regulariser, mask


def ratio(logp, old):
    return np.exp(np.clip(np.float64(logp) - old, -20, 20))


def policy_oracle(logp, old, a, cfg: LossConfig):
    out = np.zeros(SHAPE)
    for index in np.ndindex(SHAPE):
        r, adv = ratio(logp[index], old[index]), a[index]
        value = -min(r * adv, np.clip(r, 1 - cfg.clip_low, 1 + cfg.clip_high) * adv)
        if cfg.dual_clip is not None and adv < 0:
            value = min(value, -cfg.dual_clip * adv)
        out[index] = value
    return out


@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_policy_loss(dual_clip):
    cfg = LossConfig(clip_low=0.2, clip_high=0.28, dual_clip=dual_clip)
    logp, old, a = draw()
    old[0, 0, 0] = -90.0  # far outside the clamp of the log-ratio
    weight, regulariser, mask = draw_weights()
    fields = {"loss_weight": weight, "regulariser": regulariser, "mask": mask}
    found = policy_token_loss(stats(logp), inputs(old, a, **fields), cfg)
    expected = weight * policy_oracle(logp, old, a, cfg)
    np.testing.assert_allclose(found.loss, expected, rtol=2e-5, atol=1e-6)
    for name in ("update/loss", "update/policy_loss"):
        np.testing.assert_array_equal(found.sums[name], found.loss)
    assert np.isfinite(np.asarray(found.loss)).all()


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_kl_and_entropy_terms(estimator):
    cfg = LossConfig(kl_coefficient=0.3, kl_estimator=estimator, entropy_coefficient=0.2)
    logp, old, a = draw()
    reference = (old + 0.5).astype(np.float32)
    weight, u, mask = draw_weights()
    fields = {"loss_weight": weight, "regulariser": u, "mask": mask, "logp_ref": reference}
    found = policy_token_loss(stats(logp, entropy=1.7), inputs(old, a, **fields), cfg)
    d = np.float64(reference) - logp
    kl = {"k2": d * d / 2, "k3": np.exp(d) - d - 1}[estimator]
    policy = weight * policy_oracle(logp, old, a, cfg)
    expected = policy + 0.3 * u * kl - 0.2 * u * 1.7
    np.testing.assert_allclose(found.loss, expected, rtol=2e-5, atol=1e-5)
    np.testing.assert_array_equal(found.sums["update/loss"], found.loss)
    np.testing.assert_allclose(found.sums["update/policy_loss"], policy, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(found.sums["update/kl"], u * kl, rtol=2e-5, atol=1e-5)
    np.testing.assert_allclose(found.sums["update/entropy"], u * 1.7, rtol=1e-5)


def test_without_a_reference_there_is_no_kl_and_the_entropy_only_a_metric():
    logp, old, a = draw()
    one, other = (
        policy_token_loss(stats(logp, entropy), inputs(old, a), LossConfig())
        for entropy in (0.0, 2.0)
    )
    assert "update/kl" not in one.sums
    np.testing.assert_array_equal(one.loss, other.loss)
    np.testing.assert_array_equal(other.sums["update/entropy"], 2.0)


@pytest.mark.parametrize("dual_clip", [None, 1.5])
def test_the_clip_fraction_counts_exactly_the_tokens_without_gradient(dual_clip):
    cfg = LossConfig(dual_clip=dual_clip)
    logp, old, a = draw(spread=0.4)

    def loss_of(logp):
        return policy_token_loss(stats(logp), inputs(old, a), cfg)

    gradient = jax.grad(lambda x: loss_of(x).loss.sum())(jnp.asarray(logp))
    cut = np.asarray(loss_of(logp).sums["update/clip_fraction"])
    np.testing.assert_array_equal(np.asarray(gradient) == 0, cut == 1)
    assert set(cut.ravel()) == {0, 1}


def clip_oracle(logp, old, a, u, cfg: LossConfig) -> dict[str, float]:
    """Sums over tokens, one token at a time."""
    out = dict.fromkeys(("clip", "clip_low", "clip_high", "dual_clip"), 0.0)
    for index in np.ndindex(SHAPE):
        r = ratio(logp[index], old[index])
        low = a[index] < 0 and r < 1 - cfg.clip_low
        high = a[index] > 0 and r > 1 + cfg.clip_high
        dual = cfg.dual_clip is not None and a[index] < 0 and r > cfg.dual_clip
        cuts = (low or high or dual, low, high, dual)
        for name, cut in zip(out, cuts, strict=True):
            out[name] += u[index] * cut
    return {f"update/{name}_fraction": value for name, value in out.items()}


@pytest.mark.parametrize("dual_clip", [None, 1.5])
def test_fractions_of_tokens_that_each_clip_cuts(dual_clip):
    cfg = LossConfig(clip_low=0.2, clip_high=0.28, dual_clip=dual_clip)
    logp, old, a = draw(spread=0.5)
    _, u, mask = draw_weights()
    found = policy_token_loss(stats(logp), inputs(old, a, regulariser=u, mask=mask), cfg)
    expected = clip_oracle(logp, old, a, u, cfg)
    for name, value in expected.items():
        assert float(jnp.sum(found.sums[name])) == pytest.approx(value, rel=1e-5), name
        assert (value > 0) == (dual_clip is not None or name != "update/dual_clip_fraction"), name
    low, high, dual, total = (
        expected[f"update/{name}_fraction"]
        for name in ("clip_low", "clip_high", "dual_clip", "clip")
    )
    assert low + high + dual == pytest.approx(total)  # no token is cut twice


def test_how_far_the_policy_moved():
    logp, old, a = draw()
    _, u, mask = draw_weights()
    found = policy_token_loss(stats(logp), inputs(old, a, regulariser=u, mask=mask), LossConfig())
    r = ratio(logp, old)
    expected = {
        "update/ratio_mean": u * r,
        "update/logp_difference": u * np.abs(logp - old),
        "update/approx_kl": u * (r - 1 - np.log(r)),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(found.sums[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
    assert (np.asarray(found.sums["update/approx_kl"]) >= 0).all()
    farthest = np.where(mask, np.maximum(r, 1 / r), -np.inf)
    np.testing.assert_allclose(found.maxima["update/ratio_max"], farthest, rtol=1e-5)


def test_approx_kl_estimates_the_divergence_from_the_sampler():
    """Over tokens drawn from the old policy its mean is KL(old, new)."""
    rng = np.random.default_rng(0)
    old, new = rng.dirichlet(np.ones(6), 2)
    token = rng.choice(6, 200_000, p=old)
    logp, logp_old = (np.log(p)[token].astype(np.float32) for p in (new, old))
    found = policy_token_loss(stats(logp), inputs(logp_old, 0.0), LossConfig())
    values = np.asarray(found.sums["update/approx_kl"])
    error = 4 * values.std() / np.sqrt(values.size)
    assert values.mean() == pytest.approx((old * np.log(old / new)).sum(), abs=error)


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 7.0])
def test_what_is_outside_the_mask_changes_nothing(garbage):
    """Log-probs and entropies of padding may be anything, NaN included."""
    cfg = LossConfig(kl_coefficient=0.3, entropy_coefficient=0.2)
    logp, old, a = draw()
    weight, u, mask = draw_weights()

    def loss_of(outside):
        seen = stats(np.where(mask, logp, outside))
        seen = seen._replace(entropy=jnp.where(mask, 0.5, outside), is_argmax=~jnp.asarray(mask))
        fields = {"loss_weight": weight, "regulariser": u, "mask": mask}
        reference = np.where(mask, old, outside).astype(np.float32)
        x = inputs(np.where(mask, old, outside).astype(np.float32), a, logp_ref=reference, **fields)
        return policy_token_loss(seen, x, cfg)

    found, expected = loss_of(garbage), loss_of(0.0)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert (np.asarray(found.loss)[~mask] == 0).all()
    assert all((np.asarray(value)[~mask] == 0).all() for value in found.sums.values())
    assert (np.asarray(found.maxima["update/ratio_max"])[~mask] == -np.inf).all()


def test_on_policy_gradient_is_that_of_reinforce():
    a = np.broadcast_to(np.array([[[1.0], [-2.0]]], np.float32), (1, 2, 5))
    logp = jnp.zeros((1, 2, 5))
    gradient = jax.grad(
        lambda x: policy_token_loss(stats(x), inputs(logp, a), LossConfig()).loss.sum()
    )(logp)
    np.testing.assert_allclose(gradient, -a)


def test_kl_estimators():
    rng = np.random.default_rng(0)
    logp, ref = (jnp.asarray(rng.normal(-2, 1, 50), jnp.float32) for _ in range(2))
    d = ref - logp
    assert set(loss.KL_ESTIMATORS) == {"k2", "k3"}
    np.testing.assert_allclose(loss.k2(logp, ref), d * d / 2, rtol=1e-5)
    np.testing.assert_allclose(loss.k3(logp, ref), np.exp(d) - d - 1, rtol=1e-4, atol=1e-6)
    assert (np.asarray(loss.k3(logp, ref)) >= 0).all()


def one_minibatch(groups: int) -> MiniBatches:
    return MiniBatches(jnp.zeros(groups, jnp.int32), 1)


def draw_tokens(groups: int, seed: int = 0):
    """(token weights, mask, values) of ragged responses."""
    rng = np.random.default_rng(seed)
    mask = np.arange(9) < rng.integers(1, 10, (groups, 3))[..., None]
    weight = (rng.random((groups, 3, 9)).astype(np.float32) + 0.1) * mask
    return weight, mask, rng.normal(size=(groups, 3, 9)).astype(np.float32)


def aggregation_oracle(name: str, w, mask, x, length: int) -> float:
    """The loss of one mini-batch whose tokens have the losses x."""
    return {
        "weighted_token_mean": (w * x).sum() / w.sum(),
        "token_mean": (w * x).sum() / mask.sum(),
        "sequence_mean": ((w * x).sum(-1) / w.sum(-1)).mean(),
        "fixed_length": (w * x).sum(-1).mean() / length,
    }[name]


@pytest.mark.parametrize("name", sorted(loss.AGGREGATIONS))
def test_aggregations(name):
    w, mask, x = draw_tokens(2)
    c = loss.AGGREGATIONS[name](jnp.asarray(w), jnp.asarray(mask), one_minibatch(2), 64)
    np.testing.assert_allclose(jnp.sum(c * x), aggregation_oracle(name, w, mask, x, 64), rtol=1e-5)
    assert (np.asarray(c)[~mask] == 0).all()


@pytest.mark.parametrize("name", sorted(loss.AGGREGATIONS))
def test_every_mini_batch_has_denominators_of_its_own(name):
    w, mask, x = draw_tokens(12)
    index = np.random.default_rng(1).permutation(np.repeat(np.arange(3, dtype=np.int32), 4))
    minibatches = MiniBatches(jnp.asarray(index), 3)
    c = loss.AGGREGATIONS[name](jnp.asarray(w), jnp.asarray(mask), minibatches, 64)
    for mini in range(3):
        here = index == mini
        expected = aggregation_oracle(name, w[here], mask[here], x[here], 64)
        np.testing.assert_allclose(np.sum((c * x)[here]), expected, rtol=1e-5)


def test_unit_weights_are_plain_token_mean():
    mask = jnp.arange(9) < jnp.asarray([[4, 9], [7, 2]])[..., None]
    ones, minibatches = mask.astype(jnp.float32), one_minibatch(2)
    a, b = (
        loss.AGGREGATIONS[n](ones, mask, minibatches, 1)
        for n in ("weighted_token_mean", "token_mean")
    )
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", [np.float32, np.int32, bool])
@pytest.mark.parametrize("sizes", [(4, 4, 4), (1, 7, 4), (12, 0, 0)], ids=str)
def test_totals_of_mini_batches(dtype, sizes):
    rng = np.random.default_rng(0)
    index = rng.permutation(np.repeat(np.arange(3, dtype=np.int32), sizes))
    x = rng.integers(0, 100, 12).astype(dtype)
    found = MiniBatches(jnp.asarray(index), 3).total(jnp.asarray(x))
    assert found.shape == (12, 1, 1) and found.dtype == jnp.float32
    expected = np.bincount(index, np.float64(x), minlength=3)[index]
    np.testing.assert_array_equal(np.ravel(found), expected)


def test_totals_of_one_mini_batch_ignore_the_others():
    """Even infinities."""
    x = jnp.asarray([1.0, jnp.inf, 2.0])
    found = MiniBatches(jnp.asarray([0, 1, 0]), 2).total(x)
    np.testing.assert_array_equal(np.ravel(found), [3, np.inf, 3])
