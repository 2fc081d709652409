"""A stream of requests: what is drawn is the model's, whatever comes beside, before and after, and however little room there is.

The oracle for numbers is one pass of the decoder over prompt and completion; for ids, the request alone in a fresh stream.
"""

import functools

import jax
import numpy as np
import pytest

from rest_jax.config import MeshConfig, ModelConfig, RolloutConfig
from rest_jax.models.attention import prompt_rows
from rest_jax.models.decoder import logits, unstack_layers
from rest_jax.rollout.engine import RolloutSettings, make_engine
from rest_jax.rollout.requests import Piece, Request, Stream, make_stream
from rest_jax.run.load import load_policy
from tests import tiny

PAGE = 16


@functools.cache
def engine(shape: tuple[int, ...] = (1, 1, 1), layers: str = "unroll", slots: int = 2, **options):
    settings = RolloutSettings(
        1, 64, (tiny.STOP,), tiny.PAD, None, decode_slots=slots, page=PAGE, listed=5
    )
    where = tiny.mesh(*shape)
    return make_engine(tiny.decoder(layers=layers, **options), settings, where), settings, where


def stream(pages: int = 200, **options) -> Stream:
    made, settings, mesh = engine(**options)
    params = tiny.params(options.get("experts", 0))
    if options.get("layers", "unroll") == "unroll":
        params = unstack_layers(params)
    return Stream(made, settings, mesh, params, pages)


def prompt(rng: np.random.Generator, length: int) -> np.ndarray:
    return rng.integers(6, tiny.VOCAB, length).astype(np.int32)


def collect(running: Stream, pieces: dict[int, list[Piece]] | None = None) -> dict[int, Piece]:
    """All steps until nothing is pending: the pieces of every request as one."""
    found = pieces if pieces is not None else {}
    while running.pending:
        for piece in running.step():
            found.setdefault(piece.request, []).append(piece)
    return {number: as_one(parts) for number, parts in found.items()}


def as_one(parts: list[Piece]) -> Piece:
    assert all(part.finish is None for part in parts[:-1]) and parts[-1].finish is not None
    ids, logp, entropy = (
        np.concatenate([getattr(p, name) for p in parts]) for name in ("ids", "logp", "entropy")
    )
    tops = [part.top for part in parts if part.top is not None]
    words, logps = zip(*tops, strict=True) if tops else ((), ())
    top = (np.concatenate(words), np.concatenate(logps)) if tops else None
    return Piece(parts[0].request, ids, logp, entropy, top, parts[-1].finish)


def alone(request: Request, **options) -> Piece:
    """What a request draws in a stream of its own."""
    fresh = stream(**options)
    fresh.submit(request)
    (found,) = collect(fresh).values()
    return found


def whole(tokens: np.ndarray) -> jax.Array:
    """Hidden states of one pass."""
    padded = np.zeros((1, 256), np.int32)
    padded[0, : len(tokens)] = tokens
    return _pass(tiny.params(), padded, len(tokens))[0, : len(tokens)]


@jax.jit
def _pass(params, tokens, length):
    layout, positions = prompt_rows(tokens, length[None])
    return tiny.decoder().apply({"params": params}, tokens, positions, layout)[0]


def check_numbers(request: Request, found: Piece) -> None:
    """Log-probs, entropies and likeliest words against one pass over prompt and completion."""
    hidden = whole(np.concatenate([request.ids, found.ids]))
    first = len(request.ids) - 1
    scores = logits(tiny.params(), tiny.decoder().cfg, hidden[first:-1])
    logp = np.asarray(jax.nn.log_softmax(scores))
    steps = np.arange(len(found.ids))
    np.testing.assert_allclose(found.logp, logp[steps, found.ids], rtol=1e-4, atol=1e-5)
    entropy = -np.sum(np.exp(logp) * logp, axis=-1)
    np.testing.assert_allclose(found.entropy, entropy, rtol=1e-4, atol=1e-5)
    if request.temperature == 0:
        np.testing.assert_array_equal(found.ids, logp.argmax(-1))
    if request.top_logprobs:
        assert found.top is not None
        k = request.top_logprobs
        best = np.argsort(-logp, axis=-1, kind="stable")[:, :k]
        np.testing.assert_array_equal(found.top[0], best)
        expected = np.take_along_axis(logp, best, axis=-1)
        np.testing.assert_allclose(found.top[1], expected, rtol=1e-4, atol=1e-5)
    else:
        assert found.top is None


