"""A run that waits in vain ends: by itself after the time-out, sooner after SIGTERM, always with one line."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from rest_jax.config import DistributedConfig
from rest_jax.errors import UNFINISHED
from rest_jax.run.folder import EVALUATION
from rest_jax.run.metrics import read_lines
from rest_jax.run.stop import SIGTERM_CODE, StopRequest
from tests.runs import PROGRAMS, assert_same, environment, launch, lines, recipe, state

LIMITS = DistributedConfig(save_timeout=100, stop_timeout=10)


def test_a_wait_is_overdue_by_its_own_time_or_by_that_since_the_request(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    stop = StopRequest(LIMITS)
    assert stop.overdue() is None
    with stop.waiting("the save"), stop.waiting("an inner wait"):
        now += 100
        assert stop.overdue() is None
        now += 1
        assert "the save did not end within distributed.save_timeout 100 s" in str(stop.overdue())
    with stop.waiting("the save"):
        now += 50
        stop.receive()
        now += 10
        stop.receive()  # asking again changes nothing
        assert stop.overdue() is None
        now += 1
        assert "SIGTERM: the save did not end within distributed.stop_timeout 10 s" in str(
            stop.overdue()
        )
    assert stop.overdue() is None  # a run that does not wait takes its time to save


def test_sigterm_sets_the_flag_in_the_block_and_all_is_as_before_behind_it():
    stop, before = StopRequest(LIMITS), signal.getsignal(signal.SIGTERM)
    with stop.watched():
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received and stop.agreed()
    assert signal.getsignal(signal.SIGTERM) is before and signal.set_wakeup_fd(-1) == -1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_ctrl_c_and_a_closed_terminal_are_requests_too_unless_they_are_ignored(number):
    stop = StopRequest(LIMITS)
    before = signal.signal(
        number, signal.SIG_IGN
    )  # as under nohup, or in the background of a script
    try:
        with stop.watched():
            os.kill(os.getpid(), number)
            time.sleep(0.01)
            assert not stop.received
        signal.signal(number, signal.SIG_DFL)
        with stop.watched():
            os.kill(os.getpid(), number)
            assert stop.agreed() and stop.name == number.name
    finally:
        signal.signal(number, before)


class Moment:
    """In the place of `StopRequest.check`: a signal at its n-th call. `calls`: how often it was called."""

    def __init__(self, monkeypatch):
        self.calls, self.n = 0, 0
        check = StopRequest.check

        def count(request: StopRequest) -> None:
            self.calls += 1
            if self.calls == self.n:
                os.kill(os.getpid(), signal.SIGTERM)
            check(request)

        monkeypatch.setattr(StopRequest, "check", count)

    def at(self, n: int) -> None:
        self.calls, self.n = 0, n


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "sft"])
def test_stopped_at_any_moment_and_resumed_is_the_unbroken_run(
    model, tmp_path, monkeypatch, capsys, command
):
    raw = recipe(
        model, tmp_path / "unbroken", seed=1,
        data={"max_prompt_tokens": 128}, rollout={"decode_slots": 1},
        train={"checkpoint_every": 3, "max_tokens_per_microbatch": 128},
    )  # fmt: skip
    moment = Moment(monkeypatch)
    assert launch(raw, command=command) == 0
    moments = moment.calls
    raw["output"] = str(tmp_path / "broken")
    capsys.readouterr()
    codes, n = [], 0
    while 0 not in codes:
        n += 1
        moment.at(n)
        codes.append(launch(raw, command=command))
        assert capsys.readouterr().err.count("SIGTERM: ") == (codes[-1] == UNFINISHED)
        assert len(codes) <= moments
    assert set(codes[:-1]) == {UNFINISHED} and len(codes) > 3
    one, other = tmp_path / "broken" / "tiny", tmp_path / "unbroken" / "tiny"
    assert lines(one) == lines(other)
    assert read_lines(one / "samples.jsonl") == read_lines(other / "samples.jsonl")
    broken, unbroken = state(one), state(other)
    # Stopped in its last evaluation a run has saved that it is due; it is made again, and the step is not saved anew.
    broken[1].pop(EVALUATION, None)
    assert_same(broken, unbroken)


def start(*words: object, program: str = "blocked_save.py") -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(PROGRAMS / program), *map(str, words)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end_of(process: subprocess.Popen) -> list[str]:
    """What the program says of its end, which must come within 15 seconds."""
    try:
        out, err = process.communicate(timeout=15)
    finally:
        process.kill()
    assert "ended" not in out
    return [line for line in err.splitlines() if "rest-jax: error" in line]


def test_sigterm_ends_a_wait_in_which_no_python_code_runs():
    process = start(1, program="blocked_in_c.py")
    assert process.stdout is not None and process.stdout.readline() == "saving\n"
    process.send_signal(signal.SIGTERM)
    (line,) = end_of(process)
    assert process.returncode == SIGTERM_CODE and "the mutex did not end" in line


def test_a_second_signal_ends_the_process_at_once():
    process = start(100, program="blocked_in_c.py")
    assert process.stdout is not None and process.stdout.readline() == "saving\n"
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)  # a launcher and a shell pass on the same request
    time.sleep(2.3)
    assert process.poll() is None
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    (line,) = end_of(process)
    assert time.monotonic() - begun < 2 and process.returncode == 130
    assert "SIGINT after SIGTERM: the run ends unsaved" in line


def test_threads_that_end_the_process_together_say_one_reason():
    """The heartbeats' thread and the main thread may find the loss of another process at once."""
    program = """
import sys, threading, time
from rest_jax.run.stop import end, say_end

class Slow:
    def write(self, text):
        time.sleep(0.2)
        sys.__stderr__.write(text)
    def flush(self):
        sys.__stderr__.flush()

sys.stderr, barrier = Slow(), threading.Barrier(3)

def lost():
    barrier.wait()
    end("process 1 of 2 is lost", 1)

for _ in range(2):
    threading.Thread(target=lost, daemon=True).start()
barrier.wait()
say_end("process 1 of 2 is lost")
time.sleep(0.5)  # the others are told
end("", 1)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr == "rest-jax: error: process 1 of 2 is lost\n"


def test_sigterm_ends_a_run_whose_save_hangs(tmp_path):
    process = start(tmp_path, 600, 1)
    assert process.stdout is not None and process.stdout.readline() == "saving\n"
    process.send_signal(signal.SIGTERM)
    (line,) = end_of(process)
    assert process.returncode == SIGTERM_CODE
    assert f"SIGTERM: {tmp_path}/run: the last checkpoint did not end within" in line


@pytest.mark.slow
def test_a_save_that_hangs_ends_the_run_by_itself(tmp_path):
    process = start(tmp_path, 2, 600)
    (line,) = end_of(process)
    assert process.returncode == 1 and "within distributed.save_timeout 2 s" in line


@pytest.mark.multihost
def test_sigterm_ends_all_processes_when_the_save_of_one_hangs(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    processes = [start(tmp_path, 600, 2, address, index, 2) for index in range(2)]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "saving\n"
    for process in processes:
        process.send_signal(signal.SIGTERM)
    for process in processes:
        # the one that ends second may be told by the coordinator that the first is gone
        assert end_of(process) or process.returncode < 0
        assert process.returncode not in (0, None)
    assert SIGTERM_CODE in [process.returncode for process in processes]
