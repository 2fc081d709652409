"""How tokens lie in a batch, as pytrees; `layouts.py` makes them and `attention.attend` gives each its own attention.

RowLayout     `[B, T]` rows of one or more segments; supervised runs, prompts before decoding.
GroupLayout   `[P, Tp + G*Tr]`: a prompt, then its G responses; the update.
DecodeLayout  `[P, G]`: the next token of every response against a `Cache`; the rollout.
"""

import dataclasses

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

        return dataclasses.replace(
            self,
            response_k=write(self.response_k, k),
            response_v=write(self.response_v, v),
            index=self.index + 1,
        )
