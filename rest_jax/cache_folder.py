"""The folder of this package in the user's cache folder: compiled programs, plans, copies of folders of stores.

Standard library only, since every command asks for it before anything else is imported.
"""

import os
import pathlib

from rest_jax.errors import UserError


def user_cache() -> pathlib.Path:
    """Where it is; nothing is made. UserError where the user has neither a home folder nor a cache folder of another name."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return pathlib.Path(base, "rest_jax").expanduser().absolute()
    except RuntimeError as error:
        raise UserError(
            f"{base}: no home folder; set XDG_CACHE_HOME to a folder for caches"
        ) from error
