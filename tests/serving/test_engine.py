"""The engine's thread: which requests it takes in before a call."""

import threading
import types
from typing import Any

import pytest

from rest_jax.serving.engine import Engine
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
