"""loads_on_mesh.py FOLDER ADDRESS INDEX DATA,FSDP,TENSOR: one of two processes of two devices that load a model together.

Checks every shard it holds against the model loaded by itself, and prints how many bytes of tensors it read.
"""

import sys

import jax

jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[3]))

import jax.numpy as jnp
import numpy as np

from rest_jax.config import MeshConfig
from rest_jax.distributed import make_mesh
from rest_jax.models.hf.read import load_model
from rest_jax.models.hf.safetensors import Stored

plain, sizes = Stored.read, []


def read(stored, rows=slice(None)):
    """Counts."""
    found = plain(stored, rows)
    sizes.append(found.nbytes)
    return found


alone = make_mesh(MeshConfig(), jax.local_devices()[:1])
_, expected, _ = load_model(sys.argv[1], alone, jnp.float32, "none")
Stored.read = read
data, fsdp, tensor = map(int, sys.argv[4].split(","))
mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor))
_, params, _ = load_model(sys.argv[1], mesh, jnp.float32, "none")
for found, wanted in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
    for shard in found.addressable_shards:
        assert np.array_equal(np.asarray(shard.data), np.asarray(wanted)[shard.index])
print(sum(sizes))
