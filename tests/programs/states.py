"""A small state with every kind of leaf, for the tests of checkpoints and the programs they start."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rest_jax.types import CurriculumState, TrainState


def make_state(seed: int = 0) -> TrainState:
    """A state with every kind of leaf: bfloat16, bool, int32, scalars, a typed key, adamw moments with a mask."""
    key = jax.random.key(seed)
    params = {
        "layers": {"w": jax.random.normal(key, (8, 16)), "scale": jnp.ones(16)},
        "head": jax.random.normal(key, (32, 64)).astype(jnp.bfloat16),
    }
    matrices = jax.tree.map(lambda x: x.ndim > 1, params)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, mask=matrices))
    _, opt_state = tx.update(params, tx.init(params), params)
    row = jnp.arange(8, dtype=jnp.float32) / 3
    curriculum = CurriculumState(
        step=jnp.int32(3),
        nu=jnp.float32(0.1),
        entropy=row,
        gini=-row,
        base_count=row * 5,
        seen=jnp.arange(8, dtype=jnp.int32),
        count=row * 7,
        weight=row + 1,
        format_score=jnp.float32(1 / 3),
    )
    return TrainState(
        step=jnp.int32(7 + seed),
        params=params,
        opt_state=opt_state,
        rng=jax.random.fold_in(key, 5),
        curriculum=curriculum,
    )


def place(x: jax.Array, mesh: Mesh) -> jax.Array:
    """A leaf on the devices of all processes: matrices split by rows over "data", everything else on every device."""
    spec = PartitionSpec("data") if x.ndim == 2 else PartitionSpec()
    sharding = NamedSharding(mesh, spec)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = place(jax.random.key_data(x), mesh)
        return jax.jit(jax.random.wrap_key_data, out_shardings=sharding)(data)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: np.asarray(x)[index])
