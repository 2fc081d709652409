"""Safetensors files: read by rows, and written tensor by tensor into files laid out beforehand.

A file is eight bytes of header length, a JSON header that gives every tensor's dtype, shape and place, and the raw values
(https://github.com/huggingface/safetensors). The library writes only what is in memory all at once, and its readers
map the file, so that what was read counts as memory of the process; plain reads and writes at an offset do neither.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors

from rest_jax.models.hf.config import ConversionError

DTYPES = {"F32": jnp.dtype("float32"), "BF16": jnp.dtype("bfloat16"), "F16": jnp.dtype("float16")}


class TensorType(NamedTuple):
    """What a header says of a tensor, but for its place."""

    name: str
    dtype: str  # safetensors name, e.g. BF16
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclasses.dataclass(frozen=True)
class Stored:
    """One tensor on disk: what its header says."""

    file: pathlib.Path
    name: str
    dtype: str  # safetensors name; those of DTYPES can be read
    shape: tuple[int, ...]
    offset: int  # bytes, from the start of the file
    twin: "Stored | None" = None  # a second tensor that must hold the same values

    def read(self, rows: slice = slice(None)) -> np.ndarray:
        """The rows (all of them: the tensor), in its own dtype; reads exactly those bytes.

        ConversionError when the twin has other values there.
        """
        first, last, _ = rows.indices(self.shape[0])
        found = np.fromfile(
            self.file,
            np.uint8,
            count=(last - first) * self.row_bytes,
            offset=self.offset + first * self.row_bytes,
        )
        if self.twin is not None and not np.array_equal(
            found, self.twin.read(rows).view(np.uint8).ravel()
        ):
            raise ConversionError(
                f"model folder {self.file.parent}: tie_word_embeddings is true, but {self.twin.name} differs "
                f"from {self.name}; set tie_word_embeddings false or remove the tensor"
            )
        return found.view(DTYPES[self.dtype]).reshape(last - first, *self.shape[1:])

    def write(self, rows: np.ndarray, first: int = 0) -> None:
        """Writes the rows from number `first` on; they must have the tensor's dtype."""
        with self.file.open("r+b") as file:
            file.seek(self.offset + first * self.row_bytes)
            file.write(np.ascontiguousarray(rows).view(np.uint8).data)

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    @property
    def row_bytes(self) -> int:
        """Size of one index of the first axis in bytes."""
        return math.prod(self.shape[1:]) * DTYPES[self.dtype].itemsize


def scan_file(file: pathlib.Path) -> list[Stored]:
    """Every tensor of a file, from its header. ConversionError when it is not a whole safetensors file."""
    try:
        with safetensors.safe_open(file, framework="numpy"):
            pass  # the library checks the header and the length; it does not tell where the values are
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
    except (safetensors.SafetensorError, OSError) as error:
        raise ConversionError(f"{file}: not a readable safetensors file: {error}") from error
    header.pop("__metadata__", None)
    return [
        Stored(file, name, x["dtype"], tuple(x["shape"]), 8 + length + x["data_offsets"][0])
        for name, x in header.items()
    ]


def lay_out(
    folder: pathlib.Path, tensors: Sequence[TensorType], max_bytes: int
) -> dict[str, Stored]:
    """Makes the files of `tensors`, cut in their order at `max_bytes`, with headers and room for the values.

    What is not written afterwards (`Stored.write`) is zero.
    """
    shards: list[list[TensorType]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.nbytes for t in shards[-1]) + tensor.nbytes > max_bytes:
            shards.append([])
        shards[-1].append(tensor)
    placed: dict[str, Stored] = {}
    for number, shard in enumerate(shards, 1):
        part = "" if len(shards) == 1 else f"-{number:05d}-of-{len(shards):05d}"
        stored = _make_file(folder / f"model{part}.safetensors", shard)
        placed |= {tensor.name: tensor for tensor in stored}
    return placed


def _make_file(file: pathlib.Path, tensors: Iterable[TensorType]) -> list[Stored]:
    # Wide dtypes first, as the library does: every tensor is then aligned to its items.
    ordered = sorted(tensors, key=lambda tensor: -DTYPES[tensor.dtype].itemsize)
    # transformers refuses files that do not say which framework's layout they have.
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts, end = [], 0
    for tensor in ordered:
        start, end = end, end + tensor.nbytes
        starts.append(start)
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        opened.truncate(8 + len(text) + end)
    return [
        Stored(file, tensor.name, tensor.dtype, tensor.shape, 8 + len(text) + start)
        for tensor, start in zip(ordered, starts, strict=True)
    ]
