"""Reading a model of any source: an HF folder, a folder made by `rest-jax convert`, or a hub id -> sharded parameters.

Nothing is read before every tensor's name, shape and dtype is known to be right: unknown, missing and misshapen ones are all
named in one ConversionError. Each stacked parameter is made from callbacks, one a device, that read only the rows and columns
of the layers they need: no host builds more of a parameter than it holds.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, SingleDeviceSharding

from rest_jax.files import follow
from rest_jax.models.config import DecoderConfig, Remat
from rest_jax.models.decoder import param_shardings
from rest_jax.models.hf.config import ConversionError, decoder_config
from rest_jax.models.hf.folder import (
    DTYPES,
    MANIFEST,
    MANIFEST_FORMAT,
    PARAMS,
    Stored,
    find_source,
    is_converted,
    read_json,
    scan,
)
from rest_jax.models.hf.table import EMBED, HEAD, Slices, Spec, expected_shapes, table
from rest_jax.orbax_s3 import checkpoint_path
from rest_jax.types import Params

_COMPARED_ROWS = 8192
_NAMES_SHOWN = 8


def load_model(
    source: str, mesh: Mesh, dtype: Any, remat: Remat
) -> tuple[DecoderConfig, Params, pathlib.Path]:
    """Sizes, float32 master weights sharded as `param_shardings(config, mesh)`, and the folder of the side files.

    `dtype` is that of the computation. ConversionError (one line) for anything that cannot be loaded, ValueError for an
    impossible mesh.
    """
    folder = find_source(source)
    cfg = dataclasses.replace(read_config(folder), dtype=dtype, remat=remat)
    return cfg, read_params(folder, cfg, param_shardings(cfg, mesh), jnp.float32), folder


def read_config(folder: pathlib.Path) -> DecoderConfig:
    """The decoder that the config.json of a model folder describes."""
    return decoder_config(read_json(folder / "config.json"))


def read_params(
    folder: pathlib.Path, cfg: DecoderConfig, shardings: Any = None, dtype: Any = None
) -> Params:
    """Parameters of an HF or a converted folder, each device reading its own part.

    `shardings` None: on the first CPU device. `dtype` None: as stored, a stacked parameter in the widest of its layers' dtypes.
    """
    if is_converted(folder):
        abstract = _abstract(cfg, manifest_dtypes(folder, cfg), shardings, dtype)
        return _restore(folder, unflatten_dict(abstract))
    stored = scan(folder)
    _check_tensors(folder, cfg, stored)
    stored_dtypes = {name: tensor.dtype for name, tensor in stored.items()}
    abstract = _abstract(cfg, stored_dtypes, shardings, dtype)
    leaves = {s.path: _read_leaf(s, stored, abstract[s.path]) for s in table(cfg)}
    return unflatten_dict(leaves)


def manifest_dtypes(folder: pathlib.Path, cfg: DecoderConfig) -> dict[str, str]:
    """Tensor name -> safetensors dtype, from the manifest of a converted folder. ConversionError if it does not fit `cfg`."""
    manifest = read_json(folder / MANIFEST)
    if manifest.get("format") != MANIFEST_FORMAT:
        raise ConversionError(
            f"{folder / MANIFEST}: format {manifest.get('format')!r}, this version reads {MANIFEST_FORMAT}"
        )
    tensors = manifest.get("tensors", {})
    known = {name for name, _ in expected_shapes(cfg)}
    optional = {HEAD} if cfg.tied else set()  # a tied head may be stored all the same
    if set(tensors) - optional != known or not set(tensors.values()) <= DTYPES.keys():
        raise ConversionError(
            f"{folder / MANIFEST}: its tensors are not those of config.json; convert the model again"
        )
    return tensors


def _abstract(
    cfg: DecoderConfig, stored_dtypes: Mapping[str, str], shardings: Any, dtype: Any
) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
    """Shape, dtype and sharding of every parameter that is read, by its path."""
    host = SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    given = None if shardings is None else flatten_dict(shardings)
    abstract = {}
    for spec in table(cfg):
        widest = jnp.result_type(*{DTYPES[stored_dtypes[name]] for name in spec.hf_names()})
        sharding = host if given is None else given[spec.path]
        abstract[spec.path] = jax.ShapeDtypeStruct(spec.shape, dtype or widest, sharding=sharding)
    return abstract


def _restore(folder: pathlib.Path, abstract: Params) -> Params:
    """Reads the Orbax checkpoint of a converted folder."""
    path = checkpoint_path(follow(folder / PARAMS))
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(path, abstract)
    except (ValueError, KeyError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConversionError(
            f"{path}: not a readable checkpoint ({reason}); convert the model again"
        ) from error


def _read_leaf(
    spec: Spec, stored: Mapping[str, Stored], abstract: jax.ShapeDtypeStruct
) -> jax.Array:
    """One parameter, from callbacks that each read the part of one device."""

    def read_layer(name: str, index: Slices) -> np.ndarray:
        part = spec.read(lambda hf_index: stored[name].read(name, hf_index), index)
        return part.astype(abstract.dtype)

    def read(index: Slices | None) -> np.ndarray:
        index = (slice(None),) * len(spec.shape) if index is None else index
        if spec.layers is None:
            return read_layer(spec.hf_name, index)
        return np.stack([read_layer(name, index[1:]) for name in spec.hf_names()[index[0]]])

    return jax.make_array_from_callback(spec.shape, abstract.sharding, read)


def _check_tensors(folder: pathlib.Path, cfg: DecoderConfig, stored: Mapping[str, Stored]) -> None:
    """ConversionError naming every tensor that is missing, unknown, misshapen or of an unknown dtype."""
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    expected = dict(expected_shapes(cfg))
    if cfg.tied and HEAD in shapes:
        expected[HEAD] = expected[EMBED]
    wrong = [
        f"{n} has shape {shapes[n]}, needs {s}"
        for n, s in expected.items()
        if n in shapes and shapes[n] != s
    ]
    dtypes = [
        f"{name} is {tensor.dtype}" for name, tensor in stored.items() if tensor.dtype not in DTYPES
    ]
    faults = {
        "missing tensors": [name for name in expected if name not in shapes],
        "unknown tensors": [name for name in shapes if name not in expected],
        "misshapen tensors": wrong,
        f"dtypes other than {', '.join(DTYPES)}": dtypes,
    }
    named = [f"{kind}: {_shorten(names)}" for kind, names in faults.items() if names]
    if named:
        raise ConversionError(f"model folder {folder} ({cfg.family}): {'; '.join(named)}")
    if cfg.tied and HEAD in shapes:
        _check_tied_head(folder, stored)


def _check_tied_head(folder: pathlib.Path, stored: Mapping[str, Stored]) -> None:
    rows = stored[EMBED].shape[0]
    for start in range(0, rows, _COMPARED_ROWS):
        part = (slice(start, min(start + _COMPARED_ROWS, rows)), slice(None))
        embed, head = (stored[name].read(name, part) for name in (EMBED, HEAD))
        if embed.dtype != head.dtype or embed.tobytes() != head.tobytes():
            raise ConversionError(
                f"model folder {folder}: tie_word_embeddings is true, but {HEAD} differs from {EMBED}; "
                "set tie_word_embeddings false or remove the tensor"
            )


def _shorten(names: list[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more
