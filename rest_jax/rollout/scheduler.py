"""The rollout on the host decides which decode slot draws what, so that none idles while work is left: continuous batching.

    make_sampler(policy, rollout, group_size, sampling)                 -> Sampler
    sampler(params, prompts, rng, step, on_group=None, limits=None)     -> RolloutBatch (NumPy)

Prompts wait, longest first. A data shard takes the next prompt when it has decode slots to spare; the G responses of the
prompt start as slots become free, and a slot takes the next response as soon as its own has ended. `on_group(p, rows)` is
called when the G responses of prompt p are complete, with its rows, before the next tokens are drawn. At the end, decode
slots that have nothing left are removed. Caches are as wide as the longest prompt and response in them, in few sizes.

With many processes each one follows all data shards (lengths and flags are global) and feeds its own: all make the same
calls. A group, one prompt with its responses, has the number of its row in the global batch.
"""

import collections
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

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
    platform,
    replicated,
    rows_of_shards,
    to_host,
    to_mesh,
)
from rest_jax.models.policy import Policy
from rest_jax.rl.packing import bucket
from rest_jax.rollout.engine import (
    CHUNK,
    DecodeState,
    Drawn,
    Engine,
    NewRequests,
    RolloutSettings,
    Widths,
    make_engine,
    rollout_decoder,
)
from rest_jax.types import Params, PromptBatch, RolloutBatch, Routes, Sampling

_FEWEST_SLOTS = 8  # decode slots are not removed below this number

OnGroup = Callable[[int, RolloutBatch], None]


@dataclasses.dataclass
class SamplerStats:
    """Counts of one rollout. `slot_steps`: decode steps x decode slots; `tokens`: those of them that drew a token."""

    tokens: int = 0
    slot_steps: int = 0
    calls: int = 0

    @property
    def utilisation(self) -> float:
        """Share of the slot-steps that drew a token."""
        return self.tokens / max(self.slot_steps, 1)


class Response(NamedTuple):
    """A response to sample: number `sample` of a group, whose prompt is in a prompt cache entry."""

    group: int
    sample: int
    entry: int


class Shard:
    """Book-keeping of one data shard: which group is in which prompt cache entry, which response in which decode slot."""

    def __init__(self, groups: list[int], group_size: int, entries: int, slots: int):
        self.waiting = collections.deque(groups)
        self.group_size, self.num_slots = group_size, slots
        self.entries: list[int | None] = [None] * entries  # the group in each
        self.unstarted: list[Response] = []  # of cached prompts, first entry first
        self.busy: dict[int, Response] = {}  # by decode slot
        self.index = np.zeros(slots, np.int64)  # tokens drawn of each slot's response

    @property
    def free_slots(self) -> list[int]:
        """Decode slots without a response."""
        return [n for n in range(self.num_slots) if n not in self.busy]

    @property
    def nothing_waits(self) -> bool:
        """Whether every response of every prompt has been started."""
        return not self.waiting and not self.unstarted

    def next_prompt(self) -> tuple[int, int] | None:
        """(group, entry) of a prompt to prefill, when decode slots would idle otherwise."""
        if not self.waiting or None not in self.entries:
            return None
        if len(self.free_slots) <= len(self.unstarted):
            return None
        entry, group = self.entries.index(None), self.waiting.popleft()
        self.entries[entry] = group
        self.unstarted += [Response(group, sample, entry) for sample in range(self.group_size)]
        self.unstarted.sort(key=lambda response: response.entry)
        return group, entry

    def start(self) -> dict[int, Response]:
        """Starts waiting responses, first entry first, in free decode slots; returns them by slot."""
        started = dict(zip(self.free_slots, self.unstarted, strict=False))
        del self.unstarted[: len(started)]
        self.busy |= started
        self.index[list(started)] = 0
        return started

    def finish(self, slot: int) -> int | None:
        """Frees a decode slot whose response has ended; returns its group when that is complete."""
        group, _, entry = self.busy.pop(slot)
        if any(other.entry == entry for other in [*self.busy.values(), *self.unstarted]):
            return None
        self.entries[entry] = None
        return group

    def keep(self, count: int) -> list[int]:
        """Reduces to `count` decode slots, busy ones first; returns their old numbers."""
        kept = [*sorted(self.busy), *self.free_slots][:count]
        self.busy = {new: self.busy[old] for new, old in enumerate(kept) if old in self.busy}
        self.num_slots, self.index = count, self.index[kept]
        return kept


