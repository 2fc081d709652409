"""Packing a step's groups into rows: one row a data shard and micro-batch, all rows of an update equally long.

A row holds several groups, one behind the other: a prompt without its last token, then its completions, each of which begins
with that last token and leaves out its own last one. So position i of a completion reads the token before its token i, which
it predicts; the prompt is stored and computed once, and nothing between tokens is padding:

    prompt a b c, completions d e and f   ->   reads     a b  c d  c        predicts  - -  d e  f

`plan_microbatches` is host code (NumPy): from the lengths alone it says which row each group goes to, anywhere on the mesh. A
group that finds no row is split by completions, its prompt repeated. `Rows` is a micro-batch on the device: it reads the
batch's arrays in the order of the rows. How a batch is packed changes nothing but the order of sums.
"""

import bisect
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from flax.linen import spmd
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Shaped

from rest_jax.distributed import batch_sharding, pin_rows
from rest_jax.models.cache import RowLayout
from rest_jax.types import AnyArray, ResponseBatch, Routes

BUCKETS = sorted({b for k in range(5, 27) for b in (1 << k, 3 << (k - 1))})  # 32, 48, 64, 96, ..
# 32, 36, .. 64, 72, ..
ROW_LENGTHS = sorted({(8 + i) << k for k in range(2, 24) for i in range(8)})
# What a micro-batch costs by itself, above all for the weights that it gathers, as a share of the longest row.
_MICRO_BATCH_COST = 0.02
# The program of the longest row is compiled in most steps anyway: up to 6 % more padding is worth not compiling another.
_LONGEST_DISCOUNT = 0.94


@dataclasses.dataclass(frozen=True)
class BatchLengths:
    """What the host must know of a global batch to pack it; NumPy."""

    prompt_length: np.ndarray  # [P]
    response_length: np.ndarray  # [P, G]
    widths: tuple[int, int]  # padded prompt and response positions

    @classmethod
    def of(cls, batch: ResponseBatch) -> "BatchLengths":
        """Of a batch whose rows are all held by this process."""
        lengths = np.asarray(batch.prompt_length), np.asarray(batch.response_length)
        return cls(*lengths, widths=batch.widths)

    def positions(self, piece: "Piece") -> int:
        """Those that the trunk computes for a piece."""
        own = self.response_length[piece.group, list(piece.completions)]
        return int(self.prompt_length[piece.group] - 1 + own.sum())

    def whole(self, group: int) -> "Piece":
        """All completions of a group."""
        return Piece(group, tuple(range(self.response_length.shape[1])))


@dataclasses.dataclass(frozen=True)
class Piece:
    """Completions of a group that lie in one row behind their prompt."""

    group: int
    completions: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """Rows that go through the trunk together, one a data shard."""

    rows: tuple[tuple[Piece, ...], ...]
    row_length: int
    lengths: BatchLengths

    @property
    def positions(self) -> int:
        """Trunk positions computed, padding included."""
        return len(self.rows) * self.row_length

    @property
    def max_pairs(self) -> int:
        """Pairs of tokens that see each other in the row that has the most of them."""
        return max(sum(_count_pairs(piece, self.lengths) for piece in row) for row in self.rows)


@dataclasses.dataclass(frozen=True)
class Packing:
    """The limits of a row. `max_tokens`: its positions, None: all groups of a data shard fit; a prompt with one completion
    always goes. `single_groups`: a row is one undivided group.
    """

    shards: int
    max_tokens: int | None = None
    single_groups: bool = False


def bucket(length: int, width: int) -> int:
    """The least of 32, 48, 64, 96, .. that holds `length`, at most `width` (which must)."""
    return min(BUCKETS[bisect.bisect_left(BUCKETS, length)], width)


def row_length(positions: int) -> int:
    """The least of 32, 36, .. 64, 72, .. 128, 144, .. that holds so many positions; above 32 less than a ninth is padding."""
    return ROW_LENGTHS[bisect.bisect_left(ROW_LENGTHS, positions)]


def longest_row(least: int, limit: int) -> int:
    """The longest row within `limit` positions, or the shortest that holds `least` where that is longer."""
    return max(row_length(least), ROW_LENGTHS[max(0, bisect.bisect_right(ROW_LENGTHS, limit) - 1)])


