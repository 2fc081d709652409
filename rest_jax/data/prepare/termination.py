"""SIGTERM as an exception, so that a command that writes files removes its half-written ones before it ends."""

import contextlib
import signal
import threading
from collections.abc import Iterator

from rest_jax.run.signals import handled


class Terminated(BaseException):
    """The process was asked to end. No `Exception`: no handler of bad input may take it for one."""


@contextlib.contextmanager
def raised_on_sigterm() -> Iterator[None]:
    """Within the block the first SIGTERM raises `Terminated` and later ones are ignored, so that cleaning up is not cut short.

    The handler of before is set again at the end. Does nothing outside the main thread, where no handler can be set.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated

    with handled(stop, signal.SIGTERM):
        yield
