"""A GGUF file: its metadata, and its tensors as they are read by rows.

A file is magic, version, counts, key-value pairs, the tensors' names, shapes, types and places, and the raw blocks
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). The header is read here: the reader of the package `gguf` follows
every length that a file states, and takes 10 s for a vocabulary of 150 thousand words. The package dequantises.
"""

import dataclasses
import math
import pathlib
import struct
from typing import Any, BinaryIO, TypeVar

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, dequantize

from rest_jax.models.hf.config import ConversionError
from rest_jax.models.hf.safetensors import DTYPES, Stored

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_ALIGNMENT = 32  # bytes, where the metadata have no other
_MAX_HEADER = 2**26  # bytes, as of a JSON file
_MAX_ITEMS = 2**22  # of all arrays together
_MAX_COUNT = 2**16  # of tensors, and of keys
_MAX_DIMENSIONS = 4
_FORMATS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.FLOAT64: "d",
    GGUFValueType.BOOL: "?",
}
Value = TypeVar("Value")


@dataclasses.dataclass(frozen=True)
class GgufTensor(Stored):
    """One tensor of a GGUF file; of one whose type is none of DTYPES, `read` gives the float32 values of its blocks."""

    kind: GGMLQuantizationType = GGMLQuantizationType.F32
    heads: int = 0  # rows of each of them are stored in llama.cpp's order of rotary pairs; 0: as Hugging Face has them

    def read(self, rows: slice = slice(None)) -> np.ndarray:
        """The rows (all of them: the tensor) in Hugging Face's order, in the dtype of `dtype`."""
        if self.heads:
            values = self._read(0, self.shape[0])
            # Behind each other are the two that are rotated together; in Hugging Face's order they are half a head apart.
            pairs = values.reshape(self.heads, -1, 2, *self.shape[1:])
            return pairs.swapaxes(1, 2).reshape(self.shape)[rows]
        first, last, _ = rows.indices(self.shape[0])
        return self._read(first, last)

    def _read(self, first: int, last: int) -> np.ndarray:
        """The rows from `first` to `last` as they are stored."""
        row = self.blocks_bytes // self.shape[0]
        found = np.fromfile(
            self.file, np.uint8, count=(last - first) * row, offset=self.offset + first * row
        )
        shape = (last - first, *self.shape[1:])
        if self.kind.name in DTYPES:
            return found.view(DTYPES[self.dtype]).reshape(shape)
        return dequantize(found.reshape(last - first, row), self.kind).reshape(shape)

    @property
    def blocks_bytes(self) -> int:
        """Size in bytes as it is stored."""
        values, size = GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape) // values * size


@dataclasses.dataclass(frozen=True)
class GgufFile:
    """What the header of a GGUF file says."""

    path: pathlib.Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]

    def get(self, key: str, kind: type[Value], default: Value | None = None) -> Value:
        """The value of a key, or the default where there is none. ConversionError when it is needed or of another kind."""
        value = self.metadata.get(key, default)
        if type(value) is not kind:
            raise self.fault(
                f"{key} is {shown(value) if key in self.metadata else 'missing'}; "
                f"{_KINDS[kind]} is needed"
            )
        return value

    def fault(self, what: str) -> ConversionError:
        """An error that begins with the file."""
        return ConversionError(f"{self.path}: {what}")


_KINDS = {
    str: "a text",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    list: "a list",
}


