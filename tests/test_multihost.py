"""Two processes over loopback train like one: same metrics, one writer."""

import os
import pathlib
import socket
import subprocess
import sys

import pytest
import yaml

from tests.runs import environment, finish, lines, recipe, start

pytestmark = pytest.mark.multihost


def test_two_processes_equal_one(model, tmp_path):
    changes = {"train": {"steps": 2}, "rollout": {"prompts_per_step": 4}}
    finish(start("train", recipe(model, tmp_path / "one", **changes), tmp_path))
    raw = recipe(model, tmp_path / "two", **changes)
    raw["mesh"] = {"data": 2, "fsdp": 1}
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump(raw))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    several = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    words = [sys.executable, "-m", "rest_jax", "train", str(path), "--distributed"]
    processes = [
        subprocess.Popen(
            words,
            env=environment() | several | {"JAX_PROCESS_ID": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    for process in processes:
        finish(process)
    one, two = (lines(pathlib.Path(os.fspath(tmp_path / name / "tiny"))) for name in ("one", "two"))
    assert [line.keys() for line in one] == [line.keys() for line in two]
    for a, b in zip(one, two, strict=True):
        for name in ("update/loss", "reward/mean", "rollout/response_tokens", "eval/reward"):
            if name in a:
                assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-4), name
