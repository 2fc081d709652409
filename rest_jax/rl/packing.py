"""Cutting a step's groups into micro-batches: few shapes, filled by tokens, rows where they are.

`plan_microbatches` is host code (NumPy): from the lengths alone it says which groups a micro-batch takes and to which
widths they are cut. `Picker` is its device side. A group never leaves its data shard, and the mini-batch it belongs to
(`assign_minibatches`) depends on its row alone, so the result does not depend on the mesh.

Lengths are rounded up to 32, 48, 64, 96, 128, 192, .. so that few shapes are ever compiled. Every group costs its trunk
positions, prompt + G x response; a micro-batch takes the longest groups left until the budget is full, and closes early
rather than pad a group to more than twice its size.
"""

import bisect
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rest_jax.distributed import batch_sharding
from rest_jax.types import ResponseBatch

BUCKETS = sorted({b for k in range(5, 27) for b in (1 << k, 3 << (k - 1))})  # 32, 48, 64, 96, ..


@dataclasses.dataclass(frozen=True)
class BatchLengths:
    """What the host must know of a global batch to cut it; NumPy."""

    prompt_length: np.ndarray  # [P]
    response_length: np.ndarray  # [P, G]
    widths: tuple[int, int]  # padded prompt and response positions

    @classmethod
    def of(cls, batch: ResponseBatch) -> "BatchLengths":
        """Of a batch whose rows are all held by this process."""
        lengths = np.asarray(batch.prompt_length), np.asarray(batch.response_length)
        return cls(*lengths, widths=batch.widths)


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """Groups that go through the trunk together; `pick[w, r]` is a row among those of data shard w (-1: none)."""

    pick: np.ndarray  # int32 [W, R]
    widths: tuple[int, int]  # prompt and response positions kept
    tokens: int  # trunk positions that hold tokens
    positions: int  # trunk positions computed


@dataclasses.dataclass(frozen=True)
class Packing:
    """The limits of a micro-batch on each of `shards` data shards."""

    shards: int
    max_tokens: int | None = None  # trunk positions; None: no limit. At least one group always goes
    max_groups: int | None = None


def bucket(length: int, width: int) -> int:
    """The least of 32, 48, 64, 96, .. that holds `length`, at most `width` (which must)."""
    return min(BUCKETS[bisect.bisect_left(BUCKETS, length)], width)


def assign_minibatches(groups: int, count: int) -> np.ndarray:
    """int32 [P]: the mini-batch, in [0, count), of each group; equally many in each, on every data shard."""
    return np.arange(groups, dtype=np.int32) % count


def plan_microbatches(
    lengths: BatchLengths, minibatch: np.ndarray, active: np.ndarray, packing: Packing
) -> list[list[MicroBatch]]:
    """The micro-batches of each mini-batch.

    `minibatch` int [P]: of each group (`assign_minibatches`); `active` bool [P]: groups to compute, the others appear
    nowhere. A mini-batch without active groups has no micro-batch.
    """
    prompts, responses = lengths.prompt_length, lengths.response_length
    local = len(prompts) // packing.shards
    sizes = [
        (bucket(int(p), lengths.widths[0]), bucket(int(r), lengths.widths[1]))
        for p, r in zip(prompts, responses.max(axis=1), strict=True)
    ]
    groups = _Groups(sizes, prompts + responses.sum(axis=1), responses.shape[1], local)

    def queue(shard: int, index: int) -> list[int]:
        rows = range(shard * local, (shard + 1) * local)
        mine = [p for p in rows if active[p] and minibatch[p] == index]
        return sorted(mine, key=lambda p: (-groups.cost(sizes[p]), p))

    return [
        _fill([queue(shard, index) for shard in range(packing.shards)], groups, packing)
        for index in range(int(minibatch.max()) + 1)
    ]


@dataclasses.dataclass(frozen=True)
class _Groups:
    sizes: list[tuple[int, int]]  # bucketed prompt and response widths of each group
    tokens: np.ndarray  # [P]
    group_size: int
    local: int  # groups of a data shard

    def cost(self, widths: tuple[int, int]) -> int:
        return widths[0] + self.group_size * widths[1]

    def widths(self, groups: Sequence[int]) -> tuple[int, int]:
        """What holds all of them."""
        return max(self.sizes[p][0] for p in groups), max(self.sizes[p][1] for p in groups)


