"""Atomic writing: a file or a folder appears under its name when all of it is written, or not at all."""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator

from rest_jax.errors import UserError


@contextlib.contextmanager
def atomic_write(path: str | pathlib.Path) -> Iterator[pathlib.Path]:
    """A path beside `path` to write a file to. It becomes `path` when the block ends well; when it does not, it is
    removed, and what was there before is untouched. Its name has the process in it: two writers do not meet.
    """
    path = pathlib.Path(path)
    partial = _beside(path)
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | pathlib.Path) -> Iterator[pathlib.Path]:
    """An empty folder beside `path` that becomes `path` when the block ends well, and is removed when it does not.

    Missing parents of `path` are made. UserError when `path` exists and is not an empty folder.
    """
    path = pathlib.Path(os.path.abspath(path))
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"output {path}: exists and is not empty; name a new folder or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _beside(path)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        # An empty folder at `path` is replaced, too.
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _beside(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(f"{path.name}.{os.getpid()}.partial")
