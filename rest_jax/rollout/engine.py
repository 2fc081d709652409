"""The rollout: prefill each prompt once, then decode its G responses against the shared prompt keys and values.

    rollout(params, prompts, rng, step) -> RolloutBatch        pure, jitted, sharded over prompts

A row ends with the first stop id, which is its last policy token; the loop ends when every row has ended or the cache is
full. After its end a row's ids are `pad_id` and its per-token fields zero.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key

from rest_jax.models.decoder import Decoder, logits
from rest_jax.models.layouts import Cache, init_cache, prompt_rows
from rest_jax.rl.logprobs import Sampling
from rest_jax.rollout.sampling import draw, row_keys
from rest_jax.types import Params, PromptBatch, RolloutBatch


@dataclasses.dataclass(frozen=True)
class RolloutSettings:
    """The static side of a rollout."""

    group_size: int
    max_tokens: int  # Tr: response tokens, the stop id included
    stop_ids: tuple[int, ...]
    pad_id: int
    sampling: Sampling


@struct.dataclass
class DecodeState:
    """Carry of the decode loop; arrays `[P, G, Tr]` fill up from the left."""

    time: Int[Array, ""]
    cache: Cache
    tokens: Int[Array, "P G Tr"]
    logp: Float[Array, "P G Tr"]
    entropy: Float[Array, "P G Tr"]
    gini: Float[Array, "P G Tr"]
    length: Int[Array, "P G"]
    alive: Bool[Array, "P G"]


def rollout(
    params: Params,
    prompts: PromptBatch,
    rng: Key[Array, ""],
    step: Int[Array, ""],
    *,
    decoder: Decoder,
    settings: RolloutSettings,
) -> RolloutBatch:
    """Samples `group_size` responses a prompt."""
    keys = row_keys(rng, step, prompts.row, settings.group_size)
    last, cache = prefill(params, prompts, decoder, settings)
    shared = jnp.broadcast_to(last[:, None], (*keys.shape, last.shape[-1]))
    state = append(_empty(cache, keys.shape, settings), shared, keys, settings)

    def running(state):
        return (state.time < settings.max_tokens) & jnp.any(state.alive)

    def body(state):
        return decode(params, state, keys, decoder, settings)

    state = jax.lax.while_loop(running, body, state)
    return RolloutBatch(
        prompt=prompts.tokens,
        prompt_length=prompts.length,
        responses=state.tokens,
        response_length=state.length,
        logp=state.logp,
        entropy=state.entropy,
        gini=state.gini,
    )


def prefill(
    params: Params, prompts: PromptBatch, decoder: Decoder, settings: RolloutSettings
) -> tuple[Float[Array, "P V"], Cache]:
    """Runs every prompt once; the logits of its next token, and a cache with room for the responses."""
    layout, positions = prompt_rows(prompts.tokens, prompts.length)
    out: Any = decoder.apply({"params": params}, prompts.tokens, positions, layout, return_kv=True)
    hidden, kv = out
    last = jnp.take_along_axis(hidden, (prompts.length - 1)[:, None, None], axis=1)[:, 0]
    cache = init_cache(kv, prompts.length, settings.group_size, settings.max_tokens)
    return logits(params, decoder.cfg, last), cache


def decode(
    params: Params,
    state: DecodeState,
    keys: Key[Array, "P G"],
    decoder: Decoder,
    settings: RolloutSettings,
) -> DecodeState:
    """One token for every row: feeds the last one, draws the next."""
    previous = jax.lax.dynamic_index_in_dim(state.tokens, state.time - 1, axis=2, keepdims=False)
    past = state.cache
    hidden, cache = decoder.apply({"params": params}, previous, past.positions, past.layout, past)
    return append(
        dataclasses.replace(state, cache=cache), logits(params, decoder.cfg, hidden), keys, settings
    )


def append(
    state: DecodeState,
    scores: Float[Array, "P G V"],
    keys: Key[Array, "P G"],
    settings: RolloutSettings,
) -> DecodeState:
    """Draws from `scores` and writes the token and its numbers at `state.time`, for rows still alive."""
    token, *numbers = draw(scores, keys, state.time, settings.sampling)
    token = jnp.where(state.alive, token, settings.pad_id)
    numbers = [jnp.where(state.alive, x, 0.0) for x in numbers]

    def put(buffer, value):
        return jax.lax.dynamic_update_index_in_dim(buffer, value, state.time, axis=2)

    stopped = jnp.isin(token, jnp.array(settings.stop_ids, jnp.int32))
    return dataclasses.replace(
        state,
        time=state.time + 1,
        tokens=put(state.tokens, token),
        logp=put(state.logp, numbers[0]),
        entropy=put(state.entropy, numbers[1]),
        gini=put(state.gini, numbers[2]),
        length=state.length + state.alive,
        alive=state.alive & ~stopped,
    )


def _empty(cache: Cache, rows: tuple[int, ...], settings: RolloutSettings) -> DecodeState:
    shape = (*rows, settings.max_tokens)
    zeros = jnp.zeros(shape, jnp.float32)
    return DecodeState(
        time=jnp.zeros((), jnp.int32),
        cache=cache,
        tokens=jnp.full(shape, settings.pad_id, jnp.int32),
        logp=zeros,
        entropy=zeros,
        gini=zeros,
        length=jnp.zeros(rows, jnp.int32),
        alive=jnp.ones(rows, bool),
    )


def make_rollout(
    decoder: Decoder, settings: RolloutSettings, mesh: Mesh, param_shardings: Params
) -> Callable[[Params, PromptBatch, jax.Array, jax.Array], RolloutBatch]:
    """jit of `rollout`; prompts and responses are sharded over (data, fsdp), weights stay in the rollout layout."""
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    everywhere = NamedSharding(mesh, PartitionSpec())

    def run(params, prompts, rng, step):
        return rollout(params, prompts, rng, step, decoder=decoder, settings=settings)

    return jax.jit(
        run, in_shardings=(param_shardings, rows, everywhere, everywhere), out_shardings=rows
    )


def make_cast(dtype: jnp.dtype, shardings: Params) -> Callable[[Params], Params]:
    """jit of the cast-and-reshard from the train layout (float32 master) to the rollout layout."""

    def one(path, x):
        # Norm scales stay float32: the trainer multiplies by them in float32 too.
        return x if path[-1].key == "scale" else x.astype(dtype)

    def cast(params):
        return jax.tree_util.tree_map_with_path(one, params)

    return jax.jit(cast, out_shardings=shardings)
