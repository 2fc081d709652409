"""random_hf_folder.py PRESET OUT [LAYERS]: an HF folder of bfloat16 weights drawn at random, as large as the real one.

Files of at most 2 GB with the names and shapes of the preset (rest_jax/models/presets.py); a row block at a time is in memory.
"""

import dataclasses
import pathlib
import sys

import numpy as np

from benchmarks.policies import hf_config
from rest_jax.models.config import DecoderConfig
from rest_jax.models.hf.folder import write_index, write_json
from rest_jax.models.hf.safetensors import DTYPES, TensorType, lay_out
from rest_jax.models.hf.table import expected_shapes
from rest_jax.models.presets import preset

_BLOCK = 2**25  # values


def write(cfg: DecoderConfig, folder: pathlib.Path, max_bytes: int = 2 * 10**9) -> None:
    """Values are +-[2^-6, 2^-5): random signs and mantissas."""
    folder.mkdir(parents=True)
    write_json(folder / "config.json", hf_config(cfg, "bfloat16"))
    tensors = [TensorType(name, "BF16", shape) for name, shape in expected_shapes(cfg)]
    placed = lay_out(folder, tensors, max_bytes)
    write_index(folder, placed)
    rng = np.random.default_rng(0)
    for tensor in placed.values():
        width = tensor.row_bytes // 2
        step = max(1, _BLOCK // width)
        for first in range(0, tensor.shape[0], step):
            rows = min(step, tensor.shape[0] - first)
            bits = rng.integers(0, 2**16, (rows, width), np.uint16) & 0x807F | 0x3C80
            tensor.write(bits.view(DTYPES["BF16"]), first)


if __name__ == "__main__":
    sizes = preset(sys.argv[1])
    if len(sys.argv) > 3:
        sizes = dataclasses.replace(sizes, n_layers=int(sys.argv[3]))
    write(sizes, pathlib.Path(sys.argv[2]))
