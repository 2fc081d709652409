"""Writing models: a converted folder in the source's own dtypes, and an HF folder that transformers loads.

`convert(source, out)` writes parameters as an Orbax checkpoint with the side files and a manifest of the source's dtypes (of
quantised tensors float32); `export(weights, files, out)` writes safetensors, and `export(convert(x))` equals x bit for bit.
Both write all or nothing, on the host alone, and go from tensor to tensor: a few copies of one are in memory, whatever the
size of the model.
"""

import collections
import functools
import itertools
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict

from rest_jax.files import atomic_folder, fingerprints, is_url, list_files
from rest_jax.models.config import DecoderConfig
from rest_jax.models.gguf.model import read_model
from rest_jax.models.hf import store
from rest_jax.models.hf.config import ConversionError, decoder_config
from rest_jax.models.hf.folder import (
    MANIFEST,
    MANIFEST_FORMAT,
    PARAMS,
    copy_side_files,
    find_source,
    is_converted,
    read_json,
    write_index,
    write_json,
)
from rest_jax.models.hf.placement import Weights
from rest_jax.models.hf.read import (
    Report,
    check_stored,
    checked_scan,
    manifest_dtypes,
    open_weights,
    read_config,
    silent,
    verify,
    widest,
)
from rest_jax.models.hf.safetensors import DTYPES, Stored, TensorType, lay_out
from rest_jax.models.hf.table import (
    EMBED,
    HEAD,
    NORM,
    Slices,
    Spec,
    copy_in_order,
    expected_shapes,
    table,
)
from rest_jax.types import Params

MAX_SHARD_BYTES = 5 * 10**9
_PART_BYTES = 2**27  # of a tensor that needs no transposition, and of writes under way


def convert(source: str, out: str | pathlib.Path, report: Report = silent) -> None:
    """Writes a converted folder: `params/` (Orbax, the source's dtypes), side files, the manifest.

    `source` is an HF folder, a hub id or a GGUF file. All or nothing. The files of the source are read once, one after the
    other.
    """
    if not is_url(source) and pathlib.Path(source).expanduser().is_file():
        model = read_model(pathlib.Path(source).expanduser())
        cfg = decoder_config(model.config)
        stored = check_stored(f"GGUF file {source}", cfg, model.tensors)
        write_side_files = model.write_side_files
    else:
        folder = find_source(source)
        if is_converted(folder):
            raise ConversionError(f"model {source}: already a converted folder")
        cfg = read_config(folder)
        stored = checked_scan(folder, cfg)
        write_side_files = functools.partial(copy_side_files, folder)
    with atomic_folder(out, last=MANIFEST) as work:
        write_side_files(work)
        _fill_store(work / PARAMS, stored, cfg, report)
        files = fingerprints(work, sorted(list_files(work)))
        manifest = {"format": MANIFEST_FORMAT, "tensors": _stored_dtypes(stored), "files": files}
        write_json(work / MANIFEST, manifest)


def export(
    weights: Params | str | store.Folder | list[Weights],
    files: str | pathlib.Path,
    out: str | pathlib.Path,
    dtype: str | None = None,
    report: Report = silent,
    texts: Mapping[str, str] | None = None,
) -> None:
    """Writes an HF folder from `weights` and the folder `files` they came from, and `texts` by the names of their files.

    `weights` are parameters this process holds, a model folder, an Orbax checkpoint of parameters, or what is opened of one.
    Tensors, dtypes and the presence of a tied head are those of `files`; `dtype` (float32, bfloat16, float16) overrides the
    dtypes. All or nothing.
    """
    files = pathlib.Path(files)
    verify(files)
    cfg = read_config(files)
    if isinstance(weights, str):
        weights = pathlib.Path(weights)
    if isinstance(weights, (pathlib.Path, epath.Path)):
        weights = open_weights(weights, cfg)
    opened = weights if isinstance(weights, list) else _in_memory(weights, cfg)
    dtypes = _recorded_dtypes(files, cfg)
    if dtype is not None:
        dtypes = dict.fromkeys(dtypes, _dtype_name(dtype))
    with atomic_folder(out) as work:
        copy_side_files(files, work)
        for name, text in (texts or {}).items():
            (work / name).write_text(text, encoding="utf-8")
        if dtype is not None:
            hf = read_json(work / "config.json")
            keys = [key for key in ("torch_dtype", "dtype") if key in hf] or ["dtype"]
            write_json(work / "config.json", hf | dict.fromkeys(keys, dtype))
        placed = lay_out(work, _tensor_types(cfg, dtypes), MAX_SHARD_BYTES)
        write_index(work, placed)
        total = sum(tensor.nbytes for tensor in placed.values())
        for source in opened:
            for name, first, values in _hf_parts(source):
                copies = [name, HEAD] if name == EMBED and cfg.tied and HEAD in dtypes else [name]
                for tensor in (placed[copy] for copy in copies):
                    tensor.write(values.astype(DTYPES[tensor.dtype], copy=False), first)
                    report(len(values) * tensor.row_bytes, total)


