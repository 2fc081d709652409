"""compiles_flash_attention.py TOPOLOGY: attention and its gradients for four chips of it, bfloat16, heads of 128 and of 64.

Prints, as JSON, the kernels of each compiled program, the bytes of its temporaries on a device and those of all its scores.
"""

import json
import sys

import jax

jax.config.update("jax_platforms", "cpu")

import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from rest_jax.config import MeshConfig
from rest_jax.distributed import BATCH_AXES, activate, make_mesh
from rest_jax.models.attention import KERNELS, attend_rows
from rest_jax.models.cache import RowLayout

devices = topologies.get_topology_desc(sys.argv[1], "tpu").devices
mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), devices[:4])


def total(q, k, v, until):
    """Something to differentiate."""
    out = attend_rows(q, k, v, RowLayout(until, 1), KERNELS["flash"])
    return jnp.sum(out.astype(jnp.float32) ** 2)


def array(dtype, *shape):
    """Abstract, rows and heads split."""
    axes = (BATCH_AXES, None, "tensor")[: len(shape)]
    where = NamedSharding(mesh, PartitionSpec(*axes))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where)


found = []
for width in (128, 64):
    q, k = (array(jnp.bfloat16, 4, 3072, heads, width) for heads in (16, 8))
    with activate(mesh):
        run = jax.jit(jax.value_and_grad(total, (0, 1, 2)))
        compiled = run.lower(q, k, k, array(jnp.int32, 4, 3072)).compile()
    memory = compiled.memory_analysis()
    found.append(
        {
            "kernels": compiled.as_text().count('custom_call_target="tpu_custom_call"'),
            "scores": 4 * 2 * 8 * 3072**2,
            "temporaries": memory.temp_size_in_bytes,
        }
    )
print(json.dumps(found))
