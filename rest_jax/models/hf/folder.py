"""Model folders on disk: which files travel with the weights, and finding a source.

A source is an HF folder (config.json + safetensors), a folder made by `rest-jax convert` (the same
side files, `params/` and `rest_jax.json`), or a hub id.
"""

import json
import pathlib
import re
import shutil
from typing import Any

from rest_jax.models.hf.config import ConversionError

MANIFEST = "rest_jax.json"
WEIGHT_INDEX = "model.safetensors.index.json"
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
        raise ConversionError(f"{path}: a JSON object is needed, found {type(value).__name__}")
    return value


def write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
    """Indented JSON with a last newline."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def is_converted(folder: pathlib.Path) -> bool:
    """Whether `folder` was made by `rest-jax convert`."""
    return (folder / MANIFEST).is_file()


def find_source(source: str) -> pathlib.Path:
    """The local folder of a model: `source` itself, or the snapshot of a hub id (downloaded when not cached)."""
    path = pathlib.Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ConversionError(f"model {source}: a file; name the folder it lies in")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", source):
        raise ConversionError(f"model {source}: no such folder, and not a hub id (owner/name)")
    return _download(source)


def _download(hub_id: str) -> pathlib.Path:
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise ConversionError(
            f"model {hub_id}: no such folder; hub ids need `pip install huggingface_hub`"
        ) from error
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
