"""The rollout on the host decides which page holds what and which responses a call of `decode` may start: continuous batching.

    make_sampler(policy, rollout, group_size, sampling)                 -> Sampler
    sampler(params, prompts, rng, step, on_group=None, limits=None)     -> RolloutBatch (NumPy)

Prompts wait, longest first. When a data shard might soon have no response to start, every shard prefills a row of prompts, as
many as there is room for. A call of `decode` draws a page of tokens in each slot; a slot whose response has ended takes the next
of the shard's queue within the call. `on_group(p, rows)` is called when the G responses of prompt p are complete, with its rows,
before the next call. At the end, decode slots that have nothing left are removed.

A shard that runs out of pages drops the response that has drawn the least, and draws it again later: its keys decide its
tokens, so it draws the same.

With many processes each one follows all data shards (lengths and ends are global) and feeds its own: all make the same
calls. A group, one prompt with its responses, has the number of its row in the global batch; the number of a response is that
of its group times G, plus its own in the group.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rest_jax.config import RolloutConfig
from rest_jax.distributed import (
    activate,
    gather,
    host_groups,
    local_shards,
    num_data_shards,
    replicated,
    rows_of_shards,
    to_host,
    to_mesh,
)
from rest_jax.models.cache import PageTable
from rest_jax.models.policy import Policy
from rest_jax.rl.packing import row_length
from rest_jax.rollout.cast import rollout_decoder
from rest_jax.rollout.engine import (
    NOBODY,
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
from rest_jax.rollout.shard import CallResult, Placed, Shard
from rest_jax.types import Params, PromptBatch, RolloutBatch, Routes, Sampling

_PREFILL_TOKENS = 2048  # of a row of prompts, if none is longer

OnGroup = Callable[[int, RolloutBatch], None]


@dataclasses.dataclass
class SamplerStats:
    """Counts of one rollout. `slot_steps`: decode steps x decode slots; `tokens`: those of them that drew a token."""

    tokens: int = 0
    slot_steps: int = 0
    calls: int = 0
    prefill_calls: int = 0
    prefill_positions: int = 0  # of the rows of prompts, padding included
    dropped: int = 0  # responses that were begun again, for want of pages

    @property
    def utilisation(self) -> float:
        """Share of the slot-steps that drew a token."""
        return self.tokens / max(self.slot_steps, 1)

    def __add__(self, other: "SamplerStats") -> "SamplerStats":
        """Of both rollouts."""
        return SamplerStats(**{name: x + getattr(other, name) for name, x in vars(self).items()})


class Sampler:
    """Samples responses with one engine; the compiled functions are the only state kept between calls."""

    def __init__(self, engine: Engine, settings: RolloutSettings, mesh: Mesh):
        self.engine, self.settings, self.mesh = engine, settings, mesh
        self.stats = SamplerStats()
        self.between_calls: Callable[[], None] = lambda: None  # what it raises ends the rollout
        # The run's key lies on the mesh of the training, with which nothing here can be computed.
        self._place = jax.jit(lambda rng: rng, out_shardings=replicated(mesh))

    def __call__(
        self,
        params: Params,
        prompts: PromptBatch,
        rng: jax.Array,
        step: jax.Array | int,
        on_group: OnGroup | None = None,
        limits: np.ndarray | None = None,
        wanted: np.ndarray | None = None,
    ) -> RolloutBatch:
        """`group_size` responses to each of this process's prompts; NumPy. Sets `stats`.

        `limits` `[P, G]`: tokens of each response at most, where that is below `max_tokens`. `wanted`, bool `[P]`: the prompts
        that get responses, by the programs that all of them would need; those of the others are empty.
        """
        rng = self._place(rng)
        with activate(self.mesh):
            rollout = _Rollout(self, params, prompts, limits, wanted)
            while rollout.refill():
                self.between_calls()
                for group in rollout.decode(rng, jnp.int32(step)):
                    if on_group is not None:
                        on_group(group, rollout.rows(group))
        self.stats = rollout.stats
        return rollout.out

    def sample_all(
        self,
        params: Params,
        prompts: PromptBatch,
        rng: jax.Array,
        on_group: OnGroup | None = None,
    ) -> RolloutBatch:
        """Responses to all of `prompts`, which every process has: each samples those of its data shards, of which `on_group` is
        told, and gets the others'; NumPy.
        """
        size, mesh = len(prompts.length), self.mesh
        # Several processes: the last prompt fills the shards up.
        shards = num_data_shards(mesh) if jax.process_count() > 1 else 1
        own = rows_of_shards(-(-size // shards) * shards, local_shards(mesh), mesh)
        own = np.minimum(own, size - 1)
        out = self(params, jax.tree.map(lambda x: x[own], prompts), rng, 0, on_group)
        return jax.tree.map(lambda x: x[:size], gather(out, mesh))


def make_sampler(
    policy: Policy,
    rollout: RolloutConfig,
    group_size: int,
    sampling: Sampling,
    record_routes: bool = False,
) -> Sampler:
    """A sampler of `group_size` responses a prompt on a policy's rollout mesh. Its weights come from `engine.rollout_cast`.
    `record_routes`: the experts of every token come with the responses.
    """
    settings = rollout_settings(policy, rollout, group_size, sampling, record_routes)
    engine = make_engine(rollout_decoder(policy), settings, policy.rollout_mesh)
    return Sampler(engine, settings, policy.rollout_mesh)


def rollout_settings(
    policy: Policy,
    rollout: RolloutConfig,
    group_size: int,
    sampling: Sampling,
    record_routes: bool = False,
) -> RolloutSettings:
    """What is fixed for all rollouts of `make_sampler`."""
    return RolloutSettings(
        group_size=group_size,
        max_tokens=rollout.max_response_tokens,
        stop_ids=policy.tokenizer.stop_ids,
        pad_id=policy.tokenizer.pad_id,
        sampling=sampling,
        decode_slots=rollout.decode_slots,
        prompt_cache_entries=rollout.prompt_cache_entries if group_size > 1 else None,
        cache_tokens=rollout.cache_tokens,
        record_routes=record_routes,
    )


class _Rollout:
    """One rollout: the data shards, the state on the device, and what has been sampled so far."""

    def __init__(
        self,
        sampler: Sampler,
        params: Params,
        prompts: PromptBatch,
        limits: np.ndarray | None,
        wanted: np.ndarray | None,
    ):
        self.engine, self.settings, self.mesh = sampler.engine, sampler.settings, sampler.mesh
        self.params, self.stats = params, SamplerStats()
        self.prompts = jax.tree.map(np.asarray, prompts)
        self.out = _empty_batch(self.prompts, self.settings, self.engine.routes)
        self.prefilled: list[tuple[list, Any]] = []  # whose routes have not been read yet
        most = np.full(self.out.response_length.shape, self.settings.max_tokens, np.int32)
        self.limits = most if limits is None else np.minimum(most, limits)
        self.length = gather(self.prompts.length, self.mesh)
        # This process's data shards, and where each is among them.
        self.own_shards = {shard: i for i, shard in enumerate(local_shards(self.mesh))}
        own = rows_of_shards(len(self.length), list(self.own_shards), self.mesh)
        self.own_rows = np.full(len(self.length), -1)  # of a group, its row here
        self.own_rows[own] = np.arange(len(own))
        groups = deal_groups(self.length, self.mesh)
        self.sizes = self.settings.sizes(max(map(len, groups)), self.prompts.tokens.shape[1])
        pages = -(-self.length // self.settings.page)
        total = max(int(pages[own].sum()) for own in groups)
        self.width = prefill_width(int(pages.max()), total, self.settings.page)
        if wanted is not None:
            asked = gather(wanted, self.mesh)
            groups = [[group for group in own if asked[group]] for own in groups]
        self.shards = [Shard(own, self.length, self.settings, self.sizes) for own in groups]
        self.state: DecodeState = self.engine.empty_state(self.sizes)

    def refill(self) -> bool:
        """Prefills prompts while decode slots might idle, makes room for what runs, and removes slots that have nothing left.
        False when nothing is left.
        """
        while any(shard.wants_prompts for shard in self.shards):
            self.prefill([shard.place_prompts(self.width) for shard in self.shards])
        for shard in self.shards:
            self.drop(shard)
        self.shrink()
        return any(shard.running or shard.unstarted for shard in self.shards)

    def drop(self, shard: Shard) -> None:
        """Makes room for what runs."""
        for response in shard.drop_youngest():
            self.stats.dropped += 1
            row = self.own_rows[response.group]
            if row >= 0:
                self.forget(row, response.sample)

    def prefill(self, placed: list[list[Placed]]) -> None:
        """Prefills the prompts that each data shard has placed in its row."""
        page, width = self.settings.page, self.width
        if self.engine.gathers:  # a compiler that is quick: fewer positions where fewer are needed
            used = max(one.start + int(self.length[one.group]) for row in placed for one in row)
            width = min(width, page * _power_of_two(-(-used // page)))
        own = self.of_own_shards(placed)
        tokens = np.full((len(own), width), self.settings.pad_id, np.int32)
        until, position = np.zeros_like(tokens), np.zeros_like(tokens)
        pages = np.full((len(own), width // page), self.sizes.pages, np.int32)
        # an entry out of bounds: there is no such prompt
        entries = np.full_like(pages, self.sizes.entries)
        last, lengths = np.zeros_like(entries), np.ones_like(entries)
        shards = self.of_own_shards(self.shards)
        for w, (shard, prompts) in enumerate(zip(shards, own, strict=True)):
            for i, (group, entry, start) in enumerate(prompts):
                length = int(self.length[group])
                at = slice(start, start + length)
                tokens[w, at] = self.prompts.tokens[self.own_rows[group], :length]
                until[w, at], position[w, at] = start + length, np.arange(length)
                held = shard.entries[entry].pages
                pages[w, start // page : start // page + len(held)] = held
                entries[w, i], last[w, i], lengths[w, i] = entry, start + length - 1, length
        rows = to_mesh(
            PromptRows(tokens, until, position, pages, entries, last, lengths), self.mesh
        )
        self.state, routes = self.engine.prefill(self.params, self.state, rows, None)
        self.stats.prefill_calls += 1
        self.stats.prefill_positions += len(self.shards) * width
        if self.engine.routes is not None:
            self.prefilled.append((own, routes))

    def shrink(self) -> None:
        """Removes decode slots when nothing waits and few are busy."""
        if not all(shard.nothing_waits for shard in self.shards):
            return
        busy = max(len(shard.running) for shard in self.shards)
        slots = min(n for n in self.sizes.slot_counts if n >= busy or n == self.sizes.slots)
        if slots < self.shards[0].num_slots:
            kept = [shard.keep(slots) for shard in self.shards]
            kept = to_mesh(np.array(self.of_own_shards(kept), np.int32), self.mesh)
            slots, members = self.engine.keep(self.state.slots, self.state.members, kept)
            self.state = dataclasses.replace(self.state, slots=slots, members=members)

    def decode(self, rng: jax.Array, step: jax.Array) -> list[int]:
        """Draws a page of tokens in every decode slot. Returns the groups of this process that are complete now, as indices of
        its prompts.
        """
        pages = [shard.next_pages() for shard in self.shards]
        call = to_mesh(self.make_call(self.of_own_shards(pages)), self.mesh)
        self.state, drawn = self.engine.decode(self.params, self.state, call, rng, step)
        self.harvest(drawn)
        running, begin, started, steps = (
            np.asarray(x) for x in (drawn.running, drawn.begin, drawn.started, drawn.steps)
        )
        complete = []
        for w, shard in enumerate(self.shards):
            result = CallResult(running[w], begin[w], int(started[w]), int(steps), pages[w])
            complete += shard.advance(result)
        rows = self.own_rows[complete] if complete else []
        return [int(row) for row in rows if row >= 0]

    def make_call(self, next_pages: list[dict[int, int]]) -> DecodeCall:
        """What this process's data shards do in the next call, as arrays."""
        own, sizes, slots = self.of_own_shards(self.shards), self.sizes, self.shards[0].num_slots
        queue = np.zeros((5, len(own), sizes.entries * self.settings.group_size), np.int32)
        columns = self.columns()
        prompts = np.zeros((3, len(own), sizes.entries, columns[0]), np.int32)
        responses = np.zeros((3, len(own), slots, columns[1]), np.int32)
        going = np.zeros((len(own), slots), bool)
        free = np.full(going.shape, sizes.pages, np.int32)
        for w, shard in enumerate(own):
            for i, response in enumerate(shard.unstarted):
                _, sample, entry = response
                row = self.own_rows[response.group]
                limit = self.limits[row, sample]
                queue[:, w, i] = shard.number(response), entry, self.prompts.row[row], sample, limit
            for q, prompt in enumerate(shard.entries):
                if prompt is not None:
                    n = np.arange(len(prompt.pages))
                    prompts[0, w, q, n] = prompt.pages
                    rest = self.length[prompt.group] - n * self.settings.page
                    prompts[2, w, q, n] = np.minimum(rest, self.settings.page)
            going[w, list(shard.running)] = True
            for slot, running in shard.running.items():
                if running.pages:
                    responses[:, w, slot, : len(running.pages)] = np.array(running.pages).T
            for slot, page in next_pages[w].items():
                free[w, slot] = page
        queued = np.array([len(shard.unstarted) for shard in own], np.int32)
        enough = np.full(len(own), self.enough(), np.int32)
        return DecodeCall(
            Requests(*queue, sampling=None),
            queued,
            PageTable(*prompts),
            PageTable(*responses),
            going,
            free,
            enough,
        )

    def columns(self) -> tuple[int, int]:
        """Of the page tables of prompts and of responses."""
        shards = self.shards
        prompts = (len(prompt.pages) for shard in shards for prompt in shard.entries if prompt)
        responses = (len(one.pages) for shard in shards for one in shard.running.values())
        used = max(prompts, default=0), max(responses, default=0)
        return table_columns(used, self.sizes, self.engine.gathers)

    def enough(self) -> int:
        """Responses of every data shard at which slots can be removed, when nothing more is to come."""
        if any(shard.waiting for shard in self.shards):
            return 0
        return max((n for n in self.sizes.slot_counts if n < self.shards[0].num_slots), default=0)

    def harvest(self, drawn: Drawn) -> None:
        """Copies the tokens drawn into `out`."""
        owner, index, *values = to_host(drawn[:6])
        routes = self.read_prompt_routes(drawn)
        self.stats.calls += 1
        self.stats.tokens += int(np.sum(drawn.tokens))
        self.stats.slot_steps += int(drawn.steps) * np.asarray(drawn.running).size
        at = np.nonzero(owner != NOBODY)
        group, sample = np.divmod(owner[at], self.settings.group_size)
        target = self.own_rows[group], sample, index[at]
        for name, value in zip(("responses", "logp", "entropy", "gini"), values, strict=True):
            getattr(self.out, name)[target] = value[at]
        if routes is not None:
            self.out.routes.responses[target] = routes[at]
        np.maximum.at(self.out.response_length, target[:2], index[at] + 1)

    def forget(self, row: int, sample: int) -> None:
        """What a response has drawn."""
        at = row, sample
        self.out.responses[at], self.out.response_length[at] = self.settings.pad_id, 0
        for values in (self.out.logp, self.out.entropy, self.out.gini):
            values[at] = 0

    def of_own_shards(self, items: list[Any]) -> list[Any]:
        """Those of a list over all data shards that belong to this process's."""
        return [items[shard] for shard in self.own_shards]

    def read_prompt_routes(self, drawn: Drawn) -> np.ndarray | None:
        """Copies the routes of the prompts prefilled since the last call into `out`; returns those of the tokens drawn."""
        for own, prompts in self.prefilled:
            routes = to_host(prompts)
            for w, placed in enumerate(own):
                for group, _, start in placed:
                    length = int(self.length[group])
                    target = self.out.routes.prompt[self.own_rows[group]]
                    target[:length] = routes[w, start : start + length]
        self.prefilled.clear()
        return to_host(drawn.routes)

    def rows(self, group: int) -> RolloutBatch:
        """What has been sampled of one prompt."""
        return rows_of_group(self.out, group)


