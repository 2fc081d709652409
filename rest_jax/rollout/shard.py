"""Book-keeping of a data shard in a rollout: its prompts, responses and pages. Host code that every process runs alike."""

import collections
import dataclasses
from typing import NamedTuple

import numpy as np

from rest_jax.rollout.engine import NOBODY, RolloutSettings, Sizes


class Rows(NamedTuple):
    """Rows begin <= row < end of a page."""

    page: int
    begin: int
    end: int


class Prompt(NamedTuple):
    """A prompt in the cache, with its pages."""

    group: int
    pages: list[int]


class Placed(NamedTuple):
    """A prompt in a row to prefill."""

    group: int
    entry: int
    start: int  # position in the row


class Response(NamedTuple):
    """A response to sample: number `sample` of a group, whose prompt is in a prompt cache entry."""

    group: int
    sample: int
    entry: int


@dataclasses.dataclass
class Running:
    """A response in a decode slot, with what it has drawn in former calls."""

    response: Response
    pages: list[Rows]


class Shard:
    """Book-keeping of one data shard: which group is in which prompt cache entry, which response in which decode slot, and who
    has which page.
    """

    def __init__(
        self, groups: list[int], length: np.ndarray, settings: RolloutSettings, sizes: Sizes
    ):
        self.waiting = collections.deque(groups)
        self.length, self.group_size, self.page = length, settings.group_size, settings.page
        self.sizes, self.num_slots = sizes, sizes.slots
        self.entries: list[Prompt | None] = [None] * sizes.entries
        self.unstarted: list[Response] = []  # of cached prompts, first entry first
        self.running: dict[int, Running] = {}  # by decode slot
        self.free_pages = list(range(sizes.pages))[::-1]
        self.left = collections.Counter[int]()  # responses of a cached group that have not ended
        self.expected = sizes.slots  # responses that the next call may start

    @property
    def nothing_waits(self) -> bool:
        """Whether every response of every prompt has been started."""
        return not self.waiting and not self.unstarted

    @property
    def wants_prompts(self) -> bool:
        """Whether slots might idle for want of prompts, and there is room for the next."""
        few = len(self.unstarted) < self.expected
        return few and bool(self.waiting) and self._has_room(self._pages_of(self.waiting[0]))

    def place_prompts(self, width: int) -> list[Placed]:
        """Takes prompts that wait into a row of `width` positions, in their order, while there is room."""
        placed: list[Placed] = []
        used = 0
        for group in list(self.waiting):
            count = self._pages_of(group)
            if used + count * self.page > width:
                continue
            if not self._has_room(count):
                break
            entry = self.entries.index(None)
            self.entries[entry] = Prompt(group, [self.free_pages.pop() for _ in range(count)])
            self.waiting.remove(group)
            self.left[group] = self.group_size
            self.unstarted += [Response(group, sample, entry) for sample in range(self.group_size)]
            placed.append(Placed(group, entry, used))
            used += count * self.page
        if placed:
            self.unstarted.sort(key=lambda one: one.entry)
        return placed

    def _pages_of(self, group: int) -> int:
        return -(-int(self.length[group]) // self.page)

    def _has_room(self, count: int) -> bool:
        """For a prompt of so many pages: an entry, and pages. One response at its longest always finds room beside the prompts;
        while others run, every slot can continue for a call.
        """
        if None not in self.entries:
            return False
        prompts = sum(len(prompt.pages) for prompt in self.entries if prompt is not None)
        if prompts + count > self.sizes.pages - self.sizes.response_pages:
            return False
        return len(self.free_pages) - count >= (self.num_slots if self.running else 1)

    def drop_youngest(self) -> list[Response]:
        """Drops responses until the others can continue for a call; returns them. They wait again."""
        dropped = []
        while len(self.running) > len(self.free_pages):
            slot = min(self.running, key=lambda n: (len(self.running[n].pages), -n))
            running = self.running.pop(slot)
            self.free_pages += [rows.page for rows in running.pages]
            self.unstarted.insert(0, running.response)
            dropped.append(running.response)
        return dropped

    def next_pages(self) -> dict[int, int]:
        """By decode slot, the page that takes what it draws in the next call: of those that run, and of so many others that they
        may continue for another call.
        """
        idle = [n for n in range(self.num_slots) if n not in self.running]
        spare = (len(self.free_pages) - len(self.running)) // 2
        slots = [*sorted(self.running), *idle[: max(spare, not self.running)]]
        return dict(zip(slots, reversed(self.free_pages), strict=False))

    def advance(self, call: "CallResult") -> list[int]:
        """After a call: moves on what it started, drew and ended. Returns the groups that are complete now."""
        started, self.unstarted = self.unstarted[: call.started], self.unstarted[call.started :]
        self.expected = min(self.num_slots, 2 * call.started + 1)
        by_number = {self.number(one): one for one in started}
        by_number |= {self.number(one.response): one.response for one in self.running.values()}
        before, self.running = self.running, {}
        used = set()
        for slot, owner in enumerate(call.running.tolist()):
            if owner == NOBODY:
                continue
            same = slot in before and self.number(before[slot].response) == owner
            earlier = before.pop(slot).pages if same else []
            page = call.next_pages[slot]
            rows = Rows(page, int(call.begin[slot]), call.steps)
            self.running[slot] = Running(by_number.pop(owner), [*earlier, rows])
            used.add(page)
        ended = [rows.page for running in before.values() for rows in running.pages]
        self.free_pages = [page for page in self.free_pages if page not in used] + ended
        complete = []
        for response in by_number.values():
            self.left[response.group] -= 1
            if not self.left[response.group]:
                complete.append(response.group)
                prompt = self.entries[response.entry]
                assert prompt is not None
                self.free_pages += prompt.pages
                self.entries[response.entry] = None
        return complete

    def number(self, response: Response) -> int:
        """Of a response, among those of all groups."""
        return response.group * self.group_size + response.sample

    def keep(self, count: int) -> list[int]:
        """Reduces to `count` decode slots, busy ones first; returns their old numbers."""
        free = (n for n in range(self.num_slots) if n not in self.running)
        kept = [*sorted(self.running), *free][:count]
        self.running = {
            new: self.running[old] for new, old in enumerate(kept) if old in self.running
        }
        self.num_slots = count
        return kept


class CallResult(NamedTuple):
    """Of a call of `decode`, what one shard has to know."""

    running: np.ndarray  # [N] owners after it
    begin: np.ndarray  # [N]
    started: int
    steps: int
    next_pages: dict[int, int]
