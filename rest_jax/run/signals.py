"""SIGTERM and Ctrl-C: a handler for the length of a block, and a request to stop that a loop reads once a step."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def handled(handler: Callable[[int, Any], Any], *numbers: int) -> Iterator[None]:
    """Within the block `handler` (number, frame) gets these signals; afterwards the earlier handlers do. Main thread only."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)


class StopRequest:
    """Turns signals into a flag: what the loop reads is what it acts on. A context manager; SIGTERM unless others are named."""

    def __init__(self, *numbers: int):
        self.received = False
        self._handled = handled(self._receive, *(numbers or (signal.SIGTERM,)))

    def _receive(self, *_: Any) -> None:
        self.received = True

    def __enter__(self) -> "StopRequest":
        self._handled.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._handled.__exit__(None, None, None)

    def agreed(self) -> bool:
        """Whether any process received one: all must save together or go on together."""
        # Commands that only read the flag need no jax.
        from rest_jax.distributed import any_process

        return any_process(self.received)
