"""Plans and compiled programs in the user's cache folder. They save time alone: where it cannot be used, each is made anew."""

import functools

from rest_jax.cache_folder import user_cache
from rest_jax.errors import RunStopped, UserError
from rest_jax.files import atomic_write
from rest_jax.texts import warn


def read(name: str) -> bytes | None:
    """What is kept under this name; None where nothing is, or it cannot be read."""
    try:
        return (user_cache() / "plans" / name).read_bytes()
    except (OSError, UserError):
        return None


def write(name: str, content: bytes) -> None:
    """Keeps it under this name. Where that is impossible a process warns of it, once."""
    try:
        folder = user_cache() / "plans"
    except UserError as error:
        return _warn_once(str(error))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / name) as partial:
            partial.write_bytes(content)
    except (OSError, RunStopped) as error:  # RunStopped, of an OSError: the disk is full
        reason = getattr(error.__cause__ or error, "strerror", None) or error
        _warn_once(f"{folder}: {reason}")


@functools.cache
def _warn_once(reason: str) -> None:
    warn(f"plan: what is compiled is not kept: {reason}")
