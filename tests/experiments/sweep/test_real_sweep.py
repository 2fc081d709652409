"""A real sweep of a tiny policy from the command line: killed in the midst of a trial, gone on with by another worker."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from tests.test_train import environment, finish, lines, model, recipe  # noqa: F401


def start(*words: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "rest_jax", *map(str, words)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def children(process: int) -> list[int]:
    listed = pathlib.Path(f"/proc/{process}/task/{process}/children")
    return [int(word) for word in listed.read_text().split()]


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    stat = pathlib.Path(f"/proc/{process}/stat")
    return stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/task").is_dir(), reason="needs Linux's /proc")
def test_a_sweep_killed_and_gone_on_with_is_the_unbroken_one(model, tmp_path):  # noqa: F811
    base, space = tmp_path / "base.yaml", tmp_path / "space.yaml"
    base.write_text(yaml.safe_dump(recipe(model, tmp_path / "runs")))
    alpha = {"choices": [0.1, 0.7]}
    values = {"name": "real", "sampler": "grid", "parameters": {"curriculum.alpha_format": alpha}}
    space.write_text(yaml.safe_dump(values))
    sweep = tmp_path / "runs" / "real"
    first = start("sweep", base, space)
    deadline = time.monotonic() + 400
    while not (sweep / "trial-0000/checkpoints/2").is_dir():
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.05)
    (run,) = children(first.pid)
    first.send_signal(signal.SIGKILL)
    first.wait()
    while alive(run):  # it sees its worker's end of the pipe close
        assert time.monotonic() < deadline
        time.sleep(0.05)
    out = finish(start("sweep", base, space))
    assert "trial 0: goes on" in out and out.count("complete at step 4;") == 2, out
    assert "real, 2 trials: 2 complete" in out
    for name in ("results.csv", "parallel.png", "curves.png"):
        assert (sweep / name).stat().st_size > 100
    # The same trial as an ordinary run that nothing interrupted.
    config = yaml.safe_load((sweep / "logs/trial-0000.yaml").read_text())
    alone = tmp_path / "alone.yaml"
    alone.write_text(yaml.safe_dump(config | {"output": str(tmp_path / "alone")}))
    finish(start("train", alone))
    assert lines(tmp_path / "alone" / "trial-0000") == lines(sweep / "trial-0000")
    assert "eval/reward" in finish(start("report", sweep / "trial-0001"))
    shutil.rmtree(sweep / "trial-0001")  # results come from the study, not from the folders
    assert "2 complete" in finish(start("sweep", base, space, "--results"))
