"""A config, spaces and an engine whose runs need no model, for the tests of experiments."""

import os
import pathlib
import subprocess
import sys
import time

import pytest
import yaml

from rest_jax.experiments.worker import Engine

PROGRAMS = pathlib.Path(__file__).parents[1] / "programs"
OVERRIDES = {"train.steps": 8, "train.eval_every": 2, "train.checkpoint_every": 3}


@pytest.fixture(autouse=True)
def found_by_programs(monkeypatch):
    """The programs that tests start import this working tree."""
    monkeypatch.setenv("PYTHONPATH", str(PROGRAMS.parents[1]))


@pytest.fixture
def recipe(tmp_path) -> str:
    """A config file whose runs go to tmp_path/runs."""
    path = tmp_path / "base.yaml"
    path.write_text(f"output: {tmp_path / 'runs'}\nmodel:\n  source: nowhere\n")
    return str(path)


@pytest.fixture
def write_space(tmp_path):
    """Writes a space file with a grid of three points, with changes; its path."""

    def write(**values) -> str:
        space = {
            "sampler": "grid",
            "overrides": OVERRIDES,
            "parameters": {"curriculum.alpha_format": {"choices": [0.1, 0.2, 0.3]}},
        }
        path = tmp_path / "some.yaml"
        path.write_text(yaml.safe_dump(space | values, sort_keys=False))
        return str(path)

    return write


@pytest.fixture
def engine() -> Engine:
    """One worker over runs without a model."""
    program = (sys.executable, str(PROGRAMS / "fake_train.py"))
    return Engine(heartbeat=1, poll=0.02, program=program)


@pytest.fixture
def start():
    """Starts a sweep, of fake runs unless asked, as a process of its own."""

    def begin(recipe, space, seconds=0.0, workers=1, url="", kind="fake") -> subprocess.Popen:
        words = [PROGRAMS / "sweep_worker.py", kind, recipe, space, workers, url]
        return subprocess.Popen(
            [sys.executable, *map(str, words)],
            env=os.environ | {"FAKE_SECONDS": str(seconds)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return begin


@pytest.fixture
def steps():
    """The steps that a fake run trained, in order."""

    def read(folder: pathlib.Path) -> list[int]:
        path = folder / "steps.txt"
        return [int(line) for line in path.read_text().split()] if path.is_file() else []

    return read


@pytest.fixture
def until():
    """Waits for a condition."""

    def wait(condition, seconds: float = 120.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "did not happen in time"
            time.sleep(0.02)

    return wait


@pytest.fixture
def children():
    """The child processes of a process, by Linux."""

    def read(process: int) -> list[int]:
        listed = pathlib.Path(f"/proc/{process}/task/{process}/children")
        if not listed.is_file():
            pytest.skip("needs Linux's /proc")
        return [int(word) for word in listed.read_text().split()]

    return read
