"""One parameter from its source to a mesh: whole rows are read, once, and the devices do the rest.

A mesh splits matrices by columns as often as by rows, and columns of a file are short pieces of every row. So a few layers at
a time are read as they are stored, whole rows, split over all devices; the devices exchange them in the stored dtype,
transpose and cast them, and put them into the parameter, which is donated. A process reads its rows once, and holds
beside the parameters only its share of those layers.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from rest_jax.models.hf.table import Slices, Spec

Path = tuple[str, ...]
_STAGED_BYTES = 2**25  # of one device
_SMALL_BYTES = 2**24  # of a parameter


@dataclasses.dataclass(frozen=True)
class Weights:
    """The values of one parameter as its source stores them, and how to read a part of them."""

    spec: Spec
    # Leading axes of the parameter (1 when it has none), then those of one tensor.
    shape: tuple[int, ...]
    chunk: tuple[int, ...]  # what is read together: parts aligned to it are read without waste
    dtype: np.dtype
    in_hf_layout: bool  # the tensor is that of HF; else our parameter
    read: Callable[[Slices], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Size of all values in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def place(
    weights: Sequence[Weights],
    shardings: Mapping[Path, NamedSharding],
    dtype: np.dtype,
    advance: Callable[[int], None],
) -> dict[Path, jax.Array]:
    """Every parameter by its path, in its dtype and sharding. `advance` is told how many bytes of the source were read last.

    All processes call it.
    """
    small = [w for w in weights if w.nbytes <= _SMALL_BYTES]
    placed = _place_together(small, [shardings[w.spec.path] for w in small], dtype, advance)
    for w in weights:
        if w.spec.path not in placed:
            placed[w.spec.path] = _place_by_layers(w, shardings[w.spec.path], dtype, advance)
    return placed


def _place_together(
    weights: Sequence[Weights],
    shardings: Sequence[NamedSharding],
    dtype: np.dtype,
    advance: Callable[[int], None],
) -> dict[Path, jax.Array]:
    """Small parameters, by one program: compiling one for each takes longer than reading them."""
    plans = tuple(_plan(w, s, dtype) for w, s in zip(weights, shardings, strict=True))
    staged = []
    for w, plan in zip(weights, plans, strict=True):
        staged.append(_stage(w, slice(0, w.shape[0]), plan.stages[0]))
        advance(w.nbytes)
    arrange = jax.jit(_arrange_all, static_argnames="plans", out_shardings=list(shardings))
    placed = arrange(staged, plans=plans)
    return {w.spec.path: x for w, x in zip(weights, placed, strict=True)}


def _place_by_layers(
    weights: Weights, sharding: NamedSharding, dtype: np.dtype, advance: Callable[[int], None]
) -> jax.Array:
    """A parameter, a few layers at a time."""
    layers, step = weights.shape[0], _layers_together(weights, sharding)
    plan = _plan(weights, sharding, dtype)
    if step == layers:
        return _place_together([weights], [sharding], dtype, advance)[weights.spec.path]
    parameter = jnp.zeros(weights.spec.shape, dtype, device=sharding)
    insert = jax.jit(
        _insert, static_argnames="plan", out_shardings=sharding, donate_argnames="parameter"
    )
    for start in range(0, layers, step):
        staged = _stage(weights, slice(start, start + step), plan.stages[0])
        # Reading is one step ahead of the devices and no more.
        jax.block_until_ready(parameter)
        parameter = insert(parameter, staged, start, plan=plan)
        advance(weights.nbytes * step // layers)
    return parameter


class _Plan(NamedTuple):
    """How layers as they are stored become a parameter; what the program for it is compiled for."""

    spec: Spec
    in_hf_layout: bool
    stored: np.dtype
    dtype: np.dtype
    # Of the layers as they are stored: as they are read, .., as the parameter needs them.
    stages: tuple[NamedSharding, ...]
    sharding: NamedSharding  # of the parameter


def _plan(weights: Weights, sharding: NamedSharding, dtype: np.dtype) -> _Plan:
    # Compiled once for all parameters of one layout, whatever their names.
    spec = dataclasses.replace(weights.spec, hf_name="", path=())
    stages = _stages(weights, sharding)
    return _Plan(spec, weights.in_hf_layout, weights.dtype, dtype, stages, sharding)


def _layers_together(weights: Weights, sharding: NamedSharding) -> int:
    """How many layers to stage at once: about _STAGED_BYTES a device, whole chunks, and equally many each time."""
    layers = weights.shape[0]
    parts = weights.spec.shape, sharding.shard_shape(weights.spec.shape)
    shards = math.prod(parts[0]) // math.prod(parts[1])
    room = _STAGED_BYTES * shards // (weights.nbytes // layers)
    divisors = [n for n in range(1, layers + 1) if layers % n == 0]
    aligned = [n for n in divisors if n % weights.chunk[0] == 0]
    # Chunks across all layers that no divisor aligns to: everything at once.
    return max([n for n in aligned if n <= room] or aligned[:1] or [layers])


def _stages(weights: Weights, sharding: NamedSharding) -> tuple[NamedSharding, ...]:
    """Shardings of layers as they are stored, from whole rows on every device to the ones that the parameter needs.

    At first all mesh axes split rows (and experts), never columns: those that split rows in the parameter, then those that split
    its columns, then those that split nothing. The last are gathered, then those of columns exchanged (all-to-all). What
    changes is always the finest split, which the partitioner does without a whole copy. An axis that divides no rows
    leaves copies.
    """
    wanted = _axes_as_stored(weights, sharding)
    rows = range(1, max(2, len(weights.shape) - 1))
    used = {axis: at for at, axes in enumerate(wanted) for axis in axes}
    staying = [axis for axis, at in used.items() if at in rows]
    moving = [axis for axis in used if axis not in staying]
    idle = [axis for axis in sharding.mesh.axis_names if axis not in used]
    split: list[list[str]] = [list(axes) if at in rows else [] for at, axes in enumerate(wanted)]
    left = [
        size // math.prod(sharding.mesh.shape[axis] for axis in axes)
        for size, axes in zip(weights.shape, split, strict=True)
    ]
    for axis in (*moving, *idle):
        size = sharding.mesh.shape[axis]
        for at in rows:
            if left[at] % size == 0:
                left[at] //= size
                split[at].append(axis)
                break
    gathered = [[axis for axis in axes if axis not in idle] for axes in split]
    stages = (split, gathered, wanted)
    return tuple(NamedSharding(sharding.mesh, PartitionSpec(*map(tuple, axes))) for axes in stages)


def _axes_as_stored(weights: Weights, sharding: NamedSharding) -> list[list[str]]:
    """The mesh axes that split each axis of the layers as they are stored when the parameter is split by `sharding`."""
    spec = weights.spec
    stack = len(spec.stack)
    names = [
        [] if entry is None else [entry] if isinstance(entry, str) else list(entry)
        for entry in (*sharding.spec, *[None] * (len(spec.shape) - len(sharding.spec)))
    ]
    lead = names[:stack] or [[]]
    if not weights.in_hf_layout:
        return [*lead, *names[stack:]]
    fused = [group for group, sizes in enumerate(spec.groups) for _ in sizes]
    own: list[list[str]] = [[] for _ in spec.groups]
    for ours, axis in enumerate(spec.order):
        own[fused[axis]] += names[stack + ours]
    return [*lead, *own]


def _stage(weights: Weights, layers: slice, sharding: NamedSharding) -> jax.Array:
    """Layers as they are stored; a process reads no value twice, and in one piece if its devices hold one.

    As unsigned integers: a compiler that sees floats casts them before the devices exchange them.
    """
    shape = (layers.stop - layers.start, *weights.shape[1:])

    def bounds_of(index: Any) -> tuple[tuple[int, int], ...]:
        return tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))

    parts = {bounds_of(index) for index in sharding.addressable_devices_indices_map(shape).values()}
    bounds = np.asarray(list(parts))  # [parts, axes, (first, last)]
    first, last = bounds[:, :, 0].min(0), bounds[:, :, 1].max(0)
    in_one_piece = np.prod(last - first) == np.prod(bounds[:, :, 1] - bounds[:, :, 0], 1).sum()
    bits = np.dtype(f"u{weights.dtype.itemsize}")
    pieces = [tuple(zip(first, last, strict=True))] if in_one_piece else parts
    held = {
        piece: weights.read((layers, *(slice(int(a), int(b)) for a, b in piece[1:]))).view(bits)
        for piece in pieces
    }

    def part(index: Any) -> np.ndarray:
        asked = bounds_of(index)
        piece = next(iter(held)) if in_one_piece else asked
        inside = zip(asked, piece, strict=True)
        return held[piece][tuple(slice(a - start, b - start) for (a, b), (start, _) in inside)]

    return jax.make_array_from_callback(shape, sharding, part)


def _arrange(bits: jax.Array, plan: _Plan) -> jax.Array:
    for sharding in plan.stages[1:]:
        bits = jax.lax.with_sharding_constraint(bits, sharding)
    values = jax.lax.bitcast_convert_type(bits, plan.stored)
    ours = plan.spec.to_ours(values) if plan.in_hf_layout else values
    return (ours if plan.spec.stack else ours[0]).astype(plan.dtype)


def _arrange_all(staged: Sequence[jax.Array], plans: Sequence[_Plan]) -> list[jax.Array]:
    return [_arrange(x, plan) for x, plan in zip(staged, plans, strict=True)]


def _insert(parameter: jax.Array, staged: jax.Array, start: int, plan: _Plan) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(parameter, _arrange(staged, plan), start, 0)
