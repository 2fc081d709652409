"""Runs that are killed within a named phase and resumed: each ends as the unbroken one. REST_JAX_PHASES times a phase (1)."""

import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest

from rest_jax.files import as_path
from rest_jax.run.checkpoint import list_steps
from tests.runs import (
    PROGRAMS,
    assert_same,
    environment,
    finish,
    lines,
    recipe,
    start,
    start_command,
    start_processes,
    state,
    write_config,
)

TIMES = int(os.environ.get("REST_JAX_PHASES", "1"))
# A launch makes at least so many calls of each: one rollout, one group's rewards, one mini-batch, ..
PHASES = {"rollout": 8, "reward": 12, "update": 6, "evaluation": 2, "save": 2}
KILLER = str(PROGRAMS / "killed_in_phase.py")


def config_of(model: pathlib.Path, output: pathlib.Path, **changes) -> dict:
    """Steps of two updates and a checkpoint after each, more than the kills take."""
    train = {"steps": 20 * TIMES, "checkpoint_every": 1, "eval_every": 2}
    return recipe(model, output, seed=1, data={"max_prompt_tokens": 128}, train=train, **changes)


@pytest.mark.slow
def test_killed_in_each_phase_and_resumed_is_the_unbroken_run(model, tmp_path, report):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    unbroken = start("train", config_of(model, whole), whole)
    rng, words = np.random.default_rng(0), ["train", write_config(config_of(model, broken), broken)]
    finish(unbroken)
    kills = [phase for phase in PHASES for _ in range(TIMES)]
    for phase in kills:
        number = int(rng.integers(1, PHASES[phase] + 1))
        process = start_program(KILLER, phase, str(number), "0", *words)
        assert "killed" in finish(process, -signal.SIGKILL), (phase, number)
    finish(start_command(*words))
    assert lines(broken / "tiny") == lines(whole / "tiny")
    assert_same(state(broken / "tiny"), state(whole / "tiny"))
    report(
        f"{len(kills)} kills, {TIMES} in each of {', '.join(PHASES)}: the run is equal bit for bit"
    )


@pytest.mark.slow
def test_an_export_that_is_killed_leaves_nothing_under_its_name(model, tmp_path, report):
    out = tmp_path / "out"
    for number in range(1, TIMES + 1):
        process = start_program(KILLER, "export", str(number), "0", "export", str(model), str(out))
        assert "killed" in finish(process, -signal.SIGKILL)
        assert not out.exists()
    finish(start_command("export", str(model), str(out)))
    weights = (out / "model.safetensors").read_bytes()
    assert weights == (model / "model.safetensors").read_bytes()
    report(f"{TIMES} kills within exports: nothing under the name, the same command succeeds")


@pytest.mark.multihost
def test_one_of_two_processes_is_killed_in_each_phase(model, tmp_path, report):
    """The other one ends, and both resume."""
    changes = {"mesh": {"data": 2, "fsdp": 1}, "distributed": {"heartbeat_timeout": 10}}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    for process in start_processes(["train", write_config(config_of(model, whole, **changes), whole)], 2):  # fmt: skip
        finish(process)
    rng = np.random.default_rng(1)
    words = ["train", write_config(config_of(model, broken, **changes), broken)]
    kills = [phase for phase in PHASES for _ in range(TIMES)]
    for phase in kills:
        # the first process writes the manifest
        victim = 0 if phase == "save" else int(rng.integers(0, 2))
        number = int(rng.integers(1, PHASES[phase] // 2 + 1))
        program = (KILLER, phase, str(number), str(victim))
        processes = start_processes(words, 2, program=program)
        assert "killed" in finish(processes[victim], -signal.SIGKILL), (phase, number)
        out, _ = processes[1 - victim].communicate(timeout=400)
        assert processes[1 - victim].returncode != 0, out
        assert "Traceback" not in out, out
    for process in start_processes(words, 2):
        finish(process)
    assert lines(broken / "tiny") == lines(whole / "tiny")
    assert_same(state(broken / "tiny"), state(whole / "tiny"))
    report(f"2 processes, {len(kills)} kills, {TIMES} in each phase: the run is equal bit for bit")


@pytest.mark.multihost
@pytest.mark.parametrize("count", [1, 2, 4])
def test_one_of_four_processes_is_killed_and_so_many_resume(model, tmp_path, count):
    changes = {"mesh": {"data": -1, "fsdp": 1}, "distributed": {"heartbeat_timeout": 10}}
    words = ["train", write_config(config_of(model, tmp_path, **changes), tmp_path)]
    words += ["train.steps=4", "train.prompts_per_update=4"]
    processes = start_processes(words, 4, program=(KILLER, "update", "3", "2"))
    assert "killed" in finish(processes[2], -signal.SIGKILL)
    for i in (0, 1, 3):
        out, _ = processes[i].communicate(timeout=400)
        assert processes[i].returncode != 0 and "Traceback" not in out, out
    saved = list_steps(as_path(tmp_path / "tiny" / "checkpoints"))
    assert saved and max(saved) < 4
    again = [start_command(*words)] if count == 1 else start_processes(words, count)
    out = "".join(map(finish, again))
    assert f"resumes after step {max(saved)}" in out
    steps = [line["step"] for line in lines(tmp_path / "tiny") if "update/loss" in line]
    assert steps == [1, 2, 3, 4]


def start_program(*words: str) -> subprocess.Popen:
    """A program of the tests, with its words."""
    return subprocess.Popen(
        [sys.executable, *words],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
