"""Book-keeping of a data shard in a stream of requests: which sequence is in which decode slot, and which pages hold its tokens.

A sequence is a prompt with what has been drawn for it. Its keys and values lie in rows of pages; pages are shared: a sequence
whose prompt begins with the tokens of another one takes that one's pages over, as far as they agree (vLLM's automatic prefix
caching, here token by token). What has ended is kept until its pages are needed, the one used last the longest.

A sequence is admitted when the pool has room for it at its longest beside all others that run, so that none is ever dropped.
Host code without jax.
"""

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from rest_jax.rollout.engine import NOBODY
from rest_jax.rollout.shard import Rows

_LOOK_AHEAD = 4  # times the decode slots: prompts that are looked at for a row


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt to complete. `seed` and `sample` decide the draws, whatever else is sampled."""

    ids: np.ndarray  # int32 [T]
    max_tokens: int
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    seed: int = 0
    sample: int = 0  # number among the completions with one seed
    top_logprobs: int = 0  # likeliest words that are listed with every token


@dataclasses.dataclass(eq=False)
class Sequence:
    """A request with what is known of its tokens."""

    number: int
    request: Request
    ids: np.ndarray  # int32: those whose keys and values are in pages, in order
    rows: list[Rows]  # where they are
    prompt_rows: int = 0  # how many of `rows` are the prompt's
    entry: int | None = None  # of the prompt cache, once it is admitted
    pages_left: int = 0  # that it may still ask for

    @property
    def prompt_left(self) -> int:
        """Tokens of the prompt that are not in pages."""
        return max(len(self.request.ids) - len(self.ids), 0)


class Part(NamedTuple):
    """Tokens of a prompt in a row to prefill."""

    sequence: Sequence
    start: int  # position in the row
    first: int  # position in the prompt
    count: int
    held: int  # tokens before, if it is the first part: others had them in pages
    before: list[Rows]  # what they continue
    pages: list[int]  # where they go

    @property
    def completes(self) -> bool:
        """Whether the prompt is in pages now."""
        return self.first + self.count == len(self.sequence.request.ids)


class SequenceShard:
    """The sequences of one data shard. There are as many prompt cache entries as decode slots."""

    def __init__(self, slots: int, pages: int, page: int):
        self.num_slots, self.num_pages, self.page = slots, pages, page
        self.waiting: list[Sequence] = []  # their prompts are not in pages
        self.ready: list[Sequence] = []  # their prompts are
        self.running: dict[int, Sequence] = {}  # by decode slot
        self.kept: dict[int, Sequence] = {}  # by number: ended; the one used last is the last
        self.free_entries = list(range(slots))[::-1]
        self.free_pages = list(range(pages))[::-1]
        self.holders = np.zeros(pages, np.int32)  # of a page: rows of sequences in it

    @property
    def pending(self) -> int:
        """Sequences that have not ended."""
        return len(self.waiting) + len(self.ready) + len(self.running)

    def pages_needed(self, request: Request, held: int = 0) -> int:
        """For the prompt's tokens beyond `held` and a response at its longest, which begins anywhere in its first page."""
        prompt = -(-(len(request.ids) - held) // self.page)
        return prompt + -(-request.max_tokens // self.page) + 1

    def match(self, ids: np.ndarray, row: Iterable[Part] = ()) -> tuple[Sequence | None, int]:
        """The sequence that holds the most of a prompt's first tokens, and how many: a page of them at least, and not
        the last one, whose state is needed. What is in `row` is not in pages yet.
        """
        best, most = None, 0
        before = {part.sequence.number: part.first for part in row}
        for sequence in [*self.kept.values(), *self.running.values(), *self.ready, *self.waiting]:
            held = before.get(sequence.number, len(sequence.ids))
            count = min(common(sequence.ids[:held], ids), len(ids) - 1)
            if count > most:
                best, most = sequence, count
        return (best, most) if most >= self.page else (None, 0)

    def next_part(self) -> tuple[bool, int] | None:
        """Of the first prompt that waits: whether some of it is in pages, and how many tokens are not. None: nothing waits, or
        there is no room for it.
        """
        if not self.waiting:
            return None
        sequence = self.waiting[0]
        held = len(sequence.ids)
        if sequence.entry is None:
            donor, held = self._beginning(sequence)
            if not self._has_room(sequence, donor, held):
                return None
        return held > 0, len(sequence.request.ids) - held

    def place(self, width: int, size: int | None) -> list[Part]:
        """Takes tokens of prompts that wait into a row of `width` positions, in their order, while there is room: of prompts of
        which no token is in pages, or, with `size`, of others, into parts of that many positions.
        """
        parts: list[Part] = []
        used = 0
        for sequence in self.waiting[: _LOOK_AHEAD * self.num_slots]:
            if used == width:
                break
            ids, held = sequence.request.ids, 0
            if sequence.entry is None:
                donor, held = self._beginning(sequence, parts)
                beside = (common(part.sequence.request.ids, ids) for part in parts)
                if max(beside, default=0) >= held + self.page:
                    continue  # soon there is more of it in pages
                if (held > 0) != (size is not None):
                    continue
                if not self._has_room(sequence, donor, held):
                    break
                self._admit(sequence, donor, held)
            elif size is None:
                continue
            part = self._part(sequence, used, size or width - used, held)
            parts.append(part)
            used += size or len(part.pages) * self.page
            if part.completes:
                self.waiting.remove(sequence)
                self.ready.append(sequence)
        return parts

    def _beginning(
        self, sequence: Sequence, row: Iterable[Part] = ()
    ) -> tuple[Sequence | None, int]:
        """`match`; nothing for the first that waits, where it has room in that way alone.

        Turns leave pages that are partly filled: what is held of a long dialogue may take more of them than its tokens need.
        """
        donor, held = self.match(sequence.request.ids, row)
        if (
            held
            and sequence is self.waiting[0]
            and not self._has_room(sequence, donor, held)
            and self._has_room(sequence, None, 0)
        ):
            return None, 0
        return donor, held

    def _has_room(self, sequence: Sequence, donor: Sequence | None, held: int) -> bool:
        """An entry, and pages for all that a sequence may need."""
        taken = _first_rows(donor.rows, held) if donor is not None else []
        waiting = [s for s in self.waiting if s.entry is not None]
        active = [*self.running.values(), *self.ready, *waiting]
        pages = {rows.page for other in active for rows in other.rows}
        pages |= {rows.page for rows in taken}
        needed = self.pages_needed(sequence.request, held) + sum(s.pages_left for s in active)
        return bool(self.free_entries) and len(pages) + needed <= self.num_pages

    def _admit(self, sequence: Sequence, donor: Sequence | None, held: int) -> None:
        """Gives a sequence an entry, and what others hold of its prompt."""
        sequence.entry = self.free_entries.pop()
        sequence.pages_left = self.pages_needed(sequence.request, held)
        sequence.ids = sequence.request.ids[:held]
        sequence.rows = _first_rows(donor.rows, held) if donor is not None else []
        for rows in sequence.rows:
            self.holders[rows.page] += 1
        if donor is not None and donor.number in self.kept:
            self.kept[donor.number] = self.kept.pop(donor.number)

    def _part(self, sequence: Sequence, start: int, room: int, held: int) -> Part:
        """Puts as much of a prompt as there is room for into new pages."""
        first, before = len(sequence.ids), list(sequence.rows)
        count = min(sequence.prompt_left, room)
        pages = [self._take_page(sequence) for _ in range(-(-count // self.page))]
        for i, page in enumerate(pages):
            self._hold(sequence, Rows(page, 0, min(count - i * self.page, self.page)))
        sequence.ids = sequence.request.ids[: first + count]
        sequence.prompt_rows = len(sequence.rows)
        return Part(sequence, start, first, count, held, before, pages)

    def next_pages(self) -> dict[int, int]:
        """By decode slot, the page that takes what it draws in the next call: of those that run, and of those that may start."""
        idle = [n for n in range(self.num_slots) if n not in self.running]
        slots = [*sorted(self.running), *idle[: len(self.ready)]]
        return {slot: self._free_page() for slot in slots}

    def advance(
        self, owners: np.ndarray, tokens: np.ndarray, pages: dict[int, int]
    ) -> list[Sequence]:
        """After a call that drew `tokens [steps N]` for `owners [steps N]`: all sequences for which it drew, in order of slots.
        Those that have ended are still in no list; `end` keeps them.
        """
        known = {s.number: s for s in [*self.ready, *self.running.values()]}
        drew: list[Sequence] = []
        self.running = {}
        for slot, page in pages.items():
            column = owners[:, slot]
            for number in dict.fromkeys(column[column != NOBODY].tolist()):
                sequence = known[number]
                (steps,) = np.nonzero(column == number)
                begin, end = int(steps[0]), int(steps[-1]) + 1
                self._hold(sequence, Rows(page, begin, end))
                sequence.pages_left = max(sequence.pages_left - 1, 0)
                sequence.ids = np.concatenate([sequence.ids, tokens[begin:end, slot]])
                drew.append(sequence)
                self.running[slot] = sequence
            if not self.holders[page]:
                self.free_pages.append(page)
        started = [s for s in drew if s in self.ready]
        self.ready = [s for s in self.ready if s not in started]
        return drew

    def end(self, sequence: Sequence) -> None:
        """Keeps an ended sequence for prompts that begin with it, in place of those that are its beginning."""
        for rows in sequence.rows:
            self.holders[rows.page] += 1
        self.cancel(sequence)
        for other in list(self.kept.values()):
            if common(other.ids, sequence.ids) == len(other.ids):
                self._forget(other)
        self.kept[sequence.number] = sequence

    def cancel(self, sequence: Sequence) -> None:
        """Takes a sequence out of all lists; its pages are free if nobody else holds them."""
        self.waiting = [s for s in self.waiting if s is not sequence]
        self.ready = [s for s in self.ready if s is not sequence]
        self.running = {n: s for n, s in self.running.items() if s is not sequence}
        if sequence.entry is not None:
            self.free_entries.append(sequence.entry)
            sequence.entry = None
            self._release(sequence)

    def clear(self) -> None:
        """Forgets what has ended."""
        for sequence in list(self.kept.values()):
            self._forget(sequence)

    def resize(self, count: int) -> tuple[list[int], list[int]]:
        """Changes to `count` decode slots and prompt cache entries; returns the old number of each. More of them are copies of
        one that is free.
        """
        free = [n for n in range(self.num_slots) if n not in self.running]
        slots = [*sorted(self.running), *free, *free[:1] * count][:count]
        self.running = {slots.index(old): sequence for old, sequence in self.running.items()}
        free = sorted(self.free_entries)
        active = [
            s for s in [*self.waiting, *self.ready, *self.running.values()] if s.entry is not None
        ]
        entries = [*(s.entry for s in active if s.entry is not None), *free, *free[:1] * count][
            :count
        ]
        for number, sequence in enumerate(active):
            sequence.entry = number
        self.free_entries = list(range(len(active), count))[::-1]
        self.num_slots = count
        return slots, entries

    def _forget(self, sequence: Sequence) -> None:
        del self.kept[sequence.number]
        self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        for rows in sequence.rows:
            self.holders[rows.page] -= 1
            if not self.holders[rows.page]:
                self.free_pages.append(rows.page)

    def _hold(self, sequence: Sequence, rows: Rows) -> None:
        sequence.rows.append(rows)
        self.holders[rows.page] += 1

    def _take_page(self, sequence: Sequence) -> int:
        sequence.pages_left -= 1
        return self._free_page()

    def _free_page(self) -> int:
        """A page that nobody holds. What has ended makes room; admission sees to it that there is enough of it."""
        while not self.free_pages:
            self._forget(next(iter(self.kept.values())))
        return self.free_pages.pop()


def common(a: np.ndarray, b: np.ndarray) -> int:
    """How many of their first elements are equal."""
    size = min(len(a), len(b))
    differ = np.flatnonzero(a[:size] != b[:size])
    return int(differ[0]) if len(differ) else size


def _first_rows(rows: list[Rows], count: int) -> list[Rows]:
    """Where the first `count` tokens are."""
    taken = []
    for page, begin, end in rows:
        if not count:
            break
        taken.append(Rows(page, begin, min(end, begin + count)))
        count -= taken[-1].end - begin
    return taken
