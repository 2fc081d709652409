"""Records of how tokens lie in a batch, and the KV cache. They are pytrees without logic of their own besides writing keys.

RowLayout     `[B, T]`: rows of tokens that see earlier ones; prompts before decoding, packed groups in the update.
DecodeLayout  `[W, N]`: the next token of every decode slot against a `Cache`; the rollout.

A cache is divided into W data shards (the parts of the batch axes of the mesh). A shard has Q prompt cache entries, each
with the keys and values of one prompt, and N decode slots, each with those of one response; `entry` names the prompt cache
entry that the response in a slot continues. `attention.prompt_rows`, `rl/packing.py` and
`Cache.layout` make the layouts; `attention.py` attends under each of them.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

Layers = jax.Array | tuple[jax.Array, ...]  # stacked on a leading axis L, or one array a layer


@struct.dataclass
class RowLayout:
    """Rows of tokens of any number of groups, of which each token sees earlier ones, itself included.

    Token i sees token j iff j <= i < until[j]. So `until` of a completion's token is the end of the completion, that of a
    prompt's token is the end of the last completion behind it, and a token that does not see itself is padding.
    """

    until: Int[Array, "B T"]  # int32; 0 for padding
    # pairs of tokens that see each other in a row, for the compiler's account of the cost
    pairs: int = struct.field(pytree_node=False)
    # weight of each token in the load-balance loss (`rl/balance.py`), float32; None: there is none
    balance: Float[Array, "B T"] | None = None

    @property
    def valid(self) -> Bool[Array, "B T"]:
        """Where there is a token, no padding."""
        return self.until > jnp.arange(self.until.shape[1])


@struct.dataclass
class DecodeLayout:
    """One new token a decode slot, to be the `index`-th of its response.

    `members` lists the slots of every prompt cache entry, `member` is the index of a slot in the list of its entry: with the
    two, attention brings the queries of a prompt together and back.
    """

    prompt_length: Int[Array, "W Q"]  # int32
    index: Int[Array, "W N"]  # int32
    entry: Int[Array, "W N"]  # int32
    member: Int[Array, "W N"]  # int32
    members: Int[Array, "W Q G"]  # int32 decode slots; unused elements hold any slot


class LayerCache(NamedTuple):
    """One layer of a Cache."""

    prompt_k: Float[Array, "W Q K Tp H"]
    prompt_v: Float[Array, "W Q K Tp H"]
    response_k: Float[Array, "W N K S H"]
    response_v: Float[Array, "W N K S H"]

    def write(
        self, index: Int[Array, "W N"], k: Float[Array, "W N K H"], v: Float[Array, "W N K H"]
    ) -> "LayerCache":
        """With one token's keys and values at `index` of every decode slot; a full slot drops the write."""
        shard, slot = jnp.indices(index.shape)
        where = (shard, slot, slice(None), index)
        return self._replace(
            response_k=_write(self.response_k, where, k),
            response_v=_write(self.response_v, where, v),
        )


@struct.dataclass
class Cache:
    """Keys and values of prompts (stored once) and of the responses that continue them; dtype = compute dtype."""

    prompt_k: Layers  # a layer: [W Q K Tp H]
    prompt_v: Layers
    response_k: Layers  # a layer: [W N K S H]
    response_v: Layers
    prompt_length: Int[Array, "W Q"]  # int32
    index: Int[Array, "W N"]  # int32: response tokens written in each decode slot
    entry: Int[Array, "W N"]  # int32; this and the next two: see DecodeLayout
    member: Int[Array, "W N"]
    members: Int[Array, "W Q G"]

    @property
    def layout(self) -> DecodeLayout:
        """Layout of the next token of every decode slot."""
        return DecodeLayout(self.prompt_length, self.index, self.entry, self.member, self.members)

    @property
    def positions(self) -> Int[Array, "W N"]:
        """Positions of the next token of every decode slot."""
        own = jnp.take_along_axis(self.prompt_length, self.entry, axis=1)
        return own + self.index

    @property
    def layers(self) -> LayerCache:
        """The four fields, each over all layers."""
        return LayerCache(self.prompt_k, self.prompt_v, self.response_k, self.response_v)  # type: ignore[arg-type]

    def append(self, k: Layers, v: Layers) -> "Cache":
        """Writes one token's keys and values (a layer: `[W N K H]`) at `index` of every decode slot and advances it; a full
        slot drops the write.
        """
        written = self.layers.write(self.index, k, v)  # type: ignore[arg-type]
        return self.advance(written.response_k, written.response_v)

    def advance(self, response_k: Layers, response_v: Layers) -> "Cache":
        """With these layers, into which a token was written, one token further."""
        return dataclasses.replace(
            self, response_k=response_k, response_v=response_v, index=self.index + 1
        )

    def put_prompt(
        self, entry: Int[Array, " W"], k: Layers, v: Layers, length: Int[Array, " W"]
    ) -> "Cache":
        """Puts a prompt (a layer: `[W T K H]`, T at most Tp) into one entry of every data shard; entry Q drops it."""
        shard = jnp.arange(entry.shape[0])
        time = jax.tree.leaves(k)[0].shape[-3]
        where = (shard[:, None], entry[:, None], slice(None), jnp.arange(time)[None])
        return dataclasses.replace(
            self,
            prompt_k=_write(self.prompt_k, where, k),
            prompt_v=_write(self.prompt_v, where, v),
            prompt_length=self.prompt_length.at[shard, entry].set(length, mode="drop"),
        )


def is_stacked(x: jax.Array | jax.ShapeDtypeStruct) -> bool:
    """Whether an array of a cache holds the keys or values of all layers, `[L W ...]`; every other one leads with W."""
    return x.ndim == 6


def _write(layers: Layers, where: tuple, new: Layers) -> Layers:
    """Writes at `where`, the indices of one layer; what is out of bounds is dropped."""

    def write(x: jax.Array, value: jax.Array) -> jax.Array:
        value = value.astype(x.dtype)
        if is_stacked(x):
            # indexed axes come first, so the layer axis is the third of the update
            return x.at[:, *where].set(jnp.moveaxis(value, 0, 2), mode="drop")
        return x.at[where].set(value, mode="drop")

    return jax.tree.map(write, layers, new)
