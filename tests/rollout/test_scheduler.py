"""Continuous batching: what is drawn depends on nothing but the row; limits, groups, statistics; the book-keeping alone.

Two kinds of test. With the tiny policy: ids and numbers under every size of lanes, slots and caches are those of one
big batch. With a decoder of NumPy (`FakeEngine`), which checks every call it gets: random lengths, sizes and ways.
"""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rest_jax.models.decoder import param_shardings
from rest_jax.rl.packing import bucket
from rest_jax.rollout import engine as engine_lib
from rest_jax.rollout import scheduler
from rest_jax.rollout.engine import Drawn, Engine, RolloutSettings, Slots
from rest_jax.rollout.scheduler import Sampler, Way
from rest_jax.types import PromptBatch, RolloutBatch
from tests import tiny

STATS = ("logp", "entropy", "gini")


def same(out: RolloutBatch, expected: RolloutBatch) -> None:
    """The same responses, numbers up to the rounding of another batch shape."""
    np.testing.assert_array_equal(out.responses, expected.responses)
    np.testing.assert_array_equal(out.response_length, expected.response_length)
    for name in STATS:
        np.testing.assert_allclose(
            getattr(out, name), getattr(expected, name), rtol=1e-5, atol=1e-5, err_msg=name
        )
    for name in ("prompt", "prompt_length"):
        np.testing.assert_array_equal(getattr(out, name), getattr(expected, name))


@pytest.fixture(scope="module")
def whole() -> RolloutBatch:
    """Every response in a lane of its own."""
    out = tiny.rollout(tiny.prompts())
    lengths = out.response_length
    assert (lengths < tiny.TIME).any() and (lengths == tiny.TIME).any()  # some end early
    return out


# With the tiny policy


@pytest.mark.parametrize(
    "options",
    [
        {"lanes": 3},  # fewer than a group has
        {"lanes": 4},
        {"lanes": 16},
        {"lanes": 4, "prompt_slots": 1},
        {"lanes": 4, "prompt_slots": 2},
        {"lanes": 4, "prompt_slots": 100},
        {"lanes": 4, "layers": "unroll"},
        {"lanes": 3, "shape": (2, 1, 1)},
        {"lanes": 4, "shape": (1, 4, 1), "layers": "unroll"},
    ],
    ids=str,
)
def test_lanes_slots_layers_and_meshes_change_nothing(whole, options):
    same(tiny.rollout(tiny.prompts(), **options), whole)


@pytest.mark.parametrize("timing", ["at once", "all together", "two", "never early"])
def test_the_time_of_refills_changes_nothing(whole, monkeypatch, timing):
    def enough_free(self, way, lanes):
        now = len(way.free_lanes)
        return {"at once": now + 1, "all together": lanes, "two": now + 2, "never early": lanes + 1}[timing]  # fmt: skip

    monkeypatch.setattr(scheduler._Run, "enough_free", enough_free)
    same(tiny.rollout(tiny.prompts(), lanes=4), whole)


@pytest.mark.parametrize("options", [{}, {"lanes": 3}, {"shape": (2, 1, 1)}], ids=str)
def test_a_single_prompt(whole, options):
    """With more ways than prompts, too."""
    batch = jax.tree.map(lambda x: x[4:5], tiny.prompts())
    same(tiny.rollout(batch, **options), jax.tree.map(lambda x: x[4:5], whole))


class Counting:
    """A jitted function of an engine that keeps the arguments it was called with."""

    def __init__(self, function):
        self.function, self.calls = function, []

    def __call__(self, *args, **kwargs):
        self.calls.append((args, kwargs))
        return self.function(*args, **kwargs)


def counted(sampler: Sampler, name: str) -> tuple[Sampler, Counting]:
    """The sampler with one function of its engine counted; nothing is compiled anew."""
    counting = Counting(getattr(sampler.engine, name))
    engine = sampler.engine._replace(**{name: counting})
    return Sampler(engine, sampler.settings, sampler.mesh), counting


def run(sampler: Sampler, batch: PromptBatch, **options) -> RolloutBatch:
    return sampler(tiny.params(), batch, jax.random.key(7), jnp.int32(0), **options)


