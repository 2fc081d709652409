"""Files that appear under their name only when they are whole."""

import contextlib
import os
import pathlib
from collections.abc import Iterator


@contextlib.contextmanager
def atomic_write(path: str | pathlib.Path) -> Iterator[pathlib.Path]:
    """A path beside `path` to write a file to. It becomes `path` when the block ends well; when it does not, it is
    removed, and what was there before is untouched. Its name has the process in it: two writers do not meet.
    """
    path = pathlib.Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
