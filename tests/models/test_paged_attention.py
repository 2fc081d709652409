"""Attention over keys in pages against dense attention: ragged tables with holes, many queries; garbage is not read."""

import importlib.util
import json
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rest_jax.distributed import activate
from rest_jax.models.attention import attend_cache
from rest_jax.models.cache import (
    DecodeLayout,
    GatheredKeys,
    LayerCache,
    PagedKeys,
    PageTable,
    Pool,
)
from rest_jax.models.paged_attention import (
    Partial,
    Response,
    attend_part,
    attend_prompts,
    attend_responses,
    gather_pages,
    join,
    list_visits,
    normalise,
)
from rest_jax.planning import topology
from tests import tiny
from tests.conftest import REPOSITORY
from tests.models.rows import assert_close, normal

LAYERS, LAYER, SHARDS, SEQUENCES, SIZE, WIDTH = 3, jnp.int32(1), 2, 5, 4, 8
PAGES = 17


def make_table(seed: int = 0) -> PageTable:
    """Up to 3 pages a sequence, in any order and begun and ended anywhere; one sequence has none, one a single row."""
    rng = np.random.default_rng(seed)
    shape = (SHARDS, SEQUENCES, 3)
    page = np.stack([rng.permutation(PAGES)[: SEQUENCES * 3] for _ in range(SHARDS)])
    begin = rng.integers(0, SIZE, shape)
    end = rng.integers(begin + 1, SIZE + 1)
    count = rng.integers(1, 4, shape[:2])
    count[:, 1] = 0
    begin[:, 2], end[:, 2], count[:, 2] = 3, 4, 1
    end = np.where(np.arange(3) < count[..., None], end, begin)
    return PageTable(*(jnp.asarray(x, jnp.int32) for x in (page.reshape(shape), begin, end)))


def make_pool(heads: int, seed: int = 10) -> Pool:
    shape = (LAYERS, SHARDS, PAGES, heads, SIZE, WIDTH)
    return Pool(normal(seed, *shape), normal(seed + 1, *shape))


def keys_of(pool: Pool, table: PageTable, w: int, b: int) -> list[np.ndarray]:
    """k and v [K n H] of a sequence, in order."""
    rows = [x[w, b] for x in map(np.asarray, table)]
    found = [[np.zeros((pool.k.shape[3], 0, WIDTH), np.float32)] for _ in pool]
    for page, begin, end in zip(*rows, strict=True):
        for layers, into in zip(pool, found, strict=True):
            into.append(np.asarray(layers)[int(LAYER), w, page, :, begin:end])
    return [np.concatenate(x, axis=1) for x in found]


def dense(q, k, v) -> tuple[np.ndarray, np.ndarray]:
    """[K M H] over [K n H] with all scores in float64: (out, log of the total weight)."""
    score = np.einsum("kmh,knh->kmn", np.float64(q), k)
    peak = score.max(axis=-1, initial=-1e30)
    weight = np.exp(score - peak[..., None])
    total = weight.sum(axis=-1)
    out = np.einsum("kmn,knh->kmh", weight, v) / np.where(total > 0, total, 1)[..., None]
    return out, peak + np.log(np.where(total > 0, total, 1))


def each_sequence(attend):
    """What `attend(w, b)` returns, for all sequences."""
    parts = [[attend(w, b) for b in range(SEQUENCES)] for w in range(SHARDS)]
    return jax.tree.map(
        lambda *x: np.stack(x), *(jax.tree.map(lambda *x: np.stack(x), *p) for p in parts)
    )


class Slots(NamedTuple):
    """Where the responses are that ask the prompts: as in a `DecodeLayout`."""

    members: jax.Array
    entry: jax.Array
    member: jax.Array


def make_slots(group: int, seed: int = 30) -> Slots:
    """One slot more than responses, of which each prompt has some or none. The last holds what is left of one whose place another
    has taken, and what is not used of `members` names any slot.
    """
    rng = np.random.default_rng(seed)
    places = np.stack(np.divmod(np.arange(SEQUENCES * group), group), axis=1)
    count = 2 * len(places) // 3
    members = rng.integers(0, count + 1, (SHARDS, SEQUENCES, group))
    own = np.zeros((SHARDS, count + 1, 2), int)
    for w in range(SHARDS):
        own[w, :count] = rng.permutation(places)[:count]
        own[w, count] = own[w, 0]
        for slot, place in enumerate(own[w, :count]):
            members[w, *place] = slot
    return Slots(*(jnp.asarray(x, jnp.int32) for x in (members, own[..., 0], own[..., 1])))


