"""Completions to requests that come at any time: continuous batching with a prefix cache, on the devices of one process.

    make_stream(policy, rollout)   -> Stream
    stream.submit(request)         -> its number
    stream.step()                  -> Pieces   prefills what waits, then draws up to a page of tokens for all that run
    stream.cancel(number)

A call of `step` takes in what has been submitted; a request that ends frees its decode slot for the next one. What is drawn
depends on the prompt, `seed` and `sample` alone, up to the rounding of float32 sums in other shapes. `sequences.py` says which
keys and values are kept for later prompts: a dialogue that comes back with a new turn prefills only what is new.
"""

import dataclasses
import hashlib
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rest_jax.config import RolloutConfig
from rest_jax.distributed import activate, num_data_shards, replicated, to_host, to_mesh
from rest_jax.errors import UserError
from rest_jax.models.cache import PageTable
from rest_jax.models.policy import Policy
from rest_jax.rollout.cast import rollout_cast, rollout_decoder
from rest_jax.rollout.engine import (
    DecodeCall,
    DecodeState,
    Drawn,
    Engine,
    PromptRows,
    Requests,
    RolloutSettings,
    Sizes,
    make_engine,
)
from rest_jax.rollout.sampling import RequestSampling
from rest_jax.rollout.sequences import Part, Request, Sequence, SequenceShard
from rest_jax.types import Params

TOP_LOGPROBS = 20  # likeliest words of a token at most
_PAGE = 32  # tokens that a request waits for at most, before others come in and its own go out
_PREFILL_TOKENS = 1024  # of a row of prompts; longer ones take several
_USUAL_TOKENS = (
    2048  # of a prompt and its completion, for which each decode slot has room by default
)
_FEWEST_SLOTS = 2
_SPARE_PAGES = 2  # that a prompt and its completion may begin and end within


@dataclasses.dataclass(frozen=True)
class Piece:
    """What one call drew for one request."""

    request: int
    ids: np.ndarray  # int32 [n]; the last one may be the stop id
    # float32 [n] nats, of the model's own distribution: temperature 1, full support
    logp: np.ndarray
    entropy: np.ndarray  # float32 [n] nats, of the same
    top: tuple[np.ndarray, np.ndarray] | None  # likeliest words, int32 [n k], and their log-probs
    finish: str | None  # None: more comes; "stop": the last id is a stop id; "length"


