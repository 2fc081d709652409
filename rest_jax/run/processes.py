"""One process of many: joining the others, seeing that one is lost, and ending with one line.

`join` makes this process one of many. From then on a thread writes a heartbeat into the key-value store of jax's coordination
service, which the first process runs, and reads those of the others: a process whose heartbeat stops, or that says why it
ended, ends them all, since none of them could go on without its share of the devices. `leave` is how a process that fails
tells the others. jax has heartbeats too, but ends in C++ with a stack trace; `stderr_filter` makes one line of that.
"""

import atexit
import contextlib
import os
import re
import subprocess
import sys
import threading
import time
from typing import Any

import jax

from rest_jax.config import DistributedConfig
from rest_jax.errors import RunStopped, UserError
from rest_jax.run.stop import end, say_end

AUTO = "auto"
_WORLD = re.compile(r"(\d+)/(\d+)@([^@\s]+:\d+)")
_VARIABLES = ("JAX_PROCESS_ID", "JAX_NUM_PROCESSES", "JAX_COORDINATOR_ADDRESS")
_SECONDS = 1.0  # between heartbeats
_ALIVE, _ENDED = "rest_jax/alive", "rest_jax/ended"
_DONE = "done"  # the last heartbeat
_FINISH = 5.0  # seconds for a heartbeat under way
_LONGEST_REASON = 500

_peers: "Peers | None" = None


def join(world: str, config: DistributedConfig) -> None:
    """Makes this process one of many, before anything touches a device.

    `world` "I/N@HOST:PORT" says that it is process I (from 0) of N and where the first one listens; "auto" finds out: from
    JAX_PROCESS_ID, JAX_NUM_PROCESSES and JAX_COORDINATOR_ADDRESS if they are set, else jax recognises Cloud TPU, GKE,
    SLURM and Open MPI. UserError when nothing says so, RunStopped when not all have come in time.
    """
    global _peers
    known = _parse(world)
    timeout = config.heartbeat_timeout
    _filter_stderr()
    # Its service takes SIGTERM for itself; a run saves and ends on it.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            **known,
            initialization_timeout=config.initialization_timeout,
            heartbeat_timeout_seconds=timeout,
            shutdown_timeout_seconds=timeout,
        )
    except jax.errors.JaxRuntimeError as error:
        reason = " ".join(str(error).split())[:_LONGEST_REASON]
        raise RunStopped(
            f"--distributed {world}: not all processes have joined within distributed.initialization_timeout "
            f"{config.initialization_timeout} s: {reason}"
        ) from error
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:_LONGEST_REASON]
        raise UserError(
            f"--distributed {world}: {reason}; name the processes, I/N@HOST:PORT, or set {', '.join(_VARIABLES)}"
        ) from error
    if jax.process_count() > 1:
        # Before jax's own heartbeat is missed.
        _peers = Peers(timeout / 2)


def _parse(world: str) -> dict[str, Any]:
    """The arguments of `jax.distributed.initialize` that are known."""
    given = [os.environ.get(name, "") for name in _VARIABLES]
    if world == AUTO:
        if not all(given):
            return {}
        world = f"{given[0]}/{given[1]}@{given[2]}"
    match = _WORLD.fullmatch(world)
    if match is None or int(match[1]) >= int(match[2]):
        raise UserError(
            f"--distributed {world}: neither auto nor I/N@HOST:PORT with I below N, such as 0/4@host0:8476"
        )
    # Neither an address nor numbers are asked of the cluster then.
    return {
        "coordinator_address": match[3],
        "num_processes": int(match[2]),
        "process_id": int(match[1]),
        "cluster_detection_method": "deactivate",
    }