def _fill(queues: list[list[int]], groups: _Groups, packing: Packing) -> list[MicroBatch]:
    microbatches = []
    while any(queues):
        rows = _count_rows(queues, groups, packing)
        taken = [queue[:rows] for queue in queues]
        queues = [queue[rows:] for queue in queues]
        pick = np.full((len(queues), rows), -1, np.int32)
        for shard, part in enumerate(taken):
            pick[shard, : len(part)] = [p - shard * groups.local for p in part]
        members = [p for part in taken for p in part]
        widths, tokens = groups.widths(members), int(groups.tokens[members].sum())
        microbatches.append(MicroBatch(pick, widths, tokens, pick.size * groups.cost(widths)))
    return microbatches


def _count_rows(queues: list[list[int]], groups: _Groups, packing: Packing) -> int:
    """How many groups of each queue go into the next micro-batch."""
    widths = groups.widths([queue[0] for queue in queues if queue])
    rows, left = 1, max(map(len, queues))
    left = min(left, packing.max_groups or left)
    while rows < left:
        joined = groups.widths([queue[rows] for queue in queues if len(queue) > rows])
        wider = (max(widths[0], joined[0]), max(widths[1], joined[1]))
        full = (
            packing.max_tokens is not None and (rows + 1) * groups.cost(wider) > packing.max_tokens
        )
        if full or 2 * groups.cost(joined) < groups.cost(wider):
            break
        widths, rows = wider, rows + 1
    if rows < left and rows & (rows - 1):
        rows = 1 << (rows.bit_length() - 1)  # numbers of rows are few, too
    return rows


def packing_metrics(plan: Sequence[Sequence[MicroBatch]], groups: int) -> dict[str, float]:
    """Of the micro-batches of a step over `groups` groups."""
    micro = [m for mini in plan for m in mini]
    positions = sum(m.positions for m in micro)
    taken = sum(int((m.pick >= 0).sum()) for m in micro)
    return {
        "update/micro_batches": float(len(micro)),
        "update/padding": 1 - sum(m.tokens for m in micro) / positions if positions else 0.0,
        "update/skipped_groups": 1 - taken / groups,
    }


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["pick"], meta_fields=["widths", "mesh"]
)
@dataclasses.dataclass(frozen=True)
class Picker:
    """Takes the groups of a micro-batch out of arrays [P, ...], inside jit: [P, ...] -> [W * R, ...]. A pytree.

    A row of -1 is an empty group, with zeros in all arrays but those that ask for another value.
    """

    pick: Any  # int32 [W, R]
    widths: tuple[int, int]  # prompt and response positions kept
    mesh: Mesh

    def groups(self, x: Any, empty: int = 0) -> jax.Array:
        """Rows of any array [P, ...]."""
        shards, rows = self.pick.shape
        x = x.reshape(shards, -1, *x.shape[1:])
        x = jax.vmap(lambda part, row: jnp.take(part, row, axis=0, mode="clip"))(x, self.pick)
        none = (self.pick < 0).reshape(shards, rows, *(1,) * (x.ndim - 2))
        x = jnp.where(none, jnp.asarray(empty, x.dtype), x)
        x = x.reshape(shards * rows, *x.shape[2:])
        return jax.lax.with_sharding_constraint(x, batch_sharding(self.mesh))

    def prompt(self, x: Any) -> jax.Array:
        """Rows of prompts [P, Tp], cut to the prompt width."""
        return self.groups(x[:, : self.widths[0]])

    def tokens(self, x: Any) -> jax.Array:
        """Rows of a per-token array [P, G, Tr], cut to the response width."""
        return self.groups(x[:, :, : self.widths[1]])

    def put_tokens(self, x: jax.Array, part: jax.Array) -> jax.Array:
        """Writes rows [W * R, G, t] back into x [P, G, Tr]; the inverse of `tokens`."""
        shards = self.pick.shape[0]
        part = jnp.pad(part, [(0, 0), (0, 0), (0, x.shape[2] - part.shape[2])])
        old, new = (a.reshape(shards, -1, *a.shape[1:]) for a in (x, part))
        row = jnp.where(self.pick < 0, old.shape[1], self.pick)
        put = jax.vmap(lambda a, i, b: a.at[i].set(b, mode="drop"))
        return put(old, row, new).reshape(x.shape)


def make_picker(micro: MicroBatch, mesh: Mesh) -> Picker:
    """The picker of a micro-batch, its rows on their data shards."""
    return Picker(jax.device_put(micro.pick, batch_sharding(mesh)), micro.widths, mesh)
