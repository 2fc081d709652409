"""Records of how tokens lie in a batch, and the KV cache. They are pytrees without logic of their own besides writing keys.

RowLayout     `[B, T]`: rows of tokens that see earlier ones; prompts before decoding, packed groups in the update.
PrefixedRows  `[W, T]`: rows of tokens that also see keys in pages; what is new in a prompt.
DecodeLayout  `[W, N]`: the next token of every decode slot against a `Cache`; the rollout.

A cache is divided into W data shards (the parts of the batch axes of the mesh). A shard has one pool of pages, each with the keys
and values of S tokens; a page table names the pages of each prompt and of each response (PagedAttention, arXiv:2309.06180).
What is drawn in a call of `decode` is kept apart until the call ends, as the last page of `recent`, in which all slots write
the same row at the same time. A kernel reads the pages where they are; without one they are laid side by side at the
beginning of a call, those of prompts in `pool`, those of responses at the front of `recent`.

`attention.prompt_rows`, `rl/packing.py` and `rollout/engine.py` make the layouts; `attention.py` attends under each of them.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from rest_jax.types import AnyArray

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
class PrefixedRows:
    """Rows of E equal parts, each of which continues what the pages of one sequence hold. The pages lie side by side in a `Pool`,
    a layer: [W E K S H]; a token sees those of its part, and in it earlier tokens as in a `RowLayout`.
    """

    until: Int[Array, "W T"]  # int32; 0 for padding
    prefix: Bool[Array, "W E S"]  # which keys there are in the pages

    valid = RowLayout.valid


class PageTable(NamedTuple):
    """The pages of B sequences of each data shard: the rows begin <= row < end of a page are keys of the sequence."""

    page: Int[AnyArray, "W B M"]  # int32, as all three; begin = end: none of it is read
    begin: Int[AnyArray, "W B M"]
    end: Int[AnyArray, "W B M"]

    def rows(self, size: int) -> Bool[Array, "W B rows"]:
        """Which rows are keys of the sequence, if its pages, of `size` rows each, lie side by side."""
        row = jnp.arange(size)
        inside = (row >= self.begin[..., None]) & (row < self.end[..., None])
        return inside.reshape(*inside.shape[:2], -1)

    def only(self, wanted: Bool[Array, "W B"]) -> "PageTable":
        """Of which the other sequences are not read."""
        return self._replace(end=jnp.where(wanted[..., None], self.end, self.begin))


class Visits(NamedTuple):
    """Pages for a kernel to visit, sequence by sequence; behind `count` nothing is meant. Data shards one after another."""

    sequence: Int[Array, " Wn"]  # int32, as all
    page: Int[Array, " Wn"]
    begin: Int[Array, " Wn"]  # begin <= row < end are keys of the sequence
    end: Int[Array, " Wn"]
    recent: Int[Array, " Wn"]  # 1: not the page, but the sequence's rows of `recent`
    count: Int[Array, " W"]


class GatheredKeys(NamedTuple):
    """Which keys are read where pages lie side by side."""

    prompts: Bool[Array, "W Q rows"]  # of the pool
    recent: Bool[Array, "W N R"]  # earlier tokens of the response in a slot


class PagedKeys(NamedTuple):
    """What the kernels visit."""

    prompts: Visits
    responses: Visits


@struct.dataclass
class DecodeLayout:
    """One new token a decode slot.

    `members` lists the slots of every prompt cache entry, `member` is the index of a slot in the list of its entry: with the
    two, attention brings the queries of a prompt together and back.
    """

    keys: GatheredKeys | PagedKeys
    time: Int[Array, ""]  # int32: the row of `recent` that is the new token's
    entry: Int[Array, "W N"]  # int32
    member: Int[Array, "W N"]  # int32
    members: Int[Array, "W Q G"]  # int32 decode slots; unused elements hold any slot


Layout = RowLayout | PrefixedRows | DecodeLayout


class Pool(NamedTuple):
    """Pages of keys and values, in the compute dtype."""

    k: Layers  # a layer: [W P K S H]
    v: Layers

    def write(self, page: Int[Array, "W B"], k: Layers, v: Layers) -> "Pool":
        """With B whole pages (a layer: `[W B K S H]`) at these places; a page out of bounds is dropped."""

        def put(x: jax.Array, value: jax.Array) -> jax.Array:
            axis = int(is_stacked(x))
            where = (slice(None),) * axis
            one = jax.vmap(
                lambda pages, at, new: pages.at[*where, at].set(new.astype(x.dtype), mode="drop"),
                (axis, 0, axis),
                axis,
            )
            return one(x, page, value)

        def both(layers: Layers, values: Layers) -> Layers:
            return jax.tree.map(put, layers, values)

        return Pool(both(self.k, k), both(self.v, v))


class LayerCache(NamedTuple):
    """One layer of a Cache; for the kernels, all of them and its number."""

    pool: Pool
    layer: Int[Array, ""] | None
    recent_k: Any  # [W N K R H]
    recent_v: Any

    def write(
        self, time: Int[Array, ""], k: Float[Array, "W N K H"], v: Float[Array, "W N K H"]
    ) -> "LayerCache":
        """With the keys and values of the new tokens. A scatter: a dynamic-update-slice XLA would do again in what reads it, and
        copy the array for that.
        """

        def put(x: jax.Array, new: jax.Array) -> jax.Array:
            shard, slot = jnp.indices(x.shape[:2])
            where = jnp.broadcast_to(time, shard.shape)
            return x.at[shard, slot, :, where].set(new.astype(x.dtype))

        return self._replace(recent_k=put(self.recent_k, k), recent_v=put(self.recent_v, v))


@struct.dataclass
class Cache:
    """Keys and values of prompts (stored once) and of the responses that continue them; dtype = compute dtype."""

    pool: Pool  # only read; gathered, a layer: [W Q K M*S H]
    recent_k: Layers  # a layer: [W N K R H]
    recent_v: Layers

    def append(self, time: Int[Array, ""], k: Layers, v: Layers) -> "Cache":
        """With the keys and values of the new tokens in row `time`, of stacked layers: `[L W N K H]`."""

        def put(x: jax.Array, new: jax.Array) -> jax.Array:
            new = new[..., None, :].astype(x.dtype)
            return jax.lax.dynamic_update_slice_in_dim(x, new, time, axis=x.ndim - 2)

        return self.replace(recent_k=put(self.recent_k, k), recent_v=put(self.recent_v, v))  # type: ignore[attr-defined]


def is_stacked(x: jax.Array | jax.ShapeDtypeStruct) -> bool:
    """Whether an array of a cache holds the keys or values of all layers, `[L W ...]`; every other one leads with W."""
    return x.ndim == 6