class Sampler:
    """Samples responses with one engine; the compiled functions are the only state kept between calls."""

    def __init__(self, engine: Engine, settings: RolloutSettings, mesh: Mesh):
        self.engine, self.settings, self.mesh = engine, settings, mesh
        self.stats = SamplerStats()
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
    ) -> RolloutBatch:
        """`group_size` responses to each of this process's prompts; NumPy. Sets `stats`.

        `limits` `[P, G]`: tokens of each response at most, where that is below `max_tokens`.
        """
        rng = self._place(rng)
        with activate(self.mesh):
            rollout = _Rollout(self, params, prompts, limits)
            while rollout.refill(rng, jnp.int32(step)):
                for group in rollout.decode():
                    if on_group is not None:
                        on_group(group, rollout.rows(group))
        self.stats = rollout.stats
        return rollout.out

    def sample_all(self, params: Params, prompts: PromptBatch, rng: jax.Array) -> RolloutBatch:
        """Responses to all of `prompts`, which every process has: each samples those of its data shards and gets the
        others'; NumPy.
        """
        size, mesh = len(prompts.length), self.mesh
        # Several processes: the last prompt fills the shards up.
        shards = num_data_shards(mesh) if jax.process_count() > 1 else 1
        own = rows_of_shards(-(-size // shards) * shards, local_shards(mesh), mesh)
        own = np.minimum(own, size - 1)
        out = self(params, jax.tree.map(lambda x: x[own], prompts), rng, 0)
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
        # fewer widths where compilation is dear
        width_ratio=2 if platform(policy.mesh) == "cpu" else 4,
        record_routes=record_routes,
    )


class _Rollout:
    """One rollout: the data shards, the state on the device, and what has been sampled so far."""

    def __init__(
        self, sampler: Sampler, params: Params, prompts: PromptBatch, limits: np.ndarray | None
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
        self.own_rows = {int(group): row for row, group in enumerate(own)}  # its row here
        groups = deal_groups(self.length, self.mesh)
        entries, slots = self.settings.sizes(max(map(len, groups)))
        group_size = self.settings.group_size
        self.shards = [Shard(own, group_size, entries, slots) for own in groups]
        self.widths = Widths(self.prompt_width(), self.response_widths()[0])
        self.state: DecodeState = self.engine.empty_state(entries, slots, self.widths)

    def refill(self, rng: jax.Array, step: jax.Array) -> bool:
        """Prefills prompts while decode slots would idle, starts responses in free slots, fits the state to what is left.
        False when nothing is left.
        """
        while any(chosen := [shard.next_prompt() for shard in self.shards]):
            self.prefill(chosen)
        started = [shard.start() for shard in self.shards]
        if any(started):
            requests = to_mesh(self.make_requests(self.of_own_shards(started)), self.mesh)
            self.state = self.engine.start(self.state, requests, rng, step)
        busy = any(shard.busy for shard in self.shards)
        if busy:
            self.fit()
        return busy

    def prefill(self, chosen: list[tuple[int, int] | None]) -> None:
        """Prefills the (group, entry) that each data shard has chosen, if any."""
        longest = max(int(self.length[choice[0]]) for choice in chosen if choice)
        width = bucket(longest, self.prompts.tokens.shape[1])
        if width > self.widths.prompt:
            self.resize(self.widths._replace(prompt=width))
        own = self.of_own_shards(chosen)
        tokens = np.full((len(own), width), self.settings.pad_id, np.int32)
        length = np.ones(len(own), np.int32)
        # an entry out of bounds, where a shard has chosen none: the prompt is dropped
        entries = np.full(len(own), len(self.shards[0].entries), np.int32)
        for w, choice in enumerate(own):
            if choice is not None:
                group, entries[w] = choice
                length[w] = self.length[group]
                tokens[w] = self.prompts.tokens[self.own_rows[group], :width]
        tokens, length, entries = to_mesh((tokens, length, entries), self.mesh)
        prefilled = self.engine.prefill(self.params, tokens, length)
        if self.engine.routes is not None:
            self.prefilled.append((own, prefilled.routes))
            prefilled = prefilled._replace(routes=None)
        self.state = self.engine.insert(self.state, prefilled, entries)

    def make_requests(self, started: list[dict[int, Response]]) -> NewRequests:
        """The responses that start in this process's data shards, as arrays."""
        shape = (len(started), self.shards[0].num_slots)
        new = np.zeros(shape, bool)
        entries, rows, samples, limits = (np.zeros(shape, np.int32) for _ in range(4))
        for w, responses in enumerate(started):
            for slot, (group, sample, entry) in responses.items():
                new[w, slot], entries[w, slot], samples[w, slot] = True, entry, sample
                row = self.own_rows[group]
                rows[w, slot], limits[w, slot] = self.prompts.row[row], self.limits[row, sample]
        return NewRequests(new, entries, rows, samples, limits)

    def fit(self) -> None:
        """Removes decode slots when nothing waits, and makes caches as wide as what is in them. Every size is compiled, so
        it changes in coarse steps.
        """
        busy = max(len(shard.busy) for shard in self.shards)
        slots = self.shards[0].num_slots
        if all(shard.nothing_waits for shard in self.shards):
            while max(busy, _FEWEST_SLOTS) * 4 <= slots:
                slots = -(-slots // 4)
        prompt, response = self.widths
        needed = self.prompt_width()
        if needed > prompt or needed * 2 <= prompt:
            prompt = needed
        widths, longest = self.response_widths(), self.longest_response()
        if longest >= response:
            response = next(width for width in widths if width > longest)
        else:  # narrower only if responses may double in it, so that it does not swing
            response = min(response, next((n for n in widths if n >= 2 * longest), response))
        if (prompt, response) != self.widths or slots != self.shards[0].num_slots:
            self.resize(Widths(prompt, response), slots)

    def resize(self, widths: Widths, slots: int | None = None) -> None:
        """Changes the widths and, if given, the number of decode slots."""
        kept = [shard.keep(slots or shard.num_slots) for shard in self.shards]
        own = to_mesh(np.array(self.of_own_shards(kept), np.int32), self.mesh)
        self.state, self.widths = self.engine.resize(self.state, own, widths), widths

    def decode(self) -> list[int]:
        """Draws until slots that other work waits for are free, or the cache or the chunk is full. Returns the groups of
        this process that are complete now, as indices of its prompts.
        """
        steps = jnp.int32(min(CHUNK, self.widths.response - self.longest_response()))
        free = [free_to_stop_at(shard) for shard in self.of_own_shards(self.shards)]
        free = to_mesh(np.array(free, np.int32), self.mesh)
        self.state, drawn = self.engine.decode(self.params, self.state, steps, free)
        return self.harvest(drawn)

    def harvest(self, drawn: Drawn) -> list[int]:
        """Copies the tokens drawn into `out` and frees the slots of responses that have ended. Returns as `decode` does."""
        count, alive = np.asarray(drawn.count), np.asarray(drawn.alive)
        token, logp, entropy, gini = to_host(drawn[:4])
        routes = self.read_prompt_routes(drawn)
        self.stats.calls += 1
        self.stats.tokens += int(count.sum())
        self.stats.slot_steps += int(drawn.steps) * count.size
        complete = []
        for w, shard in enumerate(self.shards):
            own = w in self.own_shards
            for slot, (group, sample, _) in sorted(shard.busy.items()):
                begin, n = int(shard.index[slot]), int(count[w, slot])
                shard.index[slot] += n
                if own:
                    source = self.own_shards[w], slot, slice(n)
                    target = self.own_rows[group], sample, slice(begin, begin + n)
                    self.out.responses[target] = token[source]
                    self.out.logp[target] = logp[source]
                    self.out.entropy[target] = entropy[source]
                    self.out.gini[target] = gini[source]
                    if routes is not None:
                        self.out.routes.responses[target] = routes[source]
                    self.out.response_length[target[:2]] = begin + n
                if not alive[w, slot] and shard.finish(slot) is not None and own:
                    complete.append(self.own_rows[group])
        return complete

    def of_own_shards(self, items: list[Any]) -> list[Any]:
        """Those of a list over all data shards that belong to this process's."""
        return [items[shard] for shard in self.own_shards]

    def read_prompt_routes(self, drawn: Drawn) -> np.ndarray | None:
        """Copies the routes of the prompts prefilled since the last call into `out`; returns those of the tokens drawn."""
        for own, prompts in self.prefilled:
            routes = to_host(prompts)
            for w, choice in enumerate(own):
                if choice is not None:
                    row = self.own_rows[choice[0]]
                    self.out.routes.prompt[row, : routes.shape[1]] = routes[w]
        self.prefilled.clear()
        return to_host(drawn.routes)

    def rows(self, group: int) -> RolloutBatch:
        """What has been sampled of one prompt."""
        return jax.tree.map(lambda x: x[group : group + 1], self.out)

    def longest_response(self) -> int:
        """Tokens of the longest response that has not ended."""
        return max(int(shard.index[slot]) for shard in self.shards for slot in shard.busy)

    def prompt_width(self) -> int:
        """Width for the longest prompt in the cache or next in line."""
        groups = [g for shard in self.shards for g in [*shard.entries, *list(shard.waiting)[:1]]]
        longest = max((int(self.length[g]) for g in groups if g is not None), default=1)
        return bucket(longest, self.prompts.tokens.shape[1])

    def response_widths(self) -> list[int]:
        """Widths of the response cache."""
        return response_widths(self.settings)


def response_widths(settings: RolloutSettings) -> list[int]:
    """Widths of the response cache that are compiled, ascending up to `max_tokens`."""
    widths = [settings.max_tokens]
    while widths[0] > CHUNK:
        widths.insert(0, -(-widths[0] // settings.width_ratio))
    return widths


def free_to_stop_at(shard: Shard) -> int:
    """Free decode slots at which decoding stops: some more than now when work waits, else those that let slots be removed."""
    slots, now = shard.num_slots, len(shard.free_slots)
    if now == slots:
        return slots + 1
    if shard.nothing_waits:
        cut = slots - slots // 4 if slots >= 4 * _FEWEST_SLOTS else slots
        return max(cut, now + 1)
    return min(slots, now + max(1, slots // 32))


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
