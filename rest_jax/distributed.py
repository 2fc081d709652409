"""The mesh, the one table from logical axis names to mesh axes, and what passes between a process and the mesh.

Modules name logical axes only ("embed", "heads", ..); `RULES` says which mesh axes (data, fsdp, expert,
tensor) hold them. The batch is split over data, fsdp and expert. Train layout: weights are split over fsdp,
expert and tensor. Rollout layout: over tensor, and experts over expert, so that decoding gathers no weights.
`activate(mesh)` around a run makes the decoder pin its activations to the batch axes. All axes are Auto: XLA
places the collectives from the shardings of inputs and outputs; `models/moe.py`, `models/attention.py` and `rl/logprobs.py`
place their own.
"""

import collections
import contextlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeVar

import jax
import jax._src.distributed
import numpy as np
from flax import linen as nn
from flax.linen import spmd
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from rest_jax.config import MeshConfig
from rest_jax.errors import RunStopped, UserError
from rest_jax.texts import print_text

Tree = TypeVar("Tree")
AXES = ("data", "fsdp", "expert", "tensor")
# Rows of a batch are split over all but tensor, so the parts (data shards) are the leading part of the mesh.
BATCH_AXES = AXES[:-1]
HOST_MEMORY = "pinned_host"  # the kind of memory beside the devices that they can read
RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": BATCH_AXES,
    "positions": "tensor",
    "vocab": "tensor",
    "embed": ("fsdp", "expert"),
    "expert_embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "expert": "expert",
    "router": None,
    "head_dim": None,
    "rank": None,
    "norm": None,
    "layers": None,
}
_UNSPLIT_IN_ROLLOUT = ("embed", "expert_embed")
_SCATTERED_AT_ONCE = 4
_EXCHANGES = itertools.count(1)
# Fewer kv heads than tensor devices: every device keeps them all.
_REPLICATED_WHEN_FEW = ("kv_heads",)


