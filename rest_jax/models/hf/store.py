"""The arrays of an Orbax checkpoint, read and written part by part with tensorstore.

Orbax saves and restores whole arrays; here no more than a chunk of one need be in memory. An array lies under its dotted
path (`blocks.mlp.gate`), in the one OCDBT database of the folder (a run's checkpoint) or as a zarr folder of its own (a
converted model, where several writers could work side by side and a chunk is a plain file).
"""

import functools
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from flax.traverse_util import unflatten_dict

from rest_jax.models.hf.config import ConversionError
from rest_jax.models.hf.remote import kvstore

CHUNK_BYTES = 8 * 2**20
_ERRORS = (ValueError, RuntimeError, NotImplementedError, OSError)
Path = tuple[str, ...]  # the keys that lead to an array
Folder = pathlib.Path | epath.Path

# Nodes of an OCDBT database are looked up for every chunk. Files are not forced to disk one by one: a folder that is not
# complete never gets its name, and safetensors are not forced either.
_SETTINGS = {"cache_pool": {"total_bytes_limit": 2**26}, "file_io_sync": False}
_CONTEXT = ts.Context(_SETTINGS)
_DATABASE = "manifest.ocdbt"


def create(
    folder: pathlib.Path, arrays: Mapping[Path, jax.ShapeDtypeStruct], stacked: Mapping[Path, int]
) -> dict[Path, Any]:
    """Makes a checkpoint of empty arrays, and returns them to be written; Orbax restores what is complete.

    `stacked[path]` is the number of leading axes that count tensors (layers, experts): a chunk lies in one tensor and holds
    whole rows of it, about CHUNK_BYTES. Values are not compressed.
    """
    # Orbax describes the tree; the scalars it writes are then replaced by the arrays.
    scalars = {path: np.zeros((), x.dtype) for path, x in arrays.items()}
    with ocp.Checkpointer(ocp.StandardCheckpointHandler(use_ocdbt=False)) as checkpointer:
        checkpointer.save(folder.absolute(), args=ocp.args.StandardSave(unflatten_dict(scalars)))  # pyright: ignore[reportCallIssue]
    opened = {}
    for path, x in arrays.items():
        metadata = {
            "compressor": None,
            "shape": list(x.shape),
            "chunks": _chunk(x, stacked[path]),
        }
        spec = _spec(folder, path) | {"driver": "zarr", "dtype": x.dtype.name, "metadata": metadata}
        opened[path] = ts.open(spec, context=_CONTEXT, create=True, delete_existing=True)
    return {path: future.result() for path, future in opened.items()}


def open_array(folder: Folder, path: Path) -> Any:
    """The array `path` of a checkpoint, to be read. ConversionError when there is none."""
    try:
        return ts.open(_spec(folder, path), context=_context(folder), open=True).result()
    except _ERRORS as error:
        raise _unreadable(folder, path, error) from error


def _context(folder: Folder) -> ts.Context:
    """That of the database in a folder: what tensorstore keeps of one is wrong for another that has taken its place."""
    manifest = folder / _DATABASE
    return _context_of(manifest.read_bytes()) if manifest.exists() else _CONTEXT


@functools.lru_cache(maxsize=8)
def _context_of(manifest: bytes) -> ts.Context:
    return ts.Context(_SETTINGS)


def read(folder: Folder, path: Path, array: Any, index: tuple[slice, ...]) -> np.ndarray:
    """The part `index` of an opened array. ConversionError when it is damaged."""
    try:
        return array[index].read().result()
    except _ERRORS as error:
        raise _unreadable(folder, path, error) from error


def is_checkpoint(folder: Folder) -> bool:
    """Whether Orbax made `folder` for the arrays of a tree."""
    return (folder / "_METADATA").exists()


def _chunk(x: jax.ShapeDtypeStruct, stacked: int) -> list[int]:
    """Whole rows of one tensor, equally many in every chunk: the last one is padded to the size of the others."""
    own = x.shape[stacked:]
    row_bytes = math.prod(own[1:]) * x.dtype.itemsize
    chunks = math.ceil(own[0] * row_bytes / max(CHUNK_BYTES, row_bytes))
    return [1] * stacked + [math.ceil(own[0] / chunks), *own[1:]]


def _spec(folder: Folder, path: Path) -> dict[str, Any]:
    """Missing chunks are errors, and chunks of zeros are written, so that a part that was lost never reads as zeros."""
    base, name = kvstore(folder), ".".join(path)
    if (folder / _DATABASE).exists():
        base["path"] += "/"
        where = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
    else:
        where = {**base, "path": f"{base['path']}/{name}/"}
    missing = {"fill_missing_data_reads": False, "store_data_equal_to_fill_value": True}
    return {"driver": "zarr", "kvstore": where, **missing}


def _unreadable(folder: Folder, path: Path, error: Exception) -> ConversionError:
    reason = str(error).strip().splitlines()[0].partition(" [")[0]
    return ConversionError(
        f"{folder}: not a readable checkpoint ({'.'.join(path)}: {reason}); "
        "convert the model again, or take another checkpoint"
    )
