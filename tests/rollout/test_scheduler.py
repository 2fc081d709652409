"""Continuous batching: what is drawn depends on nothing but the row; limits, groups, statistics; the book-keeping alone.

Two kinds of test. With the tiny policy: ids and numbers under every number of decode slots, prompt cache entries and pages
and every size of a page are those of one big batch. With a decoder of NumPy (`FakeEngine`), which checks every call it gets:
random lengths, sizes and numbers of data shards.
"""

import collections
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rest_jax.distributed import activate, replicated
from rest_jax.rollout.engine import (
    NOBODY,
    DecodeCall,
    DecodeState,
    Drawn,
    Engine,
    PromptRows,
    RolloutSettings,
    Sizes,
    make_engine,
)
from rest_jax.rollout.scheduler import Sampler, prefill_width, table_columns
from rest_jax.rollout.shard import CallResult, Placed, Response, Rows, Running, Shard
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
    """Every response in a decode slot of its own, and in one page."""
    out = tiny.rollout(tiny.prompts())
    lengths = out.response_length
    assert (lengths < tiny.TIME).any() and (lengths == tiny.TIME).any()  # some end early
    return out


# With the tiny policy

MORE_OPTIONS = [
    {"decode_slots": 16},
    {"decode_slots": 4, "prompt_cache_entries": 2},
    {"decode_slots": 4, "prompt_cache_entries": 100},
    {"decode_slots": 5, "page": 2, "layers": "unroll"},
    {"decode_slots": 6, "page": 4, "shape": (1, 2, 2), "layers": "unroll"},
    {"decode_slots": 7, "page": 2, "shape": (2, 1, 2)},
    {"page": 4},
]


@pytest.mark.parametrize(
    "options",
    [
        {"decode_slots": 3},  # fewer than a group has
        pytest.param({"decode_slots": 4, "prompt_cache_entries": 1}, marks=pytest.mark.wide),
        pytest.param({"decode_slots": 4, "layers": "unroll"}, marks=pytest.mark.wide),
        pytest.param({"decode_slots": 3, "shape": (2, 1, 1)}, marks=pytest.mark.wide),
        pytest.param(
            {"decode_slots": 4, "shape": (1, 4, 1), "layers": "unroll"}, marks=pytest.mark.slow
        ),
        pytest.param({"decode_slots": 3, "page": 4}, marks=pytest.mark.slow),
        {"page": 8, "layers": "unroll"},  # slots are removed
        *(pytest.param(options, marks=pytest.mark.slow) for options in MORE_OPTIONS),
    ],
    ids=str,
)
def test_slots_entries_pages_layers_and_meshes_change_nothing(reference, options):
    same(tiny.rollout(tiny.prompts(), **options), reference)
    assert tiny.sampler(**options).stats.dropped == 0


FEW_PAGES = [
    {"decode_slots": 3, "page": 4, "cache_tokens": 4, "layers": "unroll"},
    {"decode_slots": 16, "page": 4, "cache_tokens": 64, "shape": (1, 1, 2)},
    {"decode_slots": 8, "page": 2, "cache_tokens": 50, "shape": (2, 1, 1)},
    {"page": 4, "cache_tokens": 64, "layers": "unroll"},  # 32 slots, of which some are removed
]


@pytest.mark.wide
@pytest.mark.parametrize(
    "options",
    [
        {"decode_slots": 3, "page": 4, "cache_tokens": 1},  # one prompt and one response
        *(pytest.param(options, marks=pytest.mark.slow) for options in FEW_PAGES),
    ],
    ids=str,
)
def test_responses_without_room_are_drawn_again(reference, options):
    same(tiny.rollout(tiny.prompts(), **options), reference)
    stats = tiny.sampler(**options).stats
    assert stats.dropped > 0 and stats.tokens > reference.response_length.sum()


