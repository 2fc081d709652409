"""The request to stop (SIGTERM, SIGINT, SIGHUP), and the end of a run that waits in vain: for a save, or for other processes.

The request is looked for (`check`) between the calls of a rollout or an evaluation and between the micro-batches of an update:
what a step has done by then is thrown away, since the step is repeated exactly. Where the loop waits it says so (`waiting`).

A wait is often inside XLA, Orbax or a store's
package, where no Python code of the main thread runs, neither a signal's handler nor an exception. So a thread of this module
watches: it hears of signals through Python's wake-up file descriptor, which is written whatever the main thread does, and ends
the process once a wait has lasted too long.
"""

import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from rest_jax.config import DistributedConfig
from rest_jax.distributed import any_process
from rest_jax.run.environment import handled
from rest_jax.texts import one_line, print_text

SIGTERM_CODE = 128 + signal.SIGTERM
# A signal that was ignored when the program began (nohup, a shell's background job) stays so.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_SAME = 2.0  # seconds in which a launcher and a shell may both pass on one request
_POLL = 0.2  # seconds between looks at a wait
_CLOSE = b"\0"  # no signal has this number


class StopNow(Exception):
    """The request to stop, where the step under way can be thrown away."""


class StopRequest:
    """The request to stop: a flag that a signal sets; the next signal ends the process. A resource of the main thread."""

    def __init__(self, limits: DistributedConfig):
        self.limits = limits
        self.received = False
        self.name = "stop"  # the signal's; of a request that another process received there is none
        self._received_at = float("inf")
        # What the main thread waits for, outermost first, and since when.
        self._waits: list[tuple[str, float]] = []

    def receive(self, number: int = signal.SIGTERM, *_: Any) -> None:
        """Sets the flag."""
        if not self.received:
            self.received, self._received_at = True, time.monotonic()
            self.name = signal.Signals(number).name

    def agreed(self) -> bool:
        """Whether any process received one: all must save together or go on together."""
        with self.waiting("the other processes"):
            return any_process(self.received, self.limits.save_timeout)

    def check(self) -> None:
        """StopNow when any process received one; all of them must call it."""
        if self.agreed():
            raise StopNow(self.name)

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Around what may last: past `save_timeout`, or `stop_timeout` after SIGTERM, the process ends with a line."""
        self._waits.append((what, time.monotonic()))
        try:
            yield
        finally:
            self._waits.pop()

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Within the block a signal sets the flag and waits are watched; afterwards all is as it was."""
        numbers = [n for n in SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        watcher = threading.Thread(target=self._watch, args=(ours,), daemon=True, name="stop")
        with ours, theirs, handled(self.receive, *numbers):
            before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
            watcher.start()
            try:
                yield
            finally:
                signal.set_wakeup_fd(before)
                theirs.send(_CLOSE)
                watcher.join()

    def _watch(self, signals: socket.socket) -> None:
        """Reads the numbers of signals, and looks at the wait in between, until told to close."""
        while True:
            if select.select([signals], [], [], _POLL)[0]:
                numbers = signals.recv(64)
                for number in set(numbers).intersection(SIGNALS):
                    if time.monotonic() - self._received_at > _SAME:
                        end(
                            f"{signal.Signals(number).name} after {self.name}: the run ends unsaved; the same command "
                            "resumes from the last complete checkpoint",
                            128 + number,
                        )
                    self.receive(number)
                if _CLOSE in numbers:
                    return
            if (fault := self.overdue()) is not None:
                end(fault, SIGTERM_CODE if self.received else 1)

    def overdue(self) -> str | None:
        """What has been waited for too long, as a message; None while nothing has."""
        # The main thread may end its wait just now.
        what, since = next(iter(self._waits[:1]), ("", float("inf")))
        now, limits = time.monotonic(), self.limits
        if now - max(since, self._received_at) > limits.stop_timeout:
            return (
                f"{self.name}: {what} did not end within distributed.stop_timeout {limits.stop_timeout} s, so the run ends "
                "unsaved; the same command resumes from the last complete checkpoint"
            )
        if now - since > limits.save_timeout:
            return (
                f"{what} did not end within distributed.save_timeout {limits.save_timeout} s; see to the store and the other "
                "processes, then run the same command to resume from the last complete checkpoint"
            )
        return None


_ending = threading.RLock()  # of the thread that ends the process, for good


def say_end(message: str) -> None:
    """Why the process ends, unless the message is empty. Several threads may find out at once: the first one is heard, and the
    others wait here until it has ended the process.
    """
    _ending.acquire()
    if message:
        print_text(f"rest-jax: error: {one_line(message)}", sys.stderr)


def end(message: str, code: int) -> None:
    """Ends the process at once, without waiting for threads or other processes: there is no other way out of a wait. An empty
    message has been printed before.
    """
    say_end(message)
    sys.stderr.flush()
    sys.stdout.flush()
    os._exit(code)