def rows_of_group(rollout: RolloutBatch, group: int) -> RolloutBatch:
    """The rows of one prompt, without copies."""
    return jax.tree.map(lambda x: x[group : group + 1], rollout)


def prefill_width(longest: int, total: int, page: int) -> int:
    """Positions of a row of prompts: those of the longest, or as many short ones as are worth a call. Every width is compiled.
    `longest` and `total`: pages of a prompt, and of all those of the data shard that has the most.
    """
    wanted = max(longest, min(total, -(-_PREFILL_TOKENS // page)))
    return -(-row_length(wanted * page) // page) * page


def table_columns(used: tuple[int, int], sizes: Sizes, gathers: bool) -> tuple[int, int]:
    """Columns of the page tables of prompts and of responses, of which so many are used: as many as there may be, or the next
    power of two where pages are gathered. Every number is compiled.
    """
    prompt, response = sizes.prompt_pages, sizes.response_pages
    if not gathers:
        return prompt, response
    return min(_power_of_two(used[0]), prompt), min(_power_of_two(used[1]), response)


def _power_of_two(n: int) -> int:
    """The least that is not less; 0 of 0."""
    return n and 1 << (n - 1).bit_length()


def deal_groups(lengths: np.ndarray, mesh: Mesh) -> list[list[int]]:
    """The groups of each data shard: those of a host are dealt over its shards, longest prompt first."""
    dealt: list[list[int]] = [[] for _ in range(num_data_shards(mesh))]
    for shards in host_groups(mesh):
        groups = rows_of_shards(len(lengths), shards, mesh).tolist()
        ordered = sorted(groups, key=lambda g: (-int(lengths[g]), g))
        for position, shard in enumerate(shards):
            dealt[shard] = ordered[position :: len(shards)]
    return dealt


def _empty_batch(
    prompts: PromptBatch, settings: RolloutSettings, routes: jax.ShapeDtypeStruct | None
) -> Any:
    """A RolloutBatch of NumPy arrays without responses, to be filled. `routes`: of a token, if they are recorded."""
    shape = (len(prompts.length), settings.group_size, settings.max_tokens)
    empty = None
    if routes is not None:
        both = ((*lead, *routes.shape) for lead in (prompts.tokens.shape, shape))
        empty = Routes(*(np.zeros(size, routes.dtype) for size in both))
    return RolloutBatch(
        prompt=prompts.tokens,
        prompt_length=prompts.length,
        responses=np.full(shape, settings.pad_id, np.int32),
        response_length=np.zeros(shape[:2], np.int32),
        logp=np.zeros(shape, np.float32),
        entropy=np.zeros(shape, np.float32),
        gini=np.zeros(shape, np.float32),
        routes=empty,
    )
