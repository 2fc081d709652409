"""The rollout on the host: which lane draws what, so that none idles while work is left (continuous batching).

    Sampler(engine, settings, mesh)(params, prompts, rng, step, on_group) -> RolloutBatch (NumPy)

Prompts wait, longest first. A way (part of the batch axes) takes the next prompt when it has lanes to spare; its G responses
start as lanes become free, each lane going on with another response as soon as one ends. `on_group(p, rows)` is called when
the G responses of prompt p are complete, with its rows, before the next tokens are drawn. At the end, lanes that have
nothing left are cut away. Caches are as wide as the longest prompt and response in them, in few sizes.

With many processes each one follows all ways (lengths and flags are global) and feeds its own: all make the same calls.
"""

import collections
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rest_jax.config import RolloutConfig
from rest_jax.distributed import gather, to_host, to_mesh
from rest_jax.models.decoder import Decoder, param_shardings
from rest_jax.models.load import Policy
from rest_jax.rl.packing import bucket
from rest_jax.rollout.engine import (
    CHUNK,
    Drawn,
    Engine,
    NewRequests,
    RolloutSettings,
    Slots,
    make_engine,
    rollout_decoder,
)
from rest_jax.types import Params, PromptBatch, RolloutBatch, Sampling

_FEWEST_LANES = 8

OnGroup = Callable[[int, RolloutBatch], None]


@dataclasses.dataclass
class SamplerStats:
    """Of one rollout: what the lanes did. `lane_steps`: turns x lanes; `tokens`: those that drew a policy token."""

    tokens: int = 0
    lane_steps: int = 0
    calls: int = 0
    seconds: float = 0.0

    @property
    def utilisation(self) -> float:
        """Share of the lane-steps that drew a token."""
        return self.tokens / max(self.lane_steps, 1)


class Way:
    """Book-keeping of one way: which group is in which prompt slot, which response in which lane."""

    def __init__(self, groups: list[int], group_size: int, slots: int, lanes: int):
        self.waiting = collections.deque(groups)
        self.group_size = group_size
        self.group: list[int | None] = [None] * slots
        self.unstarted: list[collections.deque[int]] = [collections.deque() for _ in range(slots)]
        self.unfinished = [0] * slots
        self.lane: list[tuple[int, int] | None] = [None] * lanes  # (slot, sample)
        self.index = np.zeros(lanes, np.int64)

    @property
    def free_lanes(self) -> list[int]:
        """NewRequests that draw nothing."""
        return [n for n, work in enumerate(self.lane) if work is None]

    @property
    def unstarted_count(self) -> int:
        """Responses of resident prompts that wait for a lane."""
        return sum(map(len, self.unstarted))

    def next_prompt(self) -> tuple[int, int] | None:
        """(group, slot) to fill in, when lanes would idle otherwise."""
        if not self.waiting or None not in self.group:
            return None
        if len(self.free_lanes) <= self.unstarted_count:
            return None
        slot, group = self.group.index(None), self.waiting.popleft()
        self.group[slot], self.unfinished[slot] = group, self.group_size
        self.unstarted[slot].extend(range(self.group_size))
        return group, slot

    def start(self) -> list[tuple[int, int, int]]:
        """(lane, slot, sample) of the responses that start now."""
        found = []
        ready = [slot for slot, samples in enumerate(self.unstarted) for _ in samples]
        for lane, slot in zip(self.free_lanes, ready, strict=False):
            sample = self.unstarted[slot].popleft()
            self.lane[lane], self.index[lane] = (slot, sample), 0
            found.append((lane, slot, sample))
        return found

    def finish(self, lane: int) -> int | None:
        """A response has ended; its group when that is complete."""
        work = self.lane[lane]
        assert work is not None
        self.lane[lane], slot = None, work[0]
        self.unfinished[slot] -= 1
        if self.unfinished[slot]:
            return None
        group, self.group[slot] = self.group[slot], None
        return group

    @property
    def idle(self) -> bool:
        """Nothing is waiting for a lane."""
        return not self.waiting and not self.unstarted_count

    def keep(self, count: int) -> list[int]:
        """Cuts down to `count` lanes, those at work first; their old numbers."""
        kept = sorted(range(len(self.lane)), key=lambda n: (self.lane[n] is None, n))[:count]
        self.lane = [self.lane[n] for n in kept]
        self.index = self.index[kept]
        return kept


