"""The rollout on the device: pure, jitted steps over a fixed set of slots. `scheduler.py` decides on the host what they do.

    prefill(params, tokens, length)        -> Prefilled      one prompt a way through the trunk
    insert(slots, prefilled, slot)         -> Slots          its keys and values into a prompt slot
    start(slots, lanes, rng, step)         -> Slots          lanes begin new responses
    decode(params, slots, until)           -> Slots, Drawn   up to `CHUNK` tokens for every lane, or until lanes are free
    resize(slots, ...)                     -> Slots          another number of lanes or positions

A way is one part of the batch axes of the mesh; it has Q prompt slots and N lanes of its own, so that nothing but the loop
condition crosses ways. A response ends with the first stop id, which is its last token, or when it is `max_tokens` long.
A lane that has ended draws nothing until it is started again.
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

from rest_jax.distributed import BATCH_AXES, num_data_shards
from rest_jax.models.cache import Layers
from rest_jax.models.config import DecoderConfig
from rest_jax.models.decoder import Decoder, logits, param_shardings, unstack_layers
from rest_jax.models.layouts import Cache, prompt_rows
from rest_jax.models.load import Policy
from rest_jax.rollout.sampling import draw, row_keys, uniforms
from rest_jax.types import Params, Sampling

CHUNK = 64  # tokens a lane that one call of `decode` draws at most


@dataclasses.dataclass(frozen=True)
class RolloutSettings:
    """The static side of a rollout. NewRequests and prompt slots are those of one way."""

    group_size: int
    max_tokens: int  # Tr: response tokens, the stop id included
    stop_ids: tuple[int, ...]
    pad_id: int
    sampling: Sampling
    lanes: int = 128
    prompt_slots: int | None = (
        None  # None: four times what whole groups need, so that stragglers hold up no lane
    )
    ratio: int = 2  # between the widths of the response cache that are compiled

    def sizes(self, groups: int) -> tuple[int, int]:
        """(prompt slots, lanes) of a way that has `groups` groups to sample."""
        lanes = min(self.lanes, groups * self.group_size)
        needed = -(-lanes // self.group_size)
        slots = self.prompt_slots or needed * (1 if self.group_size == 1 else 4)
        return min(slots, groups), lanes


@struct.dataclass
class Slots:
    """What the device holds between calls."""

    cache: Cache
    prompt_hidden: Float[Array, "W Q D"]  # predicts the first token after each prompt
    hidden: Float[Array, "W N D"]  # predicts the next token of each lane
    key: Key[Array, "W N"]
    limit: Int[Array, "W N"]  # tokens of a lane's response at most
    alive: Bool[Array, "W N"]


class Prefilled(NamedTuple):
    """One prompt a way after the trunk."""

    k: Layers  # a layer: [W T K H]
    v: Layers
    hidden: Float[Array, "W D"]
    length: Int[Array, " W"]


class NewRequests(NamedTuple):
    """New responses: lane n of way w continues the prompt in `prompt_slot` as `sample` of prompt `row`, where `new`."""

    new: Bool[Array, "W N"]
    prompt_slot: Int[Array, "W N"]
    row: Int[Array, "W N"]
    sample: Int[Array, "W N"]
    limit: Int[Array, "W N"]


class Drawn(NamedTuple):
    """What a call of `decode` drew: `count[w, n]` tokens in each lane, the first entries of its row; `alive` after it."""

    token: Int[Array, "W N CHUNK"]
    logp: Float[Array, "W N CHUNK"]
    entropy: Float[Array, "W N CHUNK"]
    gini: Float[Array, "W N CHUNK"]
    count: Int[Array, "W N"]
    alive: Bool[Array, "W N"]
    steps: Int[Array, ""]


def empty_slots(
    cfg: DecoderConfig,
    ways: int,
    group_size: int,
    *,
    prompt_slots: int,
    lanes: int,
    prompt_width: int,
    response_width: int,
) -> Slots:
    """Slots without prompts or responses."""
    n, q = lanes, prompt_slots

    def layers(*shape: int) -> Layers:
        shape = (ways, shape[0], cfg.n_kv_heads, shape[1], cfg.head_dim)
        if cfg.layers == "scan":
            return jnp.zeros((cfg.n_layers, *shape), cfg.dtype)
        return tuple(jnp.zeros(shape, cfg.dtype) for _ in range(cfg.n_layers))

    lane = jnp.zeros((ways, n), jnp.int32)
    cache = Cache(
        prompt_k=layers(q, prompt_width),
        prompt_v=layers(q, prompt_width),
        response_k=layers(n, response_width),
        response_v=layers(n, response_width),
        prompt_length=jnp.zeros((ways, q), jnp.int32),
        index=lane,
        prompt_slot=lane,
        member=lane,
        members=jnp.zeros((ways, q, group_size), jnp.int32),
    )
    return Slots(
        cache=cache,
        prompt_hidden=jnp.zeros((ways, q, cfg.d_model), cfg.dtype),
        hidden=jnp.zeros((ways, n, cfg.d_model), cfg.dtype),
        key=jax.random.split(jax.random.key(0), (ways, n)),
        limit=lane,
        alive=lane > 0,
    )


def prefill(
    params: Params, tokens: Int[Array, "W T"], length: Int[Array, " W"], *, decoder: Decoder
) -> Prefilled:
    """Runs one right-padded prompt a way through the trunk."""
    with jax.named_scope("prefill"):
        layout, positions = prompt_rows(tokens, length)
        out: Any = decoder.apply({"params": params}, tokens, positions, layout, return_kv=True)
        hidden, (k, v) = out
        last = jnp.take_along_axis(hidden, (length - 1)[:, None, None], axis=1)[:, 0]
        return Prefilled(k, v, last, length)


def insert(slots: Slots, prefilled: Prefilled, slot: Int[Array, " W"]) -> Slots:
    """Puts the prompts into prompt slot `slot` of each way; slot Q: nowhere."""
    with jax.named_scope("insert"):
        cache = slots.cache.put_prompt(slot, prefilled.k, prefilled.v, prefilled.length)
        way = jnp.arange(slot.shape[0])
        hidden = slots.prompt_hidden.at[way, slot].set(prefilled.hidden, mode="drop")
        return dataclasses.replace(slots, cache=cache, prompt_hidden=hidden)


@jax.named_scope("start")
def start(slots: Slots, lanes: NewRequests, rng: Key[Array, ""], step: Int[Array, ""]) -> Slots:
    """NewRequests begin new responses; the others go on."""
    new, cache = lanes.new, slots.cache
    way, lane = jnp.indices(new.shape)
    own = jnp.take_along_axis(slots.prompt_hidden, lanes.prompt_slot[..., None], axis=1)
    slot = jnp.where(new, lanes.prompt_slot, cache.members.shape[1])  # elsewhere: dropped
    keys = row_keys(rng, step, lanes.row, lanes.sample)
    cache = dataclasses.replace(
        cache,
        index=jnp.where(new, 0, cache.index),
        prompt_slot=jnp.where(new, lanes.prompt_slot, cache.prompt_slot),
        member=jnp.where(new, lanes.sample, cache.member),
        members=cache.members.at[way, slot, lanes.sample].set(lane, mode="drop"),
    )
    return dataclasses.replace(
        slots,
        cache=cache,
        hidden=jnp.where(new[..., None], own, slots.hidden),
        key=jnp.where(new, keys, slots.key),
        limit=jnp.where(new, lanes.limit, slots.limit),
        alive=slots.alive | new,
    )


def decode(
    params: Params,
    slots: Slots,
    steps: Int[Array, ""],
    free: Int[Array, " W"],
    *,
    decoder: Decoder,
    settings: RolloutSettings,
) -> tuple[Slots, Drawn]:
    """At most `steps` (<= CHUNK) tokens for every lane; ends when some way w has `free[w]` lanes that draw nothing.

    Each turn draws from the hidden state at hand, then runs the trunk on the token drawn.
    """
    shape = slots.alive.shape
    uniform = uniforms(slots.key, slots.cache.index, CHUNK)
    nothing = jnp.zeros((CHUNK, *shape), jnp.float32)
    out = (jnp.full((CHUNK, *shape), settings.pad_id, jnp.int32), nothing, nothing, nothing)

    def going(carry):
        t, _, slots, _ = carry
        return (t < steps) & jnp.all(jnp.sum(~slots.alive, axis=1) < free)

    def turn(carry):
        t, count, slots, out = carry
        with jax.named_scope("head"):
            scores = logits(params, decoder.cfg, slots.hidden)
        with jax.named_scope("draw"):
            drawn = draw(scores, uniform[t], settings.sampling)
        out = tuple(x.at[t].set(y) for x, y in zip(out, drawn, strict=True))
        count = count + slots.alive
        token, cache = drawn[0], slots.cache
        stopped = jnp.isin(token, jnp.array(settings.stop_ids, jnp.int32))
        stopped = stopped | (cache.index + 1 >= slots.limit)
        with jax.named_scope("trunk"):
            hidden, cache = decoder.apply(
                {"params": params}, token, cache.positions, cache.layout, cache
            )
        slots = dataclasses.replace(slots, cache=cache, hidden=hidden, alive=slots.alive & ~stopped)
        return t + 1, count, slots, out

    with jax.named_scope("decode"):
        first = (jnp.int32(0), jnp.zeros(shape, jnp.int32), slots, out)
        steps, count, slots, out = jax.lax.while_loop(going, turn, first)
    token, logp, entropy, gini = (jnp.moveaxis(x, 0, 2) for x in out)
    return slots, Drawn(token, logp, entropy, gini, count, slots.alive, steps)


@jax.named_scope("resize")
def resize(
    slots: Slots, lanes: Int[Array, "W M"], *, prompt_width: int, response_width: int
) -> Slots:
    """The given lanes in the given order, and caches of other widths; what lies beyond a width is lost."""

    def width(x, size: int):
        if x.shape[-2] >= size:
            return x[..., :size, :]
        return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, size - x.shape[-2]), (0, 0)])

    def take(x):
        return jax.vmap(lambda part, index: part[index])(x, lanes)

    def responses(x):
        x = width(x, response_width)
        return jax.vmap(take)(x) if x.ndim == 6 else take(x)  # stacked layers: one by one

    cache = slots.cache
    old, kept = cache.index.shape[1], jnp.arange(lanes.shape[1])
    moved = jax.vmap(lambda to: jnp.zeros(old, jnp.int32).at[to].set(kept))(lanes)
    cache = dataclasses.replace(
        cache,
        prompt_k=jax.tree.map(lambda x: width(x, prompt_width), cache.prompt_k),
        prompt_v=jax.tree.map(lambda x: width(x, prompt_width), cache.prompt_v),
        response_k=jax.tree.map(responses, cache.response_k),
        response_v=jax.tree.map(responses, cache.response_v),
        index=take(cache.index),
        prompt_slot=take(cache.prompt_slot),
        member=take(cache.member),
        members=jax.vmap(lambda table, to: to[table])(cache.members, moved),
    )
    return dataclasses.replace(
        slots,
        cache=cache,
        hidden=take(slots.hidden),
        key=take(slots.key),
        limit=take(slots.limit),
        alive=take(slots.alive),
    )


class Engine(NamedTuple):
    """The jitted functions; arrays that lead with W are sharded over the ways, the slots are donated."""

    empty: Callable[..., Slots]
    prefill: Callable[..., Prefilled]
    insert: Callable[..., Slots]
    start: Callable[..., Slots]
    decode: Callable[..., tuple[Slots, Drawn]]
    resize: Callable[..., Slots]
    ways: int


def make_engine(
    decoder: Decoder, settings: RolloutSettings, mesh: Mesh, param_shardings: Params
) -> Engine:
    """jit of the steps on a mesh; weights in the rollout layout."""
    ways = num_data_shards(mesh)
    first = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    second = NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))
    everywhere = NamedSharding(mesh, PartitionSpec())
    layers = second if decoder.cfg.layers == "scan" else (first,) * decoder.cfg.n_layers
    cache = Cache(layers, layers, layers, layers, first, first, first, first, first)  # type: ignore[arg-type]
    at: Any = Slots(cache, first, first, first, first, first)  # type: ignore[arg-type]
    drawn: Any = Drawn(first, first, first, first, everywhere, everywhere, everywhere)  # type: ignore[arg-type]
    filled: Any = Prefilled(layers, layers, first, first)  # type: ignore[arg-type]

    return Engine(
        empty=jax.jit(
            functools.partial(empty_slots, decoder.cfg, ways, settings.group_size),
            static_argnames=("prompt_slots", "lanes", "prompt_width", "response_width"),
            out_shardings=at,
        ),
        prefill=jax.jit(
            functools.partial(prefill, decoder=decoder),
            in_shardings=(param_shardings, first, first),
            out_shardings=filled,
        ),
        insert=jax.jit(
            insert, in_shardings=(at, filled, first), out_shardings=at, donate_argnums=0
        ),
        start=jax.jit(
            start,
            in_shardings=(at, first, everywhere, everywhere),
            out_shardings=at,
            donate_argnums=0,
        ),
        decode=jax.jit(
            functools.partial(decode, decoder=decoder, settings=settings),
            in_shardings=(param_shardings, at, everywhere, first),
            out_shardings=(at, drawn),
            donate_argnums=1,
        ),
        resize=jax.jit(
            resize,
            static_argnames=("prompt_width", "response_width"),
            out_shardings=at,
        ),
        ways=ways,
    )


def make_cast(dtype: jnp.dtype, shardings: Params, *, unstack: bool) -> Callable[[Params], Params]:
    """jit of the cast-and-reshard from the train layout (float32 master) to the rollout layout, in which the layers of an
    unrolled decoder lie apart. `shardings` are those of the rollout layout.
    """

    def one(path, x):
        # Norm scales stay float32: the trainer multiplies by them in float32 too.
        return x if path[-1].key == "scale" else x.astype(dtype)

    def cast(params):
        params = jax.tree_util.tree_map_with_path(one, params)
        return unstack_layers(params) if unstack else params

    return jax.jit(cast, out_shardings=shardings)


def rollout_decoder(decoder: Decoder) -> Decoder:
    """The decoder of rollouts. On CPU its layers are written out: a loop over stacked weights would copy each layer's
    weights for every token.
    """
    layers = "unroll" if jax.default_backend() == "cpu" else "scan"
    return Decoder(dataclasses.replace(decoder.cfg, layers=layers, remat="none"))


def rollout_cast(policy: Policy) -> Callable[[Params], Params]:
    """Function from the train weights of a policy to its rollout weights (`make_cast`)."""
    cfg = rollout_decoder(policy.decoder).cfg
    shardings = param_shardings(cfg, policy.mesh, layout="rollout")
    return make_cast(cfg.dtype, shardings, unstack=cfg.layers == "unroll")
