"""The engine's thread: which requests it takes in before a call."""

import asyncio
import threading
import types
from typing import Any

import numpy as np
import pytest

from rest_jax.rollout.requests import Piece
from rest_jax.serving.engine import Engine, Sampled
from tests.serving.servers import FakeStream


@pytest.mark.parametrize(("patience", "taken"), [(0.0, 1), (1.0, 2)])
def test_a_call_waits_for_requests_that_come_right_after_others(tokenizer, patience, taken):
    engine = Engine(FakeStream(tokenizer), 4)
    engine.tell(("first",))
    late = threading.Timer(0.2, engine.tell, [("second",)])
    late.start()
    assert engine._next_commands(patience) == [("first",), ("second",)][:taken]
    late.join()


def test_what_is_decoded_never_waits_for_the_next_request():
    decoding: Any = types.SimpleNamespace(pending=1)

    def asks() -> None:
        for _ in range(20_000):
            assert not Engine(decoding, 4)._next_commands(1e-6)

    thread = threading.Thread(target=asks, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()


def test_pieces_that_wait_are_dropped_with_their_request(tokenizer):
    """A stop string ends one completion while pieces of it and of another wait to be read."""

    def piece(number: int, finish: str | None = None) -> tuple[int, Piece]:
        drawn = np.ones(1, np.float32)
        return number, Piece(number, np.ones(1, np.int32), drawn, drawn, None, finish)

    async def read() -> list[tuple[int, str | None]]:
        engine = Engine(FakeStream(tokenizer), 4)
        engine.active = 2
        sampled = Sampled(engine, 2)
        for got in (piece(0), piece(0), piece(1), piece(0, "stop"), piece(1, "length")):
            sampled.put(got)
        first = await sampled.next()
        sampled.cancel(0)
        rest = [await sampled.next(), await sampled.next()]
        sampled.cancel(1)
        assert engine.active == 0
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(sampled.next(), 0.05)
        return [(number, drawn.finish) for number, drawn in (first, *rest)]

    assert asyncio.run(read()) == [(0, None), (1, None), (1, "length")]
