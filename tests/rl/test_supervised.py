"""The supervised update against an oracle that runs every row alone: loss, accuracy, gradient, and how it is cut."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rest_jax.config import LossConfig, SftConfig
from rest_jax.distributed import replicated
from rest_jax.models.attention import prompt_rows
from rest_jax.models.decoder import logits, param_shardings
from rest_jax.rl.packing import BatchLengths
from rest_jax.rl.step import plan_all_groups
from rest_jax.rl.supervised import (
    TOOL_CALL_REGIONS,
    GoldBatch,
    make_prepare_gold,
    make_supervised_update,
    prepare_gold,
    region_scale,
)
from rest_jax.tool_calls import Region
from rest_jax.types import TrainState
from tests import tiny
from tests.rl.stepping import RECORD, close

CFG = SftConfig(tool_call_weight=2.0, reasoning_weight=0.5)
ROWS = 8


@pytest.fixture(scope="module")
def gold() -> GoldBatch:
    """Ragged responses, half of whose tokens the tiny policy would have chosen."""
    r = tiny.rollout(tiny.prompts(ROWS), group=1)
    rng = np.random.default_rng(4)
    length = rng.integers(1, tiny.TIME + 1, (ROWS, 1)).astype(np.int32)
    mask = np.arange(tiny.TIME) < length[..., None]
    responses = np.where(mask, r.responses, tiny.PAD).astype(np.int32)
    for t in range(0, tiny.TIME, 2):
        batch = GoldBatch(r.prompt, r.prompt_length, responses, length, responses)
        responses[:, 0, t] = np.where(mask[:, 0, t], full_logits(batch)[:, t].argmax(-1), tiny.PAD)
    region = np.where(mask, rng.integers(1, 8, mask.shape), 0).astype(np.int8)
    return GoldBatch(r.prompt, r.prompt_length, responses, length, region)


def full_logits(batch, params=None):
    """[P Tr V] of the responses; every row is a prompt with its response right behind it, one forward pass."""
    width = batch.prompt.shape[1] + tiny.TIME
    rows = np.full((ROWS, width), tiny.PAD, np.int32)
    for row, prompt, n, response in zip(
        rows, batch.prompt, batch.prompt_length, batch.responses[:, 0], strict=True
    ):
        row[:n], row[n : n + tiny.TIME] = prompt[:n], response
    return logits_of_rows(tiny.params() if params is None else params, rows, batch.prompt_length)


@jax.jit
def logits_of_rows(params, rows, prompt_length):
    layout, positions = prompt_rows(rows, prompt_length + tiny.TIME)
    hidden, _ = tiny.decoder().apply({"params": params}, rows, positions, layout)
    predicting = prompt_length[:, None] - 1 + jnp.arange(tiny.TIME)
    hidden = jnp.take_along_axis(hidden, predicting[..., None], axis=1)
    return logits(params, tiny.decoder().cfg, hidden)


@functools.cache
def update_of(loss_cfg: LossConfig, mesh):
    """(the compiled update, the shardings of its state)."""
    params = tiny.params()
    state = TrainState(jnp.int32(0), params, params, jax.random.key(0), jnp.int32(0))
    shardings = jax.tree.map(lambda _: replicated(mesh), state)
    shardings = shardings.replace(params=param_shardings(tiny.decoder().cfg, mesh))
    return make_supervised_update(tiny.decoder(), RECORD, loss_cfg, mesh, shardings), shardings


def update(gold: GoldBatch, max_tokens=None, shape=(1, 1, 1), cfg=CFG, loss_cfg=None):
    """(gradient, metrics) of an update that moves nothing."""
    mesh = tiny.mesh(*shape)
    start = jax.tree.map(lambda x: x.copy(), tiny.params())
    state = TrainState(jnp.int32(0), start, RECORD.init(start), jax.random.key(0), jnp.int32(0))
    step, shardings = update_of(loss_cfg or LossConfig(vocab_chunk=5), mesh)
    plan = plan_all_groups(BatchLengths.of(gold), max_tokens, mesh)
    batch = make_prepare_gold(cfg, mesh)(gold)
    state, totals = step(jax.device_put(state, shardings), batch, plan)
    metrics = {name: float(value) for name, value in (totals.sums | totals.maxima).items()}
    return jax.tree.map(np.asarray, state.opt_state), metrics, len(plan)


@pytest.fixture(scope="module")
def plain(gold):
    return update(gold)


def mask_of(gold) -> np.ndarray:
    return (np.arange(tiny.TIME) < gold.response_length[..., None])[:, 0]


def scale_of(gold, cfg=CFG) -> np.ndarray:
    names = {region.name: 1.0 for region in Region} | {"NONE": 0.0, "THINK": cfg.reasoning_weight}
    names |= dict.fromkeys(("SCAFFOLD", "NAME", "PARAM"), cfg.tool_call_weight)
    return np.vectorize({Region[name]: x for name, x in names.items()}.get)(gold.region[:, 0])


def test_the_scale_of_each_region():
    scale = np.asarray(region_scale(CFG))
    assert scale[Region.NONE] == 0 and scale[Region.THINK] == 0.5
    assert (scale[list(TOOL_CALL_REGIONS)] == 2).all()
    assert (scale[[Region.TAG, Region.RESPONSE, Region.OTHER]] == 1).all()


def test_weights_are_divided_by_the_number_of_target_tokens(gold):
    batch = prepare_gold(jax.tree.map(jnp.asarray, gold), CFG)
    mask = mask_of(gold)
    np.testing.assert_allclose(batch.plain_weight[:, 0], mask / mask.sum(), rtol=1e-6)
    np.testing.assert_allclose(batch.loss_weight[:, 0], scale_of(gold) / mask.sum(), rtol=1e-6)


def test_loss_and_gradient_against_an_oracle(gold, plain):
    """Twice: plain, and scaled by region."""
    mask, tokens = mask_of(gold), gold.responses[:, 0, :, None]
    for cfg, (found, metrics, _) in ((CFG, plain), (SftConfig(), update(gold, cfg=SftConfig()))):
        scale = scale_of(gold, cfg)

        def objective(params, scale=scale):
            logp = jax.nn.log_softmax(full_logits(gold, params))
            chosen = jnp.take_along_axis(logp, tokens, axis=-1)[..., 0]
            return -jnp.sum(scale * jnp.where(mask, chosen, 0)) / mask.sum()

        value, gradient = jax.jit(jax.value_and_grad(objective))(tiny.params())
        assert metrics["update/loss"] == pytest.approx(float(value), rel=1e-5)
        close(found, gradient, 2e-5)
        nll = objective(tiny.params(), mask)
        assert metrics["update/nll"] == pytest.approx(float(nll), rel=1e-5)
    assert metrics["update/loss"] == pytest.approx(metrics["update/nll"])


def test_accuracy_and_entropy_against_an_oracle(gold, plain):
    mask, scores = mask_of(gold), full_logits(gold)
    correct = (np.asarray(scores.argmax(-1)) == gold.responses[:, 0])[mask]
    assert 0.3 < correct.mean() < 1
    assert plain[1]["update/accuracy"] == pytest.approx(correct.mean(), rel=1e-5)
    logp = np.asarray(jax.nn.log_softmax(scores))
    entropy = -(np.exp(logp) * logp).sum(-1)[mask].mean()
    assert plain[1]["update/entropy"] == pytest.approx(entropy, rel=1e-5)


@pytest.mark.parametrize(
    "max_tokens", [2 * (16 + tiny.TIME), pytest.param(1, marks=pytest.mark.wide)]
)
def test_micro_batches_change_nothing(gold, plain, max_tokens):
    gradient, metrics, count = update(gold, max_tokens)
    assert plain[2] == 1 and count >= 3
    close(gradient, plain[0])
    assert metrics == pytest.approx(plain[1], rel=1e-5)


@pytest.mark.parametrize(
    "shape", [pytest.param((2, 2, 1), marks=pytest.mark.wide), (1, 2, 2)], ids=str
)
def test_meshes_change_nothing(gold, plain, shape):
    gradient, metrics, _ = update(gold, 2 * (16 + tiny.TIME), shape)
    close(gradient, plain[0])
    assert metrics == pytest.approx(plain[1], rel=1e-4)


def test_padding_changes_nothing(gold, plain):
    """Not even ids that the policy would have chosen."""
    mask = np.arange(tiny.TIME) < gold.response_length[..., None]
    best = np.asarray(full_logits(gold).argmax(-1))[:, None]
    spoiled = gold.replace(responses=np.where(mask, gold.responses, best).astype(np.int32))
    assert (spoiled.responses != gold.responses).any()
    gradient, metrics, _ = update(spoiled)
    close(gradient, plain[0], 1e-6)
    assert metrics == pytest.approx(plain[1], rel=1e-6)


def test_the_terms_of_the_policy_loss_do_not_matter(gold, plain):
    """An entropy bonus belongs to the policy's loss alone."""
    options = LossConfig(vocab_chunk=5, entropy_coefficient=0.5, kl_coefficient=0.5)
    gradient, metrics, _ = update(gold, loss_cfg=options)
    jax.tree.map(np.testing.assert_array_equal, gradient, plain[0])
    assert metrics == plain[1]
