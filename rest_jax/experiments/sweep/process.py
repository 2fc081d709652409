"""Processes of a sweep: that of one trial, held by its worker, and several workers on this machine."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rest_jax import config as config_lib
from rest_jax.config import Config
from rest_jax.errors import UserError
from rest_jax.run.signals import handled

Command = Callable[[pathlib.Path], list[str]]


def child_command(config: pathlib.Path) -> list[str]:
    """The process that trains a trial."""
    return [sys.executable, "-m", "rest_jax.experiments.sweep.child", str(config)]


@contextlib.contextmanager
def running(
    command: Command, config: Config, log: pathlib.Path
) -> Iterator[subprocess.Popen[bytes]]:
    """The trial's process, its output appended to `log`; killed if it still runs when the block is left."""
    log.parent.mkdir(parents=True, exist_ok=True)
    path = log.with_suffix(".yaml")
    path.write_text(config_lib.dump(config))
    with log.open("ab") as out:
        process = subprocess.Popen(
            command(path),
            stdin=subprocess.PIPE,  # closed by our death
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is ours to pass on
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        assert process.stdin is not None
        process.stdin.close()


def how_it_failed(code: int, log: pathlib.Path) -> str:
    """Exit code and last words of a process."""
    lines = log.read_text(errors="replace").splitlines()[-200:]
    errors = [line for line in lines if line.startswith("rest-jax: error: ")]
    last = errors[-1:] or [line for line in lines if line.strip()][-1:] or ["no output"]
    ended = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    return f"{ended}: {last[0].removeprefix('rest-jax: error: ')[:300]} (log: {log})"


def local_workers(count: int, words: Sequence[str]) -> int:
    """Runs `rest-jax sweep <words>` in `count` processes; the greatest exit code. SIGTERM goes to all of them.

    GPUs listed in CUDA_VISIBLE_DEVICES are dealt out evenly. UserError when they cannot be.
    """
    dealt = environments(count)
    command = [sys.executable, "-m", "rest_jax", "sweep", *words]
    processes = [subprocess.Popen(command, env=e, start_new_session=True) for e in dealt]

    def forward(number: int, _: Any) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    with handled(forward, signal.SIGTERM, signal.SIGINT):
        return max(abs(process.wait()) for process in processes)


def environments(count: int) -> list[dict[str, str]]:
    """The environment of each worker."""
    listed = [d for d in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if d.strip()]
    if not listed:
        return [dict(os.environ) for _ in range(count)]
    if len(listed) % count:
        raise UserError(
            f"--workers {count}: the {len(listed)} GPUs of CUDA_VISIBLE_DEVICES cannot be dealt out evenly"
        )
    share = len(listed) // count
    parts = [listed[i * share : (i + 1) * share] for i in range(count)]
    return [os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(part)} for part in parts]
