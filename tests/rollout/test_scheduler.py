"""Continuous batching: what is drawn depends on nothing but the row; limits, groups, statistics; the book-keeping alone.

Two kinds of test. With the tiny policy: ids and numbers under every number of decode slots and prompt cache entries and
every width are those of one big batch. With a decoder of NumPy (`FakeEngine`), which checks every call it gets: random
lengths, sizes and numbers of data shards.
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

from rest_jax.distributed import activate, replicated
from rest_jax.rl.packing import bucket
from rest_jax.rollout import engine as engine_lib
from rest_jax.rollout import scheduler
from rest_jax.rollout.engine import (
    DecodeState,
    Drawn,
    Engine,
    Prefilled,
    RolloutSettings,
    make_engine,
)
from rest_jax.rollout.scheduler import Sampler, Shard
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
def reference() -> RolloutBatch:
    """Every response in a decode slot of its own."""
    out = tiny.rollout(tiny.prompts())
    lengths = out.response_length
    assert (lengths < tiny.TIME).any() and (lengths == tiny.TIME).any()  # some end early
    return out


# With the tiny policy


@pytest.mark.parametrize(
    "options",
    [
        {"decode_slots": 3},  # fewer than a group has
        {"decode_slots": 4},
        {"decode_slots": 16},
        {"decode_slots": 4, "prompt_cache_entries": 1},
        {"decode_slots": 4, "prompt_cache_entries": 2},
        {"decode_slots": 4, "prompt_cache_entries": 100},
        {"decode_slots": 4, "layers": "unroll"},
        {"decode_slots": 3, "shape": (2, 1, 1)},
        {"decode_slots": 4, "shape": (1, 4, 1), "layers": "unroll"},
    ],
    ids=str,
)
def test_slots_entries_layers_and_meshes_change_nothing(reference, options):
    same(tiny.rollout(tiny.prompts(), **options), reference)


@pytest.mark.parametrize("timing", ["at once", "all together", "two", "never early"])
def test_the_time_of_refills_changes_nothing(reference, monkeypatch, timing):
    def free_to_stop_at(shard):
        now, slots = len(shard.free_slots), shard.num_slots
        return {"at once": now + 1, "all together": slots, "two": now + 2, "never early": slots + 1}[timing]  # fmt: skip

    monkeypatch.setattr(scheduler, "free_to_stop_at", free_to_stop_at)
    same(tiny.rollout(tiny.prompts(), decode_slots=4), reference)


@pytest.mark.parametrize("options", [{}, {"decode_slots": 3}, {"shape": (2, 1, 1)}], ids=str)
def test_a_single_prompt(reference, options):
    """With more data shards than prompts, too."""
    batch = jax.tree.map(lambda x: x[4:5], tiny.prompts())
    same(tiny.rollout(batch, **options), jax.tree.map(lambda x: x[4:5], reference))


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


def sample(sampler: Sampler, batch: PromptBatch, **options) -> RolloutBatch:
    return sampler(tiny.params(), batch, jax.random.key(7), jnp.int32(0), **options)


@pytest.mark.parametrize("slots", [4, 128])
def test_groups_are_reported_once_when_they_are_complete(reference, slots):
    sampler, decode = counted(tiny.sampler(decode_slots=slots), "decode")
    reported: dict[int, tuple[int, RolloutBatch]] = {}

    def on_group(prompt, rows):
        assert prompt not in reported
        reported[prompt] = len(decode.calls), jax.tree.map(np.copy, rows)

    out = sample(sampler, tiny.prompts(), on_group=on_group)
    same(out, reference)
    assert sorted(reported) == list(range(8))
    for prompt, (_, rows) in reported.items():
        final = jax.tree.map(lambda x, p=prompt: x[p : p + 1], out)
        jax.tree.map(np.testing.assert_array_equal, rows, final)
        assert rows.validate().responses.shape == (1, tiny.GROUP, tiny.TIME)
    assert sampler.stats.calls == len(decode.calls)
    if slots == 4:  # most of them while others are still being decoded
        assert sum(calls < len(decode.calls) for calls, _ in reported.values()) >= 4


def test_the_key_may_lie_on_another_mesh(reference):
    """As in a run whose rollouts have a tensor size of their own."""
    sampler, params = tiny.sampler(shape=(1, 1, 2)), tiny.params()
    key = jax.device_put(jax.random.key(7), replicated(tiny.mesh(data=2)))
    with activate(tiny.mesh(data=2)):
        out = sampler(params, tiny.prompts(), key, 0)
    same(out, reference)


@pytest.mark.parametrize("slots", [3, 16])
def test_limits_cut_responses_and_change_no_others(reference, slots):
    rng = np.random.default_rng(3)
    limits = rng.integers(1, tiny.TIME + 5, (8, tiny.GROUP))
    limits[rng.random(limits.shape) < 0.4] = tiny.TIME
    limits[2] = 1
    out = sample(tiny.sampler(decode_slots=slots), tiny.prompts(), limits=limits)
    np.testing.assert_array_equal(
        out.response_length, np.minimum(reference.response_length, limits)
    )
    kept = np.arange(tiny.TIME) < out.response_length[..., None]
    assert (out.responses == np.where(kept, reference.responses, tiny.PAD)).all()
    for name in STATS:
        expected = np.where(kept, getattr(reference, name), 0)
        np.testing.assert_allclose(getattr(out, name), expected, rtol=1e-5, atol=1e-5)


@functools.cache
def endless(slots: int) -> Sampler:
    """A sampler whose stop id no policy draws: every response is `TIME` long, or as long as its limit."""
    mesh = tiny.mesh()
    options = RolloutSettings(tiny.GROUP, tiny.TIME, (tiny.VOCAB + 1,), tiny.PAD, tiny.FULL, slots)
    return Sampler(make_engine(tiny.decoder(), options, mesh), options, mesh)


def test_slots_that_are_always_busy_count_as_used():
    sampler = endless(16)
    out = sample(sampler, jax.tree.map(lambda x: x[:4], tiny.prompts()))
    assert (out.response_length == tiny.TIME).all()
    stats = sampler.stats
    assert stats.utilisation == 1.0 and stats.tokens == stats.slot_steps == 16 * tiny.TIME


@pytest.mark.parametrize("slots", [3, 4, 16])
def test_statistics_of_random_lengths(slots):
    """Tokens are the lengths; the steps are those of slots that take the next response when they are free."""
    limits = np.random.default_rng(5).integers(1, tiny.TIME + 1, (8, tiny.GROUP))
    sampler = endless(slots)
    out = sample(sampler, tiny.prompts(), limits=limits)
    np.testing.assert_array_equal(out.response_length, limits)
    stats = sampler.stats
    assert stats.tokens == limits.sum()
    order = sorted(range(8), key=lambda p: (-tiny.prompts().length[p], p))  # longest prompt first
    entries, _ = sampler.settings.sizes(8)
    assert stats.slot_steps == slots * simulated_steps(limits[order], slots, entries)
    assert 0 < stats.utilisation < 1
    assert stats.utilisation == stats.tokens / stats.slot_steps


def simulated_steps(lengths, slots: int, entries: int) -> int:
    """Decode steps that responses of these lengths [P, G] take, prompts in order: one is prefilled, into the first free entry,
    when slots are free and all responses of those before have one; slots go to the entries in order.
    """
    waiting, cached, running, steps = [list(group) for group in lengths], {}, [], 0
    while True:
        unstarted = sum(len(left) for left, _ in cached.values())
        while waiting and len(cached) < entries and slots - len(running) > unstarted:
            group = waiting.pop(0)
            entry = min(set(range(entries)) - set(cached))
            cached[entry] = [group, len(group)]
            unstarted += len(group)
        for entry in sorted(cached):
            left = cached[entry][0]
            while left and len(running) < slots:
                running.append([entry, left.pop(0)])
        if not running:
            return steps
        steps += 1
        for response in running:
            response[1] -= 1
            cached[response[0]][1] -= response[1] == 0
        running = [response for response in running if response[1]]
        cached = {entry: state for entry, state in cached.items() if state[1]}


def test_slots_without_work_are_removed():
    """All 32 responses run at once: when 24 have ended, 8 slots are left, and draw what they would have drawn."""
    limits = np.random.default_rng(6).integers(1, tiny.TIME + 1, (8, tiny.GROUP))
    sampler = endless(128)
    out = sample(sampler, tiny.prompts(), limits=limits)
    same(out, sample(endless(4), tiny.prompts(), limits=limits))
    np.testing.assert_array_equal(out.response_length, limits)
    ordered = np.sort(limits.reshape(-1))
    steps = int(ordered[23])
    assert steps < ordered[-1]
    assert sampler.stats.slot_steps == 32 * steps + 8 * (int(ordered[-1]) - steps)


@pytest.fixture(scope="module")
def chunked():
    """Four tokens a call at most, caches of 3, 6 and 12 positions: what many tokens need, with few."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_lib, "CHUNK", 4)
        patch.setattr(scheduler, "CHUNK", 4)
        mesh = tiny.mesh()
        options = RolloutSettings(tiny.GROUP, tiny.TIME, (tiny.STOP,), tiny.PAD, tiny.FULL, 3)
        yield Sampler(make_engine(tiny.decoder(), options, mesh), options, mesh)