@pytest.mark.parametrize("lanes", [4, 128])
def test_groups_are_told_once_when_they_are_complete(whole, lanes):
    sampler, decode = counted(tiny.sampler(lanes=lanes), "decode")
    told: dict[int, tuple[int, RolloutBatch]] = {}

    def on_group(prompt, rows):
        assert prompt not in told
        told[prompt] = len(decode.calls), jax.tree.map(np.copy, rows)

    out = run(sampler, tiny.prompts(), on_group=on_group)
    same(out, whole)
    assert sorted(told) == list(range(8))
    for prompt, (_, rows) in told.items():
        final = jax.tree.map(lambda x, p=prompt: x[p : p + 1], out)
        jax.tree.map(np.testing.assert_array_equal, rows, final)
        assert rows.validate().responses.shape == (1, tiny.GROUP, tiny.TIME)
    assert sampler.stats.calls == len(decode.calls)
    if lanes == 4:  # while others are still under way, most of them
        assert sum(calls < len(decode.calls) for calls, _ in told.values()) >= 4


@pytest.mark.parametrize("lanes", [3, 16])
def test_limits_cut_responses_and_change_no_others(whole, lanes):
    rng = np.random.default_rng(3)
    limits = rng.integers(1, tiny.TIME + 5, (8, tiny.GROUP))
    limits[rng.random(limits.shape) < 0.4] = tiny.TIME
    limits[2] = 1
    out = run(tiny.sampler(lanes=lanes), tiny.prompts(), limits=limits)
    np.testing.assert_array_equal(out.response_length, np.minimum(whole.response_length, limits))
    kept = np.arange(tiny.TIME) < out.response_length[..., None]
    assert (out.responses == np.where(kept, whole.responses, tiny.PAD)).all()
    for name in STATS:
        expected = np.where(kept, getattr(whole, name), 0)
        np.testing.assert_allclose(getattr(out, name), expected, rtol=1e-5, atol=1e-5)


@functools.cache
def endless(lanes: int) -> Sampler:
    """A sampler whose stop id no policy draws: every response is `TIME` long, or as long as its limit."""
    sampler = tiny.sampler()
    options = RolloutSettings(tiny.GROUP, tiny.TIME, (tiny.VOCAB + 1,), tiny.PAD, tiny.FULL, lanes)
    shardings = param_shardings(tiny.decoder().cfg, sampler.mesh, layout="rollout")
    return scheduler.make_sampler(tiny.decoder(), options, sampler.mesh, shardings)


def test_full_lanes_are_used_to_the_full():
    sampler = endless(16)
    out = run(sampler, jax.tree.map(lambda x: x[:4], tiny.prompts()))
    assert (out.response_length == tiny.TIME).all()
    stats = sampler.stats
    assert stats.utilisation == 1.0 and stats.tokens == stats.lane_steps == 16 * tiny.TIME
    assert stats.seconds > 0


@pytest.mark.parametrize("lanes", [3, 4, 16])
def test_statistics_of_random_lengths(lanes):
    """Tokens are the lengths; the turns are those of lanes that take the next response when they are free."""
    limits = np.random.default_rng(5).integers(1, tiny.TIME + 1, (8, tiny.GROUP))
    sampler = endless(lanes)
    out = run(sampler, tiny.prompts(), limits=limits)
    np.testing.assert_array_equal(out.response_length, limits)
    stats = sampler.stats
    assert stats.tokens == limits.sum()
    order = sorted(range(8), key=lambda p: (-tiny.prompts().length[p], p))  # longest prompt first
    assert stats.lane_steps == lanes * simulated_turns(
        limits[order], lanes, sampler.settings.sizes(8)[0]
    )
    assert 0 < stats.utilisation < 1
    assert stats.utilisation == stats.tokens / stats.lane_steps


def simulated_turns(lengths, lanes: int, slots: int) -> int:
    """Turns that responses of these lengths [P, G] take, prompts in order: one is taken up, into the first free slot, when
    lanes are free and all responses of those before have one; lanes go to the slots in order.
    """
    waiting, resident, running, turns = [list(group) for group in lengths], {}, [], 0
    while True:
        unstarted = sum(len(todo) for todo, _ in resident.values())
        while waiting and len(resident) < slots and lanes - len(running) > unstarted:
            group = waiting.pop(0)
            slot = min(set(range(slots)) - set(resident))
            resident[slot] = [group, len(group)]
            unstarted += len(group)
        for slot in sorted(resident):
            todo = resident[slot][0]
            while todo and len(running) < lanes:
                running.append([slot, todo.pop(0)])
        if not running:
            return turns
        turns += 1
        for work in running:
            work[1] -= 1
            resident[work[0]][1] -= work[1] == 0
        running = [work for work in running if work[1]]
        resident = {slot: state for slot, state in resident.items() if state[1]}


