"""Cutting a step's groups into micro-batches: few shapes, filled by tokens, rows where they are.

`plan` is host code (NumPy): from the lengths alone it says which groups a micro-batch takes, and to which lengths they are
cut. `take_groups` is its device side. A row never leaves its way (its part of the batch axes), and row p belongs to
mini-batch p % updates, so neither the cut into mini-batches nor the result depends on the mesh.

Lengths are rounded up to 32, 48, 64, 96, 128, 192, .. so that few shapes are ever compiled. Every group costs its trunk
positions, prompt + G x response; a micro-batch takes the longest groups left until the budget is full, and closes early
rather than pad a group to more than twice its size.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_SHORTEST = 32


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """Groups that go through the trunk together, `pick[w, r]` a row among those of way w (-1: none)."""

    pick: np.ndarray  # int32 [W, R]
    slots: tuple[int, int]  # prompt and response positions kept
    tokens: int  # true trunk positions in it
    padded: int  # positions computed


def bucket(length: int, width: int) -> int:
    """The least of 32, 48, 64, 96, .. that holds `length`, at most `width` (which must)."""
    size = _SHORTEST
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size // 3 * 4
    return min(size, width)


def plan(
    prompt_length: np.ndarray,
    response_length: np.ndarray,
    widths: tuple[int, int],
    *,
    ways: int,
    budget: int | None,
    wanted: np.ndarray | None = None,
    updates: int = 1,
    most_rows: int | None = None,
) -> list[list[MicroBatch]]:
    """The micro-batches of each update, for prompts `[P]` with responses `[P, G]`, padded to `widths`.

    `budget`: trunk positions of a micro-batch in one way; None: no limit. At least one group always goes. `wanted` [P]:
    groups to compute; the others appear nowhere. A mini-batch without wanted groups has no micro-batch. `most_rows`: groups a
    micro-batch may take of each way.
    """
    count, group = len(prompt_length), response_length.shape[1]
    local = count // ways
    sizes = [
        (bucket(int(p), widths[0]), bucket(int(r), widths[1]))
        for p, r in zip(prompt_length, response_length.max(axis=1), strict=True)
    ]
    true = prompt_length + response_length.sum(axis=1)
    chosen = np.ones(count, bool) if wanted is None else wanted

    def queue(way: int, update: int) -> list[int]:
        rows = [
            p for p in range(way * local, (way + 1) * local) if chosen[p] and p % updates == update
        ]
        return sorted(rows, key=lambda p: (-sizes[p][0] - group * sizes[p][1], p))

    return [
        _fill(
            [queue(way, update) for way in range(ways)],
            sizes,
            true,
            group,
            local,
            budget,
            most_rows or count,
        )
        for update in range(updates)
    ]


def _fill(
    queues, sizes, true, group: int, local: int, budget: int | None, most_rows: int
) -> list[MicroBatch]:
    def shape(heads: Sequence[int]) -> tuple[int, int]:
        return max(sizes[p][0] for p in heads), max(sizes[p][1] for p in heads)

    def cost(slots: tuple[int, int]) -> int:
        return slots[0] + group * slots[1]

    found = []
    while any(queues):
        slots = shape([queue[0] for queue in queues if queue])
        rows, left = 1, min(max(map(len, queues)), most_rows)
        while rows < left:
            joined = shape([queue[rows] for queue in queues if len(queue) > rows] or [queues[0][0]])
            wider = (max(slots[0], joined[0]), max(slots[1], joined[1]))
            full = budget is not None and (rows + 1) * cost(wider) > budget
            if full or 2 * cost(joined) < cost(wider):
                break
            slots, rows = wider, rows + 1
        if rows < left and rows & (rows - 1):
            rows = 1 << (rows.bit_length() - 1)  # numbers of rows are few, too
        pick = np.full((len(queues), rows), -1, np.int32)
        taken = 0
        for way, queue in enumerate(queues):
            part, queue[:] = queue[:rows], queue[rows:]
            pick[way, : len(part)] = [p - way * local for p in part]
            taken += int(sum(true[p] for p in part))
        slots = shape([int(p) + way * local for way, row in enumerate(pick) for p in row if p >= 0])
        found.append(MicroBatch(pick, slots, taken, pick.size * cost(slots)))
    return found


def take_groups(tree: Any, pick: jax.Array, slots: tuple[int, int], mesh: Mesh) -> Any:
    """Rows `pick` `[W, R]` of leaves `[P, ...]` -> `[W * R, ...]`, cut to `slots`; inside jit.

    The leaf called `prompt` is cut to the prompt slots, leaves [P, G, T] to the response slots. A row of -1 is an empty
    group: zeros, and a prompt of length 1.
    """
    ways, rows = pick.shape
    sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))

    def one(path, x):
        name = getattr(path[-1], "name", "")
        x = x.reshape(ways, -1, *x.shape[1:])
        x = jax.vmap(lambda part, index: jnp.take(part, index, axis=0, mode="clip"))(x, pick)
        empty = (pick < 0).reshape(ways, rows, *(1,) * (x.ndim - 2))
        x = jnp.where(empty, jnp.asarray(name == "prompt_length", x.dtype), x)
        x = x.reshape(ways * rows, *x.shape[2:])
        if name == "prompt":
            x = x[:, : slots[0]]
        elif x.ndim == 3:
            x = x[:, :, : slots[1]]
        return jax.lax.with_sharding_constraint(x, sharding)

    return jax.tree_util.tree_map_with_path(one, tree)


def put_groups(whole: Any, part: Any, pick: jax.Array) -> Any:
    """Writes leaves `[W * R, G, t]` back into the rows `pick` of leaves `[P, G, T]`; the inverse of `take_groups`."""
    ways = pick.shape[0]

    def one(x, new):
        new = jnp.pad(new, [(0, 0), (0, 0), (0, x.shape[2] - new.shape[2])])
        old, new = (a.reshape(ways, -1, *a.shape[1:]) for a in (x, new))
        index = jnp.where(pick < 0, old.shape[1], pick)
        put = jax.vmap(lambda a, i, b: a.at[i].set(b, mode="drop"))
        return put(old, index, new).reshape(x.shape)

    return jax.tree.map(one, whole, part)
