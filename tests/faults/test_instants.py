"""Runs that are killed or told to stop at seeded instants, again and again, and resumed: each ends as the unbroken one, bit for
bit. Checkpoints that are written when the process is killed: what is left is sound.
"""

import collections
import pathlib
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import numpy as np
import pytest

from rest_jax.errors import UNFINISHED
from rest_jax.run.checkpoint import FOLDER, Checkpoints
from rest_jax.run.folder import EVALUATION
from rest_jax.run.metrics import read_lines
from tests.programs.states import make_state
from tests.runs import (
    PROGRAMS,
    assert_same,
    environment,
    finish,
    lines,
    recipe,
    start,
    start_processes,
    state,
    write_config,
)

# SIGTERM before the run has asked for it, while Python and jax start, ends the process as usual.
ENDS = {
    signal.SIGKILL: {-signal.SIGKILL},
    signal.SIGTERM: {UNFINISHED, -signal.SIGTERM},
}
# Done before it noticed, told by the loss of the second process, jax's abort at the loss of the first (one in some hundred
# crashes while it writes its stack trace), killed.
ENDS_OF_TWO = {0, 1, -signal.SIGABRT, -signal.SIGSEGV, -signal.SIGKILL}


# With staleness 1 a checkpoint has the batch that was sampled ahead.
STALENESS = {
    "staleness 0": {},
    "staleness 1": {"staleness": 1, "recompute_logprobs": True, "tis_cap": 2.0},
    "staleness 1, dynamic sampling": {
        "staleness": 1,
        "recompute_logprobs": True,
        "tis_cap": 2.0,
        "dynamic_sampling": 1,
    },
}


def config_of(model: pathlib.Path, output: pathlib.Path, **changes) -> dict:
    """Twelve steps of two updates, five evaluations, six checkpoints."""
    train = {"steps": 12, "checkpoint_every": 2, "eval_every": 3}
    return recipe(model, output, seed=1, data={"max_prompt_tokens": 128}, train=train, **changes)


class Unbroken(NamedTuple):
    """A run that nothing interrupted."""

    folder: pathlib.Path
    rollout: dict


def assert_equal_runs(run: pathlib.Path, whole: pathlib.Path) -> None:
    """Bit for bit: metrics, samples, tokens and all of the newest checkpoint."""
    assert lines(run) == lines(whole)
    for name in ("samples.jsonl", "tokens.jsonl"):
        assert read_lines(run / name) == read_lines(whole / name)
    ended = state(run)
    # Stopped within its last evaluation: what the last checkpoint says stays true.
    ended[1].pop(EVALUATION, None)
    assert_same(ended, state(whole))


@pytest.fixture(scope="module", params=STALENESS)
def unbroken(model, tmp_path_factory, request) -> Unbroken:
    output, rollout = tmp_path_factory.mktemp("unbroken"), STALENESS[request.param]
    finish(start("train", config_of(model, output, rollout=rollout), output))
    return Unbroken(output / "tiny", rollout)