@jax.jit
def prompts(q, pool, table, slots):
    """`attend_prompts`, one data shard after another."""

    def one(w: int):
        pages = jax.tree.map(lambda x: x[:, w : w + 1], pool)
        own, places = jax.tree.map(lambda x: x[w : w + 1], (table, slots))
        visits = list_visits(own)
        layout = DecodeLayout(PagedKeys(visits, visits), jnp.int32(0), **places._asdict())
        return attend_prompts(q[w : w + 1], pages, LAYER, layout)

    return jax.tree.map(lambda *x: jnp.concatenate(x), *map(one, range(SHARDS)))


@jax.jit
def responses(q, pool, table, recent, response):
    """`attend_responses`, one data shard after another."""

    def one(w: int):
        pages, drawn = jax.tree.map(lambda x: x[:, w : w + 1], (pool, response[:2]))
        own, rows, rest = jax.tree.map(lambda x: x[w : w + 1], (table, recent, response[2:]))
        visits = list_visits(own, rows)
        return attend_responses(q[w : w + 1], pages, LAYER, visits, Response(*drawn, *rest))

    return jnp.concatenate([one(w) for w in range(SHARDS)])


@pytest.mark.parametrize(
    ("heads", "repeats", "group"),
    [
        (2, 2, 3),
        *(
            pytest.param(*x, marks=pytest.mark.wide)
            for x in [(2, 1, 1), (1, 4, 8), (1, 26, 5), (3, 3, 2)]
        ),
    ],
)
def test_prompts_equal_dense_attention(heads, repeats, group):
    table, pool, slots = make_table(), make_pool(heads), make_slots(group)
    count = slots.entry.shape[1]
    q = normal(3, SHARDS, count, heads * repeats, WIDTH)
    out, lse = (np.asarray(x) for x in prompts(q, pool, table, slots))
    assert out.dtype == lse.dtype == np.float32
    assert np.all(lse == lse[..., :1])
    for w, n in np.ndindex(SHARDS, count):
        entry = int(slots.entry[w, n])
        if n == count - 1 or entry == 1:  # what is left of one; a prompt without pages
            assert np.all(out[w, n] == 0) and np.all(lse[w, n] < -1e29)
            continue
        by_head = q[w, n].reshape(heads, repeats, WIDTH)
        expected = dense(by_head, *keys_of(pool, table, w, entry))
        found = out[w, n].reshape(by_head.shape), lse[w, n, :, 0].reshape(heads, repeats)
        assert_close(found, expected)


def make_response(heads: int, queries: int):
    """(q [W N A H], rows begin and end of `recent`, Response, keys and values [W N K n H] that its attention to the prompt is
    over). A slot has no recent rows, one no prompt.
    """
    recent = [normal(i, LAYERS, SHARDS, SEQUENCES, heads, SIZE, WIDTH) for i in (20, 21)]
    own = [normal(i, SHARDS, SEQUENCES, heads, WIDTH) for i in (22, 23)]
    begin = jnp.array([[0, 1, 2, 2, 0], [3, 0, 1, 0, 2]])
    end = jnp.array([[4, 3, 4, 2, 0], [4, 1, 2, 3, 2]])
    prompt = [normal(i, SHARDS, SEQUENCES, heads, 5, WIDTH) for i in (24, 25)]
    q = normal(3, SHARDS, SEQUENCES, heads, queries, WIDTH)
    out, lse = each_sequence(lambda w, b: dense(q[w, b], *(x[w, b] for x in prompt)))
    out[:, 4], lse[:, 4] = 0, -1e30
    prompt = [x.at[:, 4].set(jnp.nan) for x in prompt]
    q, out = (jnp.asarray(x, jnp.float32).reshape(SHARDS, SEQUENCES, -1, WIDTH) for x in (q, out))
    lse = jnp.asarray(lse, jnp.float32).reshape(*q.shape[:3], 1)
    lse = jnp.broadcast_to(lse, (*q.shape[:3], 128))
    return q, (begin, end), Response(*recent, *own, out, lse), prompt