def make_mesh(cfg: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Mesh over `devices` (default: all) with axes data, fsdp, expert, tensor; -1 takes what is left.

    Devices are in one order on all hardware: by slice (TPU) or node (GPU), then by process, then by coordinates. The last
    axis varies fastest, so tensor groups lie inside a host where they fit, and data, the outermost axis, is the one that
    crosses the data centre network. UserError with the numbers for sizes that these devices cannot have.
    """
    devices = sorted(jax.devices() if devices is None else devices, key=_device_order)
    slices = len({_slice_index(device) for device in devices})
    sizes = _axis_sizes(cfg, len(devices), slices)
    _check_tensor(sizes[AXES.index("tensor")], devices)
    grid = np.empty(len(devices), object)
    grid[:] = devices
    return Mesh(grid.reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def with_tensor(mesh: Mesh, tensor: int) -> Mesh:
    """The devices of `mesh`, in their order, with another size of the tensor axis and of fsdp; data becomes one part."""
    sizes = MeshConfig(data=1, fsdp=-1, expert=mesh.shape["expert"], tensor=tensor)
    return make_mesh(sizes, list(mesh.devices.flat))


def _device_order(device: Any) -> tuple[Any, ...]:
    coords = tuple(getattr(device, "coords", None) or ())
    return _slice_index(device), device.process_index, coords, device.id


def _slice_index(device: Any) -> int:
    """Devices of one slice are connected with each other (ICI, NVLink); between slices there is the data centre network."""
    return getattr(device, "slice_index", None) or 0


def _axis_sizes(cfg: MeshConfig, devices: int, slices: int) -> list[int]:
    """The sizes of AXES. `data` None is one part a slice; -1 is what is left."""
    given = {axis: getattr(cfg, axis) for axis in AXES}
    if given["data"] is None:
        given["data"] = slices
    named = ", ".join(f"{axis} {size}" for axis, size in given.items())
    sizes = list(given.values())
    fixed = math.prod(size for size in sizes if size != -1)
    if -1 in sizes:
        if devices % fixed:
            free = AXES[sizes.index(-1)]
            large = ", ".join(f"mesh.{axis}" for axis, n in given.items() if n not in (1, -1))
            raise UserError(
                f"mesh ({named}): {fixed} does not divide the {devices} devices here, so that nothing is left for mesh.{free}; "
                f"make {large} smaller"
            )
        sizes[sizes.index(-1)] = devices // fixed
    elif fixed != devices:
        raise UserError(
            f"mesh ({named}) needs {fixed} devices and there are {devices}; set one size to -1"
        )
    return sizes


def _check_tensor(tensor: int, devices: Sequence[Any]) -> None:
    """A tensor group is a part of a host, or several hosts of one slice. `devices` are in their order."""
    hosts = collections.Counter(device.process_index for device in devices)
    if len(set(hosts.values())) > 1:
        uneven = ", ".join(f"process {process}: {count}" for process, count in hosts.items())
        raise UserError(f"mesh: every process needs equally many devices ({uneven})")
    host = len(devices) // len(hosts)
    slices = collections.Counter(map(_slice_index, devices))
    if host % tensor and tensor % host:
        fits = ", ".join(str(n) for n in range(1, host + 1) if host % n == 0)
        raise UserError(
            f"mesh.tensor {tensor}: neither divides the {host} devices of a process nor is a multiple of them; "
            f"choose one of {fits}"
        )
    if any(count % tensor for count in slices.values()):
        raise UserError(
            f"mesh.tensor {tensor}: does not divide the {min(slices.values())} devices of a slice; "
            "a tensor group cannot cross the data centre network"
        )


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


def replicated_beside(params: Any) -> NamedSharding | None:
    """All of an array on every device that holds `params`; None for parameters that are on no mesh."""
    where = jax.tree.leaves(params)[0].sharding
    return NamedSharding(where.mesh, PartitionSpec()) if isinstance(where, NamedSharding) else None


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis split over data, fsdp and expert."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def pin_rows(x: jax.Array) -> jax.Array:
    """Splits the leading axis over the batch axes only, inside jit; does nothing outside `activate`."""
    return spmd.with_logical_constraint(x, ("batch", *(None,) * (x.ndim - 1)))


def pin_positions(x: jax.Array) -> jax.Array:
    """Splits the positions of hidden states `[B T D]` over tensor besides, where they divide, so that what is done to each alone
    is done once and kept once (sequence parallelism, arXiv:2205.05198).
    """
    tensor = jax.sharding.get_abstract_mesh().shape.get("tensor", 1)
    axis = "positions" if x.shape[1] % tensor == 0 else None
    return spmd.with_logical_constraint(x, ("batch", axis, None))


@jax.custom_vjp
def gather_positions(x: jax.Array) -> jax.Array:
    """All positions for every device of a tensor group, from `pin_positions`; its gradient is split as x is."""
    return pin_rows(x)


@jax.custom_vjp
def scatter_positions(x: jax.Array) -> jax.Array:
    """`pin_positions` of what the devices of a tensor group add up; its gradient goes to all of them."""
    return pin_positions(x)


gather_positions.defvjp(lambda x: (pin_rows(x), None), lambda _, d_x: (pin_positions(d_x),))
scatter_positions.defvjp(lambda x: (pin_positions(x), None), lambda _, d_x: (pin_rows(d_x),))


def scatter_sum(x: jax.Array, axis: str, dimension: int = 0) -> jax.Array:
    """`psum_scatter` over a mesh axis inside shard_map: of the sum every device keeps its part along a dimension, which their
    number divides.

    It is done in steps of at most four devices: of a sum over 8 or 16 libtpu makes all of it on all devices, which sends twice
    as much.
    """
    size = left = jax.lax.axis_size(axis)
    while left > 1:
        part = math.gcd(left, _SCATTERED_AT_ONCE)
        part = part if part > 1 else left
        stride = left // part
        groups = [
            list(range(block + first, block + left, stride))
            for block in range(0, size, left)
            for first in range(stride)
        ]
        x = jax.lax.psum_scatter(
            x, axis, scatter_dimension=dimension, axis_index_groups=groups, tiled=True
        )
        left = stride
    return x


def sum_parts(x: jax.Array, axes: Sequence[str], parts: Sequence[Sequence[str]]) -> jax.Array:
    """The sum over mesh axes inside shard_map, of which every device keeps its part: along each dimension, the one that those of
    the axes in `parts` give it.
    """
    left = list(axes)
    for dimension, part in enumerate(parts):
        for axis in part:
            x = scatter_sum(x, axis, dimension)
            left.remove(axis)
    return jax.lax.psum(x, tuple(left)) if left else x


def sum_weight_gradient(
    product: Callable[[jax.Array, jax.Array], jax.Array],
    x: jax.Array,
    d_y: jax.Array,
    axes: Sequence[str],
    sizes: Sequence[int],
) -> jax.Array:
    """The gradient `[I O]` of a matrix with these logical axes, `product(x [T I], d_y [T O])`, summed over the data shards; every
    device keeps the part that it holds of the matrix in the layout of training. `sizes`: what the mesh divides.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or num_data_shards(mesh) == 1 or x.shape[0] % num_data_shards(mesh):
        return product(x, d_y)
    where = PartitionSpec(
        *(
            _mesh_axis("gradient", axis, size, mesh, "train")
            for axis, size in zip(axes, sizes, strict=True)
        )
    )
    split = [part if isinstance(part, tuple) else (part,) for part in where]
    rows, columns = ("tensor" if "tensor" in part else None for part in split)
    parts = [[axis for axis in BATCH_AXES if axis in part] for part in split]

    def on_device(x, d_y):
        return sum_parts(product(x, d_y), BATCH_AXES, parts)

    specs = PartitionSpec(BATCH_AXES, rows), PartitionSpec(BATCH_AXES, columns)
    return jax.shard_map(on_device, in_specs=specs, out_specs=where)(x, d_y)


def place(shapes: Tree, shardings: Any) -> Tree:
    """Abstract arrays with the shardings of a tree like theirs, or all with one."""

    def one(x: Any, where: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    if isinstance(shardings, NamedSharding):
        return jax.tree.map(lambda x: one(x, shardings), shapes)
    return jax.tree.map(one, shapes, shardings)


def num_data_shards(mesh: Mesh | AbstractMesh) -> int:
    """Into how many parts `batch_sharding` splits an array."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def shard_owners(mesh: Mesh) -> list[tuple[int, ...]]:
    """The processes that hold each data shard: one, or several where a tensor group crosses hosts."""
    parts = mesh.devices.reshape(num_data_shards(mesh), -1)
    return [tuple(sorted({device.process_index for device in part})) for part in parts]


def host_groups(mesh: Mesh) -> list[list[int]]:
    """The data shards, grouped by the processes that hold them: those of a group work on the same rows."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for shard, owners in enumerate(shard_owners(mesh)):
        groups.setdefault(owners, []).append(shard)
    return list(groups.values())


def local_shards(mesh: Mesh, process: int | None = None) -> list[int]:
    """The data shards that a process (None: this one) holds, ascending."""
    here = jax.process_index() if process is None else process
    return [shard for shard, owners in enumerate(shard_owners(mesh)) if here in owners]


def rows_of_shards(count: int, shards: Sequence[int], mesh: Mesh) -> np.ndarray:
    """int64: which of `count` rows lie in the given data shards, ascending. The shards divide the rows evenly, but for
    the rounding where `count` is no multiple of them.
    """
    total = num_data_shards(mesh)
    parts = [np.arange(count * shard // total, count * (shard + 1) // total) for shard in shards]
    return np.concatenate(parts)


def check_batch(name: str, size: int, mesh: Mesh) -> None:
    """UserError with both numbers unless `size` rows split evenly over the batch axes."""
    shards = num_data_shards(mesh)
    if size % shards:
        sizes = " x ".join(f"{axis} {mesh.shape[axis]}" for axis in BATCH_AXES)
        raise UserError(
            f"{name} {size} does not divide over {shards} data shards (mesh {sizes}); make it a multiple of {shards}"
        )


def logical_shardings(
    boxed: Any, mesh: Mesh, *, layout: Literal["train", "rollout"] = "train"
) -> Any:
    """NamedSharding of every parameter of `boxed` (abstract, with logical axis names), as a plain nested dict like
    the parameters themselves.

    A dimension its mesh axis does not divide is an error naming tensor, dimension and axis size; only kv heads fewer
    than the tensor axis are replicated instead, and of several mesh axes that do not divide it the first alone is taken.
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


def _mesh_axis(
    name: str, axis: str, size: int, mesh: Mesh | AbstractMesh, layout: str
) -> str | tuple[str, ...] | None:
    target = RULES[axis]
    if target is None or (layout == "rollout" and axis in _UNSPLIT_IN_ROLLOUT):
        return None
    first, *others = (target,) if isinstance(target, str) else target
    joined = (first, *(other for other in others if mesh.shape[other] > 1))
    if len(joined) > 1 and size % math.prod(mesh.shape[part] for part in joined) == 0:
        return joined
    devices = mesh.shape[first]
    if size % devices == 0:
        return first
    if axis in _REPLICATED_WHEN_FEW and size < devices:
        return None
    raise UserError(
        f"parameter {name}: its {axis} dimension {size} does not divide over mesh axis {first} {devices}; "
        f"choose a {first} size that divides {size}"
    )


def to_mesh(tree: Tree, mesh: Mesh) -> Tree:
    """Leaves: the rows of this process's data shards [P_local, ...] -> global arrays, split over the data shards."""
    sharding = batch_sharding(mesh)
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), tree
    )


def move_rows(tree: Tree, source: Mesh, target: Mesh) -> Tree:
    """Leaves: the rows of this process's data shards of `source` -> global arrays, split over the data shards of `target`, a
    mesh of the same devices.
    """
    if jax.process_count() == 1 or _same_owners(source, target):
        return to_mesh(tree, target)
    rows = batch_sharding(target)
    return jax.jit(lambda x: x, out_shardings=rows)(to_mesh(tree, source))


def _same_owners(a: Mesh, b: Mesh) -> bool:
    """Whether each process has the same rows of a batch under both meshes."""
    parts = math.lcm(num_data_shards(a), num_data_shards(b))
    first, second = (
        [owners for owners in shard_owners(mesh) for _ in range(parts // num_data_shards(mesh))]
        for mesh in (a, b)
    )
    return first == second


def to_host(tree: Tree) -> Tree:
    """The inverse: NumPy rows held by this process's devices, in their order; replicas are read once."""

    def one(x):
        if x.is_fully_addressable:
            return np.asarray(x)
        shards = {s.index[0].start or 0: s.data for s in x.addressable_shards}
        return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])

    return jax.tree.map(one, tree)


def gather(tree: Tree, mesh: Mesh) -> Tree:
    """NumPy rows of the global batch, in the order of the data shards, from the rows that each process holds (those of its
    `local_shards`). Every process must call it.
    """
    if jax.process_count() == 1:
        return tree
    owners = shard_owners(mesh)
    held: dict[int, list[int]] = {}
    for shard, processes in enumerate(owners):
        for process in processes:
            held.setdefault(process, []).append(shard)
    source = [(processes[0], held[processes[0]].index(i)) for i, processes in enumerate(owners)]

    def one(x):
        parts = all_gather(x)  # [processes, rows, ...]
        parts = parts.reshape(len(held), len(held[0]), -1, *parts.shape[2:])
        return np.concatenate([parts[process, position] for process, position in source])

    return jax.tree.map(one, tree)


def all_gather(tree: Tree) -> Tree:
    """NumPy, from the arrays of every process: [processes, ...]. Every process must call it."""
    if jax.process_count() == 1:
        return jax.tree.map(lambda x: np.asarray(x)[None], tree)
    from jax.experimental import multihost_utils

    return jax.tree.map(
        lambda x: np.asarray(multihost_utils.process_allgather(np.asarray(x))), tree
    )


def any_process(value: bool, timeout: int = 1800) -> bool:
    """Whether `value` holds in any process; every process must call it, and all get the same answer. Errors of `exchange`."""
    return "1" in exchange(str(int(value)), timeout)


def exchange(text: str, timeout: int = 1800) -> list[str]:
    """The texts of all processes, in their order. Every process must call it, from one thread.

    They pass through the coordinator: no device takes part and nothing is compiled. RunStopped when one of them has not
    called it after `timeout` seconds, or has ended.
    """
    if jax.process_count() == 1:
        return [text]
    # jax offers the coordinator's store and barriers to libraries only (Orbax uses the same client).
    client: Any = jax._src.distributed.global_state.client
    number, here = next(_EXCHANGES), jax.process_index()
    name = f"rest_jax/exchange/{number}"
    try:
        client.key_value_set(f"{name}/{here}", text)
        client.wait_at_barrier(name, timeout * 1000)
        found = {int(key.rpartition("/")[2]): said for key, said in client.key_value_dir_get(name)}
        # Whoever is here has read what was said the time before.
        client.key_value_delete(f"rest_jax/exchange/{number - 1}/{here}")
    except jax.errors.JaxRuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise RunStopped(
            f"process {here} of {jax.process_count()}: the others gave no answer within {timeout} s ({reason})"
        ) from error
    return [found[index] for index in range(jax.process_count())]


def agree(fault: UserError | RunStopped | None, timeout: int = 1800) -> None:
    """Raises the fault of the first process that has found one, in all of them. Every process must call it; RunStopped as of
    `exchange`.
    """
    said_here = "" if fault is None else json.dumps([type(fault).__name__, str(fault)])
    for said in exchange(said_here, timeout):
        if said:
            kind, text = json.loads(said)
            raise {"UserError": UserError, "RunStopped": RunStopped}.get(kind, UserError)(text)


def is_first_process() -> bool:
    """Whether this process writes the run's files."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Prints a line on stdout, in the first process, without what a terminal would obey."""
    if is_first_process():
        print_text(text)
