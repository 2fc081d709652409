"""Writing models: a converted folder in the source's own dtypes, and an HF folder that transformers loads.

`convert(source, out)` writes parameters as an Orbax checkpoint with the side files and a manifest of the source's dtypes;
`export(params, files, out)` writes safetensors, and `export(convert(x))` equals x bit for bit. Both write all or nothing.
"""

import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils

from rest_jax.files import atomic_folder
from rest_jax.models.config import DecoderConfig
from rest_jax.models.hf.config import ConversionError
from rest_jax.models.hf.folder import (
    DTYPES,
    MANIFEST,
    MANIFEST_FORMAT,
    MAX_SHARD_BYTES,
    PARAMS,
    LazyTensor,
    copy_side_files,
    find_source,
    is_converted,
    read_json,
    scan,
    write_json,
    write_shards,
)
from rest_jax.models.hf.read import manifest_dtypes, read_config, read_params
from rest_jax.models.hf.table import EMBED, HEAD, NORM, Spec, expected_shapes, table
from rest_jax.types import Params

Leaves = Mapping[tuple[str, ...], Any]  # parameters by path


def convert(source: str, out: str | pathlib.Path) -> None:
    """Writes a converted folder: `params/` (Orbax, the source's dtypes), side files, the manifest.

    All or nothing. Runs on the host: it needs memory for the model once, in its stored dtype.
    """
    folder = find_source(source)
    if is_converted(folder):
        raise ConversionError(f"model {source}: already a converted folder")
    with atomic_folder(out, last=MANIFEST) as work:
        params = read_params(folder, read_config(folder))
        copy_side_files(folder, work)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(work / PARAMS, params)
        stored = {name: tensor.dtype for name, tensor in scan(folder).items()}
        write_json(work / MANIFEST, {"format": MANIFEST_FORMAT, "tensors": stored})


def export(
    params: Params | str | pathlib.Path,
    files: str | pathlib.Path,
    out: str | pathlib.Path,
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes an HF folder from parameters (or a model folder) and the folder `files` they came from.

    All or nothing. Tensors, dtypes and the presence of a tied head are those of `files`; `dtype`
    (float32, bfloat16, float16) overrides the dtypes. Several hosts: all call it, the first writes.
    """
    files = pathlib.Path(files)
    cfg = read_config(files)
    if isinstance(params, (str, pathlib.Path)):
        params = read_params(find_source(str(params)), cfg)
    leaves = flatten_dict(params)
    _check_leaves(leaves, cfg)
    dtypes = _recorded_dtypes(files, cfg)
    if dtype is not None:
        dtypes = dict.fromkeys(dtypes, _dtype_name(dtype))
    tensors = _lazy_tensors(leaves, cfg, dtypes)
    if jax.process_index() != 0:
        for _, _, make in tensors:
            make()  # takes part in the gathers
        return
    with atomic_folder(out) as work:
        copy_side_files(files, work)
        if dtype is not None:
            hf = read_json(work / "config.json")
            key = "torch_dtype" if "torch_dtype" in hf else "dtype"
            write_json(work / "config.json", {**hf, key: dtype})
        write_shards(work, tensors, max_shard_bytes)


def _recorded_dtypes(files: pathlib.Path, cfg: DecoderConfig) -> dict[str, str]:
    """Name -> safetensors dtype of every tensor that the source of a model holds.

    For side files without weights (those of a run, or of a fresh model) it is the dtype in their config.json.
    """
    if is_converted(files):
        return manifest_dtypes(files, cfg)
    if any(files.glob("*.safetensors*")):
        return {name: tensor.dtype for name, tensor in scan(files).items()}
    hf = read_json(files / "config.json")
    dtype = str(hf.get("dtype") or hf.get("torch_dtype") or "float32")
    return {name: _dtype_name(dtype) for name, _ in expected_shapes(cfg)}


def _dtype_name(dtype: str) -> str:
    """safetensors name of a dtype spelled as in a config.json."""
    names = {str(known): name for name, known in DTYPES.items()}
    if dtype not in names:
        raise ConversionError(f"export dtype {dtype!r}; known: {', '.join(names)}")
    return names[dtype]


def _lazy_tensors(
    leaves: Leaves, cfg: DecoderConfig, dtypes: Mapping[str, str]
) -> list[LazyTensor]:
    """Every tensor to write, in the order of HF: embedding, layers, norm, head."""
    lazy: dict[str, LazyTensor] = {}
    for spec in table(cfg):
        leaf = leaves[spec.path]
        for layer, name in enumerate(spec.hf_names()):
            copies_to_head = name == EMBED and cfg.tied and HEAD in dtypes
            for hf_name in [name, HEAD] if copies_to_head else [name]:
                dtype = DTYPES[dtypes[hf_name]]
                make = functools.partial(_make_tensor, spec, leaf, layer, dtype)
                lazy[hf_name] = (hf_name, int(np.prod(spec.hf_shape)) * dtype.itemsize, make)
    layers = [n for i in range(cfg.n_layers) for n in lazy if n.startswith(f"model.layers.{i}.")]
    return [lazy[name] for name in (EMBED, *layers, NORM, HEAD) if name in lazy]


def _make_tensor(spec: Spec, leaf: Any, layer: int, dtype: np.dtype) -> np.ndarray:
    """The HF tensor of one layer of a parameter."""
    return spec.to_hf(_on_host(leaf if spec.layers is None else leaf[layer]).astype(dtype))


def _check_leaves(leaves: Leaves, cfg: DecoderConfig) -> None:
    for spec in table(cfg):
        leaf = leaves.get(spec.path)
        if leaf is None or leaf.shape != spec.shape:
            fault = "missing" if leaf is None else f"of shape {leaf.shape}"
            raise ConversionError(
                f"parameter {'.'.join(spec.path)} is {fault}; config.json needs {spec.shape}"
            )


def _on_host(x: Any) -> np.ndarray:
    """The complete array; one that several processes hold is gathered, which all of them must ask for."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)
