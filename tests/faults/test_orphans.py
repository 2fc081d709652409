"""What a command has started ends with it, also when it is killed: workers of a sweep, their runs, the compiler of a plan, the
probe of `doctor`.
"""

import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
import yaml

from tests.runs import PROGRAMS, environment

pytestmark = pytest.mark.slow
SECONDS = 5.0  # for all of them to end


def descendants(pid: int) -> set[int]:
    """Every process below this one."""
    found: set[int] = set()
    for path in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, path.read_text().split()):
            found |= {child} | descendants(child)
    return found


def command_of(pid: int) -> str:
    """The words of a process; "" when it is gone or has ended."""
    try:
        return pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except FileNotFoundError:
        return ""


def until(reached: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if reached():
            return True
        time.sleep(0.05)
    return reached()


def sweep(folder: pathlib.Path) -> list[str]:
    """Two workers, each with a run of its own."""
    config, space = folder / "base.yaml", folder / "some.yaml"
    config.write_text(yaml.safe_dump({"output": str(folder), "model": {"source": "nowhere"}}))
    values = {
        "sampler": "grid",
        "overrides": {"train.steps": 400},
        "parameters": {"curriculum.alpha_format": {"choices": [0.1, 0.2, 0.3]}},
    }
    space.write_text(yaml.safe_dump(values))
    return [str(PROGRAMS / "sweep_worker.py"), "fake", str(config), str(space), "2", ""]


def plan(folder: pathlib.Path) -> list[str]:
    return ["-m", "rest_jax", "plan", "scale/tiny", "method/rest", "--topology", "cpu:8", f"output={folder}"]  # fmt: skip


def doctor(folder: pathlib.Path) -> list[str]:
    """Its probe imports a jax that does not come to an end, as one that waits for other hosts."""
    (folder / "jax.py").write_text("import time\ntime.sleep(600)\n")
    return ["-m", "rest_jax", "doctor"]


STARTED = {
    "sweep": (sweep, ["spawn_main", "spawn_main", "fake_train", "fake_train"]),
    "plan": (plan, ["planning.compiler"]),
    "doctor": (doctor, ["jax.local_devices"]),
}


@pytest.mark.skipif(not pathlib.Path("/proc/self/task").is_dir(), reason="needs Linux")
@pytest.mark.parametrize("name", STARTED)
def test_children_of_a_killed_command_end(tmp_path, name):
    make, wanted = STARTED[name]
    words, variables = make(tmp_path), environment()
    process = subprocess.Popen(
        [sys.executable, *words],
        env=variables
        | {
            "FAKE_SECONDS": "1",
            "XDG_CACHE_HOME": str(tmp_path / "cache"),
            "PYTHONPATH": f"{tmp_path}{os.pathsep}{variables['PYTHONPATH']}",
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def all_started() -> bool:
        here = [command_of(pid) for pid in descendants(process.pid)]
        return all(sum(w in text for text in here) >= wanted.count(w) for w in wanted)

    try:
        assert until(all_started, 120)
        children = descendants(process.pid)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    until(lambda: not any(map(command_of, children)), SECONDS)
    left = {pid: command for pid in children if (command := command_of(pid))}
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == {}