def assign_minibatches(groups: int, count: int) -> np.ndarray:
    """int32 [P]: the mini-batch, in [0, count), of each group; equally many in each."""
    return np.arange(groups, dtype=np.int32) % count


def plan_microbatches(
    lengths: BatchLengths, minibatch: np.ndarray, active: np.ndarray, packing: Packing
) -> list[list[MicroBatch]]:
    """The micro-batches of each mini-batch.

    `minibatch` int [P]: of each group (`assign_minibatches`); `active` bool [P]: groups to compute, the others appear
    nowhere, nor do groups without response tokens. A mini-batch without any other has no micro-batch.
    """
    if (lengths.prompt_length < 1).any():
        raise ValueError("plan_microbatches: a prompt has no token")
    active = active & (lengths.response_length.sum(axis=1) > 0)
    return [
        _pack(np.flatnonzero(active & (minibatch == index)), lengths, packing)
        for index in range(int(minibatch.max()) + 1)
    ]


def _pack(groups: np.ndarray, lengths: BatchLengths, packing: Packing) -> list[MicroBatch]:
    """Micro-batches of equally long rows, chosen to compute the fewest positions (`_fill_rows`)."""
    if not len(groups):
        return []
    pieces = [lengths.whole(int(p)) for p in groups]
    sizes = np.array([lengths.positions(piece) for piece in pieces])
    order = np.lexsort((groups, -sizes))
    pieces = [pieces[i] for i in order]
    if packing.single_groups:
        length, rows = row_length(int(sizes.max())), [(piece,) for piece in pieces]
    else:
        length, rows = _fill_rows(pieces, sizes, lengths, packing)
    count = -(-len(rows) // packing.shards)
    rows += [()] * (count * packing.shards - len(rows))
    shards = packing.shards
    return [
        MicroBatch(tuple(rows[i * shards : (i + 1) * shards]), length, lengths)
        for i in range(count)
    ]


def _fill_rows(
    pieces: list[Piece], sizes: np.ndarray, lengths: BatchLengths, packing: Packing
) -> tuple[int, list[tuple[Piece, ...]]]:
    """(length of the rows, rows) of the least cost; the largest pieces come first.

    cost = rows x (length, or 0.94 of it where it is the longest allowed, + 0.02 x the longest allowed)
    """
    groups = [piece.group for piece in pieces]
    longest = lengths.prompt_length[groups] - 1 + lengths.response_length[groups].max(axis=1)
    least, total = int(longest.max()), int(sizes.sum())
    most = longest_row(least, packing.max_tokens or ROW_LENGTHS[-1])
    best, chosen = math.inf, None
    for count in itertools.count(packing.shards, packing.shards):
        if chosen and count * (least * _LONGEST_DISCOUNT + most * _MICRO_BATCH_COST) >= best:
            return chosen
        for length in _row_lengths(max(least, -(-total // count)), most):
            cost = length * (_LONGEST_DISCOUNT if length == most else 1) + most * _MICRO_BATCH_COST
            if count * cost < best and (rows := _fill(pieces, lengths, count, length)) is not None:
                best, chosen = count * cost, (length, rows)
    raise AssertionError("there is a row for every completion in the end")


def _row_lengths(least: int, most: int) -> Iterator[int]:
    first = bisect.bisect_left(ROW_LENGTHS, least)
    return itertools.takewhile(lambda n: n <= most, ROW_LENGTHS[first:])


def _fill(
    pieces: list[Piece], lengths: BatchLengths, count: int, length: int
) -> list[tuple[Piece, ...]] | None:
    """So many rows of that length, or None: each piece goes into the row with the fewest free positions that holds it, or is
    split.
    """
    free, rows = np.full(count, length), [[] for _ in range(count)]

    def put(piece: Piece, row: int) -> None:
        rows[row].append(piece)
        free[row] -= lengths.positions(piece)

    for piece in pieces:
        left = piece
        while left.completions:
            size = lengths.positions(left)
            if size <= free.max():
                put(left, int(np.argmin(np.where(free >= size, free, length + 1))))
                break
            row = int(np.argmax(free))
            part = _what_fits(left, lengths, int(free[row]))
            if not lengths.response_length[part.group, list(part.completions)].any():
                return None
            put(part, row)
            rest = [g for g in left.completions if g not in part.completions]
            left = Piece(left.group, tuple(rest))
    return [tuple(row) for row in rows]


def _what_fits(piece: Piece, lengths: BatchLengths, free: int) -> Piece:
    """The prompt with the longest completions that fit."""
    free -= int(lengths.prompt_length[piece.group]) - 1
    own, taken = lengths.response_length[piece.group], []
    for g in sorted(piece.completions, key=lambda g: (-own[g], g)):
        if own[g] <= free:
            taken.append(g)
            free -= int(own[g])
    return Piece(piece.group, tuple(sorted(taken)))


def packing_metrics(plan: Sequence[Sequence[MicroBatch]], groups: int) -> dict[str, float]:
    """Of the micro-batches of a step over `groups` groups. A repeated prompt is padding."""
    micro = [m for mini in plan for m in mini]
    taken = {piece.group for m in micro for row in m.rows for piece in row}
    needed = sum(m.lengths.positions(m.lengths.whole(p)) for m in micro[:1] for p in taken)
    positions = sum(m.positions for m in micro)
    return {
        "update/micro_batches": float(len(micro)),
        "update/padding": 1 - needed / positions if positions else 0.0,
        "update/skipped_groups": 1 - len(taken) / groups,
    }


@struct.dataclass
class Rows:
    """A micro-batch on the devices: where each position of its rows reads, and what it predicts. int32.

    Its methods run inside jit. A batch's arrays come whole to every device, as they are a few bytes a token; not its routes.
    """

    token: Int[AnyArray, "W T"]  # index among the tokens [P, Tp + G Tr] of the batch, which is read
    # index among the response tokens [P, G, Tr], which is predicted; -1: none
    target: Int[AnyArray, "W T"]
    position: Int[AnyArray, "W T"]  # in its sequence
    until: Int[AnyArray, "W T"]  # see RowLayout
    groups: Int[AnyArray, " W"]  # that lie in a row, undivided or not
    # see RowLayout
    balance: Float[AnyArray, "W T"] | None = struct.field(default=None, kw_only=True)
    pairs: int = struct.field(pytree_node=False)  # see RowLayout

    @property
    def layout(self) -> RowLayout:
        """Which positions see each other."""
        return RowLayout(self.until, self.pairs, self.balance)

    @property
    def predicts(self) -> Bool[Array, "W T"]:
        """Where a response token is predicted."""
        return jnp.asarray(self.target) >= 0

    def tokens(self, batch: ResponseBatch) -> Int[Array, "W T"]:
        """Ids that are read."""
        return self._take(_join(batch.prompt, batch.responses), self.token)

    def routes(self, routes: Routes) -> Shaped[Array, "L W T k"]:
        """The experts that the read tokens went to."""
        both = _join(routes.prompt, routes.responses)
        # too many bytes a token to come whole
        taken = jnp.take(both, self.token, axis=0, mode="clip")
        return jnp.moveaxis(pin_rows(taken), 2, 0)

    def targets(self, x: Shaped[AnyArray, "P G Tr"]) -> Shaped[Array, "W T"]:
        """A per-token array at the predicted tokens; zero where none is."""
        return jnp.where(self.predicts, self._take(x.reshape(-1), self.target), 0)

    def completions(self, x: Shaped[AnyArray, "P G"], width: int) -> Shaped[Array, "W T"]:
        """An array over completions of `width` positions at their predicted tokens; zero where none is."""
        return jnp.where(self.predicts, self._take(x.reshape(-1), self.target // width), 0)

    def advantages(self, x: Shaped[AnyArray, "P G *Tr"], width: int) -> Shaped[Array, "W T"]:
        """An array over completions or over their tokens at the predicted tokens; zero where none is."""
        return self.completions(x, width) if x.ndim == 2 else self.targets(x)

    def put_targets(
        self, x: Shaped[Array, "P G Tr"], values: Shaped[Array, "W T"]
    ) -> Shaped[Array, "P G Tr"]:
        """x with the values of the predicted tokens; the inverse of `targets`."""
        where = jnp.where(self.predicts, self.target, x.size)
        where, values = (spmd.with_logical_constraint(a, (None, None)) for a in (where, values))
        put = x.reshape(-1).at[where.reshape(-1)].set(values.reshape(-1), mode="drop")
        return put.reshape(x.shape)

    def _take(self, flat, index):
        flat = spmd.with_logical_constraint(flat, (None,) * flat.ndim)
        return pin_rows(jnp.take(flat, index, axis=0, mode="clip"))


def make_rows(micro: MicroBatch, mesh: Mesh | None = None) -> Rows:
    """A micro-batch on its data shards, of which each process makes its own; without a mesh, NumPy."""
    count, length, lengths = len(micro.rows), micro.row_length, micro.lengths
    tokens = len(lengths.prompt_length) * (
        lengths.widths[0] + lengths.response_length.shape[1] * lengths.widths[1]
    )
    if tokens >= 1 << 31:
        raise ValueError(f"make_rows: int32 cannot index the {tokens} tokens of a batch")

    @functools.cache
    def tables(shard: int) -> np.ndarray:
        return _row_tables(micro.rows[shard], lengths, length)

    def part(field: int, index: Any) -> np.ndarray:
        return np.stack([tables(shard)[field] for shard in range(count)[index[0]]])

    def put_on_mesh(field: int) -> AnyArray:
        if mesh is None:
            return part(field, (slice(None),))
        shape, rows = (count, length), batch_sharding(mesh)
        return jax.make_array_from_callback(shape, rows, functools.partial(part, field))

    counts = np.array([len(row) for row in micro.rows], np.int32)
    groups: AnyArray = counts
    if mesh is not None:
        # not device_put, for which all processes would wait to compare what they have
        groups = jax.make_array_from_callback(
            counts.shape, batch_sharding(mesh), counts.__getitem__
        )
    # pairs of a causal row, so that one program serves all micro-batches
    return Rows(*map(put_on_mesh, range(4)), groups=groups, pairs=length * (length + 1) // 2)


def empty_rows(shards: int) -> Rows:
    """Rows of nothing, to ask for the shapes of what a micro-batch gives."""
    none = jnp.zeros((shards, ROW_LENGTHS[0]), jnp.int32)
    return Rows(none, none - 1, none, none, none[:, 0], pairs=1)


def _row_tables(row: Sequence[Piece], lengths: BatchLengths, length: int) -> np.ndarray:
    """int32 [4, T]: token, target, position and until of a row."""
    prompt_width, response_width = lengths.widths
    group_size = lengths.response_length.shape[1]
    tables = np.zeros((4, length), np.int32)
    token, target, position, until = tables
    target[:] = -1
    at = 0
    for piece in row:
        p, start = piece.group, at
        first = p * (prompt_width + group_size * response_width)
        before = int(lengths.prompt_length[p]) - 1
        at += before
        token[start:at] = first + np.arange(before)
        position[start:at] = np.arange(before)
        for g in piece.completions:
            size = int(lengths.response_length[p, g])
            own = slice(at, at + size)
            read = first + prompt_width + g * response_width + np.arange(-1, size - 1)
            token[own] = np.where(np.arange(size) == 0, first + before, read)
            target[own] = (p * group_size + g) * response_width + np.arange(size)
            position[own] = before + np.arange(size)
            at += size
            until[own] = at
        until[start : start + before] = at
    return tables


def _count_pairs(piece: Piece, lengths: BatchLengths) -> int:
    before = int(lengths.prompt_length[piece.group]) - 1
    own = lengths.response_length[piece.group, list(piece.completions)].astype(np.int64)
    return before * (before + 1) // 2 + int((own * before + own * (own + 1) // 2).sum())


def _join(prompt, responses):
    """`[P Tp ...]` and `[P G Tr ...]` as `[P*(Tp + G*Tr) ...]`."""
    own = responses.reshape(responses.shape[0], -1, *responses.shape[3:])
    both = jnp.concatenate([prompt, own], axis=1)
    return both.reshape(-1, *both.shape[2:])
