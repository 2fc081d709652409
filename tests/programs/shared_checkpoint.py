"""shared_checkpoint.py RUN ADDRESS INDEX: one of two processes that save a sharded state, and restore it around damage."""

import pathlib
import sys

import jax

jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[3]))

import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from rest_jax.run.checkpoint import Checkpoints, newest_params
from tests.programs.states import make_state, place


def placed(seed: int):
    """The state of a seed on both processes."""
    return jax.tree.map(lambda x: place(x, mesh), make_state(seed))


def check(restored, expected) -> None:
    """Every shard here is the part of the expected array that belongs to it."""
    for found, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(expected), strict=True):
        if jnp.issubdtype(wanted.dtype, jax.dtypes.prng_key):
            found, wanted = jax.random.key_data(found), jax.random.key_data(wanted)
        for shard in found.addressable_shards:
            assert np.array_equal(np.asarray(shard.data), np.asarray(wanted)[shard.index])


mesh = Mesh(np.array(jax.devices()), ("data",))
run = pathlib.Path(sys.argv[1])
with Checkpoints(run) as checkpoints:
    for step in (1, 2):
        checkpoints.save(step, placed(step), {"seen": step})
    checkpoints.wait()
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        placed(0),
    )
    state, loader_state, step = checkpoints.restore(like)
    assert (step, loader_state) == (2, {"seen": 2})
    check(state, make_state(2))
    if jax.process_index() == 0:
        path = max((run / "checkpoints" / "2").rglob("d/*"), key=lambda p: p.stat().st_size)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(bytes(content))
    multihost_utils.sync_global_devices("damaged")
    state, loader_state, step = checkpoints.restore(like)
    assert (step, loader_state) == (1, {"seen": 1})
    check(state, make_state(1))
assert newest_params(run) == (run.resolve() / "checkpoints" / "1" / "params", 1)
