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
# What is killed, and at which calls of it, from 1: a launch makes as many at least. Two processes share rollouts and rewards. A
# step has two mini-batches.
PHASES = {
    "rollout": ("rollout", range(1, 9)),
    "reward": ("reward", range(1, 13)),
    "first mini-batch": ("update", (1, 3, 5)),
    "second mini-batch": ("update", (2, 4, 6)),
    "evaluation": ("evaluation", (1, 2)),
    "save": ("save", (1, 2)),
    "end of a save": ("manifest", (1, 2)),
}
KILLER = str(PROGRAMS / "killed_in_phase.py")


def config_of(model: pathlib.Path, output: pathlib.Path, **changes) -> dict:
    """Steps of two updates and a checkpoint after each, more than the kills take."""
    train = {"steps": 24 * TIMES, "checkpoint_every": 1, "eval_every": 2}
    return recipe(model, output, seed=1, data={"max_prompt_tokens": 128}, train=train, **changes)


@pytest.mark.slow
def test_killed_in_each_phase_and_resumed_is_the_unbroken_run(model, tmp_path, report):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    unbroken = start("train", config_of(model, whole), whole)
    rng, words = np.random.default_rng(0), ["train", write_config(config_of(model, broken), broken)]
    finish(unbroken)
    kills = [PHASES[phase] for phase in PHASES for _ in range(TIMES)]
    for phase, numbers in kills:
        number = int(rng.choice(numbers))
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
    kills = [PHASES[phase] for phase in PHASES for _ in range(TIMES)]
    for i, (phase, numbers) in enumerate(kills):
        victim = 0 if phase == "manifest" else i % 2
        shared = phase in ("rollout", "reward")
        number = int(rng.choice([n for n in numbers if not shared or n <= max(numbers) // 2]))
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
def test_an_export_of_two_processes_that_is_killed_leaves_nothing_under_its_name(
    model, tmp_path, report
):
    out = tmp_path / "out"
    words = ["export", str(model), str(out)]
    for number in range(1, TIMES + 1):
        processes = start_processes(words, 2, program=(KILLER, "export", str(number), "0"))
        assert "killed" in finish(processes[0], -signal.SIGKILL)
        said, _ = processes[1].communicate(timeout=400)
        assert processes[1].returncode != 0 and "Traceback" not in said, said
        assert not out.exists()
    for process in start_processes(words, 2):
        finish(process)
    weights = (out / "model.safetensors").read_bytes()
    assert weights == (model / "model.safetensors").read_bytes()
    report(f"2 processes, {TIMES} kills within exports: nothing under the name")


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
