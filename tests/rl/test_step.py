"""The update: exact under micro-batches and meshes, GRPO as a special case, zero gradients where they belong."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rest_jax.rl.forward import response_logprobs

from rest_jax.config import CurriculumConfig, LossConfig, WeightsConfig
from rest_jax.distributed import replicated
from rest_jax.models.decoder import param_shardings
from rest_jax.rl import curriculum, loss
from rest_jax.rl.curriculum import Schedule
from rest_jax.rl.step import OldPolicy, make_logprobs, make_train_step
from rest_jax.types import TrainState, response_mask
from tests import tiny

GROUP_TOKENS = 16 + tiny.GROUP * tiny.TIME  # trunk positions of a padded group of `tiny.prompts`

# Keeps the gradient as its state and moves nothing: a difference of parameters would be rounded to the parameters' size.
RECORD = optax.GradientTransformation(
    init=lambda params: jax.tree.map(jnp.zeros_like, params),
    update=lambda grads, state, params=None: (jax.tree.map(jnp.zeros_like, grads), grads),
)


def run(cfg, scored, shape=(1, 1, 1), tx=RECORD, old=None, logp_ref=None, remat="none"):
    """(gradient as a tree, metrics, new state) of one step on a mesh."""
    mesh = tiny.mesh(*shape)
    decoder = tiny.decoder(remat)
    start = jax.tree.map(lambda x: x.copy(), tiny.params())
    state = TrainState(
        step=jnp.int32(0),
        params=start,
        opt_state=tx.init(start),
        rng=jax.random.key(0),
        curriculum=curriculum.init(cfg.schedule),
    )
    shardings = jax.tree.map(lambda _: replicated(mesh), state)
    shardings = shardings.replace(params=param_shardings(decoder.cfg, mesh))
    step = make_train_step(decoder, tx, cfg, mesh, shardings)
    new, metrics = step(jax.device_put(state, shardings), scored, old, logp_ref)
    gradient = jax.tree.map(np.asarray, new.opt_state)
    return gradient, {k: float(v) for k, v in metrics.items()}, new


def close(a, b, relative=1e-5):
    """Every leaf within `relative` of the leaf's own norm."""
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
        error = np.linalg.norm(np.asarray(x) - np.asarray(y)) / (np.linalg.norm(y) + 1e-12)
        assert error <= relative, (jax.tree_util.keystr(path), error)


@pytest.fixture(scope="module")
def scored():
    return tiny.scored(tiny.prompts())


@pytest.fixture(scope="module")
def whole(scored):
    return run(tiny.step_config(), scored)


def test_loss_and_gradient_against_an_oracle(scored, whole):
    """The definition written out: full logits, one sum, no packing."""
    cfg = tiny.step_config()
    r = scored.rollout
    mask = np.asarray(response_mask(jnp.asarray(r.response_length), tiny.TIME))
    weight = np.asarray(curriculum.update(
        curriculum.init(cfg.schedule), _stats(scored), jnp.mean(scored.format_score), cfg.schedule
    ).weight)[scored.region]  # fmt: skip
    weight = weight / (weight.sum(-1, keepdims=True) / mask.sum(-1, keepdims=True) + 1e-8) * mask
    centred = scored.reward - scored.reward.mean(1, keepdims=True)
    advantage = centred / (scored.reward.std(1, ddof=1, keepdims=True) + 1e-6)

    def objective(params):
        logp, _, _ = response_logprobs(
            tiny.decoder(), params, *map(jnp.asarray, (r.prompt, r.prompt_length, r.responses, r.response_length)),
            cfg.sampling, 100,
        )  # fmt: skip
        ratio = jnp.exp(logp - jnp.where(mask, r.logp, logp))
        clipped = jnp.clip(ratio, 0.8, 1.2)
        a = advantage[..., None]
        return (
            jnp.sum(jnp.where(mask, weight * -jnp.minimum(ratio * a, clipped * a), 0))
            / weight.sum()
        )

    value, gradient = jax.value_and_grad(objective)(tiny.params())
    assert whole[1]["update/loss"] == pytest.approx(float(value), rel=1e-4, abs=1e-6)
    close(whole[0], gradient, 2e-5)


def _stats(scored):
    from rest_jax.rl.weights import region_stats

    return region_stats(
        *map(jnp.asarray, (scored.region, scored.rollout.entropy, scored.rollout.gini))
    )


@pytest.mark.parametrize("aggregation", sorted(loss.AGGREGATIONS))
@pytest.mark.parametrize("micro", [2, 8])
def test_micro_batches_change_nothing(scored, micro, aggregation):
    cfg = tiny.step_config(
        loss=LossConfig(aggregation=aggregation, vocab_chunk=5, entropy_coefficient=0.01)
    )
    one, split = (
        run(cfg, scored),
        run(dataclasses.replace(cfg, max_tokens_per_microbatch=GROUP_TOKENS * 8 // micro), scored),
    )
    close(split[0], one[0])
    assert split[1]["update/loss"] == pytest.approx(one[1]["update/loss"], rel=1e-5, abs=1e-7)


@pytest.mark.parametrize(
    "shape", [(1, 4, 1), (2, 2, 1), (4, 1, 1), (1, 2, 2), (2, 1, 2), (1, 1, 4)], ids=str
)
def test_meshes_change_nothing(scored, whole, shape):
    gradient, metrics, new = run(tiny.step_config(), scored, shape)
    close(gradient, whole[0])
    for name, value in whole[1].items():
        assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5),
        new.curriculum, whole[2].curriculum,
    )  # fmt: skip