def count(run: pathlib.Path) -> int:
    """Lines of its metrics."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def await_instant(
    process: subprocess.Popen, run: pathlib.Path, rng: np.random.Generator
) -> float | None:
    """An instant within the start of a process, or up to a second behind one of the next lines of the run. The seconds until the
    first line that is new; None: there was none.
    """
    begun, more = count(run), int(rng.integers(0, 6))
    delay = rng.uniform(0, 1.0 if more else 12.0)
    started, first, due = time.monotonic(), None, None
    while process.poll() is None and (due is None or time.monotonic() < due):
        there, now = count(run), time.monotonic()
        if first is None and there > begun:
            first = now - started
        if due is None and there >= begun + more:
            due = now + delay
        time.sleep(0.01)
    return first


def recovered(seconds: list[float]) -> str:
    """Of launches behind a fault: when the run was further than before."""
    return f"further than before {np.median(seconds or [0]):.0f} s after a launch, at most {max(seconds, default=0):.0f}"


@pytest.mark.slow
@pytest.mark.parametrize("number", ENDS, ids=["SIGKILL", "SIGTERM"])
def test_broken_at_any_instant_and_resumed_is_the_unbroken_run(
    model, unbroken, tmp_path, instants, seed, report, number
):
    whole, rollout = unbroken
    rng = np.random.default_rng([seed, number])
    at: list[int] = []  # lines that there were
    codes = collections.Counter()
    runs, seconds = 0, []
    while len(at) < instants:
        output = tmp_path / str(runs)
        output.mkdir()
        run, code = output / "tiny", None
        while code != 0:
            process = start("train", config_of(model, output, rollout=rollout), output)
            if len(at) < instants:
                first = await_instant(process, run, rng)
                seconds += [first] if first and code is not None else []
                if process.poll() is None:
                    at.append(count(run))
                    process.send_signal(number)
            out, _ = process.communicate(timeout=400)
            code = process.returncode
            codes[code] += 1
            assert code == 0 or code in ENDS[number], out
            assert "Traceback" not in out
        assert_equal_runs(run, whole)
        runs += 1
    written = count(whole)
    inside = [n for n in at if 0 < n < written]
    report(
        f"{number.name}, staleness {rollout.get('staleness', 0)}: {len(at)} instants over {runs} runs, {at.count(0)} before the "
        f"first line, {len(inside)} within the {written} lines ({len(set(inside))} different ones), {at.count(written)} behind "
        f"the last; all runs equal bit for bit; exit codes {dict(sorted(codes.items()))}; {recovered(seconds)}"
    )


@pytest.mark.slow
@pytest.mark.multihost
def test_two_processes_killed_at_any_instant_and_resumed_are_the_unbroken_run(
    model, tmp_path, instants, seed, report
):
    """One of the two, whose loss the other one notices, or both at once."""
    changes = {
        "mesh": {"data": 2, "fsdp": 1},
        "distributed": {"heartbeat_timeout": 10, "initialization_timeout": 60},
    }
    config = write_config(config_of(model, tmp_path, **changes), tmp_path)
    for process in start_processes(["train", config], 2):
        finish(process)
    whole = tmp_path / "tiny"
    rng = np.random.default_rng([seed, 2])
    at: list[int] = []  # lines that there were
    killed = collections.Counter()
    runs, ends, seconds = 0, [], []
    while len(at) < instants:
        output = tmp_path / str(runs)
        output.mkdir()
        run, codes = output / "tiny", []
        while set(codes) != {0}:
            began, alone = time.monotonic(), False
            processes = start_processes(["train", config, f"output={output}"], 2)
            if len(at) < instants:
                first = await_instant(processes[0], run, rng)
                seconds += [first] if first and codes else []
                victims = [[0], [1], [0, 1]][int(rng.integers(3))]
                if all(process.poll() is None for process in processes):
                    at.append(count(run))
                    killed[len(victims)] += 1
                    alone, began = len(victims) == 1, time.monotonic()
                    for i in victims:
                        processes[i].kill()
            codes = []
            for process in processes:
                out, _ = process.communicate(timeout=400)
                codes.append(process.returncode)
                assert "Traceback" not in out, out
                assert process.returncode in ENDS_OF_TWO, out
            if alone:
                ends.append(time.monotonic() - began)
        assert_equal_runs(run, whole)
        runs += 1
    written = count(whole)
    inside = [n for n in at if 0 < n < written]
    report(
        f"2 processes: SIGKILL of one at {killed[1]} instants, of both at {killed[2]}, over {runs} runs: {at.count(0)} before "
        f"the first line, {len(inside)} within the {written} lines ({len(set(inside))} different ones), {at.count(written)} "
        f"behind the last; all runs equal bit for bit; the other one ended within {max(ends, default=0):.0f} s "
        f"(median {np.median(ends or [0]):.0f}); {recovered(seconds)}"
    )


@pytest.mark.slow
def test_killed_within_saves_again_and_again(tmp_path, instants, seed, report):
    """The newest checkpoint is sound after each kill, and the next process continues behind it."""
    rng, steps = np.random.default_rng(seed), [0]
    like = make_state()
    run = tmp_path / "run"
    run.mkdir()
    for _ in range(instants):
        process = subprocess.Popen(
            [sys.executable, str(PROGRAMS / "saves_forever.py"), str(run)],
            env=environment(),
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None and process.stdout.readline() == "saving\n"
        time.sleep(rng.uniform(0, 1.0))
        process.kill()
        process.communicate()
        with Checkpoints(run, keep=2) as checkpoints:
            if checkpoints.latest() is None:
                continue
            found, loader_state, step = checkpoints.restore(like)
        assert_same((found, loader_state, step), (make_state(step), {"seen": step * 10}, step))
        assert step >= steps[-1]
        steps.append(step)
        assert all(path.name.isdigit() for path in (run / FOLDER).iterdir())
    report(f"{instants} kills within {steps[-1]} saves; the newest checkpoint was sound each time")