class Peers:
    """The heartbeats of all processes, in a thread of their own. Ends this process when another one is lost for `timeout`
    seconds or has said why it ended.
    """

    def __init__(self, timeout: float):
        # The one way to the store of a running service; Orbax takes it, too.
        from jax._src import distributed

        self.client: Any = distributed.global_state.client
        self.index, self.count, self.timeout = jax.process_index(), jax.process_count(), timeout
        self.seen: dict[str, tuple[str, float]] = {}  # of every process: heartbeat, when it was new
        self.leaving = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="peers", daemon=True)
        self.thread.start()
        # Before jax waits for the others. A thread that is in C++ while Python ends aborts the process.
        atexit.register(self.finish)

    def _watch(self) -> None:
        beat = 0
        while not self.leaving.is_set():
            beat += 1
            try:
                self.client.key_value_set(f"{_ALIVE}/{self.index}", str(beat), allow_overwrite=True)
                fault = self.fault()
            except jax.errors.JaxRuntimeError:
                # The first process is gone, and jax ends this one; or all have left.
                return
            if fault is not None and not self.leaving.is_set():
                end(fault, 1)
            self.leaving.wait(_SECONDS)

    def finish(self) -> None:
        """Ends the heartbeats of a process that is done, and tells the others, who may need longer."""
        self.leaving.set()
        self.thread.join(_FINISH)
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # there is nobody left to tell
            self.client.key_value_set(f"{_ALIVE}/{self.index}", _DONE, allow_overwrite=True)

    def fault(self) -> str | None:
        """Which process is lost, and why as far as it is known; None: all live."""
        now = time.monotonic()
        for key, reason in self.client.key_value_dir_get(_ENDED):
            process = key.rsplit("/", 1)[1]
            if process != str(self.index):
                return f"process {process} of {self.count} ended: {reason}"
        for key, beat in self.client.key_value_dir_get(_ALIVE):
            if beat == _DONE:
                self.seen.pop(key, None)
            elif self.seen.get(key, ("", now))[0] != beat:
                self.seen[key] = (beat, now)
        for key, (_, when) in self.seen.items():
            if now - when > self.timeout:
                process = key.rsplit("/", 1)[1]
                return (
                    f"process {process} of {self.count} is lost: no heartbeat for {self.timeout:.0f} s; "
                    "run the same command on all hosts to resume"
                )
        return None

    def leave(self, reason: str) -> None:
        """Tells the others that this process ends. The first one, whose end takes the store away, waits for them."""
        self.leaving.set()
        try:
            self.client.key_value_set(
                f"{_ENDED}/{self.index}", reason[:_LONGEST_REASON], allow_overwrite=True
            )
            deadline = time.monotonic() + 5 * _SECONDS
            while self.index == 0 and time.monotonic() < deadline:
                time.sleep(_SECONDS)
        except jax.errors.JaxRuntimeError:
            pass  # there is nobody left to tell


def leave(reason: str, code: int) -> None:
    """Says why a process fails, tells the others, and ends it without the wait for them that jax makes at a normal end. Does
    nothing in a process that is alone.
    """
    if _peers is not None:
        say_end(reason)
        _peers.leave(reason)
        end("", code)


def lost_peer(seconds: float | None = None) -> str | None:
    """Why a computation over all processes failed: the text on the process that is lost, once that is known, within
    `seconds` (default: the time-out of heartbeats); None when all live.
    """
    if _peers is None:
        return None
    deadline = time.monotonic() + (_peers.timeout + 5 if seconds is None else seconds)
    while time.monotonic() < deadline:
        try:
            if (fault := _peers.fault()) is not None:
                return fault
        except jax.errors.JaxRuntimeError:
            return "the first process, which coordinates the others, is lost"
        time.sleep(_SECONDS)
    return None


def _filter_stderr() -> None:
    """Lets the stderr of this process, that of C++ code too, run through `stderr_filter`."""
    sys.stderr.flush()
    program = [sys.executable, "-m", "rest_jax.run.stderr_filter"]
    child = subprocess.Popen(program, stdin=subprocess.PIPE, start_new_session=True)
    assert child.stdin is not None
    os.dup2(child.stdin.fileno(), 2)
    child.stdin.close()
