"""Errors that the command line prints as one line: input to be mended (exit code 2), a run that stopped (exit code 1).

A disk that is full is one, too, whoever notices. Everything else that is raised is a defect of the program and keeps its
traceback.
"""

import contextlib
import errno
import os
from collections.abc import Iterator


class UserError(ValueError):
    """Input that cannot be used; the text names the thing, its value and the remedy, on one line."""


class RunStopped(RuntimeError):
    """A run that ended itself because going on would be useless; the text says why and what was saved."""


_FULL = [os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)]
_FULL.append("database or disk is full")  # as SQLite says it


@contextlib.contextmanager
def full_disk(what: object) -> Iterator[None]:
    """Makes one RunStopped, which begins with `what`, of an error that says that a disk, or a quota, is full."""
    try:
        yield
    except (UserError, RunStopped):
        raise
    except Exception as error:  # Python's own, TensorStore's, SQLAlchemy's
        reason = next((text for text in _FULL if text in str(error)), None)
        if reason is None:
            raise
        raise RunStopped(f"{what}: {reason}; make room and run the same command again") from error


UNFINISHED = 75  # exit code of a run that was told to stop and has saved (EX_TEMPFAIL of sysexits.h: try again)