def shown(value: Any) -> str:
    """A value of a file, which may be of any length."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}.."


def read_header(path: pathlib.Path) -> GgufFile:
    """The header of a GGUF file, checked against the size of the file; no weights are read.

    ConversionError (one line) for anything that is no complete GGUF file, and for tensors of a type that cannot be dequantised.
    """
    with path.open("rb") as file:
        reader = _Reader(path, file)
        try:
            return reader.header()
        except UnicodeDecodeError as error:
            raise reader.fault("a text that is not UTF-8") from error


class _Reader:
    """Reads a header from its begin; each length is compared with what is left before memory is taken."""

    def __init__(self, path: pathlib.Path, file: BinaryIO):
        self.path, self.file = path, file
        self.size = path.stat().st_size
        self.items = 0

    def fault(self, what: str) -> ConversionError:
        return ConversionError(f"{self.path}: not a readable GGUF file: {what}")

    def header(self) -> GgufFile:
        magic = self.file.read(4)
        if magic != _MAGIC:
            raise ConversionError(
                f"{self.path}: not a GGUF file: it begins with {magic!r}, not {_MAGIC!r}; "
                "name a GGUF file, or the folder of a Hugging Face model"
            )
        version = self.number("I")
        if version not in _VERSIONS:
            kind = "of a big-endian machine" if version % 2**16 == 0 else f"of version {version}"
            raise self.fault(f"it is {kind}; versions 2 and 3, little-endian, are read")
        tensors, keys = self.number("Q"), self.number("Q")
        if max(tensors, keys) > _MAX_COUNT:
            raise self.fault(f"it states {tensors:,} tensors and {keys:,} keys")
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = self.text()
            if key in metadata:
                raise self.fault(f"key {shown(key)} comes twice")
            metadata[key] = self.value()
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        if type(alignment) is not int or not 0 < alignment <= 2**16:
            raise self.fault(f"general.alignment is {shown(alignment)}")
        stated = [self.tensor() for _ in range(tensors)]
        start = -(-self.file.tell() // alignment) * alignment
        placed: dict[str, GgufTensor] = {}
        for tensor in stated:
            if tensor.name in placed:
                raise self.fault(f"tensor {shown(tensor.name)} comes twice")
            tensor = dataclasses.replace(tensor, offset=start + tensor.offset)
            end = tensor.offset + tensor.blocks_bytes
            if end > self.size:
                raise self.fault(
                    f"it has {self.size:,} bytes, tensor {shown(tensor.name)} ends at {end:,}; is it cut short?"
                )
            placed[tensor.name] = tensor
        return GgufFile(self.path, metadata, placed)

    def take(self, count: int) -> bytes:
        if self.file.tell() + count > min(self.size, _MAX_HEADER):
            raise self.fault(f"its header is cut short, or longer than {_MAX_HEADER // 2**20} MiB")
        return self.file.read(count)

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(code)))[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode()

    def kind(self) -> GGUFValueType:
        number = self.number("I")
        try:
            return GGUFValueType(number)
        except ValueError as error:
            raise self.fault(f"a value of type {number}") from error

    def value(self) -> Any:
        kind = self.kind()
        if kind == GGUFValueType.STRING:
            return self.text()
        if kind in _FORMATS:
            return self.number(_FORMATS[kind])
        kind, count = self.kind(), self.number("Q")
        self.items += count
        if kind == GGUFValueType.ARRAY or self.items > _MAX_ITEMS:
            what = "of arrays" if kind == GGUFValueType.ARRAY else f"of {count:,} items"
            raise self.fault(f"an array {what}")
        if kind == GGUFValueType.STRING:
            return [self.text() for _ in range(count)]
        code = f"<{count}{_FORMATS[kind]}"
        return list(struct.unpack(code, self.take(struct.calcsize(code))))

    def tensor(self) -> GgufTensor:
        """What the header says of a tensor, its offset from the end of the header."""
        name, dimensions = self.text(), self.number("I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise self.fault(f"tensor {shown(name)} has {dimensions} dimensions")
        shape = tuple(self.number("Q") for _ in range(dimensions))[::-1]
        number, offset = self.number("I"), self.number("Q")
        try:
            kind = GGMLQuantizationType(number)
        except ValueError as error:
            raise self.fault(f"tensor {shown(name)} is of type {number}") from error
        values, size = GGML_QUANT_SIZES[kind]
        if not all(shape) or math.prod(shape) > self.size * values or shape[-1] % values:
            raise self.fault(f"tensor {shown(name)} is of shape {shape} in blocks of {values}")
        stored = kind.name in DTYPES
        if not stored and dimensions == 1:
            raise self.fault(f"tensor {shown(name)} is a vector of type {kind.name}")
        if not stored:
            try:
                dequantize(np.zeros((1, size), np.uint8), kind)
            except NotImplementedError as error:
                raise ConversionError(
                    f"{self.path}: tensor {shown(name)} is of type {kind.name}, which is not dequantised; "
                    "take a file of another quantisation"
                ) from error
        dtype = kind.name if stored else "F32"
        return GgufTensor(self.path, name, dtype, shape, offset, kind=kind)
