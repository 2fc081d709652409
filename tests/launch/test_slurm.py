"""launch/slurm.sh: one srun for a run; a job that SLURM ends is queued again once the run has saved, no other is."""

import os
import shlex
import signal
import sys
import time

import pytest
import yaml

from tests.runs import environment, free_port, lines, recipe

SCRIPT = "launch/slurm.sh"
JOB = {"SLURM_JOB_ID": "42"}
RUNNING = ("squeue", [{"out": "RUNNING\n"}])
SRUN = ("srun", [{"run": "words"}])
REQUEUE = ["scontrol", "requeue", "42"]


def test_dry_run(fakes):
    assert fakes.dry_run(SCRIPT, "train", "scale/tiny", "name=a b") == (
        'srun bash -c \'trap "kill -TERM \\$!; wait \\$!; exit 143" TERM; "$0" "$@" & wait $!\''
        " rest-jax train scale/tiny 'name=a b' --distributed auto\n"
    )


def test_the_options_of_the_job(fakes):
    with open(SCRIPT) as file:
        options = [line.split()[1] for line in file if line.startswith("#SBATCH")]
    assert {"--requeue", "--open-mode=append", "--signal=TERM@300"} < set(options)


def test_words_survive(fakes, words):
    fakes.answer(SRUN)
    fakes.run("bash", "-c", fakes.dry_run(SCRIPT, *words))
    fakes.run(SCRIPT, *words, **JOB)
    assert fakes.calls("rest-jax") == [["rest-jax", *words, "--distributed", "auto"]] * 2


@pytest.mark.parametrize("code", [0, 1, 2, 139])
def test_a_run_that_ends_by_itself_is_not_queued_again(fakes, code):
    fakes.answer(SRUN, RUNNING, ("rest-jax", [{"code": code}]))
    fakes.run(SCRIPT, "train", "x", code=code, **JOB)
    assert REQUEUE not in fakes.calls()


def stopped(fakes, *answers, batch: bool) -> list[list[str]]:
    """The calls of a job that gets SIGTERM in its task, or in its batch script."""
    fakes.answer(SRUN, *answers, ("rest-jax", [{"seconds": 60}]))
    script = fakes.start(SCRIPT, "train", "x", **JOB)
    fakes.process("rest-jax", "train")
    os.kill(script.pid if batch else fakes.process("srun"), signal.SIGTERM)
    assert script.wait(30) == 143
    return fakes.calls()


@pytest.mark.parametrize("batch", [False, True])
def test_a_job_that_slurm_ends_is_queued_again(fakes, batch):
    assert stopped(fakes, RUNNING, batch=batch)[2:] == [
        ["rest-jax", "saved"],
        shlex.split("squeue --noheader --jobs=42 --format=%T"),
        REQUEUE,
    ]


def test_a_cancelled_job_is_not_queued_again(fakes):
    calls = stopped(fakes, ("squeue", [{"out": "COMPLETING\n"}]), batch=False)
    assert ["rest-jax", "saved"] in calls and REQUEUE not in calls


def test_a_sweep_gets_no_word_of_other_processes(fakes):
    assert "--distributed" not in fakes.dry_run(SCRIPT, "sweep", "tiny", "--space", "x")


@pytest.mark.slow
def test_the_same_command_finishes_a_run_that_was_stopped(fakes, model, tmp_path):
    """The real program in the task: SIGTERM in its first steps, then again from the start of the script."""
    (fakes.folder / "bin" / "rest-jax").write_text(
        f'#!/bin/sh\nexec {sys.executable} -m rest_jax "$@"\n'
    )
    path = tmp_path / "config.yaml"
    raw = recipe(model, tmp_path, train={"steps": 16, "checkpoint_every": 100, "eval_every": 0})
    path.write_text(yaml.safe_dump(raw | {"mesh": {"data": 1, "fsdp": 1}}))
    alone = {"JAX_PROCESS_ID": "0", "JAX_NUM_PROCESSES": "1"}
    address = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}"}
    used = {name: value for name, value in environment().items() if name not in ("PATH", "HOME")}
    variables = used | JOB | alone | address
    fakes.answer(SRUN, RUNNING)
    job = fakes.start(SCRIPT, "train", str(path), **variables)
    metrics = tmp_path / "tiny" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.is_file() and "update/loss" in metrics.read_text()):
        assert job.poll() is None and time.monotonic() < deadline, job.communicate()
        time.sleep(0.02)
    os.kill(fakes.process("srun"), signal.SIGTERM)
    _, said = job.communicate(timeout=300)
    assert job.returncode == 143 and "SIGTERM: saved at step" in said, said
    assert fakes.calls()[-1] == REQUEUE
    again = fakes.start(SCRIPT, "train", str(path), **variables)
    _, said = again.communicate(timeout=300)
    assert again.returncode == 0, said
    assert fakes.calls().count(REQUEUE) == 1
    steps = [line["step"] for line in lines(tmp_path / "tiny") if "update/loss" in line]
    assert steps == list(range(1, 17))
