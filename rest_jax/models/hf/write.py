"""Models in and out: HF folders and hub ids -> sharded parameters, Orbax folders, and back.

`load_model` (what runs call) takes any source; `convert` writes an Orbax folder in the source's own
dtypes; `export` writes a folder transformers loads, and `export(convert(x))` equals x bit for bit.
Every tensor is checked against `hf_table` first: unknown, missing and misshapen ones are all named in
one ConversionError.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from rest_jax.files import atomic_folder
from rest_jax.models.config import DecoderConfig, Remat
from rest_jax.models.decoder import Params, param_shardings
from rest_jax.models.hf.config import ConversionError, decoder_config
from rest_jax.models.hf.folder import (
    MANIFEST,
    copy_side_files,
    find_source,
    is_converted,
    read_json,
    write_json,
)
from rest_jax.models.hf.read import (
    EMBED,
    HEAD,
    host_sharding,
    leaf_at,
    read_params,
    set_leaf,
    widest,
)
from rest_jax.models.hf.safetensors import (
    DTYPE_NAMES,
    DTYPES,
    MAX_SHARD_BYTES,
    scan,
    write_shards,
)
from rest_jax.models.hf.table import expected_shapes, table

_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model ready to run."""

    config: DecoderConfig
    params: Params  # float32 masters, sharded as `param_shardings(config, mesh)`
    files: (
        pathlib.Path
    )  # folder with config.json, tokenizer and chat template; `export` wants it back


def load_model(source: str, mesh: Mesh, dtype: Any, remat: Remat) -> LoadedModel:
    """Loads an HF folder, a converted folder or a hub id onto `mesh`; `dtype` is that of the computation.

    Raises ConversionError (one line) for anything that cannot be loaded, ValueError for an impossible mesh.
    """
    folder = find_source(source)
    cfg = dataclasses.replace(_folder_config(folder), dtype=dtype, remat=remat)
    shardings = param_shardings(cfg, mesh)
    if is_converted(folder):
        return LoadedModel(cfg, _restore(folder, cfg, shardings, jnp.float32), folder)
    return LoadedModel(cfg, read_params(folder, cfg, shardings, jnp.float32), folder)


def load_hf(
    folder: str | pathlib.Path,
    mesh: Mesh | None = None,
    shardings: Any = None,
    param_dtype: Any = jnp.float32,
) -> tuple[DecoderConfig, Params]:
    """Config and parameters of an HF folder; `param_dtype` None keeps the stored dtypes.

    Placed as `shardings`, else as the train layout of `mesh`, else on the first CPU device. Every
    device reads its own part of each tensor: no host builds more of a parameter than it holds.
    """
    folder = pathlib.Path(folder)
    cfg = _folder_config(folder)
    if shardings is None and mesh is not None:
        shardings = param_shardings(cfg, mesh)
    return cfg, read_params(folder, cfg, shardings, param_dtype)


def convert(source: str, out: str | pathlib.Path) -> None:
    """Writes a converted folder: `params/` (Orbax, the source's dtypes), side files, the manifest.

    All or nothing. Runs on the host: it needs memory for the model once, in its stored dtype.
    """
    folder = find_source(source)
    if is_converted(folder):
        raise ConversionError(f"model {source}: already a converted folder")
    with atomic_folder(out) as work:
        cfg = _folder_config(folder)
        params = read_params(folder, cfg, None, None)
        copy_side_files(folder, work)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(work / "params", params)
        stored = {name: tensor.dtype for name, tensor in scan(folder).items()}
        write_json(work / MANIFEST, {"format": _FORMAT, "tensors": stored})


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
    cfg = _folder_config(files)
    if isinstance(params, (str, pathlib.Path)):
        source = find_source(str(params))
        params = (
            _restore(source, cfg, None, None)
            if is_converted(source)
            else read_params(source, cfg, None, None)
        )
    _check_params(params, cfg)
    recorded = _recorded_dtypes(files, cfg)
    if dtype is not None:
        recorded = dict.fromkeys(recorded, _dtype_name(dtype))
    tensors = _tensors(params, cfg, recorded)
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


def _folder_config(folder: pathlib.Path) -> DecoderConfig:
    return decoder_config(read_json(folder / "config.json"))


