"""Code of the user's own that a config names: `FILE.py:NAME`, or of a rule `FILE.py` alone, whose `RULE` is meant.

Such a file is read once a process (`read`), so that a run keeps the code that it began with; its SHA-256 is kept in every
checkpoint (`digests`). It is code like any other: whoever names one lets it do whatever the user may do (docs/plugins.md).
Standard library only: the workers of a reward import this module (`rewards/plugin_child.py`), and must start in a moment.
"""

import functools
import hashlib
import pathlib
import sys
import traceback
import types
from typing import Any, NamedTuple

from rest_jax.errors import UserError
from rest_jax.files import local_path

# Keys of a config that name a file.
KEYS = ("reward.plugin", "weights.plugin", "loss.advantage_plugin", "loss.policy_plugin")
RULE = "RULE"


class Source(NamedTuple):
    """A file as it was read, and what is meant in it."""

    path: str
    name: str
    text: bytes

    @property
    def digest(self) -> str:
        """SHA-256, in hex, of the file."""
        return hashlib.sha256(self.text).hexdigest()


def split(word: str) -> tuple[str, str]:
    """(path, name) of a word of a config. ValueError for one that names no Python file."""
    path, _, name = word.rpartition(":") if ".py:" in word else (word, "", RULE)
    if not path.endswith(".py") or not name.isidentifier():
        raise ValueError(f"{word!r}: write it as FILE.py:NAME")
    return path, name


@functools.cache
def read(word: str, key: str) -> Source:
    """The file of a word, as it was when it was first read; `key` opens the message of the UserError where it cannot be."""
    path, name = split(word)
    place = local_path(key, path)
    try:
        return Source(str(place.absolute()), name, place.read_bytes())
    except OSError as error:
        raise UserError(f"{key} {word}: {error.strerror}") from error


def named(config: Any) -> dict[str, str]:
    """The words of a config by the keys that have one."""
    found = {}
    for key in KEYS:
        section, _, name = key.partition(".")
        if (word := getattr(getattr(config, section), name)) is not None:
            found[key] = word
    return found


def check_asked(config: Any, asked: bool, what: str) -> None:
    """UserError for a recorded config that names files, unless their code was asked for."""
    for key, word in named(config).items():
        if not asked:
            raise UserError(
                f"{what}: its config names {key} {word}, which is run if --plugins asks for it"
            )


def digests(config: Any) -> dict[str, str]:
    """The SHA-256 of every file that a config names, by its key. UserError for one that cannot be read."""
    return {key: read(word, key).digest for key, word in named(config).items()}


def load(source: Source) -> Any:
    """What is meant in a file, whose code runs; its folder comes first among those that it imports from. It raises whatever
    the code raises, AttributeError where there is no such name.
    """
    path = pathlib.Path(source.path)
    name = path.stem if path.stem not in sys.modules else f"_{path.stem}_{source.digest[:8]}"
    module = types.ModuleType(name)
    module.__file__ = source.path
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    sys.modules[name] = module  # as dataclasses and pickle need it
    try:
        # Not through an importer: it would take compiled code of the same second for that of this text.
        exec(compile(source.text, source.path, "exec"), vars(module))
        return getattr(module, source.name)
    except BaseException:
        del sys.modules[name]
        raise


def describe(error: BaseException, path: str) -> str:
    """What the code of a file raised, on one line, with the line of the file where it did."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
    if isinstance(error, SyntaxError) and error.filename == path:
        lines = [error.lineno]
    try:
        said = " ".join(str(error).split())[:300]
    except Exception:  # their own class may fail as well
        said = ""
    where = f"line {lines[-1]}: " if lines else ""
    return f"{where}{type(error).__name__}{f': {said}' if said else ''}"
