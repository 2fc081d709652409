"""Model folders on disk: finding one, the files that travel with the weights, and which tensors it holds.

A source is an HF folder (config.json + safetensors, one file or several with an index), a folder made by `rest-jax convert`
(the same side files, `params/` and `rest_jax.json`), or a hub id.
"""

import json
import pathlib
import re
import shutil
import socket
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath

from rest_jax.distributed import exchange
from rest_jax.files import (
    Location,
    as_path,
    check_links,
    fetch_folder,
    is_url,
    nearest_path,
    store_errors,
)
from rest_jax.models.hf.config import ConversionError
from rest_jax.models.hf.safetensors import Stored, scan_file

# Of a converted folder: the dtype of every tensor of the source, size and digest of every file beside it.
MANIFEST = "rest_jax.json"
MANIFEST_FORMAT = 2
PARAMS = "params"  # of a converted folder: the Orbax checkpoint
WEIGHTS = "model.safetensors"
WEIGHT_INDEX = "model.safetensors.index.json"
_DOWNLOAD_SECONDS = 24 * 3600  # the longest wait for another process's download
_MAX_JSON_BYTES = 2**26
# Tensors that models compute and older versions of transformers stored all the same; it reads none of them either.
_COMPUTED = re.compile(r"rotary_emb\.(original_)?inv_freq$|(^|\.)position_ids$")
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
_PATTERNS = (*_SIDE_PATTERNS, "*.safetensors")


def copy_side_files(source: pathlib.Path, out: pathlib.Path) -> None:
    """Copies config, generation config, tokenizer, chat template and licence; never weights. UserError for links that lead
    out of the folder.
    """
    check_links(source)
    for pattern in _SIDE_PATTERNS:
        for file in sorted(source.glob(pattern)):
            if file.name == MANIFEST or file.name.endswith(".index.json") or not file.is_file():
                continue
            target = out / file.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object; ConversionError when the file is missing, larger than any such file, or holds something else."""
    if not path.is_file():  # nor anything else: a pipe would be waited for
        raise ConversionError(f"{path}: no such file; a model folder needs it")
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise ConversionError(f"{path}: {path.stat().st_size:,} bytes; it is no file of a model")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
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
        raise ConversionError(
            f"model {source}: a file; name the folder it lies in, or convert a GGUF file first (rest-jax convert)"
        )
    if not _is_hub_id(source):
        near = nearest_path(source, folders=True)
        raise ConversionError(
            f"model {source}: no such folder{near}, and not a hub id (owner/name)"
        )
    return _download(source)


def _is_hub_id(source: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", source) is not None


def small_file(source: Location, name: str) -> epath.Path | None:
    """A file beside the weights of a model, by itself; of a hub id it is downloaded. None where there is none, or no hub: that
    is for whoever wants the weights to say.
    """
    folder = as_path(source)
    with store_errors(folder):
        if not is_url(source) and not folder.exists() and _is_hub_id(str(source)):
            try:
                folder = epath.Path(_snapshot(str(source), [name]))
            except ConversionError:
                return None
        return folder / name if (folder / name).is_file() else None


def _download(hub_id: str) -> pathlib.Path:
    """The snapshot of a hub id; all processes call this. The first of each host fetches it while the others wait.

    A failure is said by one process, once; the others end without a word.
    """
    snapshot = failure = None
    if exchange(socket.gethostname()).index(socket.gethostname()) == jax.process_index():
        try:
            snapshot = _snapshot(hub_id)
        except ConversionError as error:
            failure = error
    failed = exchange("failed" if failure else "", _DOWNLOAD_SECONDS)
    if "failed" in failed:
        said_here = failed.index("failed") == jax.process_index()
        raise failure if failure is not None and said_here else ConversionError("")
    if snapshot is None:
        try:
            snapshot = _snapshot(hub_id, local_files_only=True)
        except ConversionError:
            snapshot = _snapshot(hub_id)  # two hosts of one name
    return snapshot


def _snapshot(
    hub_id: str, patterns: Sequence[str] = _PATTERNS, local_files_only: bool = False
) -> pathlib.Path:
    """The folder with the files of these patterns. Not `hf_hub_download`, which without a network tries for half a minute."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        path = huggingface_hub.snapshot_download(
            hub_id, allow_patterns=list(patterns), local_files_only=local_files_only
        )
    except (
        errors.HfHubHTTPError,
        errors.LocalEntryNotFoundError,
        errors.HFValidationError,
        OSError,
    ) as error:
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise ConversionError(
            f"model {hub_id}: no such folder{nearest_path(hub_id, folders=True)}, and the hub did not give it ({reason}); "
            "check the name and the network, or download the model and name its folder"
        ) from error
    return pathlib.Path(path)


def scan(folder: pathlib.Path) -> dict[str, Stored]:
    """Every weight in the folder's safetensors, from the headers. ConversionError names what is missing or broken."""
    check_links(folder)
    tensors: dict[str, Stored] = {}
    for file in _weight_files(folder):
        for tensor in scan_file(file):
            if _COMPUTED.search(tensor.name):
                continue
            if tensor.name in tensors:
                raise ConversionError(
                    f"tensor {tensor.name} is in both {tensors[tensor.name].file.name} and {file.name}"
                )
            tensors[tensor.name] = tensor
    return tensors


def _weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files that transformers reads: model.safetensors, and those of an index only where there is none."""
    files, index = [folder / WEIGHTS], folder / WEIGHT_INDEX
    if not files[0].is_file() and index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ConversionError(f"{index}: no weight_map")
        for name in weight_map.values():
            if not isinstance(name, str) or not re.fullmatch(r"[^/\\]+\.safetensors", name):
                raise ConversionError(
                    f"{index}: weight_map names {str(name)[:80]!r}; a .safetensors file of the folder is needed"
                )
        files = [folder / name for name in sorted(set(weight_map.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        raise ConversionError(
            f"model folder {folder}: weight files missing: {', '.join(missing[:8])}{more}"
        )
    return files


def write_index(folder: pathlib.Path, tensors: Mapping[str, Stored]) -> None:
    """Writes which tensor is in which file, when there are several files."""
    weight_map = {name: tensor.file.name for name, tensor in tensors.items()}
    if len(set(weight_map.values())) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / WEIGHT_INDEX, index)
