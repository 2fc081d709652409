"""Two processes over loopback train like one: same metrics, one writer."""

import os
import pathlib
import socket
import subprocess
import sys
import time

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


def test_folders_that_are_not_shared_are_one_line_before_anything_is_loaded(tmp_path):
    """Each process has an output folder of its own, as on hosts without a shared file system."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    begun = time.monotonic()
    processes = []
    for index in range(2):
        # There is no such model: it would be named if it was looked for.
        raw = recipe(tmp_path / "no-model", tmp_path / f"host-{index}")
        raw["mesh"] = {"data": 2, "fsdp": 1}
        folder = tmp_path / str(index)
        folder.mkdir()
        (folder / "config.yaml").write_text(yaml.safe_dump(raw))
        several = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "rest_jax", "train", str(folder / "config.yaml"), "--distributed"],
                env=environment() | several | {"JAX_PROCESS_ID": str(index)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )  # fmt: skip
    for process in processes:
        out = finish(process, 2)
        (line,) = [line for line in out.splitlines() if "error" in line]
        assert "not shared by all processes: process 0" in line and "gs://BUCKET" in line
        assert "compil" not in out and "no-model" not in out
    assert time.monotonic() - begun < 30