@pytest.mark.parametrize(
    "options",
    [
        {"decode_slots": 3},
        pytest.param({"shape": (2, 1, 1)}, marks=pytest.mark.wide),
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"page": 4}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_single_prompt(reference, options):
    """With more data shards than prompts, too."""
    batch = jax.tree.map(lambda x: x[4:5], tiny.prompts())
    same(tiny.rollout(batch, **options), jax.tree.map(lambda x: x[4:5], reference))


class Counting:
    """A jitted function of an engine that keeps the arguments it was called with, but for weights and state."""

    def __init__(self, function):
        self.function, self.calls = function, []

    def __call__(self, params, state, *args):
        self.calls.append(args)
        return self.function(params, state, *args)


def counted(sampler: Sampler, name: str) -> tuple[Sampler, Counting]:
    """The sampler with one function of its engine counted; nothing is compiled anew."""
    counting = Counting(getattr(sampler.engine, name))
    engine = sampler.engine._replace(**{name: counting})
    return Sampler(engine, sampler.settings, sampler.mesh), counting


def sample(sampler: Sampler, batch: PromptBatch, **options) -> RolloutBatch:
    return sampler(tiny.params(), batch, jax.random.key(7), jnp.int32(0), **options)


@pytest.mark.parametrize(
    "options", [pytest.param({"decode_slots": 3, "page": 4}, marks=pytest.mark.wide), {}], ids=str
)
def test_groups_are_reported_once_when_they_are_complete(reference, options):
    sampler, decode = counted(tiny.sampler(**options), "decode")
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
    if options:  # most of them while others are still being decoded
        assert sum(calls < len(decode.calls) for calls, _ in reported.values()) >= 4


def test_page_tables_are_as_wide_as_they_need_to_be(reference):
    """Where pages are gathered: 1, 2, 4 .. columns, none before the first page of a response is full."""
    sampler, decode = counted(tiny.sampler(decode_slots=3, page=4), "decode")
    same(sample(sampler, tiny.prompts()), reference)
    columns = [
        [t.page.shape[-1] for t in (call.prompts, call.responses)] for call, *_ in decode.calls
    ]
    prompts, responses = (set(x) for x in zip(*columns, strict=True))
    assert prompts == {2, 4} and {0, 1, 2} <= responses <= {0, 1, 2, 4}, columns


def test_the_key_may_lie_on_another_mesh(reference):
    """As in a run whose rollouts have a tensor size of their own."""
    sampler, params = tiny.sampler(shape=(1, 1, 2)), tiny.params()
    key = jax.device_put(jax.random.key(7), replicated(tiny.mesh(data=2)))
    with activate(tiny.mesh(data=2)):
        out = sampler(params, tiny.prompts(), key, 0)
    same(out, reference)


@pytest.mark.parametrize(
    "options", [pytest.param({"decode_slots": 3, "page": 4}, marks=pytest.mark.wide), {}], ids=str
)
def test_limits_cut_responses_and_change_no_others(reference, options):
    rng = np.random.default_rng(3)
    limits = rng.integers(1, tiny.TIME + 5, (8, tiny.GROUP))
    limits[rng.random(limits.shape) < 0.4] = tiny.TIME
    limits[2] = 1
    out = sample(tiny.sampler(**options), tiny.prompts(), limits=limits)
    np.testing.assert_array_equal(
        out.response_length, np.minimum(reference.response_length, limits)
    )
    kept = np.arange(tiny.TIME) < out.response_length[..., None]
    assert (out.responses == np.where(kept, reference.responses, tiny.PAD)).all()
    for name in STATS:
        expected = np.where(kept, getattr(reference, name), 0)
        np.testing.assert_allclose(getattr(out, name), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"decode_slots": 3}, pytest.param({"shape": (2, 1, 1)}, marks=pytest.mark.wide)],
    ids=str,
)
def test_prompts_that_are_not_wanted_get_no_responses_and_change_no_shapes(reference, options):
    sampler, sizes = tiny.sampler(**options), []

    def empty_state(asked: Sizes) -> DecodeState:
        sizes.append(asked)
        return made(asked)

    made, sampler.engine = (
        sampler.engine.empty_state,
        sampler.engine._replace(empty_state=empty_state),
    )
    sample(sampler, tiny.prompts())
    out = sample(sampler, tiny.prompts(), wanted=np.isin(np.arange(8), [1, 2, 7]))
    nothing = sample(sampler, tiny.prompts(), wanted=np.zeros(8, bool))
    assert sizes[0] == sizes[1] == sizes[2]
    same(rows(out, [1, 2, 7]), rows(reference, [1, 2, 7]))
    assert not rows(out, [0, 3, 4, 5, 6]).response_length.any()
    assert not nothing.response_length.any() and (nothing.responses == tiny.PAD).all()


def rows(out: RolloutBatch, which: list[int]) -> RolloutBatch:
    return jax.tree.map(lambda x: x[np.array(which)], out)


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


@pytest.mark.parametrize("slots", [3, *(pytest.param(n, marks=pytest.mark.wide) for n in (4, 16))])
def test_statistics_of_random_lengths(slots):
    """Tokens are the lengths; the steps are those of slots that take the next response when they are free."""
    limits = np.random.default_rng(5).integers(1, tiny.TIME + 1, (8, tiny.GROUP))
    sampler = endless(slots)
    out = sample(sampler, tiny.prompts(), limits=limits)
    np.testing.assert_array_equal(out.response_length, limits)
    stats = sampler.stats
    assert stats.tokens == limits.sum()
    order = sorted(range(8), key=lambda p: (-tiny.prompts().length[p], p))  # longest prompt first
    entries = sampler.settings.sizes(8, 16).entries
    page = sampler.settings.page
    assert stats.slot_steps == slots * simulated_steps(limits[order], slots, entries, page)
    assert 0 < stats.utilisation < 1
    assert stats.utilisation == stats.tokens / stats.slot_steps


