"""GGUF headers: tensors as the format's own package dequantises them, and one line for whatever is no GGUF file."""

import struct

import numpy as np
import pytest

from rest_jax.models.gguf.file import read_header
from rest_jax.models.gguf.model import read_model
from rest_jax.models.hf.config import ConversionError
from tests.gguf_files import Kind, write_gguf

KINDS = [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q5_0, Kind.Q4_1, Kind.Q4_K, Kind.Q6_K]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "sound.gguf"
    write_gguf(path)
    return path


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_tensors_of_every_kind(tmp_path, kind):
    """Llama, whose query and key rows are in another order in the file."""
    values = write_gguf(tmp_path / "m.gguf", kind=kind)
    tensors = read_model(tmp_path / "m.gguf").tensors
    assert set(tensors) == set(values)
    for name, value in values.items():
        read = tensors[name].read()
        np.testing.assert_array_equal(read.astype(np.float32), value, err_msg=name)
        np.testing.assert_array_equal(tensors[name].read(slice(3, 70)), read[3:70], err_msg=name)
    stored = kind.name if kind in (Kind.F32, Kind.F16, Kind.BF16) else "F32"
    assert tensors["model.layers.1.mlp.up_proj.weight"].dtype == stored


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def header(
    keys: bytes = b"", key_count: int = 0, tensors: bytes = b"", tensor_count: int = 0
) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensor_count, key_count) + keys + tensors


STRING_ARRAY = text(b"a") + struct.pack("<IIQ", 9, 8, 2**62)
NUMBER = text(b"a") + struct.pack("<IB", 0, 1)


def tensor(shape=(32,), kind=0, offset=0, name=b"t") -> bytes:
    sizes = struct.pack(f"<{len(shape)}Q", *shape)
    return text(name) + struct.pack("<I", len(shape)) + sizes + struct.pack("<IQ", kind, offset)


BAD = {
    "empty": (b"", "not a GGUF file"),
    "safetensors": (b"\x10\0\0\0\0\0\0\0{}", "not a GGUF file"),
    "version 1": (b"GGUF" + struct.pack("<I", 1), "of version 1"),
    "big-endian": (b"GGUF" + struct.pack(">I", 3), "big-endian"),
    "only magic": (b"GGUF", "cut short"),
    "keys beyond any": (header(key_count=2**63), "states 0 tensors and 9,223"),
    "a long text": (header(struct.pack("<Q", 2**62), 1), "cut short"),
    "a long array of texts": (header(STRING_ARRAY, 1), "array of 4,611"),
    "a long array of numbers": (
        header(text(b"a") + struct.pack("<IIQ", 9, 0, 2**21), 1), "cut short",
    ),
    "arrays in arrays": (header(text(b"a") + struct.pack("<IIQ", 9, 9, 1), 1), "array of arrays"),
    "an unknown type of value": (header(text(b"a") + struct.pack("<I", 99), 1), "type 99"),
    "a key twice": (header(NUMBER * 2, 2), "'a' comes twice"),
    "no UTF-8": (header(text(b"\xff") + struct.pack("<IB", 0, 1), 1), "UTF-8"),
    "alignment 0": (
        header(text(b"general.alignment") + struct.pack("<II", 4, 0), 1), "alignment is 0",
    ),
    "no dimension": (header(tensors=tensor(()), tensor_count=1), "0 dimensions"),
    "many dimensions": (header(tensors=tensor((1,) * 9), tensor_count=1), "9 dimensions"),
    "a size of 0": (header(tensors=tensor((0,)), tensor_count=1), "shape (0,)"),
    "a huge tensor": (header(tensors=tensor((2**40, 2**40)), tensor_count=1), "shape (1099"),
    "half a block": (header(tensors=tensor((33, 2), kind=8), tensor_count=1), "blocks of 32"),
    "a tensor beyond the end": (
        header(tensors=tensor(offset=2**40), tensor_count=1), "is it cut short?",
    ),
    "an unknown type of tensor": (header(tensors=tensor(kind=999), tensor_count=1), "type 999"),
    "a type that nothing dequantises": (
        header(tensors=tensor((32, 2), kind=26), tensor_count=1), "type I32, which is not dequantised",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_gguf_file_is_one_line(tmp_path, case):
    path = tmp_path / "bad.gguf"
    content, said = BAD[case]
    path.write_bytes(content)
    with pytest.raises(ConversionError, match=f"^{path}: .*") as error:
        read_header(path)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_tensor_twice(tmp_path):
    path = tmp_path / "bad.gguf"
    path.write_bytes(header(tensors=tensor() * 2, tensor_count=2) + bytes(1000))
    with pytest.raises(ConversionError, match="tensor 't' comes twice"):
        read_header(path)


def test_a_file_cut_anywhere_is_refused(sound, tmp_path):
    content = sound.read_bytes()
    path = tmp_path / "cut.gguf"
    for end in np.random.default_rng(0).integers(0, len(content) - 1, 60):
        path.write_bytes(content[:end])
        with pytest.raises(ConversionError):
            read_model(path)


def test_damaged_headers_are_refused_or_read(sound, tmp_path):
    """Whatever is in a byte of a header, reading it ends with a model or one line."""
    content, rng = bytearray(sound.read_bytes()), np.random.default_rng(1)
    path, refused = tmp_path / "damaged.gguf", 0
    for _ in range(60):
        damaged = content.copy()
        # The first keys are the sizes; behind the words are the names and shapes of the tensors.
        for at in rng.integers(8, rng.choice([700, 22_000]), 3):
            damaged[at] = rng.choice([0, 1, 255, rng.integers(256)])
        path.write_bytes(damaged)
        try:
            read_model(path).write_side_files(tmp_path)
        except ConversionError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 10