def test_lanes_without_work_are_cut_away():
    """All 32 responses run at once: when 24 have ended, 8 lanes go on, and draw what they would have drawn."""
    limits = np.random.default_rng(6).integers(1, tiny.TIME + 1, (8, tiny.GROUP))
    sampler = endless(128)
    out = run(sampler, tiny.prompts(), limits=limits)
    same(out, run(endless(4), tiny.prompts(), limits=limits))
    np.testing.assert_array_equal(out.response_length, limits)
    ordered = np.sort(limits.reshape(-1))
    turns = int(ordered[23])
    assert turns < ordered[-1]
    assert sampler.stats.lane_steps == 32 * turns + 8 * (int(ordered[-1]) - turns)


@pytest.fixture(scope="module")
def chunked():
    """Four tokens a call at most, caches of 3, 6 and 12 positions: what many tokens need, with few."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_lib, "CHUNK", 4)
        patch.setattr(scheduler, "CHUNK", 4)
        mesh = tiny.mesh()
        shardings = param_shardings(tiny.decoder().cfg, mesh, layout="rollout")
        options = RolloutSettings(tiny.GROUP, tiny.TIME, (tiny.STOP,), tiny.PAD, tiny.FULL, lanes=3)
        yield scheduler.make_sampler(tiny.decoder(), options, mesh, shardings)


def test_growing_and_shrinking_caches_change_nothing(whole, chunked):
    sampler, resize = counted(chunked, "resize")
    out = run(sampler, tiny.prompts())
    same(out, whole)
    widths = [3, *(kwargs["response_width"] for _, kwargs in resize.calls)]
    steps = set(np.sign(np.diff(widths)))
    assert set(widths) == {3, 6, 12} and {1, -1} <= steps, widths
    assert sampler.stats.tokens == out.response_length.sum()


def test_one_width_is_the_other_widths(whole, chunked):
    """A large ratio leaves one position, then all of them."""
    options = dataclasses.replace(chunked.settings, ratio=1000)
    sampler, resize = counted(Sampler(chunked.engine, options, chunked.mesh), "resize")
    same(run(sampler, tiny.prompts()), whole)
    assert {kwargs["response_width"] for _, kwargs in resize.calls} <= {1, 12}


# The book-keeping of one way


def drive(way: Way, length, size: int) -> tuple[list[tuple[int, int]], int]:
    """Runs a way to its end, one token a turn: (group, sample) in the order they end, and the turns."""
    lanes, left, order, turns = len(way.lane), {}, [], 0
    started: set[tuple[int, int]] = set()
    while True:
        while (chosen := way.next_prompt()) is not None:
            group, slot = chosen
            assert way.group[slot] == group and way.group.count(group) == 1
        resident = [group for group in way.group if group is not None]
        assert len(resident) <= len(way.group) and len(set(resident)) == len(resident)
        for lane, slot, sample in way.start():
            assert lane not in left and way.group[slot] is not None
            work = way.group[slot], sample
            assert work not in started
            started.add(work)
            left[lane] = work, length(*work)
            assert way.index[lane] == 0
        assert len(left) + len(way.free_lanes) == lanes
        if not left:
            assert way.idle
            return order, turns
        # none idles while work is there that a slot could hold
        assert not way.free_lanes or not way.waiting or None not in way.group
        turns += 1
        for lane in list(left):
            work, rest = left[lane]
            if rest > 1:
                left[lane] = work, rest - 1
                continue
            del left[lane]
            order.append(work)
            done = way.finish(lane)
            ended = collections.Counter(group for group, _ in order)[work[0]]
            assert done == (work[0] if ended == size else None)


@given(
    groups=st.integers(0, 12),
    size=st.integers(1, 5),
    slots=st.integers(1, 6),
    lanes=st.integers(1, 9),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=150)
def test_a_way_runs_every_response_once(groups, size, slots, lanes, seed):
    lengths = np.random.default_rng(seed).integers(1, 9, (groups, size))
    ids = np.random.default_rng(seed).permutation(100)[:groups]  # groups have any number
    place = {int(group): i for i, group in enumerate(ids)}
    way = Way([int(group) for group in ids], size, slots, lanes)
    order, turns = drive(way, lambda group, sample: int(lengths[place[group], sample]), size)
    assert sorted(order) == sorted((group, sample) for group in place for sample in range(size))
    assert -(-lengths.sum() // lanes) <= turns <= lengths.sum()
    assert turns == simulated_turns(lengths, lanes, slots)


def test_stragglers_hold_up_no_lane():
    """The default number of prompt slots against whole groups only."""
    lengths = np.ceil(np.random.default_rng(0).lognormal(4, 0.7, (64, 8))).astype(int)

    def utilisation(slots, lanes):
        _, turns = drive(Way(list(range(64)), 8, slots, lanes), lambda *at: int(lengths[at]), 8)
        return lengths.sum() / (turns * lanes)

    default = RolloutSettings(8, 10_000, (0,), 0, tiny.FULL, lanes=16)
    assert default.sizes(64) == (8, 16)
    assert utilisation(*default.sizes(64)) >= 0.9
    assert utilisation(2, 16) < 0.8  # whole groups only: the figure can fall


@pytest.mark.parametrize(
    ("options", "groups", "expected"),
    [
        ({}, 512, (128, 128)),
        ({}, 8, (8, 32)),  # never more than there are
        ({"lanes": 3}, 8, (4, 3)),
        ({"lanes": 3, "prompt_slots": 1}, 8, (1, 3)),
        ({"lanes": 9, "prompt_slots": 20}, 8, (8, 9)),
        ({"lanes": 9}, 100, (12, 9)),
    ],
    ids=str,
)
def test_sizes(options, groups, expected):
    assert RolloutSettings(4, 12, (5,), 0, tiny.FULL, **options).sizes(groups) == expected


def test_evaluation_has_one_lane_a_slot():
    assert RolloutSettings(1, 12, (5,), 0, tiny.FULL, lanes=6).sizes(100) == (6, 6)


def test_keep_moves_the_lanes_at_work_to_the_front():
    way = Way([7], 3, 1, 6)
    way.next_prompt()
    way.start()
    way.lane = [None, way.lane[2], None, way.lane[0], None, way.lane[1]]
    way.index[:] = [0, 12, 0, 10, 0, 11]
    assert way.keep(4) == [1, 3, 5, 0]
    assert way.lane == [(0, 2), (0, 0), (0, 1), None] and list(way.index) == [12, 10, 11, 0]


# The scheduler against a decoder of NumPy


class FakeEngine:
    """An engine whose tokens say which response they belong to; every call is checked against what is in the slots."""

    def __init__(self, ways: int, size: int, limit, chunk: int):
        self.ways, self.size, self.limit, self.chunk = ways, size, limit, chunk
        self.turns_without_work = 0

    def engine(self) -> Engine:
        steps = (self.empty, self.prefill, self.insert, self.start, self.decode, self.resize)
        return Engine(*steps, ways=self.ways)

    def empty(self, *, prompt_slots, lanes, prompt_width, response_width):
        self.prompts = np.full((self.ways, prompt_slots), -1)  # the first token of the prompt
        self.lane = [[None] * lanes for _ in range(self.ways)]  # [row, sample, index, limit]
        self.alive = np.zeros((self.ways, lanes), bool)
        self.slot = np.zeros((self.ways, lanes), int)
        self.widths = (prompt_width, response_width)
        return Slots(*[None] * 6)

    def prefill(self, params, tokens, length):
        tokens, length = np.asarray(tokens), np.asarray(length)
        assert tokens.shape[0] == self.ways and tokens.shape[1] <= self.widths[0]
        assert (length <= tokens.shape[1]).all()
        return tokens, length

    def insert(self, slots, prefilled, slot):
        tokens, length = prefilled
        for w, q in enumerate(np.asarray(slot)):
            if q < self.prompts.shape[1]:
                assert not (self.alive[w] & (self.slot[w] == q)).any(), "a prompt in use"
                assert len(set(tokens[w, : length[w]])) == 1, "the row of one prompt, whole"
                self.prompts[w, q] = tokens[w, 0]
        return slots

    def start(self, slots, lanes, rng, step):
        lanes = [np.asarray(x) for x in lanes]
        for w, n in zip(*np.nonzero(lanes[0]), strict=True):
            q, row, sample, limit = (int(x[w, n]) for x in lanes[1:])
            assert not self.alive[w, n], "a lane in use"
            assert self.prompts[w, q] == row, "another prompt"
            self.lane[w][n], self.slot[w, n], self.alive[w, n] = [row, sample, 0, limit], q, True
        return slots

    def decode(self, params, slots, steps, free):
        steps, free = int(steps), np.asarray(free)
        assert 1 <= steps <= self.chunk
        shape = self.alive.shape
        token = np.zeros((*shape, self.chunk), np.int32)
        count, turn = np.zeros(shape, np.int32), 0
        while turn < steps and ((~self.alive).sum(axis=1) < free).all():
            self.turns_without_work += not self.alive.any()
            for w, n in zip(*np.nonzero(self.alive), strict=True):
                work = self.lane[w][n]
                row, sample, index, limit = work
                assert index < self.widths[1], "the cache is full"
                token[w, n, turn] = stamp(row, sample, index)
                count[w, n] += 1
                work[2] += 1
                self.alive[w, n] = index + 1 < min(limit, self.limit(row, sample))
            turn += 1
        numbers = [token.astype(np.float32) + i for i in range(3)]
        out = Drawn(token, *numbers, count, self.alive, np.int32(turn))
        return slots, jax.tree.map(jnp.array, out)

    def resize(self, slots, lanes, *, prompt_width, response_width):
        lanes = np.asarray(lanes)
        for w, kept in enumerate(lanes):
            assert len(set(kept)) == len(kept)
            assert set(np.flatnonzero(self.alive[w])) <= set(kept), "work is cut away"
        self.lane = [[self.lane[w][n] for n in kept] for w, kept in enumerate(lanes)]
        self.alive = np.take_along_axis(self.alive, lanes, axis=1)
        self.slot = np.take_along_axis(self.slot, lanes, axis=1)
        self.widths = (prompt_width, response_width)
        return slots


def stamp(row, sample, index):
    """A token that no other place has."""
    return (row * 8 + sample) * 64 + index


@given(
    ways=st.integers(1, 3),
    groups=st.integers(1, 10),
    size=st.integers(1, 5),
    lanes=st.sampled_from([1, 2, 3, 5, 8, 40, 128]),
    slots=st.sampled_from([None, 1, 2, 7]),
    chunk=st.sampled_from([1, 4, 64]),
    limited=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=60)
def test_the_scheduler_asks_for_everything_once(
    ways, groups, size, lanes, slots, chunk, limited, seed
):
    rng = np.random.default_rng(seed)
    most = int(rng.integers(1, 30))
    natural = np.clip(np.ceil(rng.lognormal(2, 1, (groups, size))), 1, most).astype(int)
    limits = rng.integers(1, most + 3, (groups, size)) if limited else None
    expected = natural if limits is None else np.minimum(natural, limits)
    row = np.arange(1, groups + 1, dtype=np.int32)
    length = rng.integers(1, 200, groups).astype(np.int32)
    tokens = np.where(np.arange(200) < length[:, None], row[:, None], 0).astype(np.int32)

    fake = FakeEngine(ways, size, lambda row, sample: natural[row - 1, sample], chunk)
    options = RolloutSettings(size, most, (5,), 0, tiny.FULL, lanes, slots)
    sampler = Sampler(fake.engine(), options, tiny.mesh())
    told = []

    def on_group(prompt, rows):
        told.append(prompt)
        np.testing.assert_array_equal(rows.response_length[0], expected[prompt])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "CHUNK", chunk)
        out = sampler(
            None, PromptBatch(tokens, length, row), jax.random.key(0), 0, on_group, limits
        )
    assert sorted(told) == list(range(groups))
    np.testing.assert_array_equal(out.response_length, expected)
    kept = np.arange(most) < expected[..., None]
    sample, index = np.arange(size)[:, None], np.arange(most)
    mark = stamp(row[:, None, None], sample, index)
    np.testing.assert_array_equal(out.responses, np.where(kept, mark, 0))
    for i, name in enumerate(STATS):
        np.testing.assert_array_equal(getattr(out, name), np.where(kept, mark + i, 0))
    assert sampler.stats.tokens == expected.sum()
    assert sampler.stats.lane_steps >= expected.sum()
    assert fake.widths[1] <= most and fake.widths[0] <= bucket(int(length.max()), 200)
    assert fake.turns_without_work == 0


def test_no_turn_is_run_without_work():
    """Few slots, many lanes: a call ends with the last response, however few are left when it begins."""
    lengths = np.tile([1, 1, 1, 9], (16, 1))
    fake = FakeEngine(1, 4, lambda row, sample: lengths[row - 1, sample], 64)
    options = RolloutSettings(4, 30, (5,), 0, tiny.FULL, 64, prompt_slots=1)
    row = np.arange(1, 17, dtype=np.int32)
    batch = PromptBatch(row[:, None], np.ones(16, np.int32), row)
    sampler = Sampler(fake.engine(), options, tiny.mesh())
    out = sampler(None, batch, jax.random.key(0), 0)
    np.testing.assert_array_equal(out.response_length, lengths)
    assert fake.turns_without_work == 0