def dense_response(q, pool, table, recent, response: Response, prompt) -> np.ndarray:
    """New tokens over prompt, pages, recent rows and themselves, in one softmax."""

    def one(w, b):
        pages = keys_of(pool, table, w, b)
        rows = slice(int(recent[0][w, b]), int(recent[1][w, b]))
        keys = []
        for i, (layers, own) in enumerate(zip(response[:2], response[2:4], strict=True)):
            drawn = np.asarray(layers)[int(LAYER), w, b, :, rows]
            parts = [np.asarray(prompt[i][w, b])] if b != 4 else []
            parts += [pages[i], drawn, np.asarray(own[w, b])[:, None]]
            keys.append(np.concatenate(parts, axis=1))
        by_head = q[w, b].reshape(len(keys[0]), -1, WIDTH)
        return dense(by_head, *keys)[0].reshape(q[w, b].shape)

    return each_sequence(one)


def rounded(tree):
    """In bfloat16."""
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)


@pytest.mark.wide
def test_in_bfloat16_products_are_of_rounded_numbers_and_sums_are_not():
    """Two kv heads with two queries each; prompts and responses, against dense attention to the rounded keys."""
    table, pool, slots = make_table(1), rounded(make_pool(2)), make_slots(2)
    q = rounded(normal(3, SHARDS, slots.entry.shape[1], 4, WIDTH))
    out, _ = prompts(q, pool, table, slots)
    assert out.dtype == jnp.float32
    for w, n in np.ndindex(SHARDS, slots.entry.shape[1] - 1):
        if (entry := int(slots.entry[w, n])) != 1:
            expected = dense(q[w, n].reshape(2, 2, WIDTH), *keys_of(pool, table, w, entry))[0]
            assert_close(out[w, n].reshape(expected.shape), expected, tolerance=1e-2)
    q, recent, response, prompt = make_response(2, 2)
    q, response = rounded(q), Response(*rounded(response[:4]), *response[4:])
    out = responses(q, pool, table, recent, response)
    assert out.dtype == jnp.bfloat16
    expected = dense_response(q, pool, table, recent, response, prompt)
    assert_close(out.astype(jnp.float32), expected, tolerance=2e-2)


@pytest.mark.parametrize(
    ("heads", "repeats"),
    [(2, 2), *(pytest.param(*x, marks=pytest.mark.wide) for x in [(4, 1), (2, 1), (4, 2)])],
)
def test_new_tokens_over_a_mesh(heads, repeats):
    """Of two data shards on four devices each, which share four kv heads and each have both of two; as over gathered pages."""
    table, pool, slots = make_table(), make_pool(heads), make_slots(2)
    count = slots.entry.shape[1]
    q = normal(3, SHARDS, count, heads * repeats, WIDTH)
    own = tuple(normal(i, SHARDS, count, heads, WIDTH) for i in (4, 5))
    recent = [normal(i, LAYERS, SHARDS, count, heads, SIZE, WIDTH) for i in (6, 7)]
    end = jnp.asarray(np.random.default_rng(8).integers(0, SIZE + 1, (SHARDS, count)), jnp.int32)
    nothing = PageTable(*(jnp.zeros((SHARDS, count, 1), jnp.int32),) * 3)

    def by_kernels(q, own, pool, recent):
        drawn = list_visits(nothing, (jnp.zeros_like(end), end))
        layout = DecodeLayout(PagedKeys(list_visits(table), drawn), jnp.int32(0), **slots._asdict())
        return attend_cache(q, own, layout, LayerCache(pool, LAYER, *recent))

    def by_gathering(q, own, pool, recent):
        keys = GatheredKeys(table.rows(SIZE), jnp.arange(SIZE) < end[..., None])
        layout = DecodeLayout(keys, jnp.int32(0), **slots._asdict())
        gathered = Pool(*(gather_pages(x, table)[LAYER] for x in pool))
        return attend_cache(q, own, layout, LayerCache(gathered, None, *(x[LAYER] for x in recent)))

    with activate(tiny.mesh(data=2, tensor=4)):
        found = jax.jit(by_kernels)(q, own, pool, recent)
    expected = jax.jit(by_gathering)(q, own, pool, recent)
    # the last slot is not that of its response any more
    assert_close(found[:, :-1], expected[:, :-1])


