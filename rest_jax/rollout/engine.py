"""The rollout on the device: pure, jitted functions over a fixed set of decode slots, which `scheduler.py` calls.

    prefill(params, state, rows, prefix)      -> DecodeState, routes  runs a row of prompts a data shard, writes their pages
    decode(params, state, call, rng, step)    -> DecodeState, Drawn   draws up to `page` tokens in every decode slot
    keep(slots, members, kept)                -> Slots, members       fewer decode slots
    resize(state, slots, entries)             -> Slots, members, prompt_length, prompt_hidden   other numbers of both

A data shard is one part of the batch axes of the mesh. It has a pool of pages, Q prompt cache entries and N decode slots of its
own, so that nothing but the loop condition crosses shards. Which pages hold what, the scheduler says with every call; a decode
slot whose response ends takes the next of the call's queue at once. A response ends with the first stop id, which is its
last token, or when it is `limit` tokens long.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key

from rest_jax.distributed import (
    BATCH_AXES,
    batch_sharding,
    num_data_shards,
    replicated,
)
from rest_jax.models.cache import (
    Cache,
    DecodeLayout,
    GatheredKeys,
    Layers,
    PagedKeys,
    PageTable,
    Pool,
    PrefixedRows,
    RowLayout,
    is_stacked,
)
from rest_jax.models.config import DecoderConfig
from rest_jax.models.decoder import (
    Decoder,
    apply_routed,
    logits,
    param_shardings,
)
from rest_jax.models.moe import compact
from rest_jax.models.paged_attention import gather_pages, list_visits
from rest_jax.rollout.sampling import (
    RequestSampling,
    draw,
    draw_each,
    likeliest,
    row_keys,
    uniforms,
)
from rest_jax.types import AnyArray, Params, Sampling

PAGE = 64  # tokens of a page, and those that one call of `decode` draws at most in a decode slot
NOBODY = -1  # owner of a decode slot that draws nothing
_FEWEST_SLOTS = 8  # decode slots are not removed below this number
_USUAL_TOKENS = 1024  # of a prompt or response, for which the pool has room by default


class Sizes(NamedTuple):
    """What a data shard holds in a rollout."""

    entries: int  # Q: prompts in the cache
    slots: int  # N: responses decoded at once
    pages: int  # P: of the pool
    prompt_pages: int  # of an entry at most
    response_pages: int  # of a response at most

    @property
    def slot_counts(self) -> tuple[int, ...]:
        """Decode slots that are left when there is less and less to do, descending. Each is compiled."""
        return _slot_counts(self.slots)


def _slot_counts(slots: int) -> tuple[int, ...]:
    fewer = -(-slots // 4)
    return (slots, *(_slot_counts(fewer) if slots >= 4 * _FEWEST_SLOTS else ()))


@dataclasses.dataclass(frozen=True)
class RolloutSettings:
    """What is fixed for all rollouts of a sampler. Decode slots, entries and tokens are those of one data shard."""

    group_size: int
    max_tokens: int  # Tr: response tokens, the stop id included
    stop_ids: tuple[int, ...]
    pad_id: int
    sampling: Sampling | None  # None: each request says
    decode_slots: int = 128
    # None: four times what complete groups need, so that a group's last responses keep no slot waiting
    prompt_cache_entries: int | None = None
    # None: what all of them need, but no more than 1,024 tokens for each prompt and each response
    cache_tokens: int | None = None
    page: int = PAGE
    record_routes: bool = False  # the experts of every token, for replay
    listed: int = 0  # likeliest words that are listed with a token, where a request wants them

    def sizes(self, groups: int, prompt_tokens: int) -> Sizes:
        """Of a data shard that has `groups` groups to sample, with prompts of `prompt_tokens` at most."""
        slots = min(self.decode_slots, groups * self.group_size)
        needed = -(-slots // self.group_size)
        entries = self.prompt_cache_entries or needed * (1 if self.group_size == 1 else 4)
        entries = min(entries, groups)
        prompt = -(-prompt_tokens // self.page)
        # A response begins anywhere in its first page, and a call may end before its page is full, to remove slots.
        response = -(-self.max_tokens // self.page) + len(_slot_counts(slots))
        usual = -(-_USUAL_TOKENS // self.page)
        pages = entries * min(prompt, usual) + slots * min(response, usual + 1)
        if self.cache_tokens is not None:
            pages = -(-self.cache_tokens // self.page)
        return Sizes(entries, slots, max(pages, prompt + response), prompt, response)


@struct.dataclass
class DecodeState:
    """What the device holds between calls."""

    pool: Pool
    prompt_length: Int[Array, "W Q"]  # int32
    prompt_hidden: Float[Array, "W Q D"]  # predicts the first token after each prompt
    members: Int[Array, "W Q G"]  # int32: the decode slot of each response to a prompt
    slots: "Slots"


@struct.dataclass
class Slots:
    """The decode slots."""

    owner: Int[Array, "W N"]  # int32: the response in a decode slot; NOBODY: it draws nothing
    hidden: Float[Array, "W N D"]  # predicts the next token of each decode slot
    key: Key[Array, "W N"]
    entry: Int[Array, "W N"]  # int32
    member: Int[Array, "W N"]  # int32: number of the response in its group
    index: Int[Array, "W N"]  # int32: tokens drawn
    limit: Int[Array, "W N"]  # int32: tokens of a slot's response at most
    sampling: RequestSampling | None = None  # [W N]


class PromptRows(NamedTuple):
    """A row of prompts a data shard, each from the beginning of a page on; T = pages x page, up to E prompts."""

    tokens: Int[AnyArray, "W T"]
    until: Int[AnyArray, "W T"]  # see RowLayout
    position: Int[AnyArray, "W T"]
    page: Int[AnyArray, "W B"]  # where each page of the row goes; P: nowhere
    entry: Int[AnyArray, "W E"]  # Q: there is no such prompt
    last: Int[AnyArray, "W E"]  # of the row: the prompt's last token
    length: Int[AnyArray, "W E"]  # of the prompt, what its pages hold already included


class Prefix(NamedTuple):
    """What the prompts of a row continue: pages with the keys and values of their first tokens, each once."""

    table: PageTable  # [W 1 M]: of all prompts of the row
    shared: Bool[AnyArray, "W E M"]  # whether a prompt of the row continues the page
    prompt: Int[AnyArray, "W T"]  # whose token it is


class Requests(NamedTuple):
    """Responses that wait: `owner` continues the prompt in `entry`, as `sample` of prompt `row`."""

    owner: Int[AnyArray, "W M"]
    entry: Int[AnyArray, "W M"]
    row: Int[AnyArray, "W M"]
    sample: Int[AnyArray, "W M"]
    limit: Int[AnyArray, "W M"]
    sampling: RequestSampling | None = None  # [W M]


class DecodeCall(NamedTuple):
    """What the scheduler says with a call of `decode`."""

    queue: Requests
    queued: Int[AnyArray, " W"]
    prompts: PageTable  # [W Q M]
    responses: PageTable  # [W N M]
    running: Bool[AnyArray, "W N"]  # slots whose response continues; the others' are dropped
    next_page: Int[AnyArray, "W N"]  # where the tokens drawn go; P: the slot starts no response
    # A call ends when no data shard has more responses than this, and none waits in a queue.
    enough: Int[AnyArray, " W"]


class Drawn(NamedTuple):
    """What a call of `decode` drew: at each of its steps the token of every slot that has an owner, its `index`-th."""

    owner: Int[AnyArray, "W page N"]
    index: Int[AnyArray, "W page N"]
    token: Int[AnyArray, "W page N"]
    logp: Float[AnyArray, "W page N"]
    entropy: Float[AnyArray, "W page N"]
    gini: Float[AnyArray, "W page N"]
    routes: Any  # UInt [W page N L k], if they are recorded
    # the likeliest words, Int [W page N listed], and their log-probs; None: no request wants them
    likeliest: tuple[Int[AnyArray, "W page N k"], Float[AnyArray, "W page N k"]] | None
    # on every process
    running: Int[AnyArray, "W N"]  # owners after the call
    # the step at which the slot's response began, if in this call; else 0
    begin: Int[AnyArray, "W N"]
    started: Int[AnyArray, " W"]  # requests taken from the queue
    tokens: Int[AnyArray, " W"]  # drawn by a data shard
    steps: Int[AnyArray, ""]


def empty_state(
    cfg: DecoderConfig, settings: RolloutSettings, shards: int, sizes: Sizes
) -> DecodeState:
    """A state without prompts or responses."""
    group_size, page = settings.group_size, settings.page
    slot = jnp.zeros((shards, sizes.slots), jnp.int32)
    entries = (shards, sizes.entries)
    pool = Pool(*(empty_pages(cfg, shards, sizes.pages, page) for _ in "kv"))
    return DecodeState(
        pool=pool,
        prompt_length=jnp.zeros(entries, jnp.int32),
        prompt_hidden=jnp.zeros((*entries, cfg.d_model), cfg.dtype),
        members=jnp.zeros((*entries, group_size), jnp.int32),
        slots=Slots(
            owner=slot + NOBODY,
            hidden=jnp.zeros((*slot.shape, cfg.d_model), cfg.dtype),
            key=jax.random.split(jax.random.key(0), slot.shape),
            entry=slot,
            member=slot,
            index=slot,
            limit=slot,
            sampling=None if settings.sampling else RequestSampling.plain(slot.shape),
        ),
    )


def empty_pages(cfg: DecoderConfig, shards: int, pages: int, page: int) -> Layers:
    """Keys or values of all layers, zero."""
    shape = (shards, pages, cfg.n_kv_heads, page, cfg.head_dim)
    if cfg.layers == "scan":
        return jnp.zeros((cfg.n_layers, *shape), cfg.dtype)
    return tuple(jnp.zeros(shape, cfg.dtype) for _ in range(cfg.n_layers))


def prefill(
    params: Params,
    state: DecodeState,
    rows: PromptRows,
    prefix: Prefix | None = None,
    *,
    decoder: Decoder,
    settings: RolloutSettings,
) -> tuple[DecodeState, Any]:
    """Runs the prompts through the trunk and puts them into their pages and entries. With them the experts of their tokens,
    UInt [W T L k], if they are recorded. With `prefix`, the row holds only what comes behind it.
    """
    with jax.named_scope("prefill"):
        width = rows.tokens.shape[1]
        layout: Any = RowLayout(rows.until, width * (width + 1) // 2)
        pages = None
        if prefix is not None:
            read = prefix.table.rows(settings.page)[:, 0]
            shared = jnp.repeat(prefix.shared, settings.page, axis=2)
            layout = PrefixedRows(rows.until, prefix.prompt, shared & read[:, None])
            pages = Pool(*(gather_pages(layers, prefix.table) for layers in state.pool))
        hidden, (k, v), router = apply_routed(
            decoder, params, rows.tokens, rows.position, layout, pages, return_kv=True
        )
        last = jnp.take_along_axis(hidden, rows.last[..., None], axis=1)
        routes = None
        if router is not None and settings.record_routes:
            routes = compact(router.chosen, decoder.cfg)

    def by_page(x):  # [W T K H] -> [W T/S K S H], of all layers or of one
        heads = x.shape[-2:]
        x = x.reshape(*x.shape[:-3], -1, settings.page, *heads)
        return jnp.swapaxes(x, -3, -2)

    with jax.named_scope("insert"):
        shard = jnp.arange(rows.entry.shape[0])[:, None]
        k, v = jax.tree.map(by_page, (k, v))
        return dataclasses.replace(
            state,
            pool=state.pool.write(rows.page, k, v),
            prompt_length=state.prompt_length.at[shard, rows.entry].set(rows.length, mode="drop"),
            prompt_hidden=state.prompt_hidden.at[shard, rows.entry].set(last, mode="drop"),
        ), routes


def start(
    state: DecodeState, call: DecodeCall, keys: Key[Array, "W M"], taken: Int[Array, " W"]
) -> tuple[Slots, Int[Array, "W Q G"], Bool[Array, "W N"]]:
    """Gives the next requests of the queue, of which `taken` are gone, to the decode slots that are free. Returns slots, members
    and which slots are new.
    """
    slots, members = state.slots, state.members
    free = (slots.owner == NOBODY) & (call.next_page < num_pages(state.pool))
    at = taken[:, None] + jnp.cumsum(free, axis=1) - 1
    new = free & (at < call.queued[:, None])
    at = jnp.minimum(at, call.queue.owner.shape[1] - 1)

    def begin() -> tuple[Slots, jax.Array]:
        owner, entry, _, sample, limit, sampling = jax.tree.map(
            lambda x: jnp.take_along_axis(x, at, axis=1), call.queue
        )
        shard, slot = jnp.indices(new.shape)
        nowhere = jnp.where(new, entry, members.shape[1])  # not new: out of bounds, dropped
        first = Slots(
            owner=owner,
            hidden=jnp.take_along_axis(state.prompt_hidden, entry[..., None], axis=1),
            key=jnp.take_along_axis(keys, at, axis=1),
            entry=entry,
            member=sample,
            index=jnp.zeros_like(entry),
            limit=limit,
            sampling=sampling,
        )
        begun = jax.tree.map(
            lambda x, old: jnp.where(new.reshape(*new.shape, *(1,) * (x.ndim - 2)), x, old),
            first,
            slots,
        )
        return begun, members.at[shard, nowhere, sample].set(slot, mode="drop")

    return *jax.lax.cond(jnp.any(new), begin, lambda: (slots, members)), new


def num_pages(pool: Pool) -> int:
    """Pages of a data shard."""
    return jax.tree.leaves(pool)[0].shape[-4]


def decode(
    params: Params,
    state: DecodeState,
    call: DecodeCall,
    rng: Key[Array, ""],
    step: Int[Array, ""],
    *,
    decoder: Decoder,
    settings: RolloutSettings,
) -> tuple[DecodeState, Drawn]:
    """Draws a page of tokens in every decode slot, and puts it where `next_page` says.

    Each step gives free slots the next responses, draws from the hidden states at hand, then runs the trunk on the tokens drawn.
    """
    cfg, shape = decoder.cfg, call.running.shape
    owner = jnp.where(call.running, state.slots.owner, NOBODY)
    state = dataclasses.replace(state, slots=dataclasses.replace(state.slots, owner=owner))
    number, statistic = (jnp.zeros((settings.page, *shape), t) for t in (jnp.int32, jnp.float32))
    out: dict[str, Any] = {"owner": number + NOBODY, "index": number, "token": number}
    out |= {"logp": statistic, "entropy": statistic, "gini": statistic}
    if settings.record_routes:
        routes = token_routes(cfg)
        out["routes"] = jnp.zeros((*number.shape, *routes.shape), routes.dtype)
    if settings.listed:
        words = jnp.zeros((*number.shape, settings.listed))
        out["likeliest"] = words.astype(jnp.int32), words
    read, recent = _beginning(state.pool, call, cfg, settings.page)
    first_row = 0 if cfg.reads_pages else call.responses.page.shape[-1] * settings.page
    row = jnp.arange(settings.page)
    keys = row_keys(rng, step, call.queue.row, call.queue.sample)

    def unfinished(carry):
        t, state, _, progress, _ = carry
        queued = call.queued - progress["started"]
        left = jnp.sum(state.slots.owner != NOBODY, axis=1) + queued
        return (t < settings.page) & jnp.any((left > call.enough) | (queued > 0))

    def decode_step(carry):
        t, state, recent, progress, out = carry
        with jax.named_scope("start"):
            slots, members, new = start(state, call, keys, progress["started"])
            begin = jnp.where(new, t, progress["begin"])
            # what the slot's former response wrote is not read
            earlier = progress["earlier"] & ~new
            alive = slots.owner != NOBODY
        with jax.named_scope("head"):
            scores = logits(params, cfg, slots.hidden)
        with jax.named_scope("draw"):
            uniform = uniforms(slots.key, slots.index)
            if settings.sampling is not None:
                drawn = draw(scores, uniform, settings.sampling)
            else:
                assert slots.sampling is not None
                drawn = draw_each(scores, uniform, slots.sampling)
        stopped = jnp.isin(drawn[0], jnp.array(settings.stop_ids, jnp.int32))
        stopped = stopped | (slots.index + 1 >= slots.limit)
        made: dict[str, Any] = dict(zip(("token", "logp", "entropy", "gini"), drawn, strict=True))
        made |= {"owner": slots.owner, "index": slots.index}
        with jax.named_scope("trunk"):
            length = jnp.take_along_axis(state.prompt_length, slots.entry, axis=1)
            prompts = call.prompts.only(_has_running(slots, members.shape[1]))
            responses = call.responses.only(earlier & alive)
            if cfg.reads_pages:
                recent_rows = begin, jnp.where(alive, t, begin)
                read_keys: Any = PagedKeys(
                    list_visits(prompts), list_visits(responses, recent_rows)
                )
            else:
                drawn_here = (row >= begin[..., None]) & (row < t)
                seen = jnp.concatenate([responses.rows(settings.page), drawn_here], axis=-1)
                read_keys = GatheredKeys(prompts.rows(settings.page), seen)
            layout = DecodeLayout(
                read_keys,
                time=first_row + t,
                entry=slots.entry,
                member=slots.member,
                members=members,
            )
            hidden, cache, router = apply_routed(
                decoder, params, drawn[0], length + slots.index, layout, Cache(read, *recent)
            )
        if settings.record_routes:
            assert router is not None  # only models with experts are asked to
            made["routes"] = compact(router.chosen, cfg)
        if settings.listed:
            assert slots.sampling is not None
            wanted = jnp.any(slots.sampling.lists & alive)
            made["likeliest"] = likeliest(scores, settings.listed, wanted)
        progress = {
            "begin": begin,
            "earlier": earlier,
            "started": progress["started"] + jnp.sum(new, axis=1, dtype=jnp.int32),
            "tokens": progress["tokens"] + jnp.sum(alive, axis=1, dtype=jnp.int32),
        }
        out = jax.tree.map(lambda x, new: x.at[t].set(new), out, made)
        owner = jnp.where(stopped, NOBODY, slots.owner)
        slots = dataclasses.replace(slots, owner=owner, hidden=hidden, index=slots.index + 1)
        state = dataclasses.replace(state, slots=slots, members=members)
        return t + 1, state, (cache.recent_k, cache.recent_v), progress, out

    none = jnp.zeros(shape[0], jnp.int32)
    progress = {"begin": number[0], "earlier": owner != NOBODY, "started": none, "tokens": none}
    with jax.named_scope("decode"):
        first = (jnp.int32(0), state, recent, progress, out)
        steps, state, recent, progress, out = jax.lax.while_loop(unfinished, decode_step, first)
    with jax.named_scope("insert"):
        # those of responses that have ended, too: a later prompt may begin with them
        last = jax.tree.map(lambda x: x[..., -settings.page :, :], recent)
        state = dataclasses.replace(state, pool=state.pool.write(call.next_page, *last))
    drawn = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), out)
    return state, Drawn(
        **{"routes": None, "likeliest": None} | drawn,
        running=state.slots.owner,
        begin=progress["begin"],
        started=progress["started"],
        tokens=progress["tokens"],
        steps=steps,
    )


def _beginning(
    pool: Pool, call: DecodeCall, cfg: DecoderConfig, page: int
) -> tuple[Pool, tuple[Layers, Layers]]:
    """What a call of `decode` reads as the pool of its `Cache`, and its `recent` keys and values."""
    shards, slots = call.next_page.shape
    empty = empty_pages(cfg, shards, slots, page)
    if cfg.reads_pages:
        return pool, (empty, empty)
    earlier = (gather_pages(layers, call.responses) for layers in pool)
    k, v = (
        jax.tree.map(lambda *x: jnp.concatenate(x, axis=-2), layers, empty) for layers in earlier
    )
    return Pool(*(gather_pages(layers, call.prompts) for layers in pool)), (k, v)


def _has_running(slots: Slots, entries: int) -> Bool[Array, "W Q"]:
    """Which prompts have a response in a decode slot."""
    inside = slots.entry[..., None] == jnp.arange(entries)
    return jnp.any(inside & (slots.owner != NOBODY)[..., None], axis=1)


@jax.named_scope("keep")
def keep(
    slots: Slots, members: Int[Array, "W Q G"], kept: Int[Array, "W M"]
) -> tuple[Slots, Int[Array, "W Q G"]]:
    """Keeps the given decode slots, in the given order."""

    def take(x):
        return jax.vmap(lambda part, index: part[index])(x, kept)

    old, new = slots.owner.shape[1], jnp.arange(kept.shape[1])
    renumbered = jax.vmap(lambda slots: jnp.zeros(old, jnp.int32).at[slots].set(new))(kept)
    members = jax.vmap(lambda members, to: to[members])(members, renumbered)
    return jax.tree.map(take, slots), members


@jax.named_scope("resize")
def resize(
    state: DecodeState, kept: Int[Array, "W M"], entries: Int[Array, "W R"]
) -> tuple[Slots, Int[Array, "W R 1"], Int[Array, "W R"], Float[Array, "W R D"]]:
    """Keeps the given decode slots and prompt cache entries, in the given order: slots, members, prompt_length, prompt_hidden."""

    def take(x):
        return jax.vmap(lambda part, index: part[index])(x, entries)

    slots, members = keep(state.slots, state.members, kept)
    old, new = state.prompt_length.shape[1], jnp.arange(entries.shape[1])
    renumbered = jax.vmap(lambda entries: jnp.zeros(old, jnp.int32).at[entries].set(new))(entries)
    entry = jnp.take_along_axis(renumbered, slots.entry, axis=1)
    slots = dataclasses.replace(slots, entry=entry)
    return slots, *(take(x) for x in (members, state.prompt_length, state.prompt_hidden))


class Engine(NamedTuple):
    """The jitted functions. Arrays that lead with W are split over data shards; `prefill` and `decode` donate the state."""

    empty_state: Callable[[Sizes], DecodeState]
    prefill: Callable[..., tuple[DecodeState, Any]]
    decode: Callable[..., tuple[DecodeState, Drawn]]
    keep: Callable[..., tuple[Slots, jax.Array]]
    resize: Callable[..., tuple[Slots, jax.Array, jax.Array, jax.Array]]
    state_shardings: DecodeState
    num_shards: int
    gathers: bool  # pages: the fewer columns the tables have, the less `decode` does
    routes: jax.ShapeDtypeStruct | None = None  # [L k], of a token's recorded experts


def make_engine(decoder: Decoder, settings: RolloutSettings, mesh: Mesh) -> Engine:
    """jit of the functions above on a mesh; weights are in the rollout layout."""
    cfg, shards = decoder.cfg, num_data_shards(mesh)
    empty = functools.partial(empty_state, cfg, settings, shards)
    abstract = jax.eval_shape(lambda: empty(Sizes(1, 1, 1, 1, 1)))
    rows, copied = batch_sharding(mesh), replicated(mesh)
    state: Any = jax.tree.map(lambda _: rows, abstract)
    pool = jax.tree.map(lambda x: cache_sharding(x, mesh), abstract.pool)
    state = dataclasses.replace(state, pool=pool)
    params = param_shardings(cfg, mesh, layout="rollout")
    by_shard: Any = (rows,) * 8
    drawn = Drawn(*by_shard, *(copied,) * 5)
    fixed = {"decoder": decoder, "settings": settings}
    return Engine(
        empty_state=jax.jit(empty, static_argnums=0, out_shardings=state),
        prefill=jax.jit(
            functools.partial(prefill, **fixed),
            in_shardings=(params, state, rows, rows),
            out_shardings=(state, rows),
            donate_argnums=1,
        ),
        decode=jax.jit(
            functools.partial(decode, **fixed),
            in_shardings=(params, state, rows, copied, copied),
            out_shardings=(state, drawn),
            donate_argnums=1,
        ),
        keep=jax.jit(keep, in_shardings=rows, out_shardings=rows),
        resize=jax.jit(resize, in_shardings=(state, rows, rows), out_shardings=rows),
        state_shardings=state,
        num_shards=shards,
        gathers=not cfg.reads_pages,
        routes=token_routes(cfg) if settings.record_routes else None,
    )


def token_routes(cfg: DecoderConfig) -> jax.ShapeDtypeStruct:
    """[L k]: the recorded experts of a token."""
    chosen = jax.ShapeDtypeStruct((cfg.n_layers, cfg.experts_per_token), jnp.int32)
    return jax.eval_shape(functools.partial(compact, cfg=cfg), chosen)


def cache_sharding(x: jax.ShapeDtypeStruct, mesh: Mesh) -> NamedSharding:
    """Sharding of pages of keys or values [W P K S H], of stacked layers [L W P K S H]: by data shard and by head. Heads that
    the tensor axis does not divide are on all of its devices, as their weights are.
    """
    before: Any = (None,) if is_stacked(x) else ()
    heads = "tensor" if x.shape[-3] % mesh.shape["tensor"] == 0 else None
    return NamedSharding(mesh, PartitionSpec(*before, BATCH_AXES, None, heads))
