"""Reading a model of any source: an HF folder, a folder made by `rest-jax convert`, or a hub id -> sharded parameters.

Nothing is read before every tensor's name, shape and dtype is known to be right: unknown, missing and misshapen ones are all
named in one ConversionError.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from rest_jax.distributed import any_process
from rest_jax.files import find_damage, follow, list_files
from rest_jax.models.config import DecoderConfig, Remat
from rest_jax.models.decoder import param_shardings
from rest_jax.models.hf import store
from rest_jax.models.hf.config import ConversionError, decoder_config
from rest_jax.models.hf.folder import (
    MANIFEST,
    MANIFEST_FORMAT,
    PARAMS,
    find_source,
    is_converted,
    read_json,
    scan,
)
from rest_jax.models.hf.placement import Weights, place
from rest_jax.models.hf.safetensors import DTYPES, Stored
from rest_jax.models.hf.table import (
    EMBED,
    HEAD,
    Slices,
    Spec,
    adapter_table,
    expected_shapes,
    table,
)
from rest_jax.models.lora import stays_float32
from rest_jax.types import Params

_NAMES_SHOWN = 8
Folder = store.Folder
Report = Callable[[int, int], None]  # (bytes just moved, bytes in all)


def silent(_moved: int, _total: int) -> None:
    """Reports nothing."""


def load_model(
    source: str,
    mesh: Mesh,
    dtype: Any,
    remat: Remat,
    report: Report = silent,
    param_dtype: Any = jnp.float32,
) -> tuple[DecoderConfig, Params, pathlib.Path]:
    """Sizes, weights of `param_dtype` sharded as `param_shardings(config, mesh)`, and the folder of the side files.

    `dtype` is that of the computation. ConversionError (one line) for anything that cannot be loaded, ValueError for an
    impossible mesh. All processes of the mesh call it.
    """
    folder = find_source(source)
    verify(folder, together=True)
    cfg = dataclasses.replace(read_config(folder), dtype=dtype, remat=remat)
    weights = open_weights(folder, cfg)
    shardings = param_shardings(cfg, mesh)
    return cfg, read_params(weights, shardings, param_dtype, report), folder


def verify(folder: pathlib.Path, together: bool = False) -> None:
    """ConversionError when a file of a converted folder is not what was written; other folders have no digests.

    `together`: all processes call it, and each reads its share.
    """
    if not is_converted(folder):
        return
    index, count = (jax.process_index(), jax.process_count()) if together else (0, 1)
    try:
        fault = _damage(folder, index, count)
    except OSError as error:
        fault = " ".join(str(error).split())
    if any_process(bool(fault)) if together else fault:
        fault = fault or "another process found damage"
        raise ConversionError(
            f"model folder {folder}: not a readable checkpoint ({fault}); convert the model again"
        )


def _damage(folder: pathlib.Path, index: int, count: int) -> str:
    """What is wrong with share number `index` of `count` of the files, "" when nothing is."""
    written = _manifest(folder)["files"]
    in_params = f"{PARAMS}/"
    for base, prefix in ((folder, ""), (follow(folder / PARAMS), in_params)):
        names = [name for name in written if name.startswith(in_params) == bool(prefix)]
        own = [name.removeprefix(prefix) for name in names][index::count]
        there = list_files(base)
        if missing := [name for name in own if name not in there]:
            return f"{': '.join(missing[0].rsplit('/', 1))} is missing"
        if name := find_damage(base, {name: written[prefix + name] for name in own}):
            return f"{': '.join(name.rsplit('/', 1))} is not what was converted"
    return ""


def _manifest(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """The manifest of a converted folder. ConversionError when it is none."""
    manifest = read_json(folder / MANIFEST)
    if manifest.get("format") != MANIFEST_FORMAT:
        raise ConversionError(
            f"{folder / MANIFEST}: format {manifest.get('format')!r}, this version reads {MANIFEST_FORMAT}; "
            "convert the model again"
        )
    for key in ("tensors", "files"):
        if not isinstance(manifest.get(key), dict):
            raise ConversionError(f"{folder / MANIFEST}: no {key}; convert the model again")
    return manifest


def read_config(folder: pathlib.Path) -> DecoderConfig:
    """The decoder that the config.json of a model folder describes."""
    return decoder_config(read_json(folder / "config.json"))


def read_params(
    weights: Sequence[Weights], shardings: Params, dtype: Any, report: Report = silent
) -> Params:
    """The parameters, each in its NamedSharding of `shardings`; matrices are cast to `dtype`, and what is read in float32 in any
    case (`lora.stays_float32`) to that. All processes call it.
    """
    given: dict[Any, Any] = flatten_dict(shardings)
    total = sum(w.nbytes for w in weights)

    def advance(moved: int) -> None:
        report(moved, total)

    by_dtype: dict[Any, list[Weights]] = {}
    for w in weights:
        wanted = jnp.dtype("float32" if stays_float32(w.spec.path) else dtype)
        by_dtype.setdefault(wanted, []).append(w)
    placed = {}
    for wanted, those in by_dtype.items():
        placed |= place(those, given, wanted, advance)
    return unflatten_dict(placed)


def open_weights(folder: Folder, cfg: DecoderConfig) -> list[Weights]:
    """Every parameter of an HF folder, a converted folder, or an Orbax checkpoint of parameters, to be read in parts.

    ConversionError when they are not those of `cfg`.
    """
    if store.is_checkpoint(folder):
        return [_in_store(spec, folder) for spec in table(cfg)]
    folder = pathlib.Path(folder)  # what lies in a store has been fetched (`find_source`)
    if is_converted(folder):
        manifest_dtypes(folder, cfg)
        params = follow(folder / PARAMS)
        opened = [_in_store(spec, params) for spec in table(cfg)]
        there = sum(info["size"] for info in list_files(params).values())
        if sum(weights.nbytes for weights in opened) > there:  # before memory is taken for them
            raise ConversionError(f"{params}: {there:,} bytes, fewer than the model of config.json")
        return opened
    stored = checked_scan(folder, cfg)
    return [in_hf_files(spec, stored) for spec in table(cfg)]


def open_adapters(folder: Folder, cfg: DecoderConfig) -> list[Weights]:
    """The adapters (`cfg.lora`) of an Orbax checkpoint of them, to be read in parts; the rest as for `open_weights`."""
    return [_in_store(spec, folder) for spec in adapter_table(cfg)]


def checked_scan(folder: pathlib.Path, cfg: DecoderConfig) -> dict[str, Stored]:
    """Every tensor of an HF folder that has to be read; see `check_stored`."""
    return check_stored(f"model folder {folder}", cfg, scan(folder))


def check_stored(where: str, cfg: DecoderConfig, found: Mapping[str, Stored]) -> dict[str, Stored]:
    """Of the tensors found, those that have to be read; a stored copy of a tied embedding is the embedding's twin.

    Where only the head of the two is stored, it is the embedding. ConversionError, which begins with `where`, names every
    tensor that does not fit.
    """
    stored = dict(found)
    if cfg.tied and HEAD in stored and EMBED not in stored:
        stored[EMBED] = dataclasses.replace(stored.pop(HEAD), name=EMBED)
    _check_tensors(where, cfg, stored)
    if cfg.tied and HEAD in stored:
        stored[EMBED] = dataclasses.replace(stored[EMBED], twin=stored.pop(HEAD))
    return stored


def widest(spec: Spec, stored: Mapping[str, Stored]) -> np.dtype:
    """The dtype of a parameter: the one that holds the values of all its tensors."""
    return jnp.result_type(*{DTYPES[stored[name].dtype] for name in spec.hf_names()})


def in_hf_files(spec: Spec, stored: Mapping[str, Stored]) -> Weights:
    """A parameter whose tensors lie in files, to be read in parts."""
    stack = spec.stack or (1,)
    dtype = widest(spec, stored)
    names = np.asarray(spec.hf_names()).reshape(stack)

    def read(index: Slices) -> np.ndarray:
        asked, rows = names[index[: len(stack)]], index[len(stack)]
        tensors = [stored[str(name)].read(rows).astype(dtype, copy=False) for name in asked.flat]
        found = tensors[0][None] if len(tensors) == 1 else np.stack(tensors)
        return found.reshape(*asked.shape, *found.shape[1:])

    chunk = (*(1 for _ in stack), 1, *spec.hf_shape[1:])
    return Weights(spec, (*stack, *spec.hf_shape), chunk, dtype, True, read)


def _in_store(spec: Spec, folder: Folder) -> Weights:
    array = store.open_array(folder, spec.path)
    if tuple(array.shape) != spec.shape:
        raise ConversionError(
            f"{folder}: parameter {'.'.join(spec.path)} is of shape {tuple(array.shape)}; config.json needs {spec.shape}"
        )

    chunk, dtype = tuple(array.chunk_layout.read_chunk.shape), np.dtype(array.dtype.numpy_dtype)
    if any(part > size for part, size in zip(chunk, spec.shape, strict=True)):
        raise ConversionError(f"{folder}: parameter {'.'.join(spec.path)} has chunks of {chunk}")

    def read(index: Slices) -> np.ndarray:
        return store.read(folder, spec.path, array, index)

    def read_single(index: Slices) -> np.ndarray:
        return read(index[1:])[None]

    if spec.stack:
        return Weights(spec, spec.shape, chunk, dtype, False, read)
    return Weights(spec, (1, *spec.shape), (1, *chunk), dtype, False, read_single)


def manifest_dtypes(folder: pathlib.Path, cfg: DecoderConfig) -> dict[str, str]:
    """Tensor name -> safetensors dtype, from the manifest of a converted folder. ConversionError if it does not fit `cfg`."""
    tensors = _manifest(folder)["tensors"]
    _check_count(f"model folder {folder}", cfg, len(tensors))
    known = {name for name, _ in expected_shapes(cfg)}
    optional = {HEAD} if cfg.tied else set()  # a tied head may be stored all the same
    dtypes = [name for name in tensors.values() if isinstance(name, str) and name in DTYPES]
    if set(tensors) - optional != known or len(dtypes) < len(tensors):
        raise ConversionError(
            f"{folder / MANIFEST}: its tensors are not those of config.json; convert the model again"
        )
    return tensors


def _check_tensors(where: str, cfg: DecoderConfig, stored: Mapping[str, Stored]) -> None:
    """ConversionError naming every tensor that is missing, unknown, misshapen or of an unknown dtype."""
    _check_count(where, cfg, len(stored))
    expected = dict(expected_shapes(cfg))
    if cfg.tied and HEAD in stored:
        expected[HEAD] = expected[EMBED]
    named = tensor_faults(expected, stored)
    if HEAD in expected and HEAD not in stored:
        named.append("set tie_word_embeddings true if the embedding is the head, too")
    if named:
        raise ConversionError(f"{where} ({cfg.family}): {'; '.join(named)}")


def tensor_faults(
    expected: Mapping[str, tuple[int, ...]], stored: Mapping[str, Stored]
) -> list[str]:
    """What is wrong with the tensors of a folder where these shapes are needed; nothing: []."""
    shapes = {name: tensor.shape for name, tensor in stored.items()}
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
    return [f"{kind}: {_shorten(names)}" for kind, names in faults.items() if names]


def _check_count(where: str, cfg: DecoderConfig, stored: int) -> None:
    """Refuses sizes that are beyond what is there, before the names of so many tensors are made."""
    needed = sum(math.prod(spec.stack or (1,)) for spec in table(cfg))
    if needed > 2 * stored + 1000:
        raise ConversionError(
            f"{where}: config.json (num_hidden_layers {cfg.n_layers}, experts {cfg.n_experts}) needs "
            f"{needed:,} tensors, the files have {stored:,}"
        )


def _shorten(names: list[str]) -> str:
    names = [name if len(name) <= 200 else f"{name[:200]}.." for name in names]
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more
