"""What the heartbeats of the processes say, with a coordinator's store in memory."""

import threading

import pytest

from rest_jax.errors import UserError
from rest_jax.run import processes
from rest_jax.run.processes import Peers


class Store:
    """The part of the coordination service's client that is used."""

    def __init__(self):
        self.values: dict[str, str] = {}

    def key_value_set(self, key, value, allow_overwrite):
        assert allow_overwrite
        self.values[key] = value

    def key_value_dir_get(self, folder):
        return [(key, value) for key, value in self.values.items() if key.startswith(folder)]


@pytest.fixture
def clock(monkeypatch):
    """Seconds, which a test moves on."""
    now = [100.0]
    monkeypatch.setattr(processes.time, "monotonic", lambda: now[0])
    return now


def peers(store: Store, index: int) -> Peers:
    """Process `index` of two, whose own heartbeat a test writes."""
    made = Peers.__new__(Peers)
    made.client, made.index, made.count, made.timeout = store, index, 2, 30.0
    made.seen, made.leaving = {}, threading.Event()
    made.thread = threading.Thread(target=lambda: None)
    made.thread.start()
    return made


def beat(store: Store, index: int, value: int) -> None:
    store.key_value_set(f"rest_jax/alive/{index}", str(value), allow_overwrite=True)


def test_a_process_is_lost_when_its_heartbeat_stops(clock):
    store = Store()
    first = peers(store, 0)
    for step in range(5):
        beat(store, 0, step)
        beat(store, 1, min(step, 2))
        assert first.fault() is None
        clock[0] += 14
    beat(store, 0, 5)
    fault = first.fault()
    assert fault is not None and "process 1 of 2 is lost: no heartbeat for 30 s" in fault


def test_a_process_that_is_done_is_not_lost(clock):
    store = Store()
    first, second = peers(store, 0), peers(store, 1)
    beat(store, 1, 7)
    assert first.fault() is None
    second.finish()
    assert second.leaving.is_set()
    clock[0] += 1000
    assert first.fault() is None


def test_a_process_says_why_it_ended(clock):
    store = Store()
    first, second = peers(store, 0), peers(store, 1)
    second.leave("data x: no such file")
    assert first.fault() == "process 1 of 2 ended: data x: no such file"
    assert second.fault() is None


@pytest.mark.parametrize("world", ["2/2@host:1", "0/2", "a/b@host:1", "0/2@host"])
def test_a_world_that_is_none(world):
    with pytest.raises(UserError, match=f"--distributed {world}: neither auto nor"):
        processes._parse(world)
    known = processes._parse("1/2@host0:8476")
    assert known["process_id"] == 1 and known["coordinator_address"] == "host0:8476"
