"""Between one process's NumPy rows and the arrays of the whole mesh. With one process both are plain transfers."""

import os
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rest_jax.errors import UserError

Tree = TypeVar("Tree")


def to_mesh(tree: Tree, mesh: Mesh) -> Tree:
    """Leaves: this process's rows [P_local, ...] -> global arrays, first axis sharded over (data, fsdp)."""
    sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
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
