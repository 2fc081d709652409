"""Looking one batch ahead: the loader's batches in its order, and a position that is that of the batches handed out."""

import contextlib
import itertools
import json
import threading

import numpy as np
import pytest

from rest_jax.config import DataConfig
from rest_jax.data.loader import Ahead, Loader, make_loader
from rest_jax.data.tokenize import Prepared
from rest_jax.errors import UserError

SIZE, BATCH, STEPS = 10, 3, 7  # three batches an epoch, and one record left over


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    """Prompts that say which record they are of; the records are but names."""
    rng = np.random.default_rng(0)
    prompts = [np.full(rng.integers(2, 9), 100 + i, np.int32) for i in range(SIZE)]
    records = [f"record {i}" for i in range(SIZE)]
    return Prepared(records=records, prompts=prompts, answers=[], dropped=0, limit=9)


def loader(prepared, steps=STEPS, seed=0) -> Loader:
    return make_loader(
        prepared, batch_prompts=BATCH, seed=seed, pad_id=0, cfg=DataConfig(), num_steps=steps
    )


@pytest.fixture
def ahead(prepared):
    with contextlib.closing(Ahead(loader(prepared))) as made:
        yield made


def rows(batch) -> list[int]:
    return batch.row.tolist()


def rest(ahead: Ahead) -> list[list[int]]:
    """Rows of what is left."""
    found = []
    with contextlib.suppress(StopIteration):
        while True:
            found.append(rows(ahead.take()[0]))
    return found


@pytest.fixture(scope="module")
def unbroken(prepared) -> list[list[int]]:
    """The loader's own order."""
    return [rows(batch) for batch, _ in loader(prepared)]


def test_the_batches_of_the_loader_in_its_order(prepared, ahead):
    plain = list(loader(prepared))
    assert len(plain) == STEPS
    for batch, records in plain:
        found, held = ahead.take()
        for name in ("tokens", "length", "row"):
            np.testing.assert_array_equal(getattr(found, name), getattr(batch, name))
        assert held == records == [f"record {row % SIZE}" for row in batch.row]


def test_the_end(ahead, unbroken):
    assert rest(ahead) == unbroken
    for _ in range(3):
        with pytest.raises(StopIteration):
            ahead.take()


@pytest.mark.parametrize("steps", [1, None])
def test_short_and_endless(prepared, unbroken, steps):
    with contextlib.closing(Ahead(loader(prepared, steps))) as ahead:
        found = [rows(ahead.take()[0]) for _ in range(steps or 9)]
        assert found[:STEPS] == unbroken[: len(found)]
        if steps:
            with pytest.raises(StopIteration):
                ahead.take()


@pytest.mark.parametrize("done", range(STEPS + 1))
def test_resumes_after_what_was_handed_out(prepared, ahead, unbroken, done):
    """Its state is the one the loader has after as many batches, however far the look ahead is."""
    plain = loader(prepared)
    for _ in itertools.islice(plain, done):
        ahead.take()
    state = json.loads(json.dumps(ahead.get_state()))
    assert state == json.loads(json.dumps(plain.get_state()))
    with contextlib.closing(Ahead(loader(prepared))) as again:
        again.set_state(state)
        assert again.get_state() == state
        assert rest(again) == unbroken[done:]
    assert rest(ahead) == unbroken[done:]  # it was only looked at


@pytest.mark.parametrize("to", [0, 2, 5])
@pytest.mark.parametrize("done", [0, 1, 4, STEPS])
def test_another_position_drops_what_was_made_ahead(prepared, ahead, unbroken, done, to):
    plain = loader(prepared)
    for _ in range(to):
        next(plain)
    for _ in range(done):
        ahead.take()
    ahead.set_state(plain.get_state())
    assert ahead.get_state() == plain.get_state()
    assert rest(ahead) == unbroken[to:]


def test_back_from_the_end(ahead, unbroken):
    start = ahead.get_state()
    rest(ahead)
    ahead.set_state(start)
    assert rest(ahead) == unbroken


def test_a_state_of_another_run_is_refused(prepared, ahead):
    state = loader(prepared, seed=9).get_state()
    ahead.take()
    with pytest.raises(UserError, match="saved with seed 9, this run has seed 0"):
        ahead.set_state(state)


class Slow:
    """A loader that says when it is asked, and waits until it may go on."""

    def __init__(self, batches: int):
        self.left, self.asked, self.may = list(range(batches)), [], threading.Semaphore(0)

    def __next__(self):
        self.asked.append(threading.current_thread().name)
        assert self.may.acquire(timeout=20)
        if not self.left:
            raise StopIteration
        return self.left.pop(0), []

    def get_state(self):
        return {"left": len(self.left)}


def test_the_next_batch_is_made_while_the_last_is_used():
    slow = Slow(3)
    with contextlib.closing(Ahead(slow)) as ahead:
        assert (
            ahead.get_state() == {"left": 3} and slow.asked == []
        )  # nothing before it is asked for
        slow.may.release()
        assert ahead.take()[0] == 0
        slow.may.release()  # no take: this one is asked for by itself
        assert ahead._next.result(timeout=20)[0] == 1
        assert ahead.get_state() == {"left": 2}, "made, not handed out"
        assert ahead.take()[0] == 1
        slow.may.release(5)
        assert ahead.take()[0] == 2
        with pytest.raises(StopIteration):
            ahead.take()
    assert all(name.startswith("loader") for name in slow.asked)


def test_what_goes_wrong_in_the_loader_is_raised_where_the_batch_is_taken(prepared):
    class Broken(Slow):
        def __next__(self):
            if len(self.left) == 1:
                raise UserError("row ids would pass 2^31")
            return super().__next__()

    broken = Broken(2)
    broken.may.release(5)
    with contextlib.closing(Ahead(broken)) as ahead:
        assert ahead.take()[0] == 0
        with pytest.raises(UserError, match="row ids"):
            ahead.take()
