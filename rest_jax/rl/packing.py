"""Cutting a step's groups into mini-batches and micro-batches without moving rows between devices.

Row p goes to part p % n: every device then finds a share of each part among its own rows, and the cut depends on the
number of parts alone, never on the mesh.
"""

from typing import TypeVar

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Tree = TypeVar("Tree")


def split_groups(tree: Tree, parts: int, mesh: Mesh) -> Tree:
    """Leaves [P, ...] -> [parts, P / parts, ...], the second axis sharded over (data, fsdp). P % parts == 0."""
    sharding = NamedSharding(mesh, PartitionSpec(None, ("data", "fsdp")))

    def one(x):
        x = x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(x, sharding)

    return jax.tree.map(one, tree)
