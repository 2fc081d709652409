"""Parameters from the safetensors of an HF folder: checked against the table, then read part by part.

Nothing is read before every tensor's name, shape and dtype is right. Each stacked parameter is made from
callbacks, one a device, that read only the rows and columns of the layers they need.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from rest_jax.models.config import DecoderConfig
from rest_jax.models.decoder import Params
from rest_jax.models.hf.config import ConversionError
from rest_jax.models.hf.safetensors import DTYPES, Stored, scan
from rest_jax.models.hf.table import Slices, Spec, expected_shapes, table

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_COMPARED_ROWS = 8192
_NAMES_SHOWN = 8


def read_params(
    folder: pathlib.Path, cfg: DecoderConfig, shardings: Any, param_dtype: Any
) -> Params:
    """Parameters of an HF folder, each device reading its own part; None: on the host, in stored dtypes."""
    stored = scan(folder)
    check_tensors(folder, cfg, stored)
    params: dict[str, Any] = {}
    for spec in table(cfg):
        sharding = host_sharding() if shardings is None else leaf_at(shardings, spec.path)
        dtype = _stored_dtype(spec, stored) if param_dtype is None else jnp.dtype(param_dtype)
        set_leaf(params, spec.path, _read_leaf(spec, stored, sharding, dtype))
    return params


def _read_leaf(spec: Spec, stored: Mapping[str, Stored], sharding: Any, dtype: Any) -> jax.Array:
    def one(name: str, index: Slices) -> np.ndarray:
        return spec.read(lambda part: stored[name].read(name, part), index).astype(dtype)

    def read(index: Slices | None) -> np.ndarray:
        index = (slice(None),) * len(spec.shape) if index is None else index
        if spec.layers is None:
            return one(spec.hf_name, index)
        return np.stack([one(name, index[1:]) for name in spec.hf_names()[index[0]]])

    return jax.make_array_from_callback(spec.shape, sharding, read)


def check_tensors(folder: pathlib.Path, cfg: DecoderConfig, stored: Mapping[str, Stored]) -> None:
    """ConversionError naming every tensor that is missing, unknown, misshapen or of an unknown dtype."""
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    expected = dict(expected_shapes(cfg))
    if cfg.tied and HEAD in shapes:
        expected[HEAD] = expected[EMBED]
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
    found = [f"{kind}: {_shorten(names)}" for kind, names in faults.items() if names]
    if found:
        raise ConversionError(f"model folder {folder} ({cfg.family}): {'; '.join(found)}")
    if cfg.tied and HEAD in shapes:
        _check_tied_head(folder, stored)


def _check_tied_head(folder: pathlib.Path, stored: Mapping[str, Stored]) -> None:
    rows = stored[EMBED].shape[0]
    for start in range(0, rows, _COMPARED_ROWS):
        part = (slice(start, min(start + _COMPARED_ROWS, rows)), slice(None))
        embed, head = (stored[name].read(name, part) for name in (EMBED, HEAD))
        if embed.dtype != head.dtype or embed.tobytes() != head.tobytes():
            raise ConversionError(
                f"model folder {folder}: tie_word_embeddings is true, but {HEAD} differs from {EMBED}; "
                "set tie_word_embeddings false or remove the tensor"
            )


def _stored_dtype(spec: Spec, stored: Mapping[str, Stored]) -> Any:
    return widest(stored[name].dtype for name in spec.hf_names())


def widest(names: Any) -> Any:
    """The dtype that holds all of these exactly."""
    return jnp.result_type(*(DTYPES[name] for name in set(names)))


def host_sharding() -> SingleDeviceSharding:
    """The first CPU device."""
    return SingleDeviceSharding(jax.local_devices(backend="cpu")[0])


def leaf_at(tree: Any, path: tuple[str, ...]) -> Any:
    """The leaf at `path` of a nested dict; None where there is none."""
    for key in path:
        tree = tree.get(key, {}) if isinstance(tree, Mapping) else {}
    return None if isinstance(tree, Mapping) else tree


def set_leaf(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    """Puts `value` at `path` of a nested dict, making the dicts above it."""
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def _shorten(names: list[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more
