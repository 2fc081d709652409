"""What the measurements of a model write: a folder with one JSON file, and pictures beside it."""

import json
import math
import tempfile
from typing import Any

import numpy as np
from etils import epath

from rest_jax.config import Config
from rest_jax.distributed import is_first_process
from rest_jax.errors import UserError
from rest_jax.files import (
    Location,
    as_path,
    atomic_write,
    folder_while_used,
    is_url,
    make_folder,
    store_errors,
)
from rest_jax.run.load import result_place


def plain(value: Any) -> Any:
    """The same with plain lists and numbers, as JSON has them; None for what is not finite."""
    if isinstance(value, dict):
        return {name: plain(v) for name, v in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(v) for v in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value


def in_words(form: str, *values: float) -> str:
    """Of a cell: the values in the form of `str.format`, "-" where one is not known."""
    return "-" if any(map(math.isnan, values)) else form.format(*values)


def check_result_folder(config: Config, output: str | None, name: str) -> None:
    """UserError, before anything is measured, for a `result_folder` that cannot be made or written."""
    folder = result_folder(config, output, name)
    try:
        with store_errors(folder):
            if is_url(folder):
                folder.exists()
            elif is_first_process():  # which writes
                with folder_while_used(folder), tempfile.TemporaryFile(dir=folder):
                    pass
    except OSError as error:
        raise UserError(
            f"output {folder}: cannot be written ({error.strerror}); name a folder that can: --output"
        ) from error


def result_folder(config: Config, output: str | None, name: str) -> epath.Path:
    """`output`; without one, `name` in the folder of the run, for other models in the config's output folder."""
    if output:
        return as_path(output)
    return result_place(config.model.source, name) or as_path(config.output) / name


def write_result(report: dict[str, Any], folder: Location, name: str) -> epath.Path:
    """Writes the JSON file of that name, atomically, over that of an earlier measurement; its path."""
    folder = as_path(folder)
    make_folder(folder)
    with atomic_write(folder / name) as partial:
        text = json.dumps(plain(report), indent=1, allow_nan=False)
        partial.write_text(text + "\n", encoding="utf-8")
    return folder / name
