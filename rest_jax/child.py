"""A program in a process of its own, for a package that does not go with this one's, or code that may fail in any way: both sides
send JSON objects, one a line.

    python = find_python(folder, module, install)     the Python of a virtual environment that has the package
    with Child(name, [python, FILE]) as child:        child.send(object); child.receive(block) -> object or None

The program reads its standard input until that ends, and then ends. It answers on its standard output, which it should keep from
the package: `out = os.fdopen(os.dup(1), "w"); os.dup2(2, 1)`. What it writes to standard error is shown when it fails.
"""

import collections
import contextlib
import json
import os
import pathlib
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from rest_jax.errors import RunStopped, UserError
from rest_jax.files import Location, local_path

_TO_END = 10  # seconds a program has once its input has ended,
_APART_TO_END = 0.5  # and one that may do anything
_TO_READ = (
    2  # what it has written, once it has ended; what it has started may hold its outputs for ever
)
_LINES = 20  # of its standard error that are kept
_HAS_MODULE = "import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)"
_ENDED = None  # in the queue: the program has closed its output


def find_python(
    folder: Location | None, module: str, requirement: str, named: str = "--data"
) -> str:
    """The Python of the virtual environment `folder` (without one: the Python that runs this), which has the module. UserError
    when it has not, or is none; it says how to install the requirement, as pip understands it. `named`: what the folder is the
    value of.
    """
    python = sys.executable if folder is None else str(local_path(named, folder) / "bin" / "python")
    place = "this Python" if folder is None else f"{named} {folder}"
    try:
        # Isolated: a folder of that name in the working directory is no package.
        found = subprocess.run([python, "-I", "-c", _HAS_MODULE, module], capture_output=True)
    except OSError:
        place, found = f"{named} {folder}: no virtual environment", None
    if found is None or found.returncode:
        venv = pathlib.Path(module) if folder is None else folder
        lacks = place if found is None else f"{place} has no {module}"
        raise UserError(
            f"{lacks}; make an environment for it with `python -m venv {venv} && {venv}/bin/pip install "
            f"{requirement}`" + (f" and name it with --data {venv}" if folder is None else "")
        )
    return python


class NoAnswer(RunStopped):
    """A program that has not answered in time."""


class Child:
    """A program that runs until it is closed. A resource. RunStopped from every method when it has ended by itself."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str] = {},
        apart: bool = False,
    ):
        """`environment`: variables besides those of this process. `apart`: there are no others, and what the program starts ends
        with it, as a process group.
        """
        self.name, self._apart = name, apart
        self._process = subprocess.Popen(
            list(command),
            env=dict(environment) if apart else {**os.environ, **environment},
            start_new_session=apart,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
        )
        self._received: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._said: collections.deque[str] = collections.deque(maxlen=_LINES)
        self._threads = [
            threading.Thread(target=read, daemon=True) for read in (self._read, self._listen)
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(self, message: Mapping[str, Any]) -> None:
        """Sends one object."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError):
            self._fail()

    def receive(self, block: bool = True, seconds: float = 600) -> dict[str, Any] | None:
        """The next object that the program has sent; without `block` None where there is none yet. NoAnswer after `seconds`."""
        try:
            message = self._received.get(block, seconds)
        except queue.Empty:
            if not block:
                return None
            raise NoAnswer(f"{self.name}: no answer of its process in {seconds:g} s") from None
        if message is _ENDED:
            self._received.put(_ENDED)
            self._fail()
        return message

    def close(self) -> None:
        """Ends the program."""
        process = self._process
        with contextlib.suppress(OSError):
            process.stdin.close()  # type: ignore[union-attr]
        try:
            process.wait(_APART_TO_END if self._apart else _TO_END)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if self._apart:
            self._kill_group()
        for thread in self._threads:
            thread.join(_TO_READ)

    def kill(self) -> None:
        """Ends the program at once, with `apart` all of its group."""
        if self._apart:
            self._kill_group()
        self._process.kill()
        self.close()

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                with contextlib.suppress(ValueError):
                    if isinstance(message := json.loads(line), dict):
                        self._received.put(message)
                        continue
                self._said.append(line)
        self._received.put(_ENDED)

    def _listen(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as lines:
            self._said.extend(lines)

    def _fail(self) -> None:
        self.close()
        said = "".join(self._said).strip().splitlines()
        reason = f": {said[-1]}" if said else ""
        raise RunStopped(
            f"{self.name}: its process ended with exit code {self._process.returncode}{reason}"
        )
