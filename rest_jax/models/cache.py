"""How tokens lie in a batch, as pytrees; `layouts.py` makes them and `attention.attend` gives each its own attention.

RowLayout     `[B, T]` rows of one or more segments.
PromptLayout  `[P, Tp]` right-padded prompts, one a row; the pass before decoding.
GroupLayout   `[P, Tp + G*Tr]`: a prompt, then its G responses; the update.
DecodeLayout  `[W, N]`: the next token of every lane against a `Cache`; the rollout.

A cache is divided into W ways (the parts of the batch axes of the mesh). A way has Q prompt slots, each with the keys and
values of one prompt, and N lanes, each with those of one response; a lane says which prompt slot its response belongs to.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

Layers = jax.Array | tuple[jax.Array, ...]  # stacked on a leading axis L, or one array a layer


@struct.dataclass
class RowLayout:
    """Causal within equal segment ids; id 0 is padding."""

    segment_ids: Int[Array, "B T"]  # int32


@struct.dataclass
class PromptLayout:
    """One causal row a prompt, right-padded."""

    length: Int[Array, " P"]  # int32


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
    """One new token a lane, to be the `index`-th of its response.

    `members` lists the lanes of every prompt slot, `member` is a lane's place in the list of its slot: the two let
    attention bring the queries of a prompt together and back.
    """

    prompt_length: Int[Array, "W Q"]  # int32
    index: Int[Array, "W N"]  # int32
    prompt_slot: Int[Array, "W N"]  # int32
    member: Int[Array, "W N"]  # int32
    members: Int[Array, "W Q G"]  # int32 lanes; unused places hold any lane


class LayerCache(NamedTuple):
    """One layer of a Cache."""

    prompt_k: Float[Array, "W Q K Tp H"]
    prompt_v: Float[Array, "W Q K Tp H"]
    response_k: Float[Array, "W N K S H"]
    response_v: Float[Array, "W N K S H"]

    def write(
        self, index: Int[Array, "W N"], k: Float[Array, "W N K H"], v: Float[Array, "W N K H"]
    ) -> "LayerCache":
        """With one token's keys and values at `index` of every lane; a full lane drops the write."""
        where = _lane_places(index)
        return self._replace(
            response_k=_put(self.response_k, where, k), response_v=_put(self.response_v, where, v)
        )


@struct.dataclass
class Cache:
    """Keys and values of prompts (stored once) and of the responses that continue them; dtype = compute dtype."""

    prompt_k: Layers  # a layer: [W Q K Tp H]
    prompt_v: Layers
    response_k: Layers  # a layer: [W N K S H]
    response_v: Layers
    prompt_length: Int[Array, "W Q"]  # int32
    index: Int[Array, "W N"]  # int32: response tokens written in each lane
    prompt_slot: Int[Array, "W N"]  # int32, and so on: see DecodeLayout
    member: Int[Array, "W N"]
    members: Int[Array, "W Q G"]

    @property
    def layout(self) -> DecodeLayout:
        """Layout of the next token of every lane."""
        return DecodeLayout(
            self.prompt_length, self.index, self.prompt_slot, self.member, self.members
        )

    @property
    def positions(self) -> Int[Array, "W N"]:
        """Positions of the next token of every lane."""
        own = jnp.take_along_axis(self.prompt_length, self.prompt_slot, axis=1)
        return own + self.index

    @property
    def layers(self) -> LayerCache:
        """The four fields, each over all layers."""
        return LayerCache(self.prompt_k, self.prompt_v, self.response_k, self.response_v)  # type: ignore[arg-type]

    def append(self, k: Layers, v: Layers) -> "Cache":
        """Writes one token's keys and values (a layer: `[W N K H]`) at `index` of every lane and advances it; a full
        lane drops the write.
        """
        where = _lane_places(self.index)
        return self.advance(_put(self.response_k, where, k), _put(self.response_v, where, v))

    def advance(self, response_k: Layers, response_v: Layers) -> "Cache":
        """With these layers, into which a token was written, one token further."""
        return dataclasses.replace(
            self, response_k=response_k, response_v=response_v, index=self.index + 1
        )

    def put_prompt(
        self, slot: Int[Array, " W"], k: Layers, v: Layers, length: Int[Array, " W"]
    ) -> "Cache":
        """Puts a prompt (a layer: `[W T K H]`, T at most the slot's) into one slot of every way; slot Q: nowhere."""
        way = jnp.arange(slot.shape[0])
        time = jax.tree.leaves(k)[0].shape[-3]
        where = (way[:, None], slot[:, None], slice(None), jnp.arange(time)[None])
        return dataclasses.replace(
            self,
            prompt_k=_put(self.prompt_k, where, k),
            prompt_v=_put(self.prompt_v, where, v),
            prompt_length=self.prompt_length.at[way, slot].set(length, mode="drop"),
        )


def _lane_places(index: Int[Array, "W N"]) -> tuple:
    way, lane = jnp.indices(index.shape)
    return way, lane, slice(None), index


def _put(layers: Layers, where: tuple, new: Layers) -> Layers:
    """Writes at `where`, the indices of one layer; what is out of bounds is dropped."""

    def write(x: jax.Array, value: jax.Array) -> jax.Array:
        value = value.astype(x.dtype)
        if (
            x.ndim == 6
        ):  # stacked: indexed axes come first, so the layer axis is the third of the update
            return x.at[:, *where].set(jnp.moveaxis(value, 0, 2), mode="drop")
        return x.at[where].set(value, mode="drop")

    return jax.tree.map(write, layers, new)