def test_growing_and_shrinking_caches_change_nothing(reference, chunked):
    sampler, resize = counted(chunked, "resize")
    out = sample(sampler, tiny.prompts())
    same(out, reference)
    widths = [3, *(widths.response for (_, _, widths), _ in resize.calls)]
    steps = set(np.sign(np.diff(widths)))
    assert set(widths) == {3, 6, 12} and {1, -1} <= steps, widths
    assert sampler.stats.tokens == out.response_length.sum()


def test_one_width_is_the_other_widths(reference, chunked):
    """A large ratio leaves one position, then all of them."""
    options = dataclasses.replace(chunked.settings, width_ratio=1000)
    sampler, resize = counted(Sampler(chunked.engine, options, chunked.mesh), "resize")
    same(sample(sampler, tiny.prompts()), reference)
    assert {widths.response for (_, _, widths), _ in resize.calls} <= {1, 12}


# The book-keeping of one data shard


def drive(shard: Shard, length, size: int) -> tuple[list[tuple[int, int]], int]:
    """Decodes all of a shard, one token a step: (group, sample) in the order they end, and the steps."""
    slots, left, order, steps = shard.num_slots, {}, [], 0
    started: set[tuple[int, int]] = set()
    while True:
        while (chosen := shard.next_prompt()) is not None:
            group, entry = chosen
            assert shard.entries[entry] == group and shard.entries.count(group) == 1
        cached = [group for group in shard.entries if group is not None]
        assert len(cached) <= len(shard.entries) and len(set(cached)) == len(cached)
        for slot, (group, sample, entry) in shard.start().items():
            assert slot not in left and shard.entries[entry] == group
            response = group, sample
            assert response not in started
            started.add(response)
            left[slot] = response, length(*response)
            assert shard.index[slot] == 0
        assert shard.busy.keys() == left.keys() and len(left) == slots - len(shard.free_slots)
        if not left:
            assert shard.nothing_waits
            return order, steps
        # none idles while work is there that an entry could hold
        assert not shard.free_slots or not shard.waiting or None not in shard.entries
        steps += 1
        for slot in list(left):
            response, rest = left[slot]
            if rest > 1:
                left[slot] = response, rest - 1
                continue
            del left[slot]
            order.append(response)
            complete = shard.finish(slot)
            ended = collections.Counter(group for group, _ in order)[response[0]]
            assert complete == (response[0] if ended == size else None)


