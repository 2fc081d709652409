"""Model folders on disk: finding one, the files that travel with the weights, and its safetensors, tensor by tensor.

A source is an HF folder (config.json + safetensors, one file or several with an index), a folder made by `rest-jax convert`
(the same side files, `params/` and `rest_jax.json`), or a hub id.
"""

import dataclasses
import json
import pathlib
import re
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from rest_jax.files import fetch_folder, is_url
from rest_jax.models.hf.config import ConversionError

MANIFEST = "rest_jax.json"  # of a converted folder: the dtype of every tensor of the source
MANIFEST_FORMAT = 1
WEIGHT_INDEX = "model.safetensors.index.json"
PARAMS = "params"  # of a converted folder: the Orbax checkpoint
DTYPES = {"F32": jnp.dtype("float32"), "BF16": jnp.dtype("bfloat16"), "F16": jnp.dtype("float16")}
MAX_SHARD_BYTES = 5 * 10**9
LazyTensor = tuple[str, int, Callable[[], np.ndarray]]  # name, bytes, function that makes it
_SIDE_PATTERNS = (
    "*.json",  # config, generation config, tokenizer
    "*.jinja",  # chat template
    "additional_chat_templates/*.jinja",
    "merges.txt",
    "vocab.txt",
    "*.model",  # sentencepiece
    "*.tiktoken",
    "LICENSE*",
    "NOTICE*",
)


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


def copy_side_files(source: pathlib.Path, out: pathlib.Path) -> None:
    """Copies config, generation config, tokenizer, chat template and licence; never weights."""
    for pattern in _SIDE_PATTERNS:
        for file in sorted(source.glob(pattern)):
            if file.name == MANIFEST or file.name.endswith(".index.json"):
                continue
            target = out / file.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object; ConversionError when the file is missing or holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConversionError(f"{path}: no such file; a model folder needs it") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConversionError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConversionError(f"{path}: a JSON object is needed, not {type(value).__name__}")
    return value


def write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
    """Indented JSON with a last newline."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def is_converted(folder: pathlib.Path) -> bool:
    """Whether `folder` was made by `rest-jax convert`."""
    return (folder / MANIFEST).is_file()


def find_source(source: str) -> pathlib.Path:
    """The local folder of a model: `source` itself, a copy of what is at a URL, or the snapshot of a hub id (both are
    downloaded when not cached). The weights of a converted folder stay in the store (`files.follow`).
    """
    if is_url(source):
        return fetch_folder(source, leave=(PARAMS,))
    path = pathlib.Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ConversionError(f"model {source}: a file; name the folder it lies in")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", source):
        raise ConversionError(f"model {source}: no such folder, and not a hub id (owner/name)")
    return _download(source)


def _download(hub_id: str) -> pathlib.Path:
    import huggingface_hub
    from huggingface_hub import errors

    patterns = [*_SIDE_PATTERNS, "*.safetensors"]
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=patterns))
    except (
        errors.HfHubHTTPError,
        errors.LocalEntryNotFoundError,
        errors.HFValidationError,
        OSError,
    ) as error:
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise ConversionError(
            f"model {hub_id}: no such folder, and the hub did not give it ({reason}); "
            "check the name and the network, or download the model and name its folder"
        ) from error


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