def _recorded_dtypes(files: pathlib.Path, cfg: DecoderConfig) -> dict[str, str]:
    """Name -> safetensors dtype of every tensor the source of a model holds.

    Side files without weights (those of a run, or of a fresh model) stand for the dtype in their config.json.
    """
    if not is_converted(files):
        if not any(files.glob("*.safetensors*")):
            hf = read_json(files / "config.json")
            dtype = str(hf.get("dtype") or hf.get("torch_dtype") or "float32")
            return {name: _dtype_name(dtype) for name, _ in expected_shapes(cfg)}
        return {name: tensor.dtype for name, tensor in scan(files).items()}
    manifest = read_json(files / MANIFEST)
    if manifest.get("format") != _FORMAT:
        raise ConversionError(
            f"{files / MANIFEST}: format {manifest.get('format')!r}, this version reads {_FORMAT}"
        )
    tensors = manifest.get("tensors", {})
    known = {name for name, _ in expected_shapes(cfg)}
    optional = {HEAD} if cfg.tied else set()  # a tied head may be stored all the same
    if set(tensors) - optional != known or not set(tensors.values()) <= DTYPES.keys():
        raise ConversionError(
            f"{files / MANIFEST}: its tensors are not those of config.json; convert the model again"
        )
    return tensors


def _dtype_name(dtype: str) -> str:
    """safetensors name of a dtype spelled as in a config.json."""
    names = {str(known): name for known, name in DTYPE_NAMES.items()}
    if dtype not in names:
        raise ConversionError(f"export dtype {dtype!r}; known: {', '.join(names)}")
    return names[dtype]


def _tensors(
    params: Params, cfg: DecoderConfig, dtypes: Mapping[str, str]
) -> list[tuple[str, int, Callable[[], np.ndarray]]]:
    """(HF name, bytes, maker) of every tensor to write: embedding, layers in order, norm, head."""
    found: dict[str, tuple[str, int, Callable[[], np.ndarray]]] = {}
    for spec in table(cfg):
        leaf = leaf_at(params, spec.path)
        for layer, name in enumerate(spec.hf_names()):
            names = [name, HEAD] if name == EMBED and cfg.tied and HEAD in dtypes else [name]
            for hf_name in names:
                dtype = DTYPES[dtypes[hf_name]]

                def make(spec=spec, leaf=leaf, layer=layer, dtype=dtype) -> np.ndarray:
                    part = leaf if spec.layers is None else leaf[layer]
                    return spec.to_hf(_tohost_sharding(part).astype(dtype))

                found[hf_name] = (hf_name, int(np.prod(spec.hf_shape)) * dtype.itemsize, make)
    layers = [n for i in range(cfg.n_layers) for n in found if n.startswith(f"model.layers.{i}.")]
    order = [EMBED, *layers, "model.norm.weight", *([HEAD] if HEAD in found else [])]
    return [found[name] for name in order]


def _check_params(params: Params, cfg: DecoderConfig) -> None:
    for spec in table(cfg):
        leaf = leaf_at(params, spec.path)
        if leaf is None or leaf.shape != spec.shape:
            found = "missing" if leaf is None else f"of shape {leaf.shape}"
            raise ConversionError(
                f"parameter {'.'.join(spec.path)} is {found}; config.json needs {spec.shape}"
            )


def _restore(folder: pathlib.Path, cfg: DecoderConfig, shardings: Any, param_dtype: Any) -> Params:
    recorded = _recorded_dtypes(folder, cfg)
    target: dict[str, Any] = {}
    for spec in table(cfg):
        dtype = (
            widest(recorded[name] for name in spec.hf_names())
            if param_dtype is None
            else param_dtype
        )
        sharding = host_sharding() if shardings is None else leaf_at(shardings, spec.path)
        set_leaf(target, spec.path, jax.ShapeDtypeStruct(spec.shape, dtype, sharding=sharding))
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore((folder / "params").absolute(), target)
    except (ValueError, KeyError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConversionError(
            f"{folder / 'params'}: not a readable checkpoint ({reason}); convert the model again"
        ) from error


def _tohost_sharding(x: Any) -> np.ndarray:
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)
