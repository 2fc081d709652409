"""The rollout: teacher-forced agreement, stop ids, keys, independence of batch, order and devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rest_jax.models.attention import prompt_rows
from rest_jax.models.decoder import apply_routed, logits
from rest_jax.rl.logprobs import PassSpec, response_logprobs
from rest_jax.rollout.engine import NOBODY, Sizes, cache_sharding
from rest_jax.types import Sampling
from tests import tiny

SAMPLINGS = [Sampling(), Sampling(0.7), Sampling(1.2, 8), Sampling(1.0, 0, 0.9)]
# responses that begin anywhere in a page, where another has ended
PAGED = {"page": 4, "decode_slots": 3}


@pytest.mark.parametrize(
    ("sampling", "options"),
    [
        *(pytest.param(sampling, {}, marks=pytest.mark.wide) for sampling in SAMPLINGS[:-1]),
        (SAMPLINGS[-1], {}),
        pytest.param(Sampling(), PAGED, marks=pytest.mark.slow),
        (Sampling(), PAGED | {"layers": "unroll"}),
    ],
    ids=str,
)
def test_numbers_equal_teacher_forcing(sampling, options):
    out = tiny.rollout(tiny.prompts(width=4 if options else 16), sampling=sampling, **options)
    rows = tiny.packed(out)
    forced = response_logprobs(tiny.decoder(), tiny.params(), out, rows, PassSpec(sampling, 4))
    mask = np.arange(tiny.TIME) < out.response_length[..., None]
    for name, value in zip(("logp", "entropy", "gini"), forced, strict=True):
        np.testing.assert_allclose(getattr(out, name)[mask], np.asarray(value)[mask], atol=1e-4)
        assert (getattr(out, name)[~mask] == 0).all(), name
    assert out.logp[mask].max() <= 0


def test_rows_end_with_their_first_stop_id_or_are_full():
    out = tiny.rollout(tiny.prompts(32))
    ended = 0
    for p, g in np.ndindex(out.response_length.shape):
        n, ids = out.response_length[p, g], out.responses[p, g]
        assert 1 <= n <= tiny.TIME
        assert tiny.STOP not in ids[: n - 1]
        assert (ids[n:] == tiny.PAD).all()
        assert n == tiny.TIME or ids[n - 1] == tiny.STOP
        ended += ids[n - 1] == tiny.STOP
    assert ended > 0  # the case occurs


def test_samples_differ_steps_differ_and_runs_repeat():
    batch = tiny.prompts()
    one, again, later = tiny.rollout(batch), tiny.rollout(batch), tiny.rollout(batch, step=1)
    np.testing.assert_array_equal(one.responses, again.responses)
    assert (one.responses != later.responses).any()
    assert all(len({tuple(r) for r in group}) > 1 for group in one.responses)


def test_a_row_draws_the_same_in_any_batch_and_order():
    batch = tiny.prompts(8)
    together = tiny.rollout(batch)
    order = np.random.default_rng(1).permutation(8)
    shuffled = tiny.rollout(jax.tree.map(lambda x: x[order], batch))
    np.testing.assert_array_equal(shuffled.responses, together.responses[order])
    part = tiny.rollout(jax.tree.map(lambda x: x[2:5], batch))
    np.testing.assert_array_equal(part.responses, together.responses[2:5])
    wider = batch.replace(tokens=np.pad(batch.tokens, ((0, 0), (0, 9))))
    np.testing.assert_array_equal(tiny.rollout(wider).responses, together.responses)
    fewer = tiny.rollout(batch, group=2)
    np.testing.assert_array_equal(fewer.responses, together.responses[:, :2])


@pytest.mark.parametrize(
    "shape",
    [
        (2, 2, 1),
        (1, 2, 2),
        *(pytest.param(x, marks=pytest.mark.wide) for x in [(1, 4, 1), (4, 1, 1), (1, 1, 4)]),
    ],
    ids=str,
)
def test_devices_do_not_change_the_ids(shape):
    one, many = tiny.rollout(tiny.prompts()), tiny.rollout(tiny.prompts(), shape=shape)
    np.testing.assert_array_equal(one.responses, many.responses)
    np.testing.assert_allclose(one.logp, many.logp, rtol=1e-5, atol=1e-5)


def test_greedy_is_the_argmax_of_the_full_forward():
    batch = tiny.prompts(4)
    out = tiny.rollout(batch, sampling=Sampling(greedy=True), group=1)
    size = batch.tokens.shape[1] + tiny.TIME

    @jax.jit
    def best(row, length):
        layout, positions = prompt_rows(row, length)
        hidden, _ = tiny.decoder().apply({"params": tiny.params()}, row, positions, layout)
        return logits(tiny.params(), tiny.decoder().cfg, hidden[0, length[0] - 1]).argmax()

    for p in range(4):
        ids = list(batch.tokens[p, : batch.length[p]])
        for token in out.responses[p, 0, : out.response_length[p, 0]]:
            row = jnp.asarray([ids + [tiny.PAD] * (size - len(ids))], jnp.int32)
            assert int(best(row, jnp.asarray([len(ids)], jnp.int32))) == token
            ids.append(int(token))


def test_samples_follow_the_distribution():
    """Frequencies of the first token of one prompt over many samples against its probabilities."""
    batch = jax.tree.map(lambda x: x[:1], tiny.prompts())
    out = tiny.rollout(batch, group=4096)
    first = out.responses[0, :, 0]
    p = np.exp(out.logp[0, :, 0])
    for token in np.unique(first)[:12]:
        chosen = first == token
        expected = p[chosen][0]
        spread = np.sqrt(expected * (1 - expected) / 4096)
        assert abs(chosen.mean() - expected) < 5 * spread + 1e-4


def test_fields_of_unequal_length_are_refused():
    out = tiny.rollout(tiny.prompts())
    with pytest.raises(ValueError, match=r"RolloutBatch: a field of shape \(8, 4, 11\)"):
        out.replace(entropy=out.entropy[..., 1:]).validate()


# data, fsdp, tensor, expert
@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 2, 1, 2), (1, 1, 1, 4), (2, 1, 2, 2)], ids=str)
def test_devices_do_not_change_the_ids_of_experts(shape):
    one = tiny.rollout(tiny.prompts(), experts=4, record_routes=True)
    many = tiny.rollout(tiny.prompts(), shape=shape, experts=4, record_routes=True)
    np.testing.assert_array_equal(one.responses, many.responses)
    np.testing.assert_allclose(one.logp, many.logp, rtol=1e-5, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, one.routes, many.routes)


@pytest.mark.parametrize(
    "layers",
    [pytest.param("scan", marks=pytest.mark.slow), pytest.param("unroll", marks=pytest.mark.wide)],
)
def test_experts_teacher_forced_are_those_recorded(layers):
    out = tiny.rollout(tiny.prompts(), experts=4, layers=layers, record_routes=True)
    batch, rows = out.replace(routes=None), tiny.packed(out)
    decoder, params = tiny.decoder(experts=4), tiny.params(4)
    logp, _, _ = response_logprobs(decoder, params, batch, rows, PassSpec(Sampling(), 4))
    mask = np.arange(tiny.TIME) < out.response_length[..., None]
    np.testing.assert_allclose(out.logp[mask], np.asarray(logp)[mask], atol=1e-4)

    inputs = rows.tokens(batch), rows.position, rows.layout
    _, _, router = apply_routed(decoder, params, *inputs)
    recorded, read = np.asarray(rows.routes(out.routes)), np.asarray(rows.layout.valid)
    assert out.routes.prompt.dtype == recorded.dtype == np.uint8
    np.testing.assert_array_equal(recorded[:, read], np.asarray(router.chosen)[:, read])
    assert len(np.unique(out.routes.responses[mask])) == 4
    assert (tiny.rollout(tiny.prompts(), experts=4).responses == out.responses).all()


@pytest.mark.parametrize("layers", ["scan", "unroll"])
def test_caches_are_split_by_head(layers):
    """A tensor group holds each head once: with all of them on every device the caches would not shrink."""
    sampler = tiny.sampler(shape=(2, 1, 2), layers=layers)
    state = sampler.engine.empty_state(Sizes(3, 5, 7, 1, 2))
    for keys in jax.tree.leaves(state.pool):
        assert keys.shape[-5:] == (2, 7, 4, sampler.settings.page, 8)
        shard = keys.addressable_shards[0].data.shape
        assert shard[-5:-2] == (1, 7, 2)
    odd = jax.ShapeDtypeStruct((2, 5, 3, 16, 8), jnp.float32)  # three heads: on both devices
    assert cache_sharding(odd, sampler.mesh).shard_shape(odd.shape) == (1, 5, 3, 16, 8)


def test_an_empty_state_has_nobody_in_its_slots():
    sampler = tiny.sampler(page=4)
    state = sampler.engine.empty_state(Sizes(3, 5, 7, 1, 2))
    assert np.all(np.asarray(state.slots.owner) == NOBODY)
    assert state.slots.owner.shape == (1, 5) and state.members.shape == (1, 3, tiny.GROUP)
    assert state.pool.k.shape == (2, 1, 7, 4, 4, 8)
    assert all(np.all(np.asarray(x) == 0) for x in jax.tree.leaves(state.pool))
