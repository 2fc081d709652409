"""Packing into rows: every active completion once behind its prompt, within the limits; a batch read in the order of rows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rest_jax.distributed import activate
from rest_jax.rl.packing import (
    ROW_LENGTHS,
    BatchLengths,
    MicroBatch,
    Packing,
    Piece,
    assign_minibatches,
    bucket,
    longest_row,
    make_rows,
    packing_metrics,
    plan_microbatches,
    row_length,
)
from rest_jax.types import ResponseBatch, Routes
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


def test_lengths_of_rows_are_few_and_pad_little():
    for positions in (1, 31, 32, 33, 100, 511, 513, 3000, 16_384, 16_385, 100_000):
        length = row_length(positions)
        assert length in ROW_LENGTHS and positions <= length <= max(32, 9 * positions / 8)
    assert len([n for n in ROW_LENGTHS if 1024 < n <= 2048]) == 8
    assert longest_row(100, 16_384) == 16_384
    assert longest_row(100, 1500) == 1408 and longest_row(1500, 100) == 1536


@pytest.mark.parametrize("groups, count", [(5, 1), (15, 3), (40, 4)])
def test_mini_batches_have_equally_many_groups(groups, count):
    found = assign_minibatches(groups, count)
    assert found.dtype == np.int32
    assert (np.bincount(found, minlength=count) == groups // count).all()


@dataclasses.dataclass
class Case:
    """Arguments of `plan_microbatches`, and how many mini-batches there are."""

    lengths: BatchLengths
    minibatch: np.ndarray
    active: np.ndarray
    packing: Packing
    count: int

    def plan(self) -> list[list[MicroBatch]]:
        return plan_microbatches(self.lengths, self.minibatch, self.active, self.packing)


@st.composite
def cases(draw) -> Case:
    """Ragged log-normal lengths, some responses empty; groups in any order, some of them active."""
    shards, count = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    groups, group_size = draw(st.integers(count, 12)), draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    spread = draw(st.sampled_from([0.0, 0.5, 1.5]))
    longest = draw(st.sampled_from([40, 300, 1000]))
    prompt = np.clip(rng.lognormal(4, spread, groups), 1, longest).astype(np.int32)
    response = np.clip(rng.lognormal(4, spread, (groups, group_size)), 1, longest).astype(np.int32)
    response = np.where(rng.random(response.shape) < draw(st.sampled_from([0, 0.3])), 0, response)
    minibatch = rng.permutation(assign_minibatches(groups, count))
    active = rng.random(groups) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    limit = draw(st.sampled_from([None, 1, 500, 2000, 10_000]))
    packing = Packing(shards, limit, draw(st.sampled_from([False, False, True])))
    lengths = BatchLengths(prompt, response, (longest + 3, longest + 7))
    return Case(lengths, minibatch, active, packing, count)


def pieces_of(micro_batches) -> list[Piece]:
    return [piece for micro in micro_batches for row in micro.rows for piece in row]


@given(cases())
@settings(max_examples=150)
def test_every_active_completion_goes_once_behind_its_prompt(case):
    found = case.plan()
    spoken = case.lengths.response_length.sum(axis=1) > 0
    assert len(found) == case.count
    for index, micro_batches in enumerate(found):
        taken = [(piece.group, g) for piece in pieces_of(micro_batches) for g in piece.completions]
        groups = np.flatnonzero(case.active & spoken & (case.minibatch == index))
        size = case.lengths.response_length.shape[1]
        assert sorted(taken) == [(p, g) for p in groups for g in range(size)]
        assert all(len(micro.rows) == case.packing.shards for micro in micro_batches)


@given(cases())
@settings(max_examples=150)
def test_rows_are_equally_long_and_within_the_limit(case):
    lengths, packing = case.lengths, case.packing
    for micro_batches in filter(None, case.plan()):
        (length,) = {micro.row_length for micro in micro_batches}
        assert length in ROW_LENGTHS
        rows = [row for micro in micro_batches for row in micro.rows]
        assert all(sum(map(lengths.positions, row)) <= length for row in rows)
        assert all(any(micro.rows) for micro in micro_batches), "an empty micro-batch"
        groups = sorted({piece.group for row in rows for piece in row})
        if packing.single_groups:
            assert all(len(row) <= 1 for row in rows)
            sizes = [lengths.positions(lengths.whole(p)) for p in groups]
            assert length == row_length(max(sizes)) and len(pieces_of(micro_batches)) == len(groups)
        elif packing.max_tokens is not None:
            alone = lengths.prompt_length - 1 + lengths.response_length.max(axis=1)
            assert length <= longest_row(int(alone[groups].max()), packing.max_tokens)
        else:
            assert len(micro_batches) == 1


@given(cases())
@settings(max_examples=30)
def test_plans_repeat(case):
    def read(plan):
        return [[(micro.rows, micro.row_length) for micro in mini] for mini in plan]

    assert read(case.plan()) == read(case.plan())


def one_mini_batch(lengths: BatchLengths, packing: Packing) -> list[MicroBatch]:
    groups = len(lengths.prompt_length)
    every = np.zeros(groups, np.int32), np.ones(groups, bool)
    (found,) = plan_microbatches(lengths, *every, packing)
    return found


def test_a_group_that_finds_no_row_is_split():
    """Three groups of 299 positions in two rows: one and a half each, the prompt of the third once more."""
    lengths = BatchLengths(np.full(3, 100), np.full((3, 4), 50), (128, 64))
    (micro,) = one_mini_batch(lengths, Packing(2, 512))
    assert micro.row_length == 512
    wide = [lengths.positions(piece) for piece in pieces_of([micro])]
    assert sorted(wide) == [199, 199, 299, 299]


def test_a_group_longer_than_a_row_is_split_by_completions():
    lengths = BatchLengths(np.array([100]), np.array([[20, 30, 70, 80]]), (128, 96))
    found = one_mini_batch(lengths, Packing(1, 200))
    assert len(found) == 3 and {micro.row_length for micro in found} == {192}
    assert sorted(map(lengths.positions, pieces_of(found))) == [129, 179, 189]


def test_fewer_groups_than_data_shards_are_shared_by_all():
    """Two groups of eight completions on eight shards: each computes two of them."""
    lengths = BatchLengths(np.full(2, 20), np.full((2, 8), 60), (32, 64))
    (micro,) = one_mini_batch(lengths, Packing(8, 4096))
    assert [len(piece.completions) for piece in pieces_of([micro])] == [2] * 8


@pytest.mark.parametrize(("shards", "least"), [(1, 0.95), (16, 0.9), (64, 0.85)])
def test_rows_are_full_at_the_lengths_of_tool_prompts(shards, least):
    """512 prompts of which half have 690 tokens or more, 8 log-normal responses around 350: positions needed over used."""
    rng, needed, used, lengths = np.random.default_rng(0), 0, 0, set()
    for _ in range(2):
        prompt = np.clip(rng.lognormal(np.log(690), 0.45, 512), 200, 2176).astype(int)
        response = rng.lognormal(np.log(350), 0.35, (512, 1)) * rng.lognormal(0, 0.35, (512, 8))
        batch = BatchLengths(prompt, np.clip(response, 20, 1024).astype(int), (2176, 1024))
        found = one_mini_batch(batch, Packing(shards, 16_384))
        needed += sum(batch.positions(batch.whole(p)) for p in range(512))
        used += sum(micro.positions for micro in found)
        lengths |= {micro.row_length for micro in found}
    assert needed / used >= least
    assert lengths == {16_384}


def test_metrics_of_the_packing():
    """A repeated prompt, the end of a row and an empty row are padding."""
    lengths = BatchLengths(np.full(4, 11), np.full((4, 2), 20), (16, 32))
    rows = ((Piece(0, (0, 1)), Piece(2, (0,))), (Piece(2, (1,)),))
    found = packing_metrics([[MicroBatch(rows, 128, lengths)], []], 4)
    assert found == {
        "update/micro_batches": 1,
        "update/padding": 1 - 100 / 256,
        "update/skipped_groups": 0.5,
    }
    assert packing_metrics([[], []], 4)["update/padding"] == 0


def batch_of(groups: int) -> ResponseBatch:
    """Groups that can be told apart; 40 prompt and 56 response positions, group size 3, an empty response."""
    rng = np.random.default_rng(0)
    prompt, responses = (rng.permutation(10_000)[: groups * n] for n in (40, 3 * 56))
    length = rng.integers(1, 57, (groups, 3)).astype(np.int32)
    length[0, 1] = 0
    routes = (rng.integers(0, 200, (groups, *s, 2, 2)).astype(np.uint8) for s in ((40,), (3, 56)))
    return ResponseBatch(
        prompt.reshape(groups, 40).astype(np.int32),
        rng.integers(1, 41, groups).astype(np.int32),
        responses.reshape(groups, 3, 56).astype(np.int32),
        length,
        routes=Routes(*routes),
    )


def test_what_the_host_knows_of_a_batch():
    batch = batch_of(4)
    found = BatchLengths.of(batch)
    assert found.widths == batch.widths == (40, 56)
    np.testing.assert_array_equal(found.prompt_length, batch.prompt_length)
    np.testing.assert_array_equal(found.response_length, batch.response_length)


def read_row(batch: ResponseBatch, row) -> list[tuple]:
    """Of each position (token read, token predicted or None, position, index of the end), written out."""
    out: list[tuple] = []
    for p, completions in ((piece.group, piece.completions) for piece in row):
        prompt = batch.prompt[p, : batch.prompt_length[p]]
        first = len(out)
        out += [(int(t), None, i, None) for i, t in enumerate(prompt[:-1])]
        for g in completions:
            own = batch.responses[p, g, : batch.response_length[p, g]]
            read = [prompt[-1], *own][: len(own)]
            end = len(out) + len(own)
            out += [
                (int(a), int(b), len(prompt) - 1 + i, end)
                for i, (a, b) in enumerate(zip(read, own, strict=True))
            ]
        last = len(out)
        out[first:] = [(*x[:3], last if x[3] is None else x[3]) for x in out[first:]]
    return out


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 1)], ids=str)
def test_a_micro_batch_reads_the_batch_in_the_order_of_its_rows(shape):
    """Tokens, what they predict, positions, ends, experts; every per-token array and every array over completions."""
    mesh, shards = tiny.mesh(*shape), shape[0] * shape[1]
    batch, rng = batch_of(8), np.random.default_rng(1)
    each = rng.normal(size=batch.responses.shape).astype(np.float32)
    of_completion = rng.normal(size=(8, 3)).astype(np.float32)
    plan = one_mini_batch(BatchLengths.of(batch), Packing(shards, 110))
    assert any(len(piece.completions) < 3 for piece in pieces_of(plan)), "nothing is split"

    @jax.jit
    def read(batch, rows):
        return (
            rows.tokens(batch), rows.targets(batch.responses), rows.position, rows.until,
            rows.targets(each), rows.completions(of_completion, 56), rows.routes(batch.routes),
            rows.put_targets(jnp.zeros(each.shape), rows.targets(each)),
            rows.advantages(of_completion, 56), rows.advantages(each, 56),
        )  # fmt: skip

    put = np.zeros(each.shape, np.float32)
    for micro in plan:
        with activate(mesh):
            found = [np.asarray(x) for x in read(batch, make_rows(micro, mesh))]
        tokens, targets, position, until, values, advantage, routes, part, *both = found
        np.testing.assert_array_equal(both, [advantage, values])
        put += part
        for w, row in enumerate(micro.rows):
            expected = read_row(batch, row)
            for i, (token, target, at, end) in enumerate(expected):
                assert (tokens[w, i], targets[w, i]) == (token, target or 0)
                assert (position[w, i], until[w, i]) == (at, end)
                where = np.argwhere(batch.responses == target) if target else []
                if len(where):
                    p, g, t = where[0]
                    assert values[w, i] == each[p, g, t] and advantage[w, i] == of_completion[p, g]
                    read_at = (
                        batch.routes.prompt[p, at]
                        if t == 0
                        else batch.routes.responses[p, g, t - 1]
                    )
                    np.testing.assert_array_equal(routes[:, w, i], read_at)
            assert not until[w, len(expected) :].any() and not values[w, len(expected) :].any()
    mask = np.arange(56) < batch.response_length[..., None]
    np.testing.assert_array_equal(put, np.where(mask, each, 0))


def test_pairs_that_see_each_other():
    """Counted in the table of the row, by the definition."""
    batch = batch_of(3)
    (micro,) = one_mini_batch(BatchLengths.of(batch), Packing(1))
    until = make_rows(micro).until[0]
    at = np.arange(len(until))
    assert micro.max_pairs == ((at <= at[:, None]) & (at[:, None] < until)).sum()
