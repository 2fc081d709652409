"""Cutting into micro-batches: every wanted group once and in its place, within the budget; rows taken and put back."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rest_jax.rl.packing import MicroBatch, bucket, plan, put_groups, take_groups
from rest_jax.types import RolloutBatch
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


@dataclasses.dataclass
class Case:
    """Arguments of `plan`."""

    prompt: np.ndarray
    response: np.ndarray
    widths: tuple[int, int]
    ways: int
    updates: int
    budget: int | None
    wanted: np.ndarray | None

    def plan(self) -> list[list[MicroBatch]]:
        return plan(
            self.prompt, self.response, self.widths, ways=self.ways, budget=self.budget,
            wanted=self.wanted, updates=self.updates,
        )  # fmt: skip


@st.composite
def cases(draw) -> Case:
    """Ragged log-normal lengths; a few prompts a way and update, some of them wanted."""
    ways, updates = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    count = ways * updates * draw(st.integers(1, 6))
    group = draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    spread = draw(st.sampled_from([0.0, 0.5, 1.5]))
    longest = draw(st.sampled_from([40, 300, 1000]))
    prompt = np.clip(rng.lognormal(4, spread, count), 1, longest).astype(np.int32)
    response = np.clip(rng.lognormal(4, spread, (count, group)), 1, longest).astype(np.int32)
    share = draw(st.sampled_from([None, 0.0, 0.3, 1.0]))
    return Case(
        prompt,
        response,
        (longest + draw(st.integers(0, 50)), longest + draw(st.integers(0, 50))),
        ways,
        updates,
        draw(st.sampled_from([None, 1, 500, 2000, 10_000])),
        None if share is None else rng.random(count) < share,
    )


def groups_of(micro: MicroBatch, local: int) -> list[tuple[int, int]]:
    """(way, global group) of the rows that are taken."""
    return [(w, w * local + p) for w, row in enumerate(micro.pick) for p in row if p >= 0]


@given(cases())
@settings(max_examples=150)
def test_every_wanted_group_goes_once_in_its_place(case):
    found, local = case.plan(), len(case.prompt) // case.ways
    wanted = np.ones(len(case.prompt), bool) if case.wanted is None else case.wanted
    assert len(found) == case.updates
    for update, mini in enumerate(found):
        taken = [p for micro in mini for _, p in groups_of(micro, local)]
        assert sorted(taken) == [
            p for p in range(len(wanted)) if wanted[p] and p % case.updates == update
        ]
        for micro in mini:
            assert micro.pick.shape[0] == case.ways and micro.pick.dtype == np.int32
            assert (micro.pick < local).all() and (micro.pick >= -1).all()


@given(cases())
@settings(max_examples=150)
def test_slots_counts_and_budget(case):
    local, group = len(case.prompt) // case.ways, case.response.shape[1]
    true = case.prompt + case.response.sum(axis=1)
    for micro in (micro for mini in case.plan() for micro in mini):
        taken = [p for _, p in groups_of(micro, local)]
        assert taken, "nothing in it"
        prompt, response = micro.slots
        assert prompt == bucket(int(case.prompt[taken].max()), case.widths[0])
        assert response == bucket(int(case.response[taken].max()), case.widths[1])
        assert micro.tokens == true[taken].sum()
        rows, cost = micro.pick.shape[1], prompt + group * response
        assert micro.padded == case.ways * rows * cost >= micro.tokens
        if rows > 1 and case.budget is not None:
            assert rows * cost <= case.budget


@given(cases())
@settings(max_examples=100)
def test_numbers_of_rows_are_few(case):
    """Powers of two, or all that are left."""
    for mini in case.plan():
        left = np.sum([(micro.pick >= 0).sum(axis=1) for micro in mini], axis=0)
        for micro in mini:
            rows = micro.pick.shape[1]
            assert rows & (rows - 1) == 0 or rows == left.max()
            left = left - (micro.pick >= 0).sum(axis=1)


@pytest.mark.parametrize("seed", range(20))
def test_no_group_is_padded_to_more_than_twice_its_size(seed):
    rng = np.random.default_rng(seed)
    prompt = np.ceil(rng.lognormal(4, 1.5, 12)).astype(int)
    response = np.ceil(rng.lognormal(4, 1.5, (12, 2))).astype(int)
    widths = int(prompt.max()), int(response.max())
    (mini,) = plan(prompt, response, widths, ways=1, budget=None)
    assert len(mini) > 1
    for micro in mini:
        for _, p in groups_of(micro, 12):
            own = bucket(int(prompt[p]), widths[0]) + 2 * bucket(int(response[p].max()), widths[1])
            assert micro.padded <= micro.pick.size * 2 * own


def test_a_row_that_is_left_out_after_all_widens_nothing():
    """Three rows fit, two are taken: the third's long response is none of theirs."""
    prompt, response = np.array([128, 96, 32, 32]), np.array([[32], [48], [96], [96]])
    ((first, *_),) = plan(prompt, response, (500, 500), ways=1, budget=700)
    np.testing.assert_array_equal(first.pick, [[0, 1]])
    assert first.slots == (128, 48)


