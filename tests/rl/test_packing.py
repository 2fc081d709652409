"""Cutting into micro-batches: every active group once and in its place, within the budget; rows taken and put back."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rest_jax.rl.packing import (
    BatchLengths,
    MicroBatch,
    Packing,
    Picker,
    assign_minibatches,
    bucket,
    plan_microbatches,
)
from rest_jax.types import RolloutBatch, TrainBatch
from tests import tiny

LADDER = [32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096]


def test_the_ladder_of_lengths():
    assert sorted({bucket(n, 10**6) for n in range(1, 4097)}) == LADDER
    for length in [1, 31, *LADDER, *(size + 1 for size in LADDER[:-1])]:
        assert bucket(length, 10**6) == next(size for size in LADDER if size >= length)


@pytest.mark.parametrize("width", [1, 12, 32, 50, 100, 200])
def test_never_wider_than_the_padded_batch(width):
    for length in range(1, width + 1):
        size = bucket(length, width)
        assert length <= size <= width
        assert size == width or size in LADDER


@pytest.mark.parametrize("shards, count", [(1, 1), (1, 3), (2, 2), (4, 3)])
def test_mini_batches_have_equally_many_groups_of_every_data_shard(shards, count):
    found = assign_minibatches(shards * count * 5, count)
    assert found.dtype == np.int32 and set(found) == set(range(count))
    for part in np.split(found, shards):
        assert (np.bincount(part, minlength=count) == 5).all()


@dataclasses.dataclass
class Case:
    """Arguments of `plan_microbatches`, and how many mini-batches there are."""

    lengths: BatchLengths
    minibatch: np.ndarray
    active: np.ndarray
    packing: Packing
    count: int

    @property
    def local(self) -> int:
        """Groups of a data shard."""
        return len(self.active) // self.packing.shards

    def plan(self) -> list[list[MicroBatch]]:
        return plan_microbatches(self.lengths, self.minibatch, self.active, self.packing)


@st.composite
def cases(draw) -> Case:
    """Ragged log-normal lengths; a few groups a data shard and mini-batch in any order, some of them active."""
    shards, count = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    groups = shards * count * draw(st.integers(1, 6))
    group_size = draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    spread = draw(st.sampled_from([0.0, 0.5, 1.5]))
    longest = draw(st.sampled_from([40, 300, 1000]))
    prompt = np.clip(rng.lognormal(4, spread, groups), 1, longest).astype(np.int32)
    response = np.clip(rng.lognormal(4, spread, (groups, group_size)), 1, longest).astype(np.int32)
    widths = (longest + draw(st.integers(0, 50)), longest + draw(st.integers(0, 50)))
    minibatch = assign_minibatches(groups, count)
    if draw(st.booleans()):
        minibatch = rng.permutation(minibatch)
    active = rng.random(groups) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    packing = Packing(
        shards,
        draw(st.sampled_from([None, 1, 500, 2000, 10_000])),
        draw(st.sampled_from([None, None, 1, 3])),
    )
    return Case(BatchLengths(prompt, response, widths), minibatch, active, packing, count)


def groups_of(micro: MicroBatch, local: int) -> list[int]:
    """The groups that are taken, as rows of the global batch."""
    return [shard * local + p for shard, row in enumerate(micro.pick) for p in row if p >= 0]


@given(cases())
@settings(max_examples=150)
def test_every_active_group_goes_once_in_its_place(case):
    found = case.plan()
    assert len(found) == case.count
    for index, micro_batches in enumerate(found):
        taken = [p for micro in micro_batches for p in groups_of(micro, case.local)]
        assert sorted(taken) == list(np.flatnonzero(case.active & (case.minibatch == index)))
        for micro in micro_batches:
            assert micro.pick.shape[0] == case.packing.shards and micro.pick.dtype == np.int32
            assert (micro.pick < case.local).all() and (micro.pick >= -1).all()


@given(cases())
@settings(max_examples=150)
def test_widths_counts_and_budget(case):
    prompts, responses = case.lengths.prompt_length, case.lengths.response_length
    tokens, packing = prompts + responses.sum(axis=1), case.packing
    for micro in (micro for micro_batches in case.plan() for micro in micro_batches):
        taken = groups_of(micro, case.local)
        assert taken, "nothing in it"
        prompt, response = micro.widths
        assert prompt == bucket(int(prompts[taken].max()), case.lengths.widths[0])
        assert response == bucket(int(responses[taken].max()), case.lengths.widths[1])
        assert micro.tokens == tokens[taken].sum()
        rows, cost = micro.pick.shape[1], prompt + responses.shape[1] * response
        assert micro.positions == packing.shards * rows * cost >= micro.tokens
        if rows > 1 and packing.max_tokens is not None:
            assert rows * cost <= packing.max_tokens
        assert packing.max_groups is None or rows <= packing.max_groups


@given(cases())
@settings(max_examples=100)
def test_numbers_of_rows_are_few(case):
    """Powers of two, the most that are allowed, or all that are left."""
    for micro_batches in case.plan():
        left = np.sum([(micro.pick >= 0).sum(axis=1) for micro in micro_batches], axis=0)
        for micro in micro_batches:
            rows = micro.pick.shape[1]
            assert rows & (rows - 1) == 0 or rows in (left.max(), case.packing.max_groups)
            left = left - (micro.pick >= 0).sum(axis=1)


def plan_one(prompt, response, widths, packing: Packing) -> list[MicroBatch]:
    """The micro-batches of one mini-batch whose groups are all active."""
    groups = len(prompt)
    (found,) = plan_microbatches(
        BatchLengths(prompt, response, widths),
        assign_minibatches(groups, 1),
        np.ones(groups, bool),
        packing,
    )
    return found


@pytest.mark.parametrize("seed", range(20))
def test_no_group_is_padded_to_more_than_twice_its_size(seed):
    rng = np.random.default_rng(seed)
    prompt = np.ceil(rng.lognormal(4, 1.5, 12)).astype(int)
    response = np.ceil(rng.lognormal(4, 1.5, (12, 2))).astype(int)
    widths = int(prompt.max()), int(response.max())
    found = plan_one(prompt, response, widths, Packing(1))
    assert len(found) > 1
    for micro in found:
        for p in groups_of(micro, 12):
            own = bucket(int(prompt[p]), widths[0]) + 2 * bucket(int(response[p].max()), widths[1])
            assert micro.positions <= micro.pick.size * 2 * own


def test_a_row_that_is_left_out_after_all_widens_nothing():
    """Three rows fit, two are taken: the third's long response is none of theirs."""
    prompt, response = np.array([128, 96, 32, 32]), np.array([[32], [48], [96], [96]])
    first, *_ = plan_one(prompt, response, (500, 500), Packing(1, 700))
    np.testing.assert_array_equal(first.pick, [[0, 1]])
    assert first.widths == (128, 48)