@pytest.mark.parametrize(
    ("heads", "queries"),
    [(2, 7), *(pytest.param(*x, marks=pytest.mark.wide) for x in [(1, 1), (3, 2)])],
)
def test_responses_equal_dense_attention(heads, queries):
    table, pool = make_table(1), make_pool(heads)
    q, recent, response, prompt = make_response(heads, queries)
    out = responses(q, pool, table, recent, response)
    assert_close(out, dense_response(q, pool, table, recent, response, prompt))


def assert_same_attention(table: PageTable, pool: Pool, other: Pool) -> None:
    """To prompts and by responses, bit for bit."""
    q, slots = normal(3, SHARDS, 7, 4, WIDTH), make_slots(2)
    both = (prompts(q, pages, table, slots) for pages in (pool, other))
    for a, b in zip(*both, strict=True):
        np.testing.assert_array_equal(a, b)
    q, recent, response, _ = make_response(2, 2)
    np.testing.assert_array_equal(
        responses(q, pool, table, recent, response), responses(q, other, table, recent, response)
    )


def test_pages_that_no_table_names_are_not_read():
    """They may hold anything, as may the rows of the pages of other layers."""
    table, pool = make_table(), make_pool(2)
    named = np.zeros((SHARDS, PAGES), bool)
    for w, b, m in np.ndindex(SHARDS, SEQUENCES, 3):
        if table.end[w, b, m] > table.begin[w, b, m]:
            named[w, table.page[w, b, m]] = True
    assert 0 < named.sum() < named.size
    other = jnp.arange(LAYERS) != LAYER
    hidden = other[:, None, None] | ~jnp.asarray(named)
    spoilt = Pool(*(jnp.where(hidden[..., None, None, None], jnp.nan, x) for x in pool))
    assert_same_attention(table, pool, spoilt)


def test_rows_outside_of_the_range_of_a_page_change_nothing():
    """What another response has left there."""
    table, pool = make_table(), make_pool(2)
    seen = np.zeros((SHARDS, PAGES, SIZE), bool)
    for w, b, m in np.ndindex(SHARDS, SEQUENCES, 3):
        seen[w, table.page[w, b, m], table.begin[w, b, m] : table.end[w, b, m]] = True
    spoilt = Pool(*(jnp.where(jnp.asarray(seen)[:, :, None, :, None], x, 1e30) for x in pool))
    assert_same_attention(table, pool, spoilt)


def test_visits_are_the_pages_in_use_in_order():
    table = PageTable(
        page=jnp.array([[[5, 6], [7, 8], [1, 2]], [[3, 3], [4, 9], [0, 0]]], jnp.int32),
        begin=jnp.array([[[1, 0], [0, 0], [0, 0]], [[0, 0], [0, 0], [0, 0]]], jnp.int32),
        end=jnp.array([[[4, 2], [0, 0], [3, 0]], [[0, 0], [4, 1], [0, 0]]], jnp.int32),
    )
    listed = list_visits(table)
    first, second = (jax.tree.map(lambda x, w=w: x.reshape(2, -1)[w], listed) for w in (0, 1))
    assert (first.count, second.count) == (3, 2)
    fields = ("sequence", "page", "begin", "end")
    found = [
        [getattr(part, name)[: int(part.count[0])].tolist() for name in fields]
        for part in (first, second)
    ]
    assert found == [[[0, 0, 2], [5, 6, 1], [1, 0, 0], [4, 2, 3]], [[1, 1], [4, 9], [0, 0], [4, 1]]]
    assert not np.any(listed.recent)

    rows = jnp.array([[0, 1, 2], [2, 0, 1]], jnp.int32)
    listed = list_visits(table, (rows, rows + 1))
    first, second = (jax.tree.map(lambda x, w=w: x.reshape(2, -1)[w], listed) for w in (0, 1))
    assert (first.count, second.count) == (6, 5)
    assert first.sequence[:6].tolist() == [0, 0, 0, 1, 2, 2]
    assert first.recent[:6].tolist() == [0, 0, 1, 1, 0, 1]
    assert (first.begin[:6].tolist(), first.end[:6].tolist()) == (
        [1, 0, 0, 1, 0, 2],
        [4, 2, 1, 2, 3, 3],
    )
    assert second.recent[:5].tolist() == [1, 0, 0, 1, 1]


