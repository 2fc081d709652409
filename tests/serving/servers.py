"""A stream without a model, and a server over any stream, for the tests of serving."""

import contextlib
import dataclasses
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from rest_jax.data.tokenize import Encoder
from rest_jax.models.tokenizer import Tokenizer
from rest_jax.rollout.requests import Piece, Request, StreamStats
from rest_jax.serving.app import Access
from rest_jax.serving.engine import Engine
from rest_jax.serving.prompts import Served
from rest_jax.serving.server import Options, Server, listen, url
from rest_jax.templates import TEMPLATES


class FakeStream:
    """Draws what `answer` gives for a request, a page of tokens a step for each decode slot."""

    slots, page = 4, 3

    def __init__(self, tokenizer: Tokenizer, seconds: float = 0.0):
        self.tokenizer = tokenizer
        self.stats = StreamStats()
        self._numbers = itertools.count()
        self._waiting: dict[int, Request] = {}
        self.running: dict[int, tuple[Request, list[int]]] = {}
        self.reset(seconds)

    def reset(self, seconds: float = 0.0) -> None:
        """As new, but for what it has counted. `seconds`: of a step."""
        self.answer: Callable[[Request], Sequence[int]] = self._any
        self.failure: Exception | None = None
        self.seconds, self.steps = seconds, 0
        self.seen: list[Request] = []

    @property
    def pending(self) -> int:
        return len(self._waiting) + len(self.running)

    def submit(self, request: Request) -> int:
        self.seen.append(request)
        self.stats.prefilled_tokens += len(request.ids)
        number = next(self._numbers)
        self._waiting[number] = request
        return number

    def cancel(self, number: int) -> None:
        if self.running.pop(number, None) is None:
            del self._waiting[number]

    def step(self) -> list[Piece]:
        time.sleep(self.seconds)
        if self.failure is not None:
            raise self.failure
        self.steps += 1
        while self._waiting and len(self.running) < self.slots:
            number = next(iter(self._waiting))
            request = self._waiting.pop(number)
            drawn = [*self.answer(request), self.tokenizer.end_id]
            self.running[number] = (request, drawn[: request.max_tokens])
        return [self._piece(number) for number in list(self.running)]

    def _piece(self, number: int) -> Piece:
        request, left = self.running[number]
        ids = np.array(left[: self.page], np.int32)
        del left[: self.page]
        self.stats.tokens += len(ids)
        finish = None
        if not left:
            del self.running[number]
            finish = "stop" if ids[-1] == self.tokenizer.end_id else "length"
        logp = (-(ids % 7) / 10).astype(np.float32)
        k = request.top_logprobs
        top = (ids[:, None] + np.arange(k), logp[:, None] - np.arange(k)) if k else None
        return Piece(number, ids, logp, np.ones(len(ids), np.float32), top, finish)

    def _any(self, request: Request) -> list[int]:
        """As many letters as are asked for, by the prompt and the seed."""
        seed = (
            int(request.ids.sum()),
            request.seed % 2**64,
            request.sample,
            request.temperature > 0,
        )
        draws = np.random.default_rng(seed)
        return draws.integers(10, 120, request.max_tokens).tolist()


@contextlib.contextmanager
def serving(
    stream: Any,
    tokenizer: Tokenizer,
    template: str = "hermes",
    most: int = 64,
    drain: float = 5.0,
    **access: Any,
) -> Iterator["Running"]:
    """A server on a free port."""
    encoder = Encoder(tokenizer, TEMPLATES[template])
    served = Served("tiny", encoder, max_prompt_tokens=2048, max_new_tokens=128)
    engine = Engine(stream, most)
    server = Server(served, engine, Options(drain=drain, access=Access(**access)))
    with listen("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield Running(url(listener), engine, server, thread)
        finally:
            server.should_exit = True
            thread.join()


@dataclasses.dataclass
class Running:
    """A server that runs."""

    url: str
    engine: Engine
    server: Server
    thread: threading.Thread

    def until_idle(self, seconds: float = 5.0) -> None:
        """Waits until nothing runs or waits in the engine and in its stream."""
        end = time.monotonic() + seconds
        while self.engine.active or self.engine.stream.pending:
            assert time.monotonic() < end, (self.engine.active, self.engine.stream.pending)
            time.sleep(0.01)