class Sampler:
    """Samples responses with one engine; the compiled functions are the only state kept between calls."""

    def __init__(self, engine: Engine, settings: RolloutSettings, mesh: Mesh):
        self.engine, self.settings, self.mesh = engine, settings, mesh
        self.stats = SamplerStats()

    def __call__(
        self,
        params: Params,
        prompts: PromptBatch,
        rng: jax.Array,
        step: jax.Array | int,
        on_group: OnGroup | None = None,
        limits: np.ndarray | None = None,
    ) -> RolloutBatch:
        """`group_size` responses to each of this process's prompts; NumPy. Sets `stats`.

        `limits` `[P, G]`: tokens of each response at most, where that is below `max_tokens`.
        """
        begun = time.monotonic()
        run = _Run(self, params, prompts, rng, jnp.int32(step), on_group, limits)
        out = run.run()
        self.stats = run.stats
        self.stats.seconds = time.monotonic() - begun
        return out


class _Run:
    """One rollout."""

    def __init__(self, sampler: Sampler, params, prompts: PromptBatch, rng, step, on_group, limits):
        self.engine, self.settings, self.mesh = sampler.engine, sampler.settings, sampler.mesh
        self.params, self.rng, self.step, self.on_group = params, rng, step, on_group
        self.prompts = jax.tree.map(np.asarray, prompts)
        self.stats, self.limits = SamplerStats(), limits
        processes, self.count = jax.process_count(), len(self.prompts.length)
        self.first = jax.process_index() * self.count  # global number of this process's first group
        self.length = gather(self.prompts.length)
        share = self.engine.ways // processes
        self.own = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
        s = self.settings
        shares = _share_out(self.length, self.count, processes, share)
        self.sizes = s.sizes(max(map(len, shares)))
        self.ways = [Way(groups, s.group_size, *self.sizes) for groups in shares]
        shape = (self.count, s.group_size, s.max_tokens)
        self.tokens = np.full(shape, s.pad_id, np.int32)
        self.numbers = np.zeros((3, *shape), np.float32)  # logp, entropy, gini
        self.lengths = np.zeros(shape[:2], np.int32)

    def run(self) -> RolloutBatch:
        self.widths = (self.prompt_width(), self._response_sizes()[0])
        self.slots: Slots = self.engine.empty(
            prompt_slots=self.sizes[0],
            lanes=self.sizes[1],
            prompt_width=self.widths[0],
            response_width=self.widths[1],
        )
        while True:
            self.fill()
            if not any(work for way in self.ways for work in way.lane):
                break
            self.fit()
            self.decode()
        return self.rows(slice(None))

    def fill(self) -> None:
        """Prompts into free slots while lanes would idle, then responses into free lanes."""
        while any(chosen := [way.next_prompt() for way in self.ways]):
            self.prefill(chosen)
        started = [way.start() for way in self.ways]
        if not any(started):
            return
        shape = (len(self.ways), len(self.ways[0].lane))
        lanes = NewRequests(np.zeros(shape, bool), *(np.zeros(shape, np.int32) for _ in range(4)))  # type: ignore[arg-type]
        for w, found in enumerate(started):
            for lane, slot, sample in found:
                group = self.ways[w].group[slot]
                row, limit = self.request(group, sample)
                for field, value in zip(lanes, (True, slot, row, sample, limit), strict=True):
                    field[w, lane] = value  # type: ignore[index]
        self.slots = self.engine.start(self.slots, self.mine(lanes), self.rng, self.step)

    def request(self, group: int | None, sample: int) -> tuple[int, int]:
        """(row, token limit) of a response; another process's are of no interest here."""
        if group is None or not self.is_own(group):
            return 0, 1
        most = self.settings.max_tokens
        if self.limits is not None:
            most = min(most, int(self.limits[group - self.first, sample]))
        return int(self.prompts.row[group - self.first]), most

    def prefill(self, chosen: list[tuple[int, int] | None]) -> None:
        """One prompt in each way that has chosen one."""
        longest = max(int(self.length[c[0]]) for c in chosen if c)
        width = bucket(longest, self.prompts.tokens.shape[1])
        if width > self.widths[0]:
            self.resize(prompt_width=width)
        tokens = np.full((len(chosen), width), self.settings.pad_id, np.int32)
        length = np.ones(len(chosen), np.int32)
        slot = np.full(len(chosen), self.sizes[0], np.int32)  # out of bounds: nowhere
        for w, choice in enumerate(chosen):
            if choice is None:
                continue
            group, slot[w] = choice
            length[w] = self.length[group]
            if self.is_own(group):
                tokens[w] = self.prompts.tokens[group - self.first, :width]
        tokens, length, slot = self.mine((tokens, length, slot))
        filled = self.engine.prefill(self.params, tokens, length)
        self.slots = self.engine.insert(self.slots, filled, slot)

    def fit(self) -> None:
        """Fewer lanes when nothing waits; caches as wide as what is in them. In coarse steps: each size is compiled."""
        at_work = [sum(work is not None for work in way.lane) for way in self.ways]
        lanes = len(self.ways[0].lane)
        while all(way.idle for way in self.ways) and max(max(at_work), _FEWEST_LANES) * 4 <= lanes:
            lanes = -(-lanes // 4)
        prompt, response = self.widths
        needed = self.prompt_width()
        if needed > prompt or needed * 2 <= prompt:
            prompt = needed
        sizes, longest = self._response_sizes(), self.longest()
        if longest >= response:
            response = next(size for size in sizes if size > longest)
        else:  # narrower only with room to spare, so that it does not swing
            response = min(response, next((n for n in sizes if n >= 2 * longest), response))
        if (prompt, response) != self.widths or lanes != len(self.ways[0].lane):
            self.resize(prompt_width=prompt, response_width=response, lanes=lanes)

    def resize(self, prompt_width=None, response_width=None, lanes: int | None = None) -> None:
        self.widths = (prompt_width or self.widths[0], response_width or self.widths[1])
        kept = [way.keep(lanes or len(way.lane)) for way in self.ways]
        self.slots = self.engine.resize(
            self.slots,
            self.mine(np.array(kept, np.int32)),
            prompt_width=self.widths[0],
            response_width=self.widths[1],
        )

    def decode(self) -> None:
        """Draws until some lane that could go on with other work is free, or the cache is full, or the chunk is."""
        steps = min(CHUNK, self.widths[1] - self.longest())
        lanes = len(self.ways[0].lane)
        free = [self.enough_free(way, lanes) for way in self.ways]
        self.slots, drawn = self.engine.decode(
            self.params, self.slots, jnp.int32(steps), self.mine(np.array(free, np.int32))
        )
        self.harvest(drawn)

    def enough_free(self, way: Way, lanes: int) -> int:
        """Free lanes at which to stop: one more than now when work waits, else those that let the lanes be cut."""
        now = len(way.free_lanes)
        if now == lanes:
            return lanes + 1
        if way.idle:
            cut = lanes - lanes // 4 if lanes >= 4 * _FEWEST_LANES else lanes
            return max(cut, now + 1)
        return min(lanes, now + max(1, lanes // 32))

    def harvest(self, drawn: Drawn) -> None:
        """Takes in what was drawn; tells of complete groups."""
        count, alive = np.asarray(drawn.count), np.asarray(drawn.alive)
        token, *numbers = to_host(drawn[:4])
        self.stats.calls += 1
        self.stats.tokens += int(count.sum())
        self.stats.lane_steps += int(drawn.steps) * count.size
        complete = []
        for w, way in enumerate(self.ways):
            for lane, work in enumerate(way.lane):
                if work is None:
                    continue
                (slot, sample), n = work, count[w, lane]
                group, at = way.group[slot], int(way.index[lane])
                way.index[lane] += n
                if group is not None and self.is_own(group):
                    row, place = group - self.first, slice(at, at + n)
                    own = w - self.own.start
                    self.tokens[row, sample, place] = token[own, lane, :n]
                    for field, new in zip(self.numbers, numbers, strict=True):
                        field[row, sample, place] = new[own, lane, :n]
                    self.lengths[row, sample] = at + n
                if not alive[w, lane]:
                    done = way.finish(lane)
                    if done is not None and self.is_own(done):
                        complete.append(done - self.first)
        if self.on_group is not None:
            for group in complete:
                self.on_group(group, self.rows(slice(group, group + 1)))

    def rows(self, rows: slice) -> RolloutBatch:
        """What is known of these prompts."""
        numbers = self.numbers[:, rows]
        return RolloutBatch(
            prompt=self.prompts.tokens[rows],
            prompt_length=self.prompts.length[rows],
            responses=self.tokens[rows],
            response_length=self.lengths[rows],
            logp=numbers[0],
            entropy=numbers[1],
            gini=numbers[2],
        )

    def longest(self) -> int:
        """Tokens in the longest response under way."""
        return max(
            int(index)
            for way in self.ways
            for index, work in zip(way.index, way.lane, strict=True)
            if work is not None
        )

    def prompt_width(self) -> int:
        """Width for the longest prompt in the slots or next in line."""
        lengths = [
            int(self.length[group])
            for way in self.ways
            for group in [*way.group, *list(way.waiting)[:1]]
            if group is not None
        ]
        return bucket(max(lengths, default=1), self.prompts.tokens.shape[1])

    def _response_sizes(self) -> list[int]:
        """Widths of the response cache, ascending up to `max_tokens`."""
        sizes = [self.settings.max_tokens]
        while sizes[0] > CHUNK:
            sizes.insert(0, -(-sizes[0] // self.settings.ratio))
        return sizes

    def is_own(self, group: int) -> bool:
        """Whether a (global) group is this process's."""
        return self.first <= group < self.first + self.count

    def mine(self, tree: Any) -> Any:
        """This process's ways of host arrays [W, ...], on the mesh."""
        return to_mesh(jax.tree.map(lambda x: x[self.own], tree), self.mesh)


def _share_out(lengths: np.ndarray, count: int, processes: int, share: int) -> list[list[int]]:
    """The groups of each way: every process deals its own out over its own ways, longest prompt first."""
    ways = []
    for process in range(processes):
        groups = range(process * count, (process + 1) * count)
        ordered = sorted(groups, key=lambda g: (-int(lengths[g]), g))
        ways += [ordered[way::share] for way in range(share)]
    return ways


def make_sampler(
    decoder: Decoder, settings: RolloutSettings, mesh: Mesh, param_shardings: Params
) -> Sampler:
    """A sampler over a mesh; weights in the rollout layout (`engine.make_cast`)."""
    return Sampler(make_engine(decoder, settings, mesh, param_shardings), settings, mesh)


def policy_sampler(
    policy: Policy, group_size: int, max_tokens: int, sampling: Sampling, rollout: RolloutConfig
) -> Sampler:
    """A sampler of a policy; decode slots and prompt cache entries as in `rollout`. Weights come from `rollout_cast`."""
    settings = RolloutSettings(
        group_size=group_size,
        max_tokens=max_tokens,
        stop_ids=policy.tokenizer.stop_ids,
        pad_id=policy.tokenizer.pad_id,
        sampling=sampling,
        lanes=rollout.decode_slots,
        prompt_slots=rollout.prompt_cache_entries if group_size > 1 else None,
        # fewer sizes where compilation is dear
        ratio=2 if jax.default_backend() == "cpu" else 4,
    )
    decoder = rollout_decoder(policy.decoder)
    shardings = param_shardings(decoder.cfg, policy.mesh, layout="rollout")
    return make_sampler(decoder, settings, policy.mesh, shardings)