@given(cases())
@settings(max_examples=30)
def test_plans_repeat(case):
    for one, two in zip(case.plan(), case.plan(), strict=True):
        assert [(m.slots, m.tokens, m.padded) for m in one] == [
            (m.slots, m.tokens, m.padded) for m in two
        ]
        for a, b in zip(one, two, strict=True):
            np.testing.assert_array_equal(a.pick, b.pick)


@given(cases())
@settings(max_examples=50)
def test_without_a_limit_and_lengths_alike_one_micro_batch_is_enough(case):
    alike = dataclasses.replace(
        case, prompt=np.full_like(case.prompt, 40), response=np.full_like(case.response, 33),
        budget=None, wanted=None,
    )  # fmt: skip
    for mini in alike.plan():
        (micro,) = mini
        assert (micro.pick >= 0).all()


def test_meshes_do_not_change_which_groups_a_mini_batch_has():
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, 300, 24), rng.integers(1, 300, (24, 4))
    wanted = rng.random(24) < 0.7

    def groups(ways):
        found = plan(*lengths, (300, 300), ways=ways, budget=4000, wanted=wanted, updates=3)
        return [sorted(p for m in mini for _, p in groups_of(m, 24 // ways)) for mini in found]

    assert groups(1) == groups(2) == groups(4) == groups(8)


def test_few_shapes_and_little_padding_for_typical_lengths():
    """512 prompts x 4 log-normal responses, over several steps: what is compiled stays few."""
    shapes, tokens, padded = set(), 0, 0
    for step in range(5):
        rng = np.random.default_rng(step)
        prompt = np.clip(rng.normal(700, 150, 512), 100, 1500).astype(int)
        response = np.clip(rng.lognormal(5.3, 0.5, (512, 4)), 20, 2048).astype(int)
        (mini,) = plan(prompt, response, (1536, 2048), ways=1, budget=16_384)
        shapes |= {(micro.pick.shape[1], micro.slots) for micro in mini}
        tokens += sum(micro.tokens for micro in mini)
        padded += sum(micro.padded for micro in mini)
    assert len(shapes) <= 40
    assert tokens / padded > 0.5


def batch(ways: int, local: int) -> RolloutBatch:
    """Rows that can be told apart; 40 prompt and 56 response positions, group of 3."""
    rng = np.random.default_rng(0)
    rows, group, tp, tr = ways * local, 3, 40, 56
    floats = rng.normal(size=(3, rows, group, tr)).astype(np.float32)
    return RolloutBatch(
        rng.integers(1, 90, (rows, tp)).astype(np.int32),
        rng.integers(1, tp + 1, rows).astype(np.int32),
        rng.integers(1, 90, (rows, group, tr)).astype(np.int32),
        rng.integers(1, tr + 1, (rows, group)).astype(np.int32),
        *floats,
    )


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 1)], ids=str)
def test_groups_are_taken_and_put_back(shape):
    mesh = tiny.mesh(*shape)
    ways = shape[0] * shape[1]
    whole = batch(ways, 4)
    rng = np.random.default_rng(2)
    pick = np.stack([rng.permutation(4)[:3] for _ in range(ways)]).astype(np.int32)
    pick[0, 1] = pick[-1, 2] = -1
    slots = (32, 48)
    take = jax.jit(lambda tree, pick: take_groups(tree, pick, slots, mesh))
    part = jax.tree.map(np.asarray, take(whole, pick))
    rows = [None if p < 0 else w * 4 + int(p) for w, row in enumerate(pick) for p in row]
    for at, row in enumerate(rows):
        if row is None:  # an empty group: a prompt of one token, nothing else
            assert part.prompt_length[at] == 1
            assert all(
                not leaf[at].any()
                for leaf in jax.tree.leaves(
                    dataclasses.replace(part, prompt_length=part.prompt * 0)
                )
            )
            continue
        np.testing.assert_array_equal(part.prompt[at], whole.prompt[row, :32])
        np.testing.assert_array_equal(part.responses[at], whole.responses[row, :, :48])
        np.testing.assert_array_equal(part.logp[at], whole.logp[row, :, :48])
        np.testing.assert_array_equal(part.response_length[at], whole.response_length[row])
        assert part.prompt_length[at] == whole.prompt_length[row]

    fields = ("logp", "entropy")
    old = {name: getattr(whole, name) for name in fields}
    new = {name: getattr(part, name) + 100 for name in fields}
    put = jax.tree.map(np.asarray, jax.jit(put_groups)(old, new, pick))
    for name in fields:
        expected = old[name].copy()
        for row in rows:
            if row is not None:
                expected[row, :, :48] = old[name][row, :, :48] + 100
                expected[row, :, 48:] = 0  # behind the slots there is nothing
        np.testing.assert_array_equal(put[name], expected)


def test_dtypes_survive():
    whole = {
        "region": np.ones((2, 3, 8), np.int8),
        "flag": np.ones((2,), bool),
        "length": np.ones((2, 3), np.int32),
    }
    part = take_groups(whole, jnp.array([[1, -1]]), (4, 4), tiny.mesh())
    assert {name: x.dtype for name, x in part.items()} == {
        name: x.dtype for name, x in whole.items()
    }
    assert part["region"].shape == (2, 3, 4)
