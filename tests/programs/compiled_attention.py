"""compiled_attention.py TOPOLOGY: attention of rows and its gradients for four chips of it, bfloat16, heads of 128 and of 64.

Prints, as JSON, the kernels of each compiled program with their FLOPs on a device, the bytes of its temporaries there and those
of all its scores.
"""

import json
import sys

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from rest_jax.config import MeshConfig
from rest_jax.distributed import BATCH_AXES, activate, make_mesh
from rest_jax.models.attention import KERNELS, attend_rows
from rest_jax.models.cache import RowLayout
from rest_jax.models.policy import attention_of
from rest_jax.planning import hlo, topology
from rest_jax.planning.work import is_kernel, kernel_flops

devices = topology.devices(topology.parse(sys.argv[1]))
mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), devices[:4])
PAIRS = 1000


def total(q, k, v, until):
    """Something to differentiate."""
    out = attend_rows(q, k, v, RowLayout(until, PAIRS), KERNELS[attention_of(mesh)])
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
    uses = hlo.uses(hlo.parse(compiled.as_text()))
    kernels = [use.instruction for use in uses if is_kernel(use.instruction)]
    found.append(
        {
            "kernels": len(kernels),
            "flops": sum(map(kernel_flops, kernels)),
            "expected_flops": 2 * (2 + 3 + 4) * PAIRS * width * 2 * 8,
            "scores": 4 * 2 * 8 * 3072**2,
            "temporaries": memory.temp_size_in_bytes,
        }
    )
print(json.dumps(found))