def test_gathered_pages_lie_side_by_side():
    table, pool = make_table(), make_pool(2)
    gathered = gather_pages(pool.k, table)
    assert gathered.shape == (LAYERS, SHARDS, SEQUENCES, 2, 3 * SIZE, WIDTH)
    one = gather_pages(tuple(pool.k), table)
    assert len(one) == LAYERS
    for layer, found in enumerate(one):
        np.testing.assert_array_equal(found, gathered[layer])
    for w, b, m in np.ndindex(SHARDS, SEQUENCES, 3):
        part = gathered[:, w, b, :, m * SIZE : (m + 1) * SIZE]
        np.testing.assert_array_equal(part, pool.k[:, w, table.page[w, b, m]])
    # with the rows of the table, as the mask of dense attention
    q, rows = normal(3, SHARDS, SEQUENCES, 2, 3, WIDTH), table.rows(SIZE)[:, :, None, None]
    part = attend_part(q, *(gather_pages(x, table)[LAYER] for x in pool), rows)
    expected = each_sequence(lambda w, b: dense(q[w, b], *keys_of(pool, table, w, b))[0])
    assert_close(normalise(part), expected)
    assert np.all(np.asarray(normalise(part))[:, 1] == 0)


def test_parts_of_the_keys_are_joined_in_one_softmax():
    """Huge scores in one of them, nothing seen in another."""
    q, k, v = (10 * normal(i, 2, n, WIDTH) for i, n in ((0, 3), (1, 9), (2, 9)))
    seen = np.ones((3, 9), bool)
    seen[0, :6], seen[1] = False, False
    seen = jnp.asarray(seen)
    cuts = (slice(0, 4), slice(4, 6), slice(6, 9))
    parts = [attend_part(q, k[:, at], v[:, at], seen[:, at]) for at in cuts]
    found = normalise(join(*parts))
    whole = normalise(attend_part(q, k, v, seen))
    assert_close(found, whole)
    assert isinstance(parts[0], Partial) and np.all(np.asarray(found)[:, 1] == 0)
    np.testing.assert_allclose(found[:, 2], dense(q, k, v)[0][:, 2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"decode_slots": 3}, marks=pytest.mark.slow),
        pytest.param({"decode_slots": 5, "shape": (1, 2, 2)}, marks=pytest.mark.slow),
        # a kv head a device
        pytest.param({"decode_slots": 3, "shape": (1, 1, 4)}, marks=pytest.mark.slow),
        # the place of a prompt is taken by another
        pytest.param({"decode_slots": 3, "prompt_cache_entries": 2}, marks=pytest.mark.slow),
        # slots are removed at the end
        pytest.param({"decode_slots": 32, "prompts": 16}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_rollouts_with_the_kernel_equal_those_of_gathered_pages(options):
    """Responses that begin anywhere in a page, and end."""
    options = dict(options)
    batch = tiny.prompts(options.pop("prompts", 4), 8)
    blocks = tiny.rollout(batch, group=2)
    flash = tiny.rollout(batch, group=2, page=4, attention="flash", **options)
    np.testing.assert_array_equal(flash.responses, blocks.responses)
    for name in ("logp", "entropy", "gini"):
        a, b = getattr(flash, name), getattr(blocks, name)
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.aot
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("name", ["v5e:2x2", "v5p:2x2x1"])
def test_kernels_compile_for_tpus(name, tmp_path):
    """In the shapes of several models, under fsdp 2 x tensor 2: two kernels, each of which says what a visit reads, and
    no gather of queries or results around them.
    """
    command = [sys.executable, "-m", "tests.programs.compiled_decoding", name]
    environment = topology.child_environment(topology.parse(name), tmp_path)
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert len(made) == 5
    for shape, found in made.items():
        assert found == {"pages": [1, 1], "gathers": 0}, shape