def simulated_steps(lengths, slots: int, entries: int, page: int) -> int:
    """Decode steps that responses of these lengths [P, G] take where there are pages enough.

    Between calls of `page` steps prompts are prefilled in order, into the first free entries, while the next call might start
    more responses than wait; a slot that is free takes the next that waits, first entry first.
    """
    waiting, cached, running, steps = [list(group) for group in lengths], {}, [], 0
    expected = slots
    while True:
        queue = [(entry, n) for entry, (left, _) in sorted(cached.items()) for n in left]
        if waiting and len(cached) < entries and len(queue) < expected:
            while waiting and len(cached) < entries:
                group = waiting.pop(0)
                cached[min(set(range(entries)) - set(cached))] = [group, len(group)]
            continue
        before = len(queue)
        for _ in range(page):
            while queue and len(running) < slots:
                entry, length = queue.pop(0)
                cached[entry][0].pop(0)
                running.append([entry, length])
            if not running:
                break
            steps += 1
            for response in running:
                response[1] -= 1
                cached[response[0]][1] -= response[1] == 0
            running = [response for response in running if response[1]]
        expected = min(slots, 2 * (before - len(queue)) + 1)
        cached = {entry: state for entry, state in cached.items() if state[1]}
        if not running and not cached and not waiting:
            return steps


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


# What a rollout is sized by


OPTIONS: dict[str, Any] = {"group_size": 4, "stop_ids": (5,), "pad_id": 0, "sampling": tiny.FULL}


@pytest.mark.parametrize(
    ("options", "groups", "expected"),
    [
        # 100 prompt tokens are 2 pages, 12 tokens of a response up to 2 and one for each removal of slots
        ({}, 512, Sizes(128, 128, 128 * 2 + 128 * 4, 2, 4)),
        ({}, 8, Sizes(8, 32, 8 * 2 + 32 * 3, 2, 3)),  # never more than there are
        ({"decode_slots": 3}, 16, Sizes(4, 3, 4 * 2 + 3 * 2, 2, 2)),
        ({"decode_slots": 3, "prompt_cache_entries": 1}, 8, Sizes(1, 3, 2 + 3 * 2, 2, 2)),
        ({"decode_slots": 9, "prompt_cache_entries": 20}, 8, Sizes(8, 9, 8 * 2 + 9 * 2, 2, 2)),
        ({"decode_slots": 9}, 100, Sizes(12, 9, 12 * 2 + 9 * 2, 2, 2)),
        ({"decode_slots": 9, "page": 4}, 100, Sizes(12, 9, 12 * 25 + 9 * 4, 25, 4)),
        # 1,024 tokens for each by default, and what the longest may need
        ({"decode_slots": 9, "max_tokens": 4000}, 100, Sizes(12, 9, 12 * 2 + 9 * 17, 2, 64)),
        ({"decode_slots": 1, "max_tokens": 4000}, 1, Sizes(1, 1, 2 + 64, 2, 64)),
        ({"decode_slots": 9, "cache_tokens": 640}, 100, Sizes(12, 9, 10, 2, 2)),
        ({"decode_slots": 9, "cache_tokens": 641}, 100, Sizes(12, 9, 11, 2, 2)),
        ({"decode_slots": 9, "cache_tokens": 1}, 100, Sizes(12, 9, 4, 2, 2)),  # one response
    ],
    ids=str,
)
def test_sizes(options, groups, expected):
    made = RolloutSettings(**{"max_tokens": 12, **OPTIONS, **options})
    assert made.sizes(groups, 100) == expected


def test_long_prompts_have_pages_of_their_own():
    sizes = RolloutSettings(4, 12, (5,), 0, tiny.FULL, decode_slots=4).sizes(8, 3000)
    assert sizes == Sizes(4, 4, 4 * 16 + 4 * 2, 47, 2)


def test_evaluation_has_one_slot_an_entry():
    sizes = RolloutSettings(1, 12, (5,), 0, tiny.FULL, decode_slots=6).sizes(100, 64)
    assert (sizes.entries, sizes.slots) == (6, 6)


@pytest.mark.parametrize(
    ("slots", "expected"),
    [(1, (1,)), (31, (31,)), (32, (32, 8)), (128, (128, 32, 8)), (130, (130, 33, 9))],
)
def test_slots_become_fewer_by_factors_of_four(slots, expected):
    assert Sizes(1, slots, 1, 1, 1).slot_counts == expected


@pytest.mark.parametrize(
    ("longest", "total", "page", "expected"),
    [
        (1, 1, 64, 64),
        (2, 3, 64, 192),
        (2, 1000, 64, 2048),  # many short prompts: 2,048 tokens
        (50, 1000, 64, 64 * 52),  # a longer one; 50 pages are not a length of rows
        (3, 3, 4, 32),  # the shortest row
        (11, 11, 4, 44),
        (3, 3, 24, 72),
        (11, 11, 24, 288),
    ],
)
def test_rows_of_prompts_hold_the_longest_and_many_short_ones(longest, total, page, expected):
    width = prefill_width(longest, total, page)
    assert width == expected and width % page == 0


