"""How tokens lie in a batch: one pytree a layout. `attention.attend` gives each its own attention.

RowLayout     `[B, T]` rows of one or more segments; supervised runs, prompts before decoding.
GroupLayout   `[P, Tp + G*Tr]`: a prompt, then its G responses; the update. `pack_group` makes the row, `split_group` cuts it.
DecodeLayout  `[P, G]`: the next token of every response against a `Cache`; the rollout.

Positions of a group: prompt 0, 1, ..; response token t at prompt_length + t, whatever the padding between.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int


@struct.dataclass
class RowLayout:
    """Causal within equal segment ids; id 0 is padding."""

    segment_ids: Int[Array, "B T"]  # int32


@struct.dataclass
class GroupLayout:
    """One prompt right-padded to `prompt_slots`, then `group_size` responses of `response_slots` each, right-padded."""

    prompt_length: Int[Array, " P"]  # int32
    response_length: Int[Array, "P G"]  # int32
    prompt_slots: int = struct.field(pytree_node=False)
    group_size: int = struct.field(pytree_node=False)
    response_slots: int = struct.field(pytree_node=False)


@struct.dataclass
class DecodeLayout:
    """One new token a response, to be the `index`-th of its row."""

    prompt_length: Int[Array, " P"]  # int32
    index: Int[Array, "P G"]  # int32


@struct.dataclass
class Cache:
    """Keys and values of P prompts (stored once) and their G responses, layers stacked; dtype = compute dtype."""

    prompt_k: Float[Array, "L P Tp K H"]
    prompt_v: Float[Array, "L P Tp K H"]
    response_k: Float[Array, "L P G S K H"]
    response_v: Float[Array, "L P G S K H"]
    prompt_length: Int[Array, " P"]  # int32
    index: Int[Array, "P G"]  # int32: response tokens written in each row

    @property
    def layout(self) -> DecodeLayout:
        """Layout of the next token of every row."""
        return DecodeLayout(self.prompt_length, self.index)

    @property
    def positions(self) -> Int[Array, "P G"]:
        """Positions of the next token of every row."""
        return self.prompt_length[:, None] + self.index

    def append(self, k: Float[Array, "L P G K H"], v: Float[Array, "L P G K H"]) -> "Cache":
        """Writes one token's keys and values at `index` of every row and advances it; a full row drops the write."""
        p, g = jnp.indices(self.index.shape)

        def write(slots: jax.Array, new: jax.Array) -> jax.Array:
            return slots.at[:, p, g, self.index].set(new.astype(slots.dtype), mode="drop")

        return self.replace(
            response_k=write(self.response_k, k),
            response_v=write(self.response_v, v),
            index=self.index + 1,
        )


def init_cache(
    kv: tuple[Float[Array, "L P Tp K H"], Float[Array, "L P Tp K H"]],
    prompt_length: Int[Array, " P"],
    group_size: int,
    slots: int,
) -> Cache:
    """Cache of `slots` empty places for each of `group_size` responses behind the prompts' keys and values `kv`.

    `kv` is what a RowLayout pass with `return_kv=True` returned; every response starts at index 0.
    """
    prompt_k, prompt_v = kv
    layers, prompts, _, heads, width = prompt_k.shape
    empty = jnp.zeros((layers, prompts, group_size, slots, heads, width), prompt_k.dtype)
    index = jnp.zeros((prompts, group_size), jnp.int32)
    return Cache(prompt_k, prompt_v, empty, empty, prompt_length.astype(jnp.int32), index)


def prompt_rows(
    prompt: Int[Array, "P Tp"], prompt_length: Int[Array, " P"]
) -> tuple[RowLayout, Int[Array, "P Tp"]]:
    """Layout and positions of right-padded prompts as plain rows (the pass before decoding)."""
    time = jnp.arange(prompt.shape[1], dtype=jnp.int32)
    segment_ids = (time < prompt_length[:, None]).astype(jnp.int32)
    return RowLayout(segment_ids), jnp.broadcast_to(time, prompt.shape)


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
    x: Float[Array, "P packed ..."], layout: GroupLayout
) -> tuple[Float[Array, "P Tp ..."], Float[Array, "P G Tr ..."]]:
    """Cuts anything packed along axis 1 (hidden states, q, k, v) into its prompt part and its response parts."""
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