@given(
    groups=st.integers(0, 12),
    size=st.integers(1, 5),
    entries=st.integers(1, 6),
    slots=st.integers(1, 9),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=150)
def test_a_shard_decodes_every_response_once(groups, size, entries, slots, seed):
    lengths = np.random.default_rng(seed).integers(1, 9, (groups, size))
    ids = np.random.default_rng(seed).permutation(100)[:groups]  # groups have any number
    row = {int(group): i for i, group in enumerate(ids)}
    shard = Shard([int(group) for group in ids], size, entries, slots)
    order, steps = drive(shard, lambda group, sample: int(lengths[row[group], sample]), size)
    assert sorted(order) == sorted((group, sample) for group in row for sample in range(size))
    assert -(-lengths.sum() // slots) <= steps <= lengths.sum()
    assert steps == simulated_steps(lengths, slots, entries)


def test_stragglers_keep_no_slot_waiting():
    """The default number of prompt cache entries against that of complete groups only."""
    lengths = np.ceil(np.random.default_rng(0).lognormal(4, 0.7, (64, 8))).astype(int)

    def utilisation(entries, slots):
        shard = Shard(list(range(64)), 8, entries, slots)
        _, steps = drive(shard, lambda *at: int(lengths[at]), 8)
        return lengths.sum() / (steps * slots)

    default = RolloutSettings(8, 10_000, (0,), 0, tiny.FULL, decode_slots=16)
    assert default.sizes(64) == (8, 16)
    assert utilisation(*default.sizes(64)) >= 0.9
    assert utilisation(2, 16) < 0.8  # complete groups only: the figure can fall


@pytest.mark.parametrize(
    ("options", "groups", "expected"),
    [
        ({}, 512, (128, 128)),
        ({}, 8, (8, 32)),  # never more than there are
        ({"decode_slots": 3}, 8, (4, 3)),
        ({"decode_slots": 3, "prompt_cache_entries": 1}, 8, (1, 3)),
        ({"decode_slots": 9, "prompt_cache_entries": 20}, 8, (8, 9)),
        ({"decode_slots": 9}, 100, (12, 9)),
    ],
    ids=str,
)
def test_sizes(options, groups, expected):
    assert RolloutSettings(4, 12, (5,), 0, tiny.FULL, **options).sizes(groups) == expected


def test_evaluation_has_one_slot_an_entry():
    assert RolloutSettings(1, 12, (5,), 0, tiny.FULL, decode_slots=6).sizes(100) == (6, 6)


def test_keep_moves_the_busy_slots_to_the_front():
    shard = Shard([7], 3, 1, 6)
    shard.next_prompt()
    shard.start()
    zero, one, two = shard.busy.values()
    shard.busy = {3: zero, 5: one, 1: two}
    shard.index[:] = [0, 12, 0, 10, 0, 11]
    assert shard.keep(4) == [1, 3, 5, 0]
    assert shard.busy == {0: two, 1: zero, 2: one}
    assert shard.num_slots == 4 and list(shard.index) == [12, 10, 11, 0]


# The scheduler against a decoder of NumPy


class FakeEngine:
    """An engine whose tokens say which response they belong to; every call is checked against what is in the slots."""

    def __init__(self, shards: int, size: int, limit, chunk: int):
        self.shards, self.size, self.limit, self.chunk = shards, size, limit, chunk
        self.idle_steps = 0

    def engine(self) -> Engine:
        steps = (self.empty_state, self.prefill, self.insert, self.start, self.decode, self.resize)
        return Engine(*steps, state_shardings=None, num_shards=self.shards)

    def empty_state(self, entries, slots, widths):
        self.prompts = np.full((self.shards, entries), -1)  # the first token of the prompt
        self.slots = [[None] * slots for _ in range(self.shards)]  # [row, sample, index, limit]
        self.alive = np.zeros((self.shards, slots), bool)
        self.entry = np.zeros((self.shards, slots), int)
        self.widths = widths
        return DecodeState(*[None] * 6)

    def prefill(self, params, tokens, length):
        tokens, length = np.asarray(tokens), np.asarray(length)
        assert tokens.shape[0] == self.shards and tokens.shape[1] <= self.widths.prompt
        assert (length <= tokens.shape[1]).all()
        return Prefilled(k=tokens, v=None, hidden=None, length=length)

    def insert(self, state, prefilled, entries):
        tokens, length = prefilled.k, prefilled.length
        for w, q in enumerate(np.asarray(entries)):
            if q < self.prompts.shape[1]:
                assert not (self.alive[w] & (self.entry[w] == q)).any(), "a prompt in use"
                assert len(set(tokens[w, : length[w]])) == 1, "all of one prompt's row"
                self.prompts[w, q] = tokens[w, 0]
        return state

    def start(self, state, requests, rng, step):
        new, *fields = (np.asarray(x) for x in requests)
        for w, n in zip(*np.nonzero(new), strict=True):
            q, row, sample, limit = (int(x[w, n]) for x in fields)
            assert not self.alive[w, n], "a slot in use"
            assert self.prompts[w, q] == row, "another prompt"
            self.slots[w][n], self.entry[w, n], self.alive[w, n] = [row, sample, 0, limit], q, True
        return state

    def decode(self, params, state, steps, free):
        steps, free = int(steps), np.asarray(free)
        assert 1 <= steps <= self.chunk
        shape = self.alive.shape
        token = np.zeros((*shape, self.chunk), np.int32)
        count, done = np.zeros(shape, np.int32), 0
        while done < steps and ((~self.alive).sum(axis=1) < free).all():
            self.idle_steps += not self.alive.any()
            for w, n in zip(*np.nonzero(self.alive), strict=True):
                response = self.slots[w][n]
                row, sample, index, limit = response
                assert index < self.widths.response, "the cache is full"
                token[w, n, done] = stamp(row, sample, index)
                count[w, n] += 1
                response[2] += 1
                self.alive[w, n] = index + 1 < min(limit, self.limit(row, sample))
            done += 1
        numbers = [token.astype(np.float32) + i for i in range(3)]
        out = Drawn(token, *numbers, count, self.alive, np.int32(done))
        return state, jax.tree.map(jnp.array, out)

    def resize(self, state, kept, widths):
        kept = np.asarray(kept)
        for w, own in enumerate(kept):
            assert len(set(own)) == len(own)
            assert set(np.flatnonzero(self.alive[w])) <= set(own), "a busy slot is removed"
        self.slots = [[self.slots[w][n] for n in own] for w, own in enumerate(kept)]
        self.alive = np.take_along_axis(self.alive, kept, axis=1)
        self.entry = np.take_along_axis(self.entry, kept, axis=1)
        self.widths = widths
        return state


def stamp(row, sample, index):
    """A token that no other position of any response has."""
    return (row * 8 + sample) * 64 + index


@given(
    shards=st.integers(1, 3),
    groups=st.integers(1, 10),
    size=st.integers(1, 5),
    slots=st.sampled_from([1, 2, 3, 5, 8, 40, 128]),
    entries=st.sampled_from([None, 1, 2, 7]),
    chunk=st.sampled_from([1, 4, 64]),
    limited=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=60)
def test_the_scheduler_asks_for_everything_once(
    shards, groups, size, slots, entries, chunk, limited, seed
):
    rng = np.random.default_rng(seed)
    most = int(rng.integers(1, 30))
    natural = np.clip(np.ceil(rng.lognormal(2, 1, (groups, size))), 1, most).astype(int)
    limits = rng.integers(1, most + 3, (groups, size)) if limited else None
    expected = natural if limits is None else np.minimum(natural, limits)
    row = np.arange(1, groups + 1, dtype=np.int32)
    length = rng.integers(1, 200, groups).astype(np.int32)
    tokens = np.where(np.arange(200) < length[:, None], row[:, None], 0).astype(np.int32)

    fake = FakeEngine(shards, size, lambda row, sample: natural[row - 1, sample], chunk)
    options = RolloutSettings(size, most, (5,), 0, tiny.FULL, slots, entries)
    sampler = Sampler(fake.engine(), options, tiny.mesh(data=shards))
    reported = []

    def on_group(prompt, rows):
        reported.append(prompt)
        np.testing.assert_array_equal(rows.response_length[0], expected[prompt])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "CHUNK", chunk)
        out = sampler(
            None, PromptBatch(tokens, length, row), jax.random.key(0), 0, on_group, limits
        )
    assert sorted(reported) == list(range(groups))
    np.testing.assert_array_equal(out.response_length, expected)
    kept = np.arange(most) < expected[..., None]
    sample, index = np.arange(size)[:, None], np.arange(most)
    mark = stamp(row[:, None, None], sample, index)
    np.testing.assert_array_equal(out.responses, np.where(kept, mark, 0))
    for i, name in enumerate(STATS):
        np.testing.assert_array_equal(getattr(out, name), np.where(kept, mark + i, 0))
    assert sampler.stats.tokens == expected.sum()
    assert sampler.stats.slot_steps >= expected.sum()
    assert fake.widths.response <= most and fake.widths.prompt <= bucket(int(length.max()), 200)
    assert fake.idle_steps == 0


def test_no_step_is_run_without_work():
    """Few entries, many slots: a call ends with the last response, however few are left when it begins."""
    lengths = np.tile([1, 1, 1, 9], (16, 1))
    fake = FakeEngine(1, 4, lambda row, sample: lengths[row - 1, sample], 64)
    options = RolloutSettings(4, 30, (5,), 0, tiny.FULL, 64, prompt_cache_entries=1)
    row = np.arange(1, 17, dtype=np.int32)
    batch = PromptBatch(row[:, None], np.ones(16, np.int32), row)
    sampler = Sampler(fake.engine(), options, tiny.mesh())
    out = sampler(None, batch, jax.random.key(0), 0)
    np.testing.assert_array_equal(out.response_length, lengths)
    assert fake.idle_steps == 0