@pytest.mark.parametrize(
    ("used", "gathers", "expected"),
    [
        ((3, 5), True, (4, 8)),
        ((1, 0), True, (1, 0)),
        ((4, 2), True, (4, 2)),
        ((5, 9), True, (6, 9)),  # as many as there may be
        ((3, 5), False, (6, 9)),
        ((0, 0), False, (6, 9)),
    ],
)
def test_columns_of_page_tables(used, gathers, expected):
    assert table_columns(used, Sizes(8, 8, 100, 6, 9), gathers) == expected


# The book-keeping of one data shard


def make_shard(lengths, sizes: Sizes, group_size: int = 2, page: int = 4) -> Shard:
    """Groups 0, 1, .. wait, with prompts of these lengths."""
    options = RolloutSettings(group_size, 100, (5,), 0, tiny.FULL, page=page)
    return Shard(list(range(len(lengths))), np.array(lengths), options, sizes)


def running(shard: Shard, *responses: tuple[int, int, list[int]]) -> None:
    """Puts responses (slot, group, pages) of the first entry into slots, each with pages of its own that are free no longer."""
    for sample, (slot, group, pages) in enumerate(responses):
        rows = [Rows(page, 0, shard.page) for page in pages]
        shard.running[slot] = Running(Response(group, sample, 0), rows)
        shard.free_pages = [page for page in shard.free_pages if page not in pages]


def test_prompts_are_placed_in_order_while_there_is_room():
    """A row of 6 pages. The longest come first; one that does not fit into the row leaves its place to shorter ones."""
    shard = make_shard([13, 9, 8, 5, 4], Sizes(5, 2, 100, 4, 3))
    assert shard.wants_prompts
    placed = shard.place_prompts(24)
    assert placed == [Placed(0, 0, 0), Placed(2, 1, 16)]  # 4 pages, not 3, 2
    assert list(shard.waiting) == [1, 3, 4]
    assert not shard.wants_prompts  # four responses wait for two slots
    assert [(one.entry, one.sample) for one in shard.unstarted] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [len(entry.pages) for entry in shard.entries if entry] == [4, 2]
    held = [page for entry in shard.entries if entry for page in entry.pages]
    assert sorted(held + shard.free_pages) == list(range(100))
    shard.unstarted = shard.unstarted[3:]
    assert shard.wants_prompts
    assert [one.group for one in shard.place_prompts(24)] == [1, 3, 4]
    assert not shard.waiting and shard.left == {group: 2 for group in range(5)}


def test_prompts_wait_for_an_entry():
    shard = make_shard([4, 4, 4], Sizes(2, 8, 100, 1, 1))
    assert [one.entry for one in shard.place_prompts(64)] == [0, 1]
    assert shard.waiting and len(shard.unstarted) < 8 and not shard.wants_prompts
    shard.entries[0], shard.unstarted = None, shard.unstarted[2:]
    assert shard.wants_prompts and shard.place_prompts(64) == [Placed(2, 0, 0)]
    assert [one.entry for one in shard.unstarted] == [0, 0, 1, 1]  # the first entry first


def test_prompts_wait_while_the_next_call_has_enough_to_start():
    """As many again as the last call started, and one."""
    shard = make_shard([4] * 4, Sizes(4, 8, 100, 1, 1), group_size=4)
    shard.place_prompts(4)
    assert len(shard.unstarted) == 4 and shard.wants_prompts  # for 8 slots
    owners = np.full(8, NOBODY)
    owners[0] = shard.number(shard.unstarted[0])
    call = CallResult(owners, np.zeros(8, int), 1, 4, shard.next_pages())
    shard.advance(call)
    assert len(shard.unstarted) == 3 and not shard.wants_prompts
    shard.unstarted.pop()
    assert shard.wants_prompts


def test_prompts_leave_pages_to_the_longest_response():
    """5 pages, of which a response may need 3: no more than two prompts of a page."""
    shard = make_shard([4, 4, 4], Sizes(3, 4, 5, 1, 3))
    assert len(shard.place_prompts(64)) == 2 and not shard.wants_prompts


def test_prompts_leave_a_page_to_every_slot_while_responses_run():
    shard = make_shard([4, 4, 4], Sizes(3, 3, 7, 1, 1))
    shard.place_prompts(4)
    running(shard, (0, 0, shard.free_pages[:1]))
    shard.unstarted = []
    assert len(shard.free_pages) == 5 and shard.wants_prompts
    shard.free_pages = shard.free_pages[:4]
    assert shard.wants_prompts and len(shard.place_prompts(64)) == 1
    assert len(shard.free_pages) == 3 and not shard.wants_prompts


