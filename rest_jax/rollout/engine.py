"""The rollout on the device: pure, jitted functions over a fixed set of decode slots, which `scheduler.py` calls.

    prefill(params, tokens, length)           -> Prefilled           runs one prompt a data shard through the trunk
    insert(state, prefilled, entry)           -> DecodeState         puts its keys and values into a prompt cache entry
    start(state, requests, rng, step)         -> DecodeState         begins new responses in decode slots
    decode(params, state, steps, free)        -> DecodeState, Drawn  draws up to `CHUNK` tokens in every decode slot
    resize(state, kept, widths)               -> DecodeState         changes the number of decode slots and the widths

A data shard is one part of the batch axes of the mesh. It has Q prompt cache entries and N decode slots of its own, so that
nothing but the loop condition crosses shards. A response ends with the first stop id, which is its last token, or when it is
`limit` tokens long. A decode slot whose response has ended draws nothing until it is started again.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key, UInt

from rest_jax.distributed import (
    BATCH_AXES,
    batch_sharding,
    num_data_shards,
    platform,
    replicated,
)
from rest_jax.models.attention import prompt_rows
from rest_jax.models.cache import Cache, Layers, is_stacked
from rest_jax.models.config import DecoderConfig
from rest_jax.models.decoder import (
    Decoder,
    apply_routed,
    logits,
    param_shardings,
    unstack_layers,
)
from rest_jax.models.moe import compact
from rest_jax.models.policy import Policy
from rest_jax.rollout.sampling import draw, row_keys, uniforms
from rest_jax.types import AnyArray, Params, Sampling

CHUNK = 64  # tokens that one call of `decode` draws at most in a decode slot


@dataclasses.dataclass(frozen=True)
class RolloutSettings:
    """What is fixed for all rollouts of a sampler. Decode slots and prompt cache entries are those of one data shard."""

    group_size: int
    max_tokens: int  # Tr: response tokens, the stop id included
    stop_ids: tuple[int, ...]
    pad_id: int
    sampling: Sampling
    decode_slots: int = 128
    # None: four times what complete groups need, so that a group's last responses keep no slot waiting
    prompt_cache_entries: int | None = None
    width_ratio: int = 2  # between the widths of the response cache that are compiled
    record_routes: bool = False  # the experts of every token, for replay

    def sizes(self, groups: int) -> tuple[int, int]:
        """(prompt cache entries, decode slots) of a data shard that has `groups` groups to sample."""
        slots = min(self.decode_slots, groups * self.group_size)
        needed = -(-slots // self.group_size)
        entries = self.prompt_cache_entries or needed * (1 if self.group_size == 1 else 4)
        return min(entries, groups), slots


class Widths(NamedTuple):
    """Tokens that an entry of the prompt cache and a slot of the response cache hold."""

    prompt: int
    response: int


@struct.dataclass
class DecodeState:
    """What the device holds between calls."""

    cache: Cache
    prompt_hidden: Float[Array, "W Q D"]  # predicts the first token after each prompt
    hidden: Float[Array, "W N D"]  # predicts the next token of each decode slot
    key: Key[Array, "W N"]
    limit: Int[Array, "W N"]  # tokens of a slot's response at most
    alive: Bool[Array, "W N"]  # whether the slot has a response that has not ended


class Prefilled(NamedTuple):
    """One prompt a data shard after the trunk."""

    k: Layers  # a layer: [W T K H]
    v: Layers
    hidden: Float[AnyArray, "W D"]
    length: Int[AnyArray, " W"]
    routes: UInt[Array, "W T L k"] | None = None  # if they are recorded


class NewRequests(NamedTuple):
    """New responses: where `new`, decode slot n of shard w continues the prompt in `entry` as `sample` of prompt `row`."""

    new: Bool[AnyArray, "W N"]
    entry: Int[AnyArray, "W N"]
    row: Int[AnyArray, "W N"]
    sample: Int[AnyArray, "W N"]
    limit: Int[AnyArray, "W N"]


class Drawn(NamedTuple):
    """What a call of `decode` drew: `count[w, n]` tokens in each slot, the first elements of its row; `alive` after it."""

    token: Int[AnyArray, "W N CHUNK"]
    logp: Float[AnyArray, "W N CHUNK"]
    entropy: Float[AnyArray, "W N CHUNK"]
    gini: Float[AnyArray, "W N CHUNK"]
    count: Int[AnyArray, "W N"]
    alive: Bool[AnyArray, "W N"]
    steps: Int[AnyArray, ""]
    routes: UInt[AnyArray, "W N CHUNK L k"] | None = None  # if they are recorded


def empty_state(
    cfg: DecoderConfig, group_size: int, shards: int, entries: int, slots: int, widths: Widths
) -> DecodeState:
    """A state without prompts or responses; numbers of entries and slots are those of one data shard."""

    def layers(count: int, width: int) -> Layers:
        shape = (shards, count, cfg.n_kv_heads, width, cfg.head_dim)
        if cfg.layers == "scan":
            return jnp.zeros((cfg.n_layers, *shape), cfg.dtype)
        return tuple(jnp.zeros(shape, cfg.dtype) for _ in range(cfg.n_layers))

    zero = jnp.zeros((shards, slots), jnp.int32)
    cache = Cache(
        prompt_k=layers(entries, widths.prompt),
        prompt_v=layers(entries, widths.prompt),
        response_k=layers(slots, widths.response),
        response_v=layers(slots, widths.response),
        prompt_length=jnp.zeros((shards, entries), jnp.int32),
        index=zero,
        entry=zero,
        member=zero,
        members=jnp.zeros((shards, entries, group_size), jnp.int32),
    )
    return DecodeState(
        cache=cache,
        prompt_hidden=jnp.zeros((shards, entries, cfg.d_model), cfg.dtype),
        hidden=jnp.zeros((shards, slots, cfg.d_model), cfg.dtype),
        key=jax.random.split(jax.random.key(0), (shards, slots)),
        limit=zero,
        alive=zero > 0,
    )


def prefill(
    params: Params,
    tokens: Int[Array, "W T"],
    length: Int[Array, " W"],
    *,
    decoder: Decoder,
    settings: RolloutSettings,
) -> Prefilled:
    """Runs one right-padded prompt a data shard through the trunk."""
    with jax.named_scope("prefill"):
        layout, positions = prompt_rows(tokens, length)
        hidden, (k, v), router = apply_routed(
            decoder, params, tokens, positions, layout, return_kv=True
        )
        last = jnp.take_along_axis(hidden, (length - 1)[:, None, None], axis=1)[:, 0]
        routes = None
        if router is not None and settings.record_routes:
            routes = compact(router.chosen, decoder.cfg)
        return Prefilled(k, v, last, length, routes)


@jax.named_scope("insert")
def insert(state: DecodeState, prefilled: Prefilled, entry: Int[Array, " W"]) -> DecodeState:
    """Puts a prompt into prompt cache entry `entry` of each data shard; entry Q drops it."""
    cache = state.cache.put_prompt(entry, prefilled.k, prefilled.v, prefilled.length)
    shard = jnp.arange(entry.shape[0])
    hidden = state.prompt_hidden.at[shard, entry].set(prefilled.hidden, mode="drop")
    return dataclasses.replace(state, cache=cache, prompt_hidden=hidden)


@jax.named_scope("start")
def start(
    state: DecodeState, requests: NewRequests, rng: Key[Array, ""], step: Int[Array, ""]
) -> DecodeState:
    """Begins the new responses; the other decode slots are left as they are."""
    new, cache = requests.new, state.cache
    shard, slot = jnp.indices(new.shape)
    own = jnp.take_along_axis(state.prompt_hidden, requests.entry[..., None], axis=1)
    entry = jnp.where(
        new, requests.entry, cache.members.shape[1]
    )  # not new: out of bounds, dropped
    keys = row_keys(rng, step, requests.row, requests.sample)
    cache = dataclasses.replace(
        cache,
        index=jnp.where(new, 0, cache.index),
        entry=jnp.where(new, requests.entry, cache.entry),
        member=jnp.where(new, requests.sample, cache.member),
        members=cache.members.at[shard, entry, requests.sample].set(slot, mode="drop"),
    )
    return dataclasses.replace(
        state,
        cache=cache,
        hidden=jnp.where(new[..., None], own, state.hidden),
        key=jnp.where(new, keys, state.key),
        limit=jnp.where(new, requests.limit, state.limit),
        alive=state.alive | new,
    )


def decode(
    params: Params,
    state: DecodeState,
    steps: Int[Array, ""],
    free: Int[Array, " W"],
    *,
    decoder: Decoder,
    settings: RolloutSettings,
) -> tuple[DecodeState, Drawn]:
    """Draws at most `steps` (<= CHUNK) tokens in every decode slot; ends when `free[w]` slots of some shard w draw nothing.

    Each step draws from the hidden state at hand, then runs the trunk on the token drawn.
    """
    shape = state.alive.shape
    uniform = uniforms(state.key, state.cache.index, CHUNK)
    zero = jnp.zeros((CHUNK, *shape), jnp.float32)
    out: Any = (jnp.full((CHUNK, *shape), settings.pad_id, jnp.int32), zero, zero, zero)
    if settings.record_routes:
        routes = token_routes(decoder.cfg)
        out = (*out, jnp.zeros((CHUNK, *shape, *routes.shape), routes.dtype))

    def unfinished(carry):
        t, _, state, _ = carry
        return (t < steps) & jnp.all(jnp.sum(~state.alive, axis=1) < free)

    def decode_step(carry):
        t, count, state, out = carry
        with jax.named_scope("head"):
            scores = logits(params, decoder.cfg, state.hidden)
        with jax.named_scope("draw"):
            drawn = draw(scores, uniform[t], settings.sampling)
        count = count + state.alive
        token, cache = drawn[0], state.cache
        stopped = jnp.isin(token, jnp.array(settings.stop_ids, jnp.int32))
        stopped = stopped | (cache.index + 1 >= state.limit)
        with jax.named_scope("trunk"):
            hidden, cache, router = apply_routed(
                decoder, params, token, cache.positions, cache.layout, cache
            )
        if settings.record_routes:
            assert router is not None  # only models with experts are asked to
            drawn = (*drawn, compact(router.chosen, decoder.cfg))
        out = tuple(x.at[t].set(y) for x, y in zip(out, drawn, strict=True))
        state = dataclasses.replace(state, cache=cache, hidden=hidden, alive=state.alive & ~stopped)
        return t + 1, count, state, out

    with jax.named_scope("decode"):
        first = (jnp.int32(0), jnp.zeros(shape, jnp.int32), state, out)
        steps, count, state, out = jax.lax.while_loop(unfinished, decode_step, first)
    token, logp, entropy, gini, *routes = (jnp.moveaxis(x, 0, 2) for x in out)
    return state, Drawn(token, logp, entropy, gini, count, state.alive, steps, *routes)


@jax.named_scope("resize")
def resize(state: DecodeState, kept: Int[Array, "W M"], widths: Widths) -> DecodeState:
    """Keeps the given decode slots, in the given order, in caches of other widths; what lies beyond a width is lost."""

    def to_width(x, width: int):
        if x.shape[-2] >= width:
            return x[..., :width, :]
        return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, width - x.shape[-2]), (0, 0)])

    def take(x):
        return jax.vmap(lambda part, index: part[index])(x, kept)

    def take_responses(x):
        x = to_width(x, widths.response)
        return jax.vmap(take)(x) if is_stacked(x) else take(x)

    cache = state.cache
    old, new = cache.index.shape[1], jnp.arange(kept.shape[1])
    renumbered = jax.vmap(lambda slots: jnp.zeros(old, jnp.int32).at[slots].set(new))(kept)
    cache = dataclasses.replace(
        cache,
        prompt_k=jax.tree.map(lambda x: to_width(x, widths.prompt), cache.prompt_k),
        prompt_v=jax.tree.map(lambda x: to_width(x, widths.prompt), cache.prompt_v),
        response_k=jax.tree.map(take_responses, cache.response_k),
        response_v=jax.tree.map(take_responses, cache.response_v),
        index=take(cache.index),
        entry=take(cache.entry),
        member=take(cache.member),
        members=jax.vmap(lambda members, to: to[members])(cache.members, renumbered),
    )
    return dataclasses.replace(
        state,
        cache=cache,
        hidden=take(state.hidden),
        key=take(state.key),
        limit=take(state.limit),
        alive=take(state.alive),
    )


class Engine(NamedTuple):
    """The jitted functions. Arrays that lead with W are split over data shards; `insert`, `start`, `decode` donate the state."""

    empty_state: Callable[..., DecodeState]
    prefill: Callable[..., Prefilled]
    insert: Callable[..., DecodeState]
    start: Callable[..., DecodeState]
    decode: Callable[..., tuple[DecodeState, Drawn]]
    resize: Callable[..., DecodeState]
    state_shardings: DecodeState
    num_shards: int
    routes: jax.ShapeDtypeStruct | None = None  # [L k], of a token's recorded experts


def make_engine(decoder: Decoder, settings: RolloutSettings, mesh: Mesh) -> Engine:
    """jit of the functions above on a mesh; weights are in the rollout layout."""
    shards = num_data_shards(mesh)
    empty = functools.partial(empty_state, decoder.cfg, settings.group_size, shards)
    abstract = jax.eval_shape(lambda: empty(1, 1, Widths(1, 1)))
    rows, copied = batch_sharding(mesh), replicated(mesh)
    state: Any = jax.tree.map(lambda _: rows, abstract)
    kv = jax.tree.map(lambda x: cache_sharding(x, mesh), abstract.cache.layers)
    state = dataclasses.replace(state, cache=dataclasses.replace(state.cache, **kv._asdict()))
    params = param_shardings(decoder.cfg, mesh, layout="rollout")
    routes: Any = rows if settings.record_routes else None
    prefilled: Any = Prefilled(k=kv.prompt_k, v=kv.prompt_v, hidden=rows, length=rows)
    drawn: Any = Drawn(rows, rows, rows, rows, count=copied, alive=copied, steps=copied)
    return Engine(
        empty_state=jax.jit(empty, static_argnums=(0, 1, 2), out_shardings=state),
        prefill=jax.jit(
            functools.partial(prefill, decoder=decoder, settings=settings),
            in_shardings=(params, rows, rows),
            out_shardings=prefilled._replace(routes=routes),
        ),
        insert=jax.jit(
            insert, in_shardings=(state, prefilled, rows), out_shardings=state, donate_argnums=0
        ),
        start=jax.jit(
            start, in_shardings=(state, rows, copied, copied), out_shardings=state, donate_argnums=0
        ),
        decode=jax.jit(
            functools.partial(decode, decoder=decoder, settings=settings),
            in_shardings=(params, state, copied, rows),
            out_shardings=(state, drawn._replace(routes=routes)),
            donate_argnums=1,
        ),
        resize=jax.jit(resize, static_argnums=2, out_shardings=state),
        state_shardings=state,
        num_shards=shards,
        routes=token_routes(decoder.cfg) if settings.record_routes else None,
    )


def token_routes(cfg: DecoderConfig) -> jax.ShapeDtypeStruct:
    """[L k]: the recorded experts of a token."""
    chosen = jax.ShapeDtypeStruct((cfg.n_layers, cfg.experts_per_token), jnp.int32)
    return jax.eval_shape(functools.partial(compact, cfg=cfg), chosen)


def cache_sharding(x: jax.ShapeDtypeStruct, mesh: Mesh) -> NamedSharding:
    """Sharding of keys or values [W N K S H], of stacked layers [L W N K S H], and of those of new prompts, [L] W T K H: by
    data shard and by head. Heads that the tensor axis does not divide are on all of its devices, as their weights are.
    """
    before: Any = (None,) if is_stacked(x) else ()
    heads = "tensor" if x.shape[-3] % mesh.shape["tensor"] == 0 else None
    return NamedSharding(mesh, PartitionSpec(*before, BATCH_AXES, None, heads))


def rollout_decoder(policy: Policy) -> Decoder:
    """The decoder of rollouts. On CPU and GPU its layers are unrolled: a loop over stacked weights would copy each layer's
    weights and caches for every token. On TPU it is the other way round (docs/performance.md).
    """
    layers = "scan" if platform(policy.mesh) == "tpu" else "unroll"
    return Decoder(dataclasses.replace(policy.config, layers=layers, remat="none"))


def rollout_cast(policy: Policy) -> Callable[[Params], Params]:
    """The cast from a policy's train weights (float32 masters, train layout) to its rollout weights: in the compute dtype, in
    the rollout layout on the rollout mesh, with the layers of an unrolled decoder apart. `cast_programs` is what it runs.
    """
    programs = cast_programs(policy)
    unrolled = rollout_decoder(policy).cfg.layers == "unroll"

    def cast(params: Params) -> Params:
        params = jax.tree.map(lambda program, x: program(x), programs, params)
        return unstack_layers(params) if unrolled else params

    return cast


def cast_programs(policy: Policy) -> Any:
    """The jitted cast of each parameter, in the tree of the train weights; of an unrolled decoder a stacked parameter becomes a
    tuple of layers. One program for all would hold a second copy of the weights on every device.
    """
    cfg, mesh = rollout_decoder(policy).cfg, policy.rollout_mesh
    stacked = dataclasses.replace(cfg, layers="scan")

    def program(path: tuple[Any, ...], sharding: NamedSharding) -> Callable[[jax.Array], Any]:
        cast = functools.partial(_cast_leaf, cfg.dtype, path)
        if cfg.layers == "scan" or path[0].key != "blocks":
            return jax.jit(cast, out_shardings=sharding)
        layer = NamedSharding(mesh, PartitionSpec(*sharding.spec[1:]))
        return jax.jit(lambda x: tuple(cast(x)), out_shardings=(layer,) * cfg.n_layers)

    where = param_shardings(stacked, mesh, layout="rollout")
    return jax.tree_util.tree_map_with_path(program, where)


def _cast_leaf(dtype: Any, path: tuple[Any, ...], x: jax.Array) -> jax.Array:
    """Norm scales stay float32: the trainer multiplies by them in float32 too."""
    return x if path[-1].key == "scale" else x.astype(dtype)
