"""The mesh, the one table from logical axis names to mesh axes, and what passes between a process and the mesh.

Modules name logical axes only ("embed", "heads", ..); `RULES` says which mesh axes (data, fsdp, tensor,
expert) hold them. Train layout: weights split over fsdp and tensor. Rollout layout: over tensor only, so
that decoding gathers no weights. `activate(mesh)` around a run makes the decoder pin its activations to
the batch axes. All axes are Auto: XLA places the collectives from the shardings of inputs and outputs.
"""

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeVar

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rest_jax.config import MeshConfig
from rest_jax.errors import UserError

Tree = TypeVar("Tree")
AXES = ("data", "fsdp", "tensor", "expert")
BATCH_AXES = ("data", "fsdp")
RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": BATCH_AXES,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "expert": "expert",
    "head_dim": None,
    "norm": None,
    "layers": None,
}
_UNSPLIT_IN_ROLLOUT = ("embed",)
# Fewer kv heads than tensor devices: every device keeps them all.
_REPLICATED_WHEN_FEW = ("kv_heads",)


def make_mesh(cfg: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Mesh over `devices` (default: all) with axes data, fsdp, tensor, expert; -1 takes what is left.

    ValueError with both numbers when the sizes do not use exactly the devices there are.
    """
    given = devices is not None
    devices = list(devices if devices is not None else jax.devices())
    sizes = [getattr(cfg, axis) for axis in AXES]
    fixed = math.prod(size for size in sizes if size != -1)
    named = ", ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))
    if -1 in sizes:
        if len(devices) % fixed:
            raise UserError(
                f"mesh ({named}): {fixed} does not divide the {len(devices)} devices; change the fixed sizes"
            )
        sizes[sizes.index(-1)] = len(devices) // fixed
    elif fixed != len(devices):
        raise UserError(
            f"mesh ({named}) needs {fixed} devices and there are {len(devices)}; set one size to -1"
        )
    kinds = (AxisType.Auto,) * len(AXES)
    if given:
        ordered = np.empty(len(devices), object)
        ordered[:] = sorted(devices, key=_by_host)
        return Mesh(ordered.reshape(sizes), AXES, axis_types=kinds)
    return jax.make_mesh(tuple(sizes), AXES, axis_types=kinds, devices=devices)


def _by_host(device: Any) -> tuple[Any, ...]:
    """Sorts devices by slice, process and coordinates, so that neighbours in the mesh are on one host."""
    slice_index = getattr(device, "slice_index", None) or 0
    return slice_index, device.process_index, getattr(device, "coords", None) or (), device.id


def platform(mesh: Mesh) -> str:
    """What the devices of a mesh are: "cpu", "gpu" or "tpu". They need not be in this machine (`rest_jax.planning`)."""
    name: str = mesh.devices.flat[0].platform
    return "gpu" if name in ("cuda", "rocm") else name


@contextlib.contextmanager
def activate(mesh: Mesh) -> Iterator[None]:
    """Makes `mesh` and the table ambient: functions traced inside pin activations to the batch axes."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(tuple(RULES.items())):
        yield


def replicated(mesh: Mesh) -> NamedSharding:
    """All of an array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis split over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def place(shapes: Tree, shardings: Any) -> Tree:
    """Abstract arrays with the shardings of a tree like theirs, or all with one."""
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, shapes)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )


def num_data_shards(mesh: Mesh) -> int:
    """Into how many parts `batch_sharding` splits an array."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def check_batch(name: str, size: int, mesh: Mesh) -> None:
    """UserError with both numbers unless `size` rows split evenly over the batch axes."""
    shards = num_data_shards(mesh)
    if size % shards:
        raise UserError(
            f"{name} {size} does not divide over {shards} data shards "
            f"(mesh data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']}); make it a multiple of {shards}"
        )


def logical_shardings(
    boxed: Any, mesh: Mesh, *, layout: Literal["train", "rollout"] = "train"
) -> Any:
    """NamedSharding of every parameter of `boxed` (abstract, with logical axis names), as a plain nested dict like
    the parameters themselves.

    A dimension its mesh axis does not divide is an error naming tensor, dimension and axis size; only
    kv heads fewer than the tensor axis are replicated instead.
    """

    def sharding_of(path: tuple[Any, ...], box: Any) -> NamedSharding:
        name = ".".join(str(getattr(key, "key", key)) for key in path)
        spec = [
            _mesh_axis(name, axis, size, mesh, layout)
            for axis, size in zip(box.names, box.value.shape, strict=True)
        ]
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(
        sharding_of, boxed, is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata)
    )


def tree_shardings_like(tree: Any, params: Any, shardings: Any) -> Any:
    """Shardings for a state that mirrors parameters somewhere inside (optimiser moments, a TrainState).

    A leaf whose path ends in a parameter's path and whose shape is the parameter's gets the parameter's sharding; every
    other leaf is replicated. `tree` and `params` may be abstract (`jax.eval_shape`).
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    placed = jax.tree.leaves(shardings)
    known = {path: (leaf.shape, where) for (path, leaf), where in zip(leaves, placed, strict=True)}
    everywhere = replicated(placed[0].mesh)

    def sharding_of(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        for start in range(len(path)):
            shape, where = known.get(path[start:], (None, everywhere))
            if shape == np.shape(leaf):
                return where
        return everywhere

    return jax.tree_util.tree_map_with_path(sharding_of, tree)


def _mesh_axis(name: str, axis: str, size: int, mesh: Mesh, layout: str) -> str | None:
    target = RULES[axis]
    if target is None or (layout == "rollout" and axis in _UNSPLIT_IN_ROLLOUT):
        return None
    assert isinstance(target, str)  # parameters never carry the batch axis
    devices = mesh.shape[target]
    if size % devices == 0:
        return target
    if axis in _REPLICATED_WHEN_FEW and size < devices:
        return None
    raise UserError(
        f"parameter {name}: its {axis} dimension {size} does not divide over mesh axis {target} {devices}; "
        f"choose a {target} size that divides {size}"
    )


def to_mesh(tree: Tree, mesh: Mesh) -> Tree:
    """Leaves: this process's rows [P_local, ...] -> global arrays, first axis sharded over (data, fsdp)."""
    sharding = batch_sharding(mesh)
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), tree
    )


def to_host(tree: Tree) -> Tree:
    """The inverse: NumPy rows held by this process's devices, in their order; replicas are read once."""

    def one(x):
        if x.is_fully_addressable:
            return np.asarray(x)
        shards = {s.index[0].start or 0: s.data for s in x.addressable_shards}
        return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])

    return jax.tree.map(one, tree)


def gather(tree: Tree) -> Tree:
    """NumPy rows of every process, in the order of the processes; every process must call it."""
    if jax.process_count() == 1:
        return tree
    from jax.experimental import multihost_utils

    return jax.tree.map(
        lambda x: np.asarray(multihost_utils.process_allgather(x, tiled=True)), tree
    )


def any_process(value: bool) -> bool:
    """Whether `value` holds in any process; every process must call it, and all get the same answer."""
    return bool(np.any(gather(np.asarray([value]))))


def join() -> None:
    """Makes this process one of many: SLURM, Cloud TPU and Open MPI are recognised by jax itself; elsewhere
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say who is who. UserError when nothing does.
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = [os.environ.get(name) for name in names]
    try:
        if all(given):
            jax.distributed.initialize(given[0], int(given[1] or 0), int(given[2] or 0))
        else:
            jax.distributed.initialize()
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--distributed: {reason} (set {', '.join(names)})") from error


def is_first_process() -> bool:
    """Whether this process writes the run's files."""
    return jax.process_index() == 0