@given(cases())
@settings(max_examples=30)
def test_plans_repeat(case):
    for one, two in zip(case.plan(), case.plan(), strict=True):
        assert [(m.widths, m.tokens, m.positions) for m in one] == [
            (m.widths, m.tokens, m.positions) for m in two
        ]
        for a, b in zip(one, two, strict=True):
            np.testing.assert_array_equal(a.pick, b.pick)


@given(cases())
@settings(max_examples=50)
def test_without_a_limit_and_lengths_alike_one_micro_batch_is_enough(case):
    prompt = np.full_like(case.lengths.prompt_length, 40)
    response = np.full_like(case.lengths.response_length, 33)
    alike = dataclasses.replace(
        case,
        lengths=BatchLengths(prompt, response, case.lengths.widths),
        minibatch=assign_minibatches(len(prompt), case.count),
        active=np.ones(len(prompt), bool),
        packing=Packing(case.packing.shards),
    )
    for micro_batches in alike.plan():
        (micro,) = micro_batches
        assert (micro.pick >= 0).all()


@pytest.mark.parametrize("permuted", [False, True])
def test_meshes_do_not_change_which_groups_a_mini_batch_has(permuted):
    rng = np.random.default_rng(1)
    lengths = BatchLengths(rng.integers(1, 300, 24), rng.integers(1, 300, (24, 4)), (300, 300))
    active, minibatch = rng.random(24) < 0.7, assign_minibatches(24, 3)
    if permuted:
        minibatch = rng.permutation(minibatch)

    def groups(shards):
        found = plan_microbatches(lengths, minibatch, active, Packing(shards, 4000))
        return [sorted(p for m in mini for p in groups_of(m, 24 // shards)) for mini in found]

    assert groups(1) == groups(2) == groups(4) == groups(8)


def test_few_shapes_and_little_padding_for_typical_lengths():
    """512 prompts x 4 log-normal responses, over several steps: what is compiled stays few."""
    shapes, tokens, positions = set(), 0, 0
    for step in range(5):
        rng = np.random.default_rng(step)
        prompt = np.clip(rng.normal(700, 150, 512), 100, 1500).astype(int)
        response = np.clip(rng.lognormal(5.3, 0.5, (512, 4)), 20, 2048).astype(int)
        found = plan_one(prompt, response, (1536, 2048), Packing(1, 16_384))
        shapes |= {(micro.pick.shape[1], micro.widths) for micro in found}
        tokens += sum(micro.tokens for micro in found)
        positions += sum(micro.positions for micro in found)
    assert len(shapes) <= 40
    assert tokens / positions > 0.5


def rollout(groups: int) -> RolloutBatch:
    """Groups that can be told apart; 40 prompt and 56 response positions, group size 3."""
    rng = np.random.default_rng(0)
    group_size, tp, tr = 3, 40, 56
    floats = rng.normal(size=(3, groups, group_size, tr)).astype(np.float32)
    return RolloutBatch(
        rng.integers(1, 90, (groups, tp)).astype(np.int32),
        rng.integers(1, tp + 1, groups).astype(np.int32),
        rng.integers(1, 90, (groups, group_size, tr)).astype(np.int32),
        rng.integers(1, tr + 1, (groups, group_size)).astype(np.int32),
        *floats,
    )


def train_batch(groups: int, reference: bool) -> TrainBatch:
    r, rng = rollout(groups), np.random.default_rng(1)
    old, ref, weight, u = rng.normal(size=(4, *r.responses.shape)).astype(np.float32)
    advantage = rng.normal(size=r.response_length.shape).astype(np.float32)
    layout = (r.prompt, r.prompt_length, r.responses, r.response_length)
    return TrainBatch(*layout, old, ref if reference else None, advantage, weight, u)


BATCHES = {
    "rollout": rollout,
    "train": lambda groups: train_batch(groups, reference=False),
    "train with a reference": lambda groups: train_batch(groups, reference=True),
}


def test_what_the_host_knows_of_a_batch():
    batch = rollout(4)
    found = BatchLengths.of(batch)
    assert found.widths == batch.widths == (40, 56)
    np.testing.assert_array_equal(found.prompt_length, batch.prompt_length)
    np.testing.assert_array_equal(found.response_length, batch.response_length)


def pick_some(shards: int) -> tuple[np.ndarray, list[int | None]]:
    """(pick of 3 of 4 groups a data shard with two empty rows, those groups in the global batch)."""
    rng = np.random.default_rng(2)
    pick = np.stack([rng.permutation(4)[:3] for _ in range(shards)]).astype(np.int32)
    pick[0, 1] = pick[-1, 2] = -1
    rows = [None if p < 0 else s * 4 + int(p) for s, row in enumerate(pick) for p in row]
    return pick, rows


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 1)], ids=str)
def test_the_groups_of_a_micro_batch(shape, kind):
    """Every field has the rows picked, cut to the widths, in its dtype; a row of no group is a prompt of one token."""
    mesh, shards = tiny.mesh(*shape), shape[0] * shape[1]
    batch = BATCHES[kind](shards * 4)
    pick, rows = pick_some(shards)
    take = jax.jit(lambda batch, pick: batch.take(Picker(pick, (32, 48), mesh)))
    part = jax.tree.map(np.asarray, take(batch, pick))
    assert type(part) is type(batch) and part.widths == (32, 48)
    for field in dataclasses.fields(batch):
        full, taken = getattr(batch, field.name), getattr(part, field.name)
        if full is None:
            assert taken is None
            continue
        cut = {"prompt": np.s_[:32], "prompt_length": (), "response_length": (), "advantage": ()}
        index = cut.get(field.name, np.s_[:, :48])
        assert taken.dtype == full.dtype, field.name
        for at, row in enumerate(rows):
            empty = 1 if field.name == "prompt_length" else 0
            expected = np.full_like(full[0][index], empty) if row is None else full[row][index]
            np.testing.assert_array_equal(taken[at], expected, err_msg=field.name)
    assert not np.asarray(part.mask)[[row is None for row in rows]].any()


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 1)], ids=str)
def test_tokens_are_put_back(shape):
    """Where they came from; nothing stays behind the width, and what was not picked is left alone."""
    mesh, shards = tiny.mesh(*shape), shape[0] * shape[1]
    pick, rows = pick_some(shards)
    old = rollout(shards * 4).logp

    @jax.jit
    def put(x, pick):
        picker = Picker(pick, (32, 48), mesh)
        return picker.put_tokens(x, picker.tokens(x) + 100)

    expected = old.copy()
    for row in rows:
        if row is not None:
            expected[row, :, :48] = old[row, :, :48] + 100
            expected[row, :, 48:] = 0
    np.testing.assert_array_equal(np.asarray(put(old, pick)), expected)


@pytest.mark.parametrize("dtype", [np.int8, np.int32, bool, np.float32])
@pytest.mark.parametrize("shape", [(2,), (2, 3), (2, 3, 8), (2, 1, 2, 2)], ids=str)
def test_groups_of_any_array(shape, dtype):
    x = np.arange(1, np.prod(shape) + 1).reshape(shape).astype(dtype)
    picker = Picker(jnp.array([[1, -1]]), (4, 4), tiny.mesh())
    for empty in (0, 1):
        found = np.asarray(picker.groups(x, empty))
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, [x[1], np.full_like(x[1], empty)])
    if len(shape) == 3:
        np.testing.assert_array_equal(np.asarray(picker.tokens(x))[0], x[1, :, :4])