@dataclasses.dataclass
class StreamStats:
    """Counts since the stream was made; none ever falls."""

    prefilled_tokens: int = 0  # of prompts
    reused_tokens: int = 0  # of prompts that are prefilled: those that were in pages
    tokens: int = 0  # drawn
    slot_steps: int = 0  # decode steps x decode slots
    prefill_calls: int = 0
    calls: int = 0

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts, as far as they are in pages."""
        return self.prefilled_tokens + self.reused_tokens


class Stream:
    """A resource: compiled functions, pages of keys and values, and the requests that have not ended."""

    def __init__(
        self, engine: Engine, settings: RolloutSettings, mesh: Mesh, params: Params, pages: int
    ):
        self.engine, self.settings, self.mesh, self.params = engine, settings, mesh, params
        self.stats = StreamStats()
        self.slot_counts = _slot_counts(settings.decode_slots)
        slots = self.slot_counts[-1]
        self._pages, self._numbers = pages, itertools.count()
        self._shards = [
            SequenceShard(slots, pages, settings.page) for _ in range(num_data_shards(mesh))
        ]
        self._owners: dict[int, tuple[Sequence, SequenceShard]] = {}
        self._state: DecodeState = engine.empty_state(Sizes(slots, slots, pages, 0, 0))
        self._rng, self._step = jax.device_put((jax.random.key(0), jnp.int32(0)), replicated(mesh))

    @property
    def pending(self) -> int:
        """Requests that have not ended."""
        return len(self._owners)

    @property
    def capacity(self) -> int:
        """Tokens that a prompt and its completion may have, wherever pages begin in them."""
        return (self._pages - _SPARE_PAGES) * self.settings.page

    def submit(self, request: Request) -> int:
        """Takes a request; returns its number. ValueError if it is longer than the pages, or empty."""
        shard = max(self._shards, key=lambda s: (s.match(request.ids)[1], -s.pending))
        if not len(request.ids) or request.max_tokens < 1:
            raise ValueError("a request needs a prompt, and one token at least to draw")
        if request.top_logprobs > self.settings.listed:
            raise ValueError(f"{request.top_logprobs} log-probs, at most {self.settings.listed}")
        if shard.pages_needed(request) > self._pages:
            raise ValueError(
                f"prompt + completion {len(request.ids):,} + {request.max_tokens:,} tokens, at most {self.capacity:,} together"
            )
        sequence = Sequence(next(self._numbers), request, request.ids[:0], [])
        shard.waiting.append(sequence)
        self._owners[sequence.number] = sequence, shard
        return sequence.number

    def cancel(self, number: int) -> None:
        """Ends a request before its time; one that has ended is none."""
        if number in self._owners:
            sequence, shard = self._owners.pop(number)
            shard.cancel(sequence)

    def clear(self, params: Params) -> None:
        """Takes other weights; nothing is kept of former prompts. ValueError while requests run."""
        if self._owners:
            raise ValueError(f"{self.pending} requests have not ended")
        self.params = params
        for shard in self._shards:
            shard.clear()

    def step(self) -> list[Piece]:
        """Draws up to a page of tokens for every request that has a decode slot."""
        with activate(self.mesh):
            self._resize()
            while (row := self._next_row()) is not None:
                self._prefill([shard.place(*row) for shard in self._shards], row[1])
            if not any(shard.running or shard.ready for shard in self._shards):
                return []
            return self._decode()

    def _resize(self) -> None:
        """As few decode slots as leave one free, if there are more of them: a free one is needed to add others."""
        pending = max(shard.pending for shard in self._shards)
        count = min((n for n in self.slot_counts if n > pending), default=self.slot_counts[0])
        if count == self._shards[0].num_slots:
            return
        kept = [shard.resize(count) for shard in self._shards]
        slots, entries = (np.array(x, np.int32) for x in zip(*kept, strict=True))
        slots, entries = to_mesh((slots, entries), self.mesh)
        slots, members, length, hidden = self.engine.resize(self._state, slots, entries)
        self._state = dataclasses.replace(
            self._state, slots=slots, members=members, prompt_length=length, prompt_hidden=hidden
        )

    def _next_row(self) -> tuple[int, int | None] | None:
        """Positions of the next rows of prompts, and of each part of them if they continue pages. None: there is none."""
        page = self.settings.page
        found = [part for shard in self._shards if (part := shard.next_part()) is not None]
        if not found:
            return None
        new = [count for held, count in found if not held]
        if new:
            return _PREFILL_TOKENS, None
        size = max(_at_least(-(-count // page), 2, first=1) * page for _, count in found)
        size = min(size, _PREFILL_TOKENS)
        waiting = max(len(shard.waiting) for shard in self._shards)
        parts = _at_least(min(waiting, self._shards[0].num_slots), 4, first=1)
        return size * max(min(parts, _PREFILL_TOKENS // size), 1), size

    def _prefill(self, placed: list[list[Part]], size: int | None) -> None:
        """Runs the parts of prompts that each data shard has placed in its row; `size`: positions of each, of those that continue
        pages.
        """
        page, shards = self.settings.page, len(placed)
        ends = max(part.start + len(part.pages) * page for parts in placed for part in parts)
        if size is None:
            width = min(_at_least(-(-ends // page), 4) * page, _PREFILL_TOKENS)
        else:
            width = size * _at_least(-(-ends // size), 4, first=1)
        tokens = np.full((shards, width), self.settings.pad_id, np.int32)
        until, position = np.zeros_like(tokens), np.zeros_like(tokens)
        pages = np.full((shards, width // page), self._pages, np.int32)
        # an entry out of bounds: there is no such prompt
        entries = np.full_like(pages, self._shards[0].num_slots)
        last, lengths = np.zeros_like(entries), np.ones_like(entries)
        columns = max(len(part.before) for parts in placed for part in parts)
        before = np.zeros(
            (3, shards, width // size if size else 0, _at_least(columns, 2)), np.int32
        )
        for w, parts in enumerate(placed):
            for i, part in enumerate(parts):
                sequence, at = part.sequence, slice(part.start, part.start + part.count)
                tokens[w, at] = sequence.request.ids[part.first : part.first + part.count]
                until[w, at], position[w, at] = at.stop, part.first + np.arange(part.count)
                pages[w, part.start // page :][: len(part.pages)] = part.pages
                if size:
                    before[:, w, i, : len(part.before)] = np.array(part.before).T
                if part.completes:
                    assert sequence.entry is not None
                    entries[w, i], last[w, i] = sequence.entry, at.stop - 1
                    lengths[w, i] = len(sequence.request.ids)
                self.stats.prefilled_tokens += part.count
                self.stats.reused_tokens += part.held
        rows: Any = PromptRows(tokens, until, position, pages, entries, last, lengths)
        prefix = PageTable(*before) if size else None
        rows, prefix = to_mesh((rows, prefix), self.mesh)
        self._state, _ = self.engine.prefill(self.params, self._state, rows, prefix)
        self.stats.prefill_calls += 1

    def _decode(self) -> list[Piece]:
        pages = [shard.next_pages() for shard in self._shards]
        call = to_mesh(self._make_call(pages), self.mesh)
        self._state, drawn = self.engine.decode(
            self.params, self._state, call, self._rng, self._step
        )
        steps = int(drawn.steps)
        self.stats.calls += 1
        self.stats.slot_steps += steps * np.asarray(drawn.running).size
        lists = any(s.request.top_logprobs for s, _ in self._owners.values())
        wanted = drawn._replace(likeliest=drawn.likeliest if lists else None)
        host = jax.tree.map(to_host, wanted)
        pieces: list[Piece] = []
        for w, shard in enumerate(self._shards):
            owners = host.owner[w, :steps]
            for sequence in shard.advance(owners, host.token[w, :steps], pages[w]):
                pieces.append(self._piece(sequence, owners, host, w))
                if pieces[-1].finish is not None:
                    shard.end(sequence)
                    del self._owners[sequence.number]
        return pieces

    def _piece(self, sequence: Sequence, owners: np.ndarray, host: Drawn, shard: int) -> Piece:
        """What a call drew for a sequence, which has a decode slot of it for some steps in a row."""
        at = np.nonzero(owners == sequence.number)
        ids, logp, entropy = (x[shard][at] for x in (host.token, host.logp, host.entropy))
        self.stats.tokens += len(ids)
        request, top = sequence.request, None
        if request.top_logprobs and host.likeliest is not None:
            words, logps = (x[shard][at][:, : request.top_logprobs] for x in host.likeliest)
            top = words, logps
        finish = None
        if int(ids[-1]) in self.settings.stop_ids:
            finish = "stop"
        elif len(sequence.ids) == len(request.ids) + request.max_tokens:
            finish = "length"
        return Piece(sequence.number, ids, logp, entropy, top, finish)

    def _make_call(self, pages: list[dict[int, int]]) -> DecodeCall:
        """What the data shards do in the next call, as arrays."""
        count, shards = self._shards[0].num_slots, len(self._shards)
        queue = np.zeros((5, shards, count), np.int32)
        sampling = RequestSampling.plain((shards, count))
        rows = [[*shard.ready, *shard.running.values()] for shard in self._shards]
        prompt_columns = max((s.prompt_rows for active in rows for s in active), default=0)
        columns = max((len(s.rows) - s.prompt_rows for active in rows for s in active), default=0)
        prompts = np.zeros((3, shards, count, _at_least(prompt_columns, 4)), np.int32)
        responses = np.zeros((3, shards, count, _at_least(columns, 4)), np.int32)
        running = np.zeros((shards, count), bool)
        free = np.full(running.shape, self._pages, np.int32)
        for w, shard in enumerate(self._shards):
            for i, sequence in enumerate(shard.ready):
                request = sequence.request
                assert sequence.entry is not None
                row, limit = _draws_of(request), request.max_tokens
                queue[:, w, i] = sequence.number, sequence.entry, row, 0, limit
                for array, value in zip(
                    sampling,
                    (request.temperature, request.top_p, request.top_logprobs > 0),
                    strict=True,
                ):
                    array[w, i] = value
            for sequence in rows[w]:
                assert sequence.entry is not None
                prompts[:, w, sequence.entry, : sequence.prompt_rows] = np.array(
                    sequence.rows[: sequence.prompt_rows]
                ).T
            for slot, sequence in shard.running.items():
                running[w, slot] = True
                drawn = sequence.rows[sequence.prompt_rows :]
                responses[:, w, slot, : len(drawn)] = np.array(drawn).T
            for slot, page in pages[w].items():
                free[w, slot] = page
        queued = np.array([len(shard.ready) for shard in self._shards], np.int32)
        return DecodeCall(
            Requests(*queue, sampling=sampling),
            queued,
            PageTable(*prompts),
            PageTable(*responses),
            running,
            free,
            np.zeros(shards, np.int32),
        )


def check_capacity(stream: Stream, longest: int, command: str, keys: str) -> None:
    """UserError, in the name of a command, for requests of more tokens than a cache holds; the `keys` are what shortens them."""
    if longest > stream.capacity:
        raise UserError(
            f"{command}: prompt + completion {longest:,} tokens, rollout.cache_tokens holds {stream.capacity:,}; raise it, or "
            f"lower {keys}"
        )


def make_stream(
    policy: Policy, rollout: RolloutConfig, params: Params | None = None, longest: int = 0
) -> Stream:
    """A stream on a policy's rollout mesh, with `rollout.decode_slots` and `rollout.cache_tokens` a data shard; by default of the
    latter it takes a request of `longest` tokens, prompt and completion, however few the slots. `params`: weights from
    `rollout_cast`, in place of the policy's. ValueError on several processes.
    """
    if jax.process_count() > 1:
        raise ValueError("a stream of requests runs on one process")
    settings = RolloutSettings(
        group_size=1,
        max_tokens=rollout.max_response_tokens,
        stop_ids=policy.tokenizer.stop_ids,
        pad_id=policy.tokenizer.pad_id,
        sampling=None,
        decode_slots=rollout.decode_slots,
        page=_PAGE,
        listed=min(TOP_LOGPROBS, policy.config.vocab_size),
    )
    usual = rollout.decode_slots * _USUAL_TOKENS
    tokens = rollout.cache_tokens or max(usual, longest + _SPARE_PAGES * _PAGE)
    engine = make_engine(rollout_decoder(policy), settings, policy.rollout_mesh)
    if params is None:
        params = rollout_cast(policy)(policy.params)
    return Stream(engine, settings, policy.rollout_mesh, params, -(-tokens // _PAGE))


def _slot_counts(slots: int) -> tuple[int, ...]:
    """Decode slots while there is less and less to do, descending. Each is compiled when it is first needed."""
    fewer = max(slots // 4, _FEWEST_SLOTS)
    return (slots, *(_slot_counts(fewer) if fewer < slots else ()))


def _at_least(n: int, factor: int, first: int = 4) -> int:
    """The least of `first`, `first * factor`, .. that is not less: every one is compiled."""
    while first < n:
        first *= factor
    return first


def _draws_of(request: Request) -> int:
    """The row that keys a request's draws: 31 bits of its seed and its number."""
    digest = hashlib.sha256(f"{request.seed}/{request.sample}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