def _fill_store(
    folder: pathlib.Path, stored: Mapping[str, Stored], cfg: DecoderConfig, report: Report
) -> None:
    """Writes every tensor into its place in a store, in the order in which the files hold them."""
    specs = table(cfg)
    shapes = {s.path: jax.ShapeDtypeStruct(s.shape, widest(s, stored)) for s in specs}
    arrays = store.create(folder, shapes, {s.path: len(s.stack) for s in specs})
    places = {
        name: (spec, index)
        for spec in specs
        for index, name in zip(np.ndindex(*spec.stack), spec.hf_names(), strict=True)
    }
    total = sum(stored[name].nbytes for name in places)
    writes: collections.deque[tuple[Any, int]] = collections.deque()
    for name in sorted(places, key=lambda name: (stored[name].file, stored[name].offset)):
        spec, index = places[name]
        tensor, array = stored[name], arrays[spec.path]
        # Parts of a chunk would be written by reading the rest of it.
        chunk = array.chunk_layout.read_chunk.shape[len(index)]
        chunk = chunk if spec.as_in_hf else tensor.shape[0]
        for rows in _row_parts(tensor.shape[0], tensor.row_bytes, chunk):
            values = tensor.read(rows).astype(shapes[spec.path].dtype, copy=False)
            part = (*index, rows) if spec.as_in_hf else index
            ours = values if spec.as_in_hf else copy_in_order(spec.to_ours(values))
            write = array[part].write(ours)
            write.commit.force()
            writes.append((write, values.nbytes))
            report((rows.stop - rows.start) * tensor.row_bytes, total)
            # Two are under way at least: one is encoded while the next is read.
            while len(writes) > 2 and sum(size for _, size in writes) > _PART_BYTES:
                writes.popleft()[0].result()
    for write, _ in writes:
        write.result()


def _row_parts(rows: int, row_bytes: int, chunk: int) -> Iterator[slice]:
    """`rows` in parts of about _PART_BYTES, but in whole chunks of `chunk` rows."""
    step = chunk * max(1, _PART_BYTES // (row_bytes * chunk))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _hf_parts(weights: Weights) -> Iterator[tuple[str, int, np.ndarray]]:
    """(HF tensor, number of the first row, rows) of one parameter, as its source has them together."""
    spec = weights.spec
    stack = spec.stack or (1,)
    names = np.asarray(spec.hf_names()).reshape(stack)
    own = weights.shape[len(stack) :]
    divisible = weights.in_hf_layout or spec.as_in_hf
    row_bytes = math.prod(own[1:]) * weights.dtype.itemsize
    chunk = weights.chunk[len(stack)] if divisible else own[0]
    for block in _blocks(stack, weights.chunk[: len(stack)]):
        for rows in _row_parts(own[0], row_bytes, chunk):
            rest = tuple(slice(0, n) for n in own[1:])
            values = weights.read((*block, rows, *rest))
            for at, name in np.ndenumerate(names[block]):
                one = values[at]
                yield str(name), rows.start, one if divisible else spec.to_hf(one)


def _blocks(shape: tuple[int, ...], step: tuple[int, ...]) -> Iterator[Slices]:
    ranges = (range(0, n, k) for n, k in zip(shape, step, strict=True))
    for starts in itertools.product(*ranges):
        yield tuple(slice(a, min(a + k, n)) for a, k, n in zip(starts, step, shape, strict=True))


def _recorded_dtypes(files: pathlib.Path, cfg: DecoderConfig) -> dict[str, str]:
    """Name -> safetensors dtype of every tensor that the source of a model holds.

    For side files without weights (those of a run, or of a fresh model) it is the dtype in their config.json.
    """
    if is_converted(files):
        return manifest_dtypes(files, cfg)
    if any(files.glob("*.safetensors*")):
        return _stored_dtypes(checked_scan(files, cfg))
    hf = read_json(files / "config.json")
    dtype = str(hf.get("dtype") or hf.get("torch_dtype") or "float32")
    return {name: _dtype_name(dtype) for name, _ in expected_shapes(cfg)}


def _stored_dtypes(stored: Mapping[str, Stored]) -> dict[str, str]:
    """Of every tensor of `checked_scan`, and of the tied head that is stored as well."""
    twins = [tensor.twin for tensor in stored.values() if tensor.twin is not None]
    return {name: tensor.dtype for name, tensor in [*stored.items(), *((t.name, t) for t in twins)]}


def _dtype_name(dtype: str) -> str:
    """safetensors name of a dtype spelled as in a config.json."""
    names = {str(known): name for name, known in DTYPES.items()}
    if dtype not in names:
        raise ConversionError(f"export dtype {dtype!r}; known: {', '.join(names)}")
    return names[dtype]


def _tensor_types(cfg: DecoderConfig, dtypes: Mapping[str, str]) -> list[TensorType]:
    """Every tensor to write, in the order of HF: embedding, layers, norm, head."""
    shapes = dict(expected_shapes(cfg))
    if cfg.tied and HEAD in dtypes:
        shapes[HEAD] = shapes[EMBED]
    layers = [n for i in range(cfg.n_layers) for n in shapes if n.startswith(f"model.layers.{i}.")]
    names = [name for name in (EMBED, *layers, NORM, HEAD) if name in shapes]
    return [TensorType(name, dtypes[name], shapes[name]) for name in names]


def _in_memory(params: Params, cfg: DecoderConfig) -> list[Weights]:
    """Parameters that this process holds, as weights to be read in parts."""
    leaves = flatten_dict(params)
    return [_leaf_weights(spec, leaves.get(spec.path)) for spec in table(cfg)]


def _leaf_weights(spec: Spec, leaf: Any) -> Weights:
    if leaf is None or leaf.shape != spec.shape:
        fault = "missing" if leaf is None else f"of shape {leaf.shape}"
        raise ConversionError(
            f"parameter {'.'.join(spec.path)} is {fault}; config.json needs {spec.shape}"
        )

    stack = spec.stack or (1,)
    own = spec.shape[len(spec.stack) :]
    ones = tuple(1 for _ in stack)

    def read(index: Slices) -> np.ndarray:
        # By number: jax compiles a slice for each of its starts.
        tensor = leaf[tuple(part.start for part in index[: len(spec.stack)])]
        return np.asarray(tensor).reshape(*ones, *own)

    chunk = (*ones, *own)
    return Weights(spec, (*stack, *own), chunk, jnp.dtype(leaf.dtype), False, read)
