"""Workers over runs without a model: results, pruning, failures, and what is left when workers are killed or stopped."""

import csv
import json
import os
import pathlib
import signal
import time
import unittest.mock
from dataclasses import replace

import optuna
import pytest

from rest_jax.config import load
from rest_jax.errors import RunStopped
from rest_jax.experiments import worker
from rest_jax.experiments.search import sweep
from rest_jax.run.metrics import read_lines

FAIL = optuna.trial.TrialState.FAIL


def table(folder: pathlib.Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(autouse=True)
def draw_nothing(request, monkeypatch):
    """Optuna's pictures take seconds: only the test that asks for them draws them."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr("rest_jax.experiments.search._plot", lambda *_: None)


@pytest.fixture
def drawn():
    """Pictures are drawn."""


def test_each_trial_is_an_ordinary_run_and_fails_alone(recipe, write_space, engine, capsys, drawn):
    parameters = {
        "curriculum.alpha_format": {"choices": [0.1, 0.2]},
        "curriculum.alpha_think": {"choices": [0.5, 9.0]},
        "weights.w_max": {"choices": [4.0, 0.01]},
    }
    folder = sweep([recipe], [], write_space(parameters=parameters), engine=engine)
    rows = table(folder)
    states = [row["state"] for row in rows]
    assert [states.count(s) for s in ("complete", "failed", "invalid")] == [2, 2, 4]
    for row in rows:
        run = folder / row["trial"]
        if row["state"] == "complete":
            assert float(row["eval/reward"]) == 8 * float(row["curriculum.alpha_format"])
            assert read_lines(run / "metrics.jsonl")[-1]["step"] == 8
        if row["state"] == "invalid":
            assert "w_min 0.02 is above w_max 0.01" in row["reason"] and not run.exists()
        if row["state"] == "failed":
            assert "exit code 1: step 1: not finite (log: " in row["reason"]
    shown = capsys.readouterr().out
    assert "best: trial-" in shown
    assert shown.count("exit code 1: step 1: not finite") == 4  # when it happens, and in the table
    for name in ("curves", "history", "parallel"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    # Nothing is left to do, and failed trials are not tried again.
    again = sweep([recipe], [], write_space(parameters=parameters), engine=engine)
    assert table(again) == rows


def test_a_sweep_of_failures_says_so(recipe, write_space, engine):
    space = write_space(parameters={"curriculum.alpha_think": {"choices": [9.0]}})
    with pytest.raises(RunStopped, match="all 1 trials failed; the first: exit code 1: step 1"):
        sweep([recipe], [], space, engine=engine)


def test_successive_halving_stops_and_saves(recipe, write_space, engine, steps, monkeypatch):
    monkeypatch.setenv("FAKE_SECONDS", "0.1")
    space = write_space(
        pruner={"successive_halving": {"min_resource": 2, "reduction_factor": 2}},
        parameters={"curriculum.alpha_format": {"choices": [0.9, 0.1, 0.2, 0.3]}},
    )
    folder = sweep([recipe], [], space, engine=engine)
    rows = {float(row["curriculum.alpha_format"]): row for row in table(folder)}
    assert rows[0.9]["state"] == "complete"
    pruned = [row for row in rows.values() if row["state"] == "pruned"]
    assert pruned and all(row["reason"].startswith("pruned at step ") for row in pruned)
    for row in pruned:
        reached = steps(folder / row["trial"])
        assert 2 <= len(reached) < 8
        assert int((folder / row["trial"] / "checkpoint.txt").read_text()) == reached[-1]


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_the_trial_of_a_lost_worker_resumes_in_its_folder(
    recipe, write_space, tmp_path, start, steps, until, how
):
    parameters = {"curriculum.alpha_format": {"choices": [0.1, 0.2]}}
    space, folder = write_space(parameters=parameters), tmp_path / "runs/some"
    first, trial = start(recipe, space, 0.15), folder / "trial-0000"
    until(lambda: len(steps(trial)) >= 5)
    first.send_signal(how)
    out, _ = first.communicate(timeout=60)
    time.sleep(0.3)
    trained = steps(trial)
    assert 5 <= len(trained) < 8  # the run ended with its worker
    if how == signal.SIGTERM:
        assert first.returncode == 0 and "stopped and saved; free for any worker" in out
    second = start(recipe, space, 0.0)
    out, _ = second.communicate(timeout=120)
    assert second.returncode == 0 and "trial-0000: resumes " in out, out
    saved = {signal.SIGKILL: 3, signal.SIGTERM: len(trained)}[how]
    assert steps(trial) == [*trained, *range(saved + 1, 9)]
    found = [(row["state"], row["attempts"]) for row in table(folder)]
    assert found == [("complete", "2"), ("complete", "1")]
    held = [line["step"] for line in read_lines(trial / "metrics.jsonl") if "eval/reward" in line]
    assert held == [0, 2, 4, 6, 8]


@pytest.mark.slow
def test_two_workers_share_a_sweep(recipe, write_space, tmp_path, start, steps):
    choices = [i / 10 for i in range(1, 5)]
    space = write_space(parameters={"curriculum.alpha_format": {"choices": choices}})
    process = start(recipe, space, 0.02, workers=2)
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 0 and out.count("complete at step 8;") == 4, out
    rows = table(tmp_path / "runs/some")
    assert sorted(float(row["curriculum.alpha_format"]) for row in rows) == choices
    assert {(row["state"], row["attempts"]) for row in rows} == {("complete", "1")}
    for row in rows:
        assert steps(tmp_path / "runs/some" / row["trial"]) == list(range(1, 9))


def test_a_run_stopped_from_outside_is_taken_again(
    recipe, write_space, tmp_path, start, steps, until, children
):
    space = write_space(parameters={"curriculum.alpha_format": {"choices": [0.1]}})
    process, trial = start(recipe, space, 0.1), tmp_path / "runs/some/trial-0000"
    until(lambda: len(steps(trial)) >= 3)
    (run,) = children(process.pid)
    os.kill(run, signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "its run was stopped; free for any worker" in out, out
    assert steps(trial) == list(range(1, 9))


def test_a_worker_whose_trial_was_taken_away_kills_its_run(
    recipe, write_space, engine, steps, monkeypatch
):
    """As when it slept so long that others took it for dead: two runs never train in one folder."""
    monkeypatch.setenv("FAKE_SECONDS", "0.2")
    real, begun = worker._running, []

    def taken_by_others(words, log):
        if not begun:
            url = f"sqlite:///{log.parents[1] / 'study.db'}"
            optuna.load_study(study_name="some", storage=url).tell(0, state=FAIL)
        begun.append(words)
        return real(words, log)

    monkeypatch.setattr(worker, "_running", taken_by_others)
    space = write_space(parameters={"curriculum.alpha_format": {"choices": [0.1]}})
    folder = sweep([recipe], [], space, engine=engine, name="some")
    (row,) = table(folder)
    assert (row["state"], row["attempts"], len(begun)) == ("complete", "2", 2)
    assert steps(folder / "trial-0000") == list(range(1, 9))


@pytest.mark.slow
def test_a_run_that_is_refused_names_its_last_line(recipe, write_space, engine):
    """The real program of a trial, for a model that does not exist."""
    real = replace(engine, program=worker.Engine().program)
    space = write_space(parameters={"curriculum.alpha_format": {"choices": [0.1]}})
    with pytest.raises(RunStopped, match=r"exit code 2: .*nowhere"):
        sweep([recipe], [], space, engine=real)


@pytest.mark.parametrize(
    ("listed", "workers", "index", "own"),
    [("0,1,4,5", 2, 1, "1,5"), ("0,1,4", 2, 0, "0,4"), ("3", 2, 1, "3"), ("", 2, 1, "")],
)
def test_gpus_are_shared(monkeypatch, engine, listed, workers, index, own):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: None)
    monkeypatch.setattr(worker, "Worker", unittest.mock.MagicMock())
    worker._work_on_share(worker.Worker(), replace(engine, workers=workers), index)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == own


def test_last_words_of_a_process(tmp_path):
    log = tmp_path / "log"
    log.write_text("step 1\nrest-jax: error: too large\nWARNING: bye\n\n")
    assert worker.how_it_failed(2, log) == f"exit code 2: too large (log: {log})"
    log.write_text(
        "Traceback:\nKeyError: 'a rule'\n-----\nFor simplicity, JAX has removed its frames.\n"
    )
    assert worker.how_it_failed(1, log) == f"exit code 1: KeyError: 'a rule' (log: {log})"
    log.write_text("")
    assert worker.how_it_failed(-9, log) == f"killed by signal 9: no output (log: {log})"


def test_what_a_run_has_written_is_parsed_once(tmp_path, monkeypatch):
    config = load([], [f"output={tmp_path}", "name=r", "model.source=m"])
    parsed, parse = [], worker.parse_lines
    monkeypatch.setattr(
        worker, "parse_lines", lambda path, lines, first: parsed.append((first, len(lines))) or parse(path, lines, first)
    )  # fmt: skip
    evaluations, lines = worker.Evaluations(config, "eval/exact"), []

    def read(*steps: int, kept: int | None = None, half: str = "") -> dict[int, float]:
        lines[kept:] = [json.dumps({"step": n, "eval/exact": n / 8} if n % 2 == 0 else {"step": n}) for n in steps]  # fmt: skip
        path.write_text("".join(f"{line}\n" for line in lines) + half)
        return evaluations.read()

    assert evaluations.read() == {}
    config.folder.mkdir()
    path = pathlib.Path(config.folder / "metrics.jsonl")
    assert read(half='{"ste') == {}
    assert read(0, 1, 2, kept=9) == {0: 0.0, 2: 0.25}
    assert read(3, 4, kept=9, half='{"step": 5') == {0: 0.0, 2: 0.25, 4: 0.5}
    assert parsed == [(1, 0), (1, 3), (4, 2)]
    # cut by a run that resumes, and shorter, or as long as before and longer by now
    assert read(kept=2) == {0: 0.0}
    assert read(2, 3, 4, 5, 6, kept=1) == {0: 0.0, 2: 0.25, 4: 0.5, 6: 0.75}
    assert read(kept=9) == {0: 0.0, 2: 0.25, 4: 0.5, 6: 0.75}
    assert parsed[3:] == [(1, 2), (1, 6), (7, 0)]


def test_what_a_power_cut_has_torn_ends_what_is_read_until_the_run_has_dropped_it(tmp_path):
    config = load([], [f"output={tmp_path}", "name=r", "model.source=m"])
    evaluations = worker.Evaluations(config, "eval/exact")
    config.folder.mkdir()
    path = pathlib.Path(config.folder / "metrics.jsonl")
    first, later = (json.dumps({"step": n, "eval/exact": n / 8}) + "\n" for n in (2, 4))
    path.write_text(first + "\0" * 20 + "\n" + later)
    for _ in range(2):
        assert evaluations.read() == {2: 0.25}
    path.write_text(first)  # by the run that resumes
    assert evaluations.read() == {2: 0.25}
    path.write_text(first + later)
    assert evaluations.read() == {2: 0.25, 4: 0.5}