@pytest.mark.parametrize("remat", ["block", "dots"])
def test_remat_changes_nothing(scored, whole, remat):
    close(run(tiny.step_config(), scored, remat=remat)[0], whole[0])


def test_uniform_weights_are_grpo_bit_for_bit(scored):
    uniform = Schedule(WeightsConfig(rule="uniform"), CurriculumConfig(shape="constant"), 10)
    rest = run(tiny.step_config(schedule=uniform), scored)[0]
    plain = run(
        tiny.step_config(
            schedule=dataclasses.replace(
                uniform, weights=WeightsConfig(rule="uniform", normalizer="none")
            ),
            loss=LossConfig(aggregation="token_mean", vocab_chunk=5),
        ),
        scored,
    )[0]
    jax.tree.map(np.testing.assert_array_equal, rest, plain)


def test_equal_rewards_give_no_gradient(scored):
    same = scored.replace(reward=np.full_like(scored.reward, 1.7))
    gradient, metrics, _ = run(tiny.step_config(), same)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient))
    assert metrics["reward/equal_groups"] == 1.0


def test_a_group_without_signal_only_enters_the_denominator(scored):
    """Its tokens count in the mean; changing them changes nothing else."""
    reward = scored.reward.copy()
    reward[3] = 0.5
    flat = scored.replace(reward=reward)
    other = scored.rollout.responses.copy()
    other[3] = np.where(other[3] > 5, (other[3] - 6 + 11) % (tiny.VOCAB - 6) + 6, other[3])
    changed = flat.replace(rollout=scored.rollout.replace(responses=other))
    close(run(tiny.step_config(), changed)[0], run(tiny.step_config(), flat)[0], 1e-6)


def test_padding_and_zeroed_regions_get_no_gradient(scored):
    """Ids behind the end of a response, and tokens of a region zeroed by name, do not matter as targets."""
    r = scored.rollout
    mask = np.arange(tiny.TIME) < r.response_length[..., None]
    noise = np.where(mask, r.responses, 17).astype(np.int32)
    changed = scored.replace(rollout=r.replace(responses=noise))
    close(run(tiny.step_config(), changed)[0], run(tiny.step_config(), scored)[0], 1e-6)
    nothing = scored.replace(region=np.where(mask, 5, 0).astype(np.int8))
    zero = Schedule(WeightsConfig(zero=("think",)), CurriculumConfig(), 10)
    gradient = run(tiny.step_config(schedule=zero), nothing)[0]
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient))


def test_mini_batches_are_consecutive_updates(scored):
    """Two updates of a step move the parameters as two steps on the halves would, with the same curriculum."""
    _, metrics, new = run(tiny.step_config(updates=2), scored, tx=tiny.optimizer())
    assert int(new.opt_state[0].count) == 2
    assert metrics["update/logp_difference"] > metrics["rollout/logp_mismatch"]


def test_kl_term(scored):
    mesh = tiny.mesh()
    cfg = tiny.step_config(loss=LossConfig(kl_coefficient=0.5, kl_estimator="k2", vocab_chunk=5))
    shardings = param_shardings(tiny.decoder().cfg, mesh)
    same = make_logprobs(tiny.decoder(), cfg, mesh, shardings)(tiny.params(), scored.rollout).logp
    gradient, metrics, _ = run(cfg, scored, logp_ref=same)
    close(gradient, run(tiny.step_config(), scored)[0], 2e-5)
    assert metrics["update/kl"] == pytest.approx(0, abs=1e-8)
    far = run(cfg, scored, logp_ref=same - 1.0)[1]
    assert far["update/kl"] == pytest.approx(0.5, rel=1e-3)
    assert far["update/loss"] == pytest.approx(metrics["update/loss"] + 0.25, rel=1e-3)


def test_recomputed_values_and_importance_correction(scored):
    mesh = tiny.mesh()
    cfg = tiny.step_config(max_tokens_per_microbatch=GROUP_TOKENS * 4, tis_cap=1.5)
    shardings = param_shardings(tiny.decoder().cfg, mesh)
    old = make_logprobs(tiny.decoder(), cfg, mesh, shardings)(tiny.params(), scored.rollout)
    mask = np.arange(tiny.TIME) < scored.rollout.response_length[..., None]
    np.testing.assert_allclose(np.asarray(old.logp)[mask], scored.rollout.logp[mask], atol=2e-5)
    gradient, metrics, _ = run(cfg, scored, old=old)
    close(gradient, run(tiny.step_config(), scored)[0], 1e-4)
    assert metrics["rollout/logp_mismatch"] < 1e-5
    # a sampler that was more certain than the trainer by a factor of 2: ratio 0.5 on every token
    biased = scored.replace(
        rollout=scored.rollout.replace(logp=np.asarray(old.logp) + np.float32(np.log(2)) * mask)
    )
    halved = run(cfg, biased, old=OldPolicy(old.logp, old.entropy, old.gini))[0]
    close(halved, jax.tree.map(lambda g: g / 2, gradient), 1e-4)