def requests(count: int, seed: int = 0) -> list[Request]:
    """Ragged prompts, some of which begin alike, with every kind of sampling."""
    rng = np.random.default_rng(seed)
    stem, made = prompt(rng, 11), []
    for i in range(count):
        ids = prompt(rng, int(rng.integers(1, 30)))
        if i % 3 == 0:
            ids = np.concatenate([stem[: int(rng.integers(1, 12))], ids])
        made.append(
            Request(
                ids,
                max_tokens=int(rng.integers(1, 20)),
                temperature=float(rng.choice([0.0, 0.7, 1.0])),
                top_p=float(rng.choice([0.5, 1.0])),
                seed=int(rng.integers(2**40)),
                sample=i % 2,
                top_logprobs=int(rng.choice([0, 3])),
            )
        )
    return made


def same(found: Piece, expected: Piece) -> None:
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_allclose(found.logp, expected.logp, rtol=1e-4, atol=1e-5)
    assert found.finish == expected.finish


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"pages": 7}, marks=pytest.mark.slow),  # often one at a time
        pytest.param({"layers": "scan"}, marks=pytest.mark.slow),
        pytest.param({"shape": (2, 1, 1)}, marks=pytest.mark.slow),
        pytest.param({"shape": (2, 1, 2), "layers": "scan"}, marks=pytest.mark.slow),
        pytest.param({"slots": 8}, marks=pytest.mark.slow),  # fewer and more of them
    ],
    ids=str,
)
def test_requests_draw_what_they_draw_alone(options):
    asked = requests(17)
    rng = np.random.default_rng(1)
    running, pieces, numbers = stream(**options), {}, {}
    for request in asked:
        numbers[running.submit(request)] = request
        for _ in range(rng.integers(0, 3)):
            for piece in running.step():
                pieces.setdefault(piece.request, []).append(piece)
    for number, found in collect(running, pieces).items():
        check_numbers(numbers[number], found)
        if not options and number % 4 == 0:
            same(found, alone(numbers[number]))
    assert len(pieces) == len(asked)
    assert running.stats.tokens == sum(len(p.ids) for parts in pieces.values() for p in parts)


def test_a_dialogue_prefills_only_what_is_new():
    rng = np.random.default_rng(2)
    kept, ids = stream(), prompt(rng, 21)
    total, new = 0, ids
    for turn in range(5):
        request = Request(ids, 7, seed=turn)
        total += len(ids)
        before = kept.stats.prefilled_tokens
        number = kept.submit(request)
        found = collect(kept)[number]
        same(found, alone(request))
        check_numbers(request, found)
        # the new turn and the last token drawn, at most
        assert kept.stats.prefilled_tokens - before <= len(new) + 1
        new = prompt(rng, int(rng.integers(1, 9)))
        ids = np.concatenate([ids, found.ids, new])
    assert kept.stats.prompt_tokens == total
    assert kept.stats.reused_tokens > 0.6 * total


@pytest.mark.parametrize("length", [1, PAGE, PAGE + 1])
def test_what_has_room_is_taken(length):
    running = stream(pages=8)
    ids = prompt(np.random.default_rng(4), length)
    running.submit(Request(ids, running.capacity - length))
    with pytest.raises(ValueError, match=f"at most {running.capacity} together"):
        running.submit(Request(ids, running.capacity + 3 * PAGE))


@pytest.mark.wide
def test_a_dialogue_that_has_room_ends_however_its_turns_fill_the_pages():
    """Turns that leave every page partly filled: what is held of them takes more pages than the prompt needs."""
    rng = np.random.default_rng(0)
    running = stream(pages=20)
    ids, waits = prompt(rng, 18), prompt(rng, 5)
    turns = 0
    while len(ids) + 18 <= running.capacity:
        numbers = [
            running.submit(Request(asked, n, seed=turns)) for asked, n in ((ids, 18), (waits, 3))
        ]
        found: dict[int, list[Piece]] = {}
        for _ in range(20):
            for piece in running.step():
                found.setdefault(piece.request, []).append(piece)
        assert not running.pending
        answer = as_one(found[numbers[0]])
        same(answer, alone(Request(ids, 18, seed=turns)))
        ids = np.concatenate([ids, answer.ids, prompt(rng, 18)])
        turns += 1
    assert turns > 5
    assert running.stats.reused_tokens > 0.3 * running.stats.prompt_tokens


def test_completions_of_one_prompt_share_its_pages():
    ids = prompt(np.random.default_rng(3), 40)
    running = stream()
    asked = [Request(ids, 6, sample=i) for i in range(6)]
    numbers = [running.submit(request) for request in asked]
    found = collect(running)
    assert running.stats.prefilled_tokens == len(ids) + 5
    assert len({tuple(found[n].ids.tolist()) for n in numbers}) > 3
    for number, request in zip(numbers, asked, strict=True):
        same(found[number], alone(request))