def test_pages_go_to_running_responses_first():
    shard = make_shard([4], Sizes(1, 4, 3, 1, 2))
    running(shard, (3, 0, [0]), (1, 0, []))
    assert shard.next_pages() == {1: 1, 3: 2}
    shard.free_pages = [4, 5, 6]
    assert shard.next_pages() == {1: 6, 3: 5}  # a third response could not go on for another call
    shard.free_pages = [3, 4, 5, 6]
    assert shard.next_pages() == {1: 6, 3: 5, 0: 4}
    assert shard.free_pages == [3, 4, 5, 6]  # they are taken when the call has ended
    shard.running = {}
    shard.free_pages = [3]
    assert shard.next_pages() == {0: 3}


def test_the_youngest_responses_are_dropped_until_the_others_have_pages():
    shard = make_shard([4], Sizes(1, 4, 7, 1, 4), group_size=4)
    running(shard, (0, 0, [0, 1]), (1, 0, [2]), (2, 0, [3]), (3, 0, [4, 5]))
    assert len(shard.drop_youngest()) == 2  # one page for four, two for three, three for two
    assert sorted(shard.running) == [0, 3] and sorted(shard.free_pages) == [2, 3, 6]
    assert [one.sample for one in shard.unstarted] == [1, 2]
    assert len(shard.drop_youngest()) == 0


def test_a_call_moves_pages_and_ends_groups():
    """Group 0 has three responses: one continues, one ends and another takes its slot in the same call."""
    shard = make_shard([4, 8], Sizes(2, 2, 10, 2, 4), group_size=3)
    shard.place_prompts(64)
    prompts = [entry.pages for entry in shard.entries if entry]
    pages = shard.next_pages()
    started = shard.unstarted[:2]
    numbers = [shard.number(one) for one in started]
    assert shard.advance(CallResult(np.array(numbers), np.zeros(2, int), 2, 4, pages)) == []
    assert {n: one.pages for n, one in shard.running.items()} == {
        n: [Rows(pages[n], 0, 4)] for n in (0, 1)
    }
    later = shard.next_pages()
    assert not {*later.values()} & {*pages.values(), *prompts[0], *prompts[1]}
    # slot 0 ended its response and took the next at step 3, slot 1 continues; the call ended after step 3
    numbers = [shard.number(shard.unstarted[0]), numbers[1]]
    assert shard.advance(CallResult(np.array(numbers), np.array([2, 0]), 1, 3, later)) == []
    assert shard.running[0].pages == [Rows(later[0], 2, 3)]
    assert shard.running[1].pages == [Rows(pages[1], 0, 4), Rows(later[1], 0, 3)]
    assert pages[0] in shard.free_pages
    # both end, and with them the group
    more = shard.next_pages()
    ended = np.full(2, NOBODY)
    assert shard.advance(CallResult(ended, np.zeros(2, int), 0, 2, more)) == [0]
    assert not shard.running and shard.entries[0] is None and shard.entries[1] is not None
    assert sorted(shard.free_pages + prompts[1]) == list(range(10))


def test_responses_that_start_and_end_in_one_call_are_counted():
    shard = make_shard([4], Sizes(1, 1, 10, 1, 4), group_size=3)
    shard.place_prompts(64)
    ended = CallResult(np.array([NOBODY]), np.array([3]), 3, 4, shard.next_pages())
    assert shard.advance(ended) == [0]
    assert shard.nothing_waits and sorted(shard.free_pages) == list(range(10))


def test_keep_moves_the_busy_slots_to_the_front():
    shard = make_shard([4], Sizes(1, 6, 10, 1, 4))
    running(shard, (3, 0, [3]), (5, 0, [5]), (1, 0, [1]))
    zero, one, two = (shard.running[n] for n in (3, 5, 1))
    assert shard.keep(4) == [1, 3, 5, 0]
    assert shard.running == {0: two, 1: zero, 2: one} and shard.num_slots == 4


# The scheduler against a decoder of NumPy

UNKNOWN = -1  # a row of a page that nobody has written, or that holds what is not meant
PROMPT = 7  # as a sample: the prompt's own tokens


def stamp(row, sample, index, attempt=0):
    """A token that no other position of any prompt or response has, nor another attempt at it."""
    return ((row * 8 + sample) * 8 + attempt % 8) * 256 + index


@dataclasses.dataclass
class FakeResponse:
    """In a decode slot; `pages` are those that have been written."""

    row: int
    sample: int
    attempt: int
    left: int
    index: int = 0
    pages: list[Rows] = dataclasses.field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        """What it has drawn."""
        return [stamp(self.row, self.sample, n, self.attempt) for n in range(self.index)]


