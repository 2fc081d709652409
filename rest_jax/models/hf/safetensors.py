"""Reading and writing the safetensors of an HF folder: one file or several with an index, lazily, tensor by tensor."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from rest_jax.models.hf.config import ConversionError
from rest_jax.models.hf.folder import WEIGHT_INDEX, read_json, write_json

DTYPES = {"F32": jnp.dtype("float32"), "BF16": jnp.dtype("bfloat16"), "F16": jnp.dtype("float16")}
MAX_SHARD_BYTES = 5 * 10**9
LazyTensor = tuple[str, int, Callable[[], np.ndarray]]  # name, bytes, function that makes it


@dataclasses.dataclass(frozen=True)
class Stored:
    """One tensor on disk: what its header says."""

    file: pathlib.Path
    shape: tuple[int, ...]
    dtype: str  # safetensors name, e.g. BF16

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """The part `index` of the tensor, in its own dtype; reads no more than that."""
        with safetensors.safe_open(self.file, framework="numpy") as opened:
            return opened.get_slice(name)[index]


def scan(folder: pathlib.Path) -> dict[str, Stored]:
    """Every tensor of the folder's safetensors, headers only. ConversionError names what is missing or broken."""
    tensors: dict[str, Stored] = {}
    for file in _weight_files(folder):
        try:
            with safetensors.safe_open(file, framework="numpy") as opened:
                for name in opened.keys():  # noqa: SIM118 (a file handle, not a dict)
                    header = opened.get_slice(name)
                    if name in tensors:
                        raise ConversionError(
                            f"tensor {name} is in both {tensors[name].file.name} and {file.name}"
                        )
                    tensors[name] = Stored(file, tuple(header.get_shape()), header.get_dtype())
        except (safetensors.SafetensorError, OSError) as error:
            raise ConversionError(f"{file}: not a readable safetensors file: {error}") from error
    return tensors


def _weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    index = folder / WEIGHT_INDEX
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ConversionError(f"{index}: no weight_map")
        files = [folder / name for name in sorted(set(weight_map.values()))]
    else:
        files = [folder / "model.safetensors"]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ConversionError(f"model folder {folder}: weight files missing: {', '.join(missing)}")
    return files


def write_shards(
    out: pathlib.Path,
    tensors: Sequence[LazyTensor],
    max_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes the tensors in order, cut into files of at most `max_bytes`, with an index when there are several.

    A tensor is made when its file is written, so at most one file's worth is in memory.
    """
    shards: list[list[LazyTensor]] = [[]]
    for entry in tensors:
        if shards[-1] and sum(size for _, size, _ in shards[-1]) + entry[1] > max_bytes:
            shards.append([])
        shards[-1].append(entry)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        part = "" if len(shards) == 1 else f"-{number:05d}-of-{len(shards):05d}"
        file = f"model{part}.safetensors"
        arrays = {name: make() for name, _, make in shard}
        # transformers refuses files that do not say which framework's layout they have
        safetensors.numpy.save_file(arrays, out / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(arrays, file)
    if len(shards) > 1:
        total = sum(size for _, size, _ in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(out / WEIGHT_INDEX, index)