def test_each_part_of_a_row_reads_its_own_pages_alone():
    rng = np.random.default_rng(5)
    stem, columns = prompt(rng, 3 * PAGE), []
    running = stream()
    prefill = running.engine.prefill

    def counted(params, state, rows, prefix):
        columns.append(0 if prefix is None else prefix.page.shape[-1])
        return prefill(params, state, rows, prefix)

    running.engine = running.engine._replace(prefill=counted)
    asked = [Request(np.concatenate([stem, prompt(rng, n)]), 5, temperature=0) for n in (4, 9, 13)]
    numbers = [running.submit(asked[0])]
    found = collect(running)
    numbers += map(running.submit, asked[1:])
    found |= collect(running)
    assert columns == [0, 4]  # for three pages
    for number, request in zip(numbers, asked, strict=True):
        check_numbers(request, found[number])


def test_a_long_prompt_takes_several_rows(monkeypatch):
    monkeypatch.setattr("rest_jax.rollout.requests._PREFILL_TOKENS", 64)
    rng = np.random.default_rng(4)
    running = stream()
    asked = [Request(prompt(rng, n), 5, temperature=0) for n in (161, 3, 100)]
    numbers = {running.submit(request): request for request in asked}
    for number, found in collect(running).items():
        check_numbers(numbers[number], found)
    assert running.stats.prefill_calls >= 5


def test_a_cancelled_request_frees_its_place_and_changes_nothing():
    rng = np.random.default_rng(5)
    running = stream()
    long = [running.submit(Request(prompt(rng, 9), 60, seed=i)) for i in range(2)]
    waits = Request(prompt(rng, 7), 8)
    last = running.submit(waits)
    pieces: dict[int, list[Piece]] = {}
    running.step()
    for number in (*long, long[0], 12345):
        running.cancel(number)
    assert running.pending == 1
    counted = running.stats.prompt_tokens
    found = collect(running, pieces)
    assert found.keys() == {last}
    # what has left was prefilled, and a count never falls
    assert counted == 18 and running.stats.prompt_tokens == counted + len(waits.ids)
    same(found[last], alone(waits))
    later = Request(prompt(rng, 12), 8)
    number = running.submit(later)
    same(collect(running)[number], alone(later))


def test_pages_are_neither_lost_nor_held_twice():
    rng = np.random.default_rng(6)
    running = stream(pages=20)
    for round_ in range(6):
        numbers = [running.submit(request) for request in requests(9, seed=round_)]
        for _ in range(rng.integers(1, 4)):
            running.step()
        for number in rng.permutation(numbers)[:4]:
            running.cancel(int(number))
        while running.pending:
            running.step()
        (shard,) = running._shards
        assert not running.pending and len(shard.free_entries) == shard.num_slots
        held = np.zeros(20, int)
        for sequence in shard.kept.values():
            assert sum(end - begin for _, begin, end in sequence.rows) == len(sequence.ids)
            for rows in sequence.rows:
                held[rows.page] += 1
        np.testing.assert_array_equal(held, shard.holders)
        assert sorted(shard.free_pages) == np.flatnonzero(held == 0).tolist()


def test_other_weights_forget_former_prompts():
    ids = prompt(np.random.default_rng(7), 20)
    running = stream()
    running.submit(Request(ids, 5))
    with pytest.raises(ValueError, match="1 requests have not ended"):
        running.clear(running.params)
    collect(running)
    running.clear(jax.tree.map(lambda x: 1.1 * x, running.params))
    number = running.submit(Request(ids, 5, temperature=0))
    found = collect(running)[number]
    assert running.stats.reused_tokens == 0
    fresh = stream()
    fresh.clear(running.params)
    fresh.submit(Request(ids, 5, temperature=0))
    same(found, collect(fresh)[0])


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (Request(np.zeros(0, np.int32), 5), "needs a prompt"),
        (Request(np.ones(3, np.int32), 0), "one token at least"),
        (Request(np.ones(80, np.int32), 20), r"80 \+ 20 tokens, at most 64 together"),
        (Request(np.ones(3, np.int32), 5, top_logprobs=6), "at most 5"),
    ],
    ids=["empty", "nothing to draw", "too long", "too many log-probs"],
)
def test_requests_that_cannot_be_taken(request_, reason):
    running = stream(pages=6)
    with pytest.raises(ValueError, match=reason):
        running.submit(request_)
    assert not running.pending


def test_the_longest_request_has_room_however_few_the_slots(model):
    policy = load_policy(ModelConfig(source=str(model)), MeshConfig(fsdp=-1))
    few = RolloutConfig(decode_slots=2)
    assert make_stream(policy, few).capacity == 2 * 2048 - 64
    assert make_stream(policy, few, longest=9001).capacity >= 9001
    assert make_stream(policy, few, longest=100).capacity == 2 * 2048 - 64
    given = few.model_copy(update={"cache_tokens": 640})
    # what is asked for is taken
    assert make_stream(policy, given, longest=9001).capacity == 640 - 64
