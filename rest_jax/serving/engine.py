"""The thread that owns the stream: requests of all clients are decoded together.

`Engine.sample(requests)` is for the thread of the event loop and gives a `Sampled`, from which the pieces come as they are drawn;
closing it cancels what has not ended, so that its decode slots are free. An answer does not depend on what else runs: its draws
are decided by the seed of its request. When the stream fails, all that wait get `EngineEnded`, and no more is taken.
"""

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from rest_jax.rollout.requests import Piece, Request, StreamStats

_STOP_SECONDS = 60.0
# of a call's time: so long a free decode slot waits for the next request, which would else wait for a call that is almost empty
_PATIENCE = 0.02


class Stream(Protocol):
    """What is needed of `rollout.requests.Stream`."""

    stats: StreamStats

    def submit(self, request: Request) -> int: ...
    def cancel(self, number: int) -> None: ...
    def step(self) -> list[Piece]: ...
    @property
    def pending(self) -> int: ...


class EngineEnded(RuntimeError):
    """No more comes: the stream has failed, or the server ends."""


class QueueFull(RuntimeError):
    """As many requests wait as may wait."""


class Sampled:
    """The pieces of some requests, as they are drawn. A resource of the event loop's thread."""

    def __init__(self, engine: "Engine", count: int):
        self._engine = engine
        self._pieces: asyncio.Queue[tuple[int, Piece] | Exception] = asyncio.Queue()
        self._open = set(range(count))
        self._cancelled: set[int] = set()
        self.begun = time.monotonic()

    async def next(self) -> tuple[int, Piece]:
        """(number of the request, its next piece). EngineEnded when no more will come, ValueError when the stream cannot take a
        request.
        """
        while True:
            got = await self._pieces.get()
            if isinstance(got, Exception):
                raise got
            if got[0] not in self._cancelled:  # else it was drawn before that was known
                return got

    def put(self, got: tuple[int, Piece] | Exception) -> None:
        """What the engine has for it."""
        if isinstance(got, Exception):
            self._pieces.put_nowait(got)
        elif got[0] in self._open:
            self._pieces.put_nowait(got)
            if got[1].finish is not None:
                self._forget(got[0])

    def cancel(self, number: int) -> None:
        """No more pieces of this request, nor those that wait."""
        self._cancelled.add(number)
        if number in self._open:
            self._engine.tell(("cancel", self, number))
            self._forget(number)

    def close(self) -> None:
        """No more pieces of any."""
        for number in list(self._open):
            self.cancel(number)
        self._engine.listening.discard(self)

    def _forget(self, number: int) -> None:
        self._open.discard(number)
        self._engine.active -= 1
        self._engine.seconds = time.monotonic() - self.begun


class Engine:
    """A resource: `start` it in the event loop, `stop` it at the end. `most`: requests that run or wait at once."""

    def __init__(self, stream: Stream, most: int):
        self.stream, self.most = stream, most
        self.active = 0  # requests that run or wait
        self.seconds = 1.0  # that a request took lately
        self.failure: Exception | None = None  # of the stream
        self.ended: str | None = None  # why nothing is taken any more
        # no SimpleQueue: its timed get can wait without end (CPython 3.11)
        self._commands: queue.Queue[tuple[Any, ...]] = queue.Queue()
        self.listening: set[Sampled] = set()  # that are not closed
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self, on_failure: Callable[[], None]) -> None:
        """`on_failure` is called in the event loop's thread."""
        self._loop, self._on_failure = asyncio.get_running_loop(), on_failure
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after the call that is under way; one that hangs is left to the end of the process."""
        self.tell(("stop",))
        self._thread.join(_STOP_SECONDS)

    def sample(self, requests: Sequence[Request]) -> Sampled:
        """EngineEnded, or QueueFull when more than `most` would run or wait."""
        if self.ended is not None:
            raise EngineEnded(self.ended)
        if self.active + len(requests) > self.most:
            raise QueueFull
        sampled = Sampled(self, len(requests))
        self.listening.add(sampled)
        self.active += len(requests)
        for number, request in enumerate(requests):
            self.tell(("submit", sampled, number, request))
        return sampled

    def end(self, why: str) -> None:
        """Nothing is taken any more, and nobody waits any longer."""
        self.ended = why
        for sampled in self.listening:
            sampled.put(EngineEnded(why))

    def tell(self, command: tuple[Any, ...]) -> None:
        """For the engine's thread."""
        self._commands.put(command)

    def _run(self) -> None:
        try:
            self._decode()
        except Exception as error:
            if not self._loop.is_closed():  # else nobody is there any more
                self.failure = error
                self._loop.call_soon_threadsafe(self._failed)

    def _decode(self) -> None:
        numbers: dict[tuple[Sampled, int], int] = {}
        owners: dict[int, tuple[Sampled, int]] = {}
        patience = 0.0
        while True:
            for name, *rest in self._next_commands(patience):
                if name == "stop":
                    return
                owner = (rest[0], rest[1])
                if name == "submit":
                    try:
                        number = self.stream.submit(rest[2])
                    except ValueError as error:
                        self._loop.call_soon_threadsafe(rest[0].put, error)
                        continue
                    numbers[owner], owners[number] = number, owner
                elif owner in numbers:
                    owners.pop(number := numbers.pop(owner))
                    self.stream.cancel(number)
            patience = 0.0
            if self.stream.pending:
                begun = time.monotonic()
                drawn = [(owners[p.request], p) for p in self.stream.step() if p.request in owners]
                for owner, piece in drawn:
                    if piece.finish is not None:
                        owners.pop(numbers.pop(owner))
                        patience = _PATIENCE * (time.monotonic() - begun)
                self._loop.call_soon_threadsafe(self._hand_out, drawn)

    def _next_commands(self, patience: float) -> list[tuple[Any, ...]]:
        """All that come within `patience` seconds; waits for one while nothing is decoded."""
        commands = [] if self.stream.pending else [self._commands.get()]
        until = time.monotonic() + patience
        while True:
            try:
                commands.append(self._commands.get(timeout=max(until - time.monotonic(), 0)))
            except queue.Empty:
                return commands

    def _hand_out(self, drawn: Sequence[tuple[tuple[Sampled, int], Piece]]) -> None:
        for (sampled, number), piece in drawn:
            sampled.put((number, piece))

    def _failed(self) -> None:
        self.end(f"the engine has failed: {self.failure}")
        self._on_failure()
