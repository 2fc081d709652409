"""Leaves of a checkpoint: their names, their fingerprints, and reading one item back, verified.

The fingerprint of a leaf is sum_i bits_i * odd_hash(i) mod 2^32 over its elements, computed where the data lies: any
order of summation gives the same value, so it holds for every sharding, and one changed element always changes it.

Arrays are read with tensorstore, the storage under Orbax: reading a damaged file through Orbax's own asynchronous
reader leaves dozens of tracebacks of its threads on stderr, and the record of names, shapes and dtypes that goes with a
checkpoint already says what has to be there.
"""

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from jax.experimental import multihost_utils
from jaxtyping import Array, Shaped, UInt32

from rest_jax.errors import UserError

Leaves = dict[str, Any]  # dotted path -> array or ShapeDtypeStruct
Description = dict[str, list[Any]]  # dotted path -> [shape, dtype, fingerprint]


class DamagedError(Exception):
    """A checkpoint that is not what was saved; the text says in which way."""


@jax.jit
def fingerprint(x: Shaped[Array, "..."]) -> UInt32[Array, ""]:
    """Checksum of the bits of x, the same for every sharding; see the head of this file."""
    if x.dtype == jnp.bool_:
        bits = x.astype(jnp.uint32)
    else:
        size = x.dtype.itemsize
        bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{min(8 * size, 32)}"))
        bits = bits.astype(jnp.uint32)
    place = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        place = place * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    place = (place ^ (place >> 16)) * np.uint32(0x7FEB352D)
    place = (place ^ (place >> 15)) * np.uint32(0x846CA68B)
    odd = (place ^ (place >> 16)) | np.uint32(1)
    return jnp.sum(bits * odd, dtype=jnp.uint32)


def named(tree: Any) -> Leaves:
    """The leaves of a tree under their dotted paths, in the order of the tree."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in paths}


def is_key(leaf: Any) -> bool:
    """Whether a leaf, concrete or abstract, is a typed random key."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def key_impl(leaf: Any) -> str:
    """Name of the generator of a typed random key."""
    for name in ("threefry2x32", "rbg", "unsafe_rbg"):
        if jax.eval_shape(functools.partial(jax.random.key, impl=name), 0).dtype == leaf.dtype:
            return name
    raise ValueError(f"random key of dtype {leaf.dtype}: unknown generator")


def plain(leaf: Any) -> Any:
    """Key arrays as uint32 data, abstract ones likewise; anything else unchanged."""
    if not is_key(leaf):
        return leaf
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.random.key_data(leaf)
    data = jax.eval_shape(jax.random.key_data, leaf)
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=leaf.sharding)


def describe(leaves: Leaves) -> Description:
    """name -> [shape, dtype, fingerprint], the last as a Python int."""
    sums = jax.device_get({name: fingerprint(jnp.asarray(leaf)) for name, leaf in leaves.items()})
    return {
        name: [list(leaf.shape), str(leaf.dtype), int(sums[name])] for name, leaf in leaves.items()
    }


def compare(path: pathlib.Path, recorded: Description, abstract: Leaves) -> None:
    """UserError when the checkpoint is sound, but of a state of another form."""
    for name in sorted(recorded.keys() ^ abstract.keys()):
        owner = "checkpoint" if name in recorded else "configured run"
        raise UserError(
            f"checkpoint {path}: only the {owner} has {name}; it is of another model or optimiser"
        )
    for name, like in abstract.items():
        shape, dtype, _ = recorded[name]
        if (tuple(shape), dtype) != (tuple(like.shape), str(like.dtype)):
            raise UserError(
                f"checkpoint {path}: {name} is {dtype}{shape}, the configured run has "
                f"{like.dtype}{list(like.shape)}; it is of another model or optimiser"
            )


def read(path: pathlib.Path, recorded: Description, abstract: Any) -> Any:
    """One array item, each leaf in its sharding and verified against its fingerprint. DamagedError otherwise."""
    leaves = named(abstract)
    compare(path.parent, recorded, leaves)
    arrays = [guard(lambda n=n, x=x: _load(path, n, x), path.name) for n, x in leaves.items()]
    sums = jax.device_get([fingerprint(x) for x in arrays])
    for name, found in zip(leaves, sums, strict=True):
        if int(found) != recorded[name][2]:
            raise DamagedError(f"{path.name}: the content of {name} is not what was saved")
    return jax.tree.unflatten(jax.tree.structure(abstract), arrays)


def _load(path: pathlib.Path, name: str, like: Any) -> jax.Array:
    """The leaf `name` of an item; every process reads the parts that its own devices hold, each once."""
    store = ts.open(
        {
            "driver": "zarr",
            "kvstore": {"driver": "ocdbt", "base": f"file://{path}/", "path": f"{name}/"},
            "fill_missing_data_reads": False,
        },
        open=True,
        read=True,
    ).result()
    if store.shape != tuple(like.shape) or store.dtype.numpy_dtype != like.dtype:
        raise DamagedError(f"{path.name}: {name} is stored as {store.dtype.name}{store.shape}")
    parts: dict[str, np.ndarray] = {}

    def part(index: Any) -> np.ndarray:
        key = str(index)
        if key not in parts:
            parts[key] = store[index].read().result()
        return parts[key]

    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.make_array_from_callback(store.shape, getattr(like, "sharding", None) or first, part)


def guard(read: Callable[[], Any], item: str) -> Any:
    """read(), its failure as DamagedError; all processes agree on the outcome."""
    result, failure = None, None
    try:
        result = read()
    except DamagedError as error:
        failure = error
    except (ValueError, OSError, LookupError, TypeError, NotImplementedError) as error:
        failure = DamagedError(f"{item}: {' '.join(str(error).split())[:200]}")
    if jax.process_count() > 1:
        sound = multihost_utils.process_allgather(np.asarray(failure is None))
        if failure is None and not np.all(sound):
            failure = DamagedError(f"{item}: another process could not read its part")
    if failure is not None:
        raise failure
    return result