class FakeEngine:
    """An engine whose tokens say which response they belong to; every call is checked against what each page holds.

    Unlike a policy it may draw another length every time that it begins a response: `lengths` `[attempts, P, G]`.
    """

    def __init__(self, shards: int, options: RolloutSettings, lengths: np.ndarray, gathers: bool):
        self.shards, self.options, self.lengths, self.gathers = shards, options, lengths, gathers
        self.page, self.size = options.page, options.group_size
        self.attempts: collections.Counter = collections.Counter()  # by (row, sample)
        self.ended: dict[tuple[int, int], int] = {}  # tokens
        self.dropped = self.drawn = self.steps = self.calls = self.positions = 0

    def engine(self) -> Engine:
        steps = (self.empty_state, self.prefill, self.decode, self.keep)
        return Engine(*steps, None, None, self.shards, self.gathers)  # type: ignore[arg-type]

    def empty_state(self, sizes: Sizes):
        self.sizes = sizes
        self.content = np.full((self.shards, sizes.pages, self.page), UNKNOWN)
        # a data shard: by entry (row, length, pages)
        self.prompts: list[dict[int, tuple[int, int, list[int]]]] = [{} for _ in range(self.shards)]
        self.slots: list[list[FakeResponse | None]] = [
            [None] * sizes.slots for _ in range(self.shards)
        ]
        return DecodeState(*[None] * 5)

    def live_pages(self, w: int) -> list[int]:
        """Pages that may not be written."""
        used = [page for _, _, pages in self.prompts[w].values() for page in pages]
        used += [rows.page for one in self.slots[w] if one for rows in one.pages]
        assert len(set(used)) == len(used), "a page is used twice"
        return used

    def prefill(self, params, state, rows: PromptRows, prefix: None):
        rows = jax.tree.map(np.asarray, rows)
        width = rows.tokens.shape[1]
        assert rows.page.shape[1] * self.page == width and (rows.entry < self.sizes.entries).any()
        self.positions += self.shards * width
        for w in range(self.shards):
            live, where, inside = self.live_pages(w), rows.page[w].copy(), np.zeros(width, bool)
            for e in np.flatnonzero(rows.entry[w] < self.sizes.entries):
                entry, last, length = (int(x[w, e]) for x in (rows.entry, rows.last, rows.length))
                start = last + 1 - length
                row = int(rows.tokens[w, start]) // stamp(1, 0, 0)
                assert (row, 0) not in self.attempts, "a prompt is prefilled twice"
                assert start % self.page == 0 and entry not in self.prompts[w], "an entry in use"
                at, pages = slice(start, last + 1), slice(start // self.page, last // self.page + 1)
                tokens = stamp(row, PROMPT, np.arange(length))
                np.testing.assert_array_equal(rows.tokens[w, at], tokens)
                np.testing.assert_array_equal(rows.position[w, at], np.arange(length))
                assert (rows.until[w, at] == last + 1).all() and not inside[at].any()
                inside[at] = True
                own = where[pages].tolist()
                assert (np.array(own) < self.sizes.pages).all(), "a prompt without a page"
                where[pages] = self.sizes.pages  # nothing else is written there
                assert not {*own} & {*live} and len({*own}) == len(own), "a page in use"
                live += own
                padded = np.pad(tokens, (0, -length % self.page), constant_values=UNKNOWN)
                self.content[w, own] = padded.reshape(-1, self.page)
                self.prompts[w][entry] = row, length, own
                self.attempts.update({(row, sample): 0 for sample in range(self.size)})
            assert (where == self.sizes.pages).all() and (rows.until[w, ~inside] == 0).all()
        return state, None

    def read(self, w: int, table, n: int) -> list[int]:
        """What the pages of a sequence hold."""
        page, begin, end = (x[w, n] for x in table)
        used = end > begin
        assert (np.sort(used)[::-1] == used).all(), "pages in use come first"
        found = [self.content[w, p, b:e] for p, b, e in zip(page, begin, end, strict=True) if e > b]
        return np.concatenate([[], *found]).tolist()

    def decode(self, params, state, call: DecodeCall, rng, step):
        call = jax.tree.map(np.asarray, call)
        for w in range(self.shards):
            self.check(w, call)
        if not self.gathers:
            widths = call.prompts.page.shape[-1], call.responses.page.shape[-1]
            assert widths == (self.sizes.prompt_pages, self.sizes.response_pages)
        return state, self.draw(call)

    def check(self, w: int, call: DecodeCall) -> None:
        """What a call says of a data shard. Drops what no longer runs."""
        for n, one in enumerate(self.slots[w]):
            if one is not None and not call.running[w, n]:
                self.slots[w][n] = None
                self.dropped += 1
            assert one is not None or not call.running[w, n], "nothing runs in a free slot"
        live, slots = self.live_pages(w), self.slots[w]
        given = call.next_page[w][call.next_page[w] < self.sizes.pages].tolist()
        assert len({*given}) == len(given) and not {*given} & {*live}, "a page in use"
        for n, one in enumerate(slots):
            assert self.read(w, call.responses, n) == (one.tokens if one else [])
            assert one is None or call.next_page[w, n] < self.sizes.pages, "a response has no page"
        for entry in range(self.sizes.entries):
            row, length, _ = self.prompts[w].get(entry, (0, 0, []))
            assert self.read(w, call.prompts, entry) == [
                stamp(row, PROMPT, n) for n in range(length)
            ]
        busy = {(one.row, one.sample) for one in slots if one}
        queue = [tuple(int(x[w, i]) for x in call.queue[:5]) for i in range(call.queued[w])]
        for owner, entry, row, sample, _ in queue:
            assert owner == (row - 1) * self.size + sample and self.prompts[w][entry][0] == row
        wait = [(row, sample) for _, _, row, sample, _ in queue]
        known = {(row, g) for row, _, _ in self.prompts[w].values() for g in range(self.size)}
        assert len({*wait}) == len(wait) and {*wait} == known - busy - self.ended.keys()
        fresh = [one[1:4:2] for one in queue if not self.attempts[one[2:4]]]
        assert fresh == sorted(fresh), "first entry first"

    def draw(self, call: DecodeCall) -> Drawn:
        shape = call.running.shape
        made = np.zeros((3, shape[0], self.page, shape[1]), int)
        made[0] = NOBODY
        begin, started = np.zeros(shape, np.int32), np.zeros(shape[0], np.int32)
        alive = np.array([[one is not None for one in own] for own in self.slots])
        tokens, t = np.zeros(shape[0], np.int32), 0
        while t < self.page:
            queued = call.queued - started
            if not ((alive.sum(1) + queued > call.enough) | (queued > 0)).any():
                break
            for w, n in zip(*np.nonzero(~alive & (call.next_page < self.sizes.pages)), strict=True):
                if started[w] < call.queued[w]:
                    _, _, row, sample, limit = (int(x[w, started[w]]) for x in call.queue[:5])
                    attempt = self.attempts[row, sample]
                    length = self.lengths[attempt % len(self.lengths), row - 1, sample]
                    self.slots[w][n] = FakeResponse(row, sample, attempt, min(length, limit))
                    self.attempts[row, sample] += 1
                    begin[w, n], alive[w, n], started[w] = t, True, started[w] + 1
            assert alive.any(), "a step without work"
            for w, n in zip(*np.nonzero(alive), strict=True):
                one = self.slots[w][n]
                assert one is not None
                owner = (one.row - 1) * self.size + one.sample
                token = stamp(one.row, one.sample, one.index, one.attempt)
                made[:, w, t, n] = owner, one.index, token
                one.index += 1
                if one.index == one.left:
                    self.finish(w, n)
                    alive[w, n] = False
            tokens, t = tokens + np.sum(made[0, :, t] != NOBODY, axis=1), t + 1
        assert t > 0, "a call without a step"
        for w, n in zip(*np.nonzero(alive), strict=True):
            one, page, first = self.slots[w][n], int(call.next_page[w, n]), int(begin[w, n])
            assert one is not None
            self.content[w, page] = UNKNOWN
            self.content[w, page, first:t] = one.tokens[one.index - (t - first) :]
            one.pages.append(Rows(page, first, t))
        owners = np.full(shape, NOBODY)
        owners[alive] = made[0, :, t - 1][alive]
        self.drawn, self.steps, self.calls = (
            self.drawn + tokens.sum(), self.steps + t * alive.size, self.calls + 1)  # fmt: skip
        numbers = [made[2].astype(np.float32) + i for i in range(3)]
        out = Drawn(*made, *numbers, None, None, owners, begin, started, tokens, np.int32(t))
        return jax.tree.map(jnp.asarray, out)

    def finish(self, w: int, n: int) -> None:
        one = self.slots[w][n]
        assert one is not None and (one.row, one.sample) not in self.ended, "a response ends twice"
        self.ended[one.row, one.sample] = one.index
        self.slots[w][n] = None
        if all((one.row, sample) in self.ended for sample in range(self.size)):
            (entry,) = (q for q, (row, _, _) in self.prompts[w].items() if row == one.row)
            del self.prompts[w][entry]

    def keep(self, slots, members, kept):
        kept = np.asarray(kept)
        assert kept.shape[1] in self.sizes.slot_counts and len(self.ended) > 0
        for w, own in enumerate(kept.tolist()):
            busy = {n for n, one in enumerate(self.slots[w]) if one}
            assert len({*own}) == len(own) and busy <= {*own}, "a busy slot is removed"
            self.slots[w] = [self.slots[w][n] for n in own]
        return slots, members


def sample_fake(fake: FakeEngine, length: np.ndarray, limits=None, on_group=None):
    """Samples prompts of these lengths, row p + 1 for prompt p; returns (what came, statistics)."""
    sampler = Sampler(fake.engine(), fake.options, tiny.mesh(data=fake.shards))
    row, index = np.arange(1, len(length) + 1, dtype=np.int32), np.arange(length.max())
    tokens = stamp(row[:, None], PROMPT, index)
    tokens = np.where(index < length[:, None], tokens, 0).astype(np.int32)
    batch = PromptBatch(tokens, length.astype(np.int32), row)
    out = sampler(None, batch, jax.random.key(0), 0, on_group, limits)  # type: ignore[arg-type]
    return out, sampler.stats


@given(
    shards=st.integers(1, 3),
    groups=st.integers(1, 10),
    size=st.integers(1, 5),
    slots=st.sampled_from([1, 2, 3, 5, 8, 40, 128]),
    entries=st.sampled_from([None, 1, 2, 7]),
    page=st.sampled_from([1, 2, 4, 64]),
    cache_tokens=st.sampled_from([None, 1, 40, 150]),
    limited=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
@example(1, 10, 4, 40, None, 4, 150, False, 0)  # few pages, and slots are removed
@example(1, 9, 5, 128, None, 2, 40, False, 1)
@settings(max_examples=60)
def test_the_scheduler_asks_for_everything_once(
    shards, groups, size, slots, entries, page, cache_tokens, limited, seed
):
    rng = np.random.default_rng(seed)
    most = int(rng.integers(1, 30))
    lengths = np.clip(np.ceil(rng.lognormal(2, 1, (3, groups, size))), 1, most).astype(int)
    limits = rng.integers(1, most + 3, (groups, size)) if limited else None
    prompt = rng.integers(1, rng.choice([5, 30, 200]), groups)
    options = RolloutSettings(
        size, most, (5,), 0, tiny.FULL, slots, entries, cache_tokens, page=page
    )
    fake = FakeEngine(shards, options, lengths, gathers=bool(seed % 2))
    reported = {}

    def on_group(prompt, rows):
        assert prompt not in reported
        reported[prompt] = rows.response_length[0].copy()

    out, stats = sample_fake(fake, prompt, limits, on_group)
    attempt = np.array([[fake.attempts[p + 1, g] - 1 for g in range(size)] for p in range(groups)])
    expected = np.take_along_axis(lengths, attempt[None] % 3, axis=0)[0]
    expected = expected if limits is None else np.minimum(expected, limits)
    np.testing.assert_array_equal([reported[p] for p in range(groups)], expected)
    np.testing.assert_array_equal(out.response_length, expected)
    kept = np.arange(most) < expected[..., None]
    row, sample = np.arange(1, groups + 1)[:, None, None], np.arange(size)[:, None]
    mark = stamp(row, sample, np.arange(most), attempt[..., None])
    np.testing.assert_array_equal(out.responses, np.where(kept, mark, 0))
    for i, name in enumerate(STATS):
        np.testing.assert_array_equal(getattr(out, name), np.where(kept, mark + i, 0))
    found = stats.tokens, stats.slot_steps, stats.calls, stats.prefill_positions, stats.dropped
    assert found == (fake.drawn, fake.steps, fake.calls, fake.positions, fake.dropped)
    assert stats.dropped == attempt.sum() and stats.tokens >= expected.sum()
    assert stats.dropped or stats.tokens == expected.sum()


def test_no_step_is_run_without_work():
    """Few entries, many slots: a call ends with the last response, however few are left when it begins."""
    lengths = np.tile([1, 1, 1, 9], (1, 16, 1))
    options = RolloutSettings(4, 30, (5,), 0, tiny.FULL, 64, prompt_cache_entries=1)
    out, stats = sample_fake(FakeEngine(1, options, lengths, True), np.ones(16, int))
    np.testing.assert_array_equal(out.response_length, lengths[0])
    assert stats.slot_steps <= 16 * 9 * 64


def test_stragglers_keep_no_slot_waiting():
    """The default number of prompt cache entries against that of complete groups only."""
    lengths = np.ceil(np.random.default_rng(0).lognormal(4, 0.7, (1, 64, 8))).astype(int)

    def utilisation(**options):
        made = RolloutSettings(8, 1000, (5,), 0, tiny.FULL, decode_slots=16, **options)
        _, stats = sample_fake(FakeEngine(1, made, lengths, True), np.full(64, 100))
        assert stats.tokens == lengths.sum() and stats.dropped == 0
        return stats.utilisation

    assert utilisation() >= 0.9
    assert utilisation(prompt_cache_entries=2) < 0.8  # complete groups only: the figure can fall


@pytest.mark.parametrize("page", [2, 64])
def test_steps_of_random_lengths(page):
    """Those of slots that take the next response when they are free, in every size of a page."""
    lengths = np.random.default_rng(7).integers(1, 40, (1, 20, 3))
    options = RolloutSettings(3, 40, (5,), 0, tiny.FULL, decode_slots=5, page=page)
    _, stats = sample_fake(FakeEngine(1, options, lengths, True), np.full(20, 9))
    entries = options.sizes(20, 9).entries
    assert stats.slot_steps == 5 * simulated_steps(lengths[0], 5, entries, page)
