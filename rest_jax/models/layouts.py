"""Making and cutting the layouts of `records.py`: packed groups, prompt rows, the cache of a rollout.

Positions of a group: prompt 0, 1, ..; response token t at prompt_length + t, whatever the padding between.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from rest_jax.models.cache import (
    Cache,
    DecodeLayout,
    GroupLayout,
    LayerCache,
    PromptLayout,
    RowLayout,
)

__all__ = [
    "Cache",
    "DecodeLayout",
    "GroupLayout",
    "LayerCache",
    "PromptLayout",
    "RowLayout",
    "group_layout",
    "init_cache",
    "pack_group",
    "predicting_hidden",
    "prompt_rows",
    "split_group",
]


def init_cache(
    kv: tuple[Float[Array, "L P Tp K H"], Float[Array, "L P Tp K H"]],
    prompt_length: Int[Array, " P"],
    group_size: int,
    slots: int,
) -> Cache:
    """Cache of P ways, each with one prompt and `slots` empty places for each of its `group_size` responses.

    `kv` is what a PromptLayout pass with `return_kv=True` returned; every response starts at index 0.
    """
    prompt_k, prompt_v = (x.transpose(0, 1, 3, 2, 4)[:, :, None] for x in kv)
    layers, prompts, _, heads, _, width = prompt_k.shape
    empty = jnp.zeros((layers, prompts, group_size, heads, slots, width), prompt_k.dtype)
    lane = jnp.broadcast_to(jnp.arange(group_size, dtype=jnp.int32), (prompts, group_size))
    return Cache(
        prompt_k,
        prompt_v,
        response_k=empty,
        response_v=empty,
        prompt_length=prompt_length.astype(jnp.int32)[:, None],
        index=jnp.zeros_like(lane),
        prompt_slot=jnp.zeros_like(lane),
        member=lane,
        members=lane[:, None],
    )


def prompt_rows(
    prompt: Int[Array, "P Tp"], prompt_length: Int[Array, " P"]
) -> tuple[PromptLayout, Int[Array, "P Tp"]]:
    """Layout and positions of right-padded prompts as plain rows (the pass before decoding)."""
    time = jnp.arange(prompt.shape[1], dtype=jnp.int32)
    return PromptLayout(prompt_length), jnp.broadcast_to(time, prompt.shape)


def pack_group(
    prompt: Int[Array, "P Tp"], prompt_length: Int[Array, " P"], responses: Int[Array, "P G Tr"]
) -> tuple[Int[Array, "P packed"], Int[Array, "P packed"]]:
    """Tokens and positions `[P, Tp + G*Tr]` (int32) of whole groups, for a GroupLayout."""
    prompts, group_size, slots = responses.shape
    tokens = jnp.concatenate([prompt, responses.reshape(prompts, group_size * slots)], axis=1)
    own = prompt_length[:, None] + jnp.tile(jnp.arange(slots, dtype=jnp.int32), group_size)
    first = jnp.broadcast_to(jnp.arange(prompt.shape[1], dtype=jnp.int32), prompt.shape)
    return tokens.astype(jnp.int32), jnp.concatenate([first, own.astype(jnp.int32)], axis=1)


def group_layout(
    prompt: Int[Array, "P Tp"],
    prompt_length: Int[Array, " P"],
    responses: Int[Array, "P G Tr"],
    response_length: Int[Array, "P G"],
) -> GroupLayout:
    """The layout that goes with `pack_group` of the same arrays."""
    _, group_size, slots = responses.shape
    return GroupLayout(prompt_length, response_length, prompt.shape[1], group_size, slots)


def split_group(
    x: Shaped[Array, "P packed ..."], layout: GroupLayout
) -> tuple[Shaped[Array, "P Tp ..."], Shaped[Array, "P G Tr ..."]]:
    """Cuts anything packed along axis 1 (tokens, hidden states, q, k, v) into prompt and responses."""
    prompt, rest = x[:, : layout.prompt_slots], x[:, layout.prompt_slots :]
    shape = (x.shape[0], layout.group_size, layout.response_slots, *x.shape[2:])
    return prompt, rest.reshape(shape)


def predicting_hidden(
    hidden: Float[Array, "P packed D"], layout: GroupLayout
) -> Float[Array, "P G Tr D"]:
    """The hidden state that predicts each response token: one position earlier, for t = 0 the last prompt token's."""
    prompt, responses = split_group(hidden, layout)
    last = jnp.take_along_axis(prompt, (layout.prompt_length - 1)[:, None, None], axis=1)
    first = jnp.broadcast_to(last[:, None], (*responses.shape[:2], 1, hidden.shape[-1]))
    return jnp.concatenate([first, responses[:, :, :-1]], axis=2)
