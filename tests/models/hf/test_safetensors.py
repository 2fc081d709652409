"""Files laid out beforehand are what the safetensors library reads and writes."""

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from rest_jax.models.hf.config import ConversionError
from rest_jax.models.hf.safetensors import TensorType, lay_out, scan_file

RNG = np.random.default_rng(0)
VALUES = {
    "odd": RNG.normal(size=(3, 5)).astype(jnp.bfloat16),
    "wide": RNG.normal(size=(4, 2, 3)).astype(np.float32),
    "half": RNG.normal(size=7).astype(np.float16),
}
NAMES = {"bfloat16": "BF16", "float32": "F32", "float16": "F16"}
TYPES = [TensorType(name, NAMES[x.dtype.name], x.shape) for name, x in VALUES.items()]


def test_the_library_reads_what_is_written_by_rows(tmp_path):
    placed = lay_out(tmp_path, TYPES, 10**9)
    for name, x in VALUES.items():
        placed[name].write(x[2:], first=2)
        placed[name].write(x[:2])
    found = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert found.keys() == VALUES.keys()
    for name, x in VALUES.items():
        assert found[name].dtype == x.dtype and found[name].tobytes() == x.tobytes()
        assert placed[name].offset % x.dtype.itemsize == 0


def test_rows_of_what_the_library_writes(tmp_path):
    safetensors.numpy.save_file(VALUES, tmp_path / "a.safetensors", metadata={"format": "pt"})
    for stored in scan_file(tmp_path / "a.safetensors"):
        x = VALUES[stored.name]
        assert stored.nbytes == x.nbytes and stored.shape == x.shape
        np.testing.assert_array_equal(stored.read(), x)
        np.testing.assert_array_equal(stored.read(slice(1, 3)), x[1:3])


def test_files_are_cut_in_the_order_given(tmp_path):
    placed = lay_out(tmp_path, TYPES, 120)
    files = [placed[name].file.name for name in VALUES]
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    assert files == [first, second, second]
    for name, x in VALUES.items():
        placed[name].write(x)
    for file in {first, second}:
        for name, x in safetensors.numpy.load_file(tmp_path / file).items():
            assert x.tobytes() == VALUES[name].tobytes()


def test_a_file_cut_short_is_refused(tmp_path):
    safetensors.numpy.save_file(VALUES, tmp_path / "a.safetensors")
    content = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(content[:-1])
    with pytest.raises(ConversionError, match=r"a\.safetensors: not a readable safetensors file"):
        scan_file(tmp_path / "a.safetensors")
