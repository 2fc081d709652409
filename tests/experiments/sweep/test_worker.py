"""Workers over runs without a model: results, pruning, refusals, and what is left when workers are killed or stopped."""

import csv
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from rest_jax import cli
from rest_jax.errors import RunStopped, UserError
from rest_jax.experiments.sweep import command, points, process, queue, study
from rest_jax.experiments.sweep.worker import Worker, work
from rest_jax.run.metrics import read_lines
from tests.experiments.sweep.fake_worker import fake_command

HERE = pathlib.Path(__file__).parent
LOST = (
    "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"  # as when a run is ended from outside
)
ALPHA = {"curriculum.alpha_format": {"choices": [0.1, 0.2, 0.3]}}


def worker_of(space, shared, **options) -> Worker:
    opened = study.open_study(space, shared, None)
    return Worker(space, shared, opened, command=fake_command, poll=0.02, **options)


def ended(worker: Worker) -> dict[int, dict]:
    newest = queue.current(worker.study.get_trials())
    return {slot: trial.user_attrs[queue.ENDED] for slot, trial in newest.items()}


def test_every_trial_is_an_ordinary_run_and_fails_for_itself_alone(make, tmp_path):
    parameters = ALPHA | {"curriculum.alpha_think": {"choices": [0.5, 9.0]}}
    parameters |= {"weights.w_max": {"choices": [4.0, 0.05]}}
    worker = worker_of(*make(sampler="grid", parameters=parameters))
    assert work(worker) == 12
    states = [found["state"] for found in ended(worker).values()]
    assert [states.count(s) for s in ("complete", "failed", "invalid")] == [3, 3, 6]
    for slot, trial in queue.current(worker.study.get_trials()).items():
        found, folder = ended(worker)[slot], worker.folder / f"trial-{slot:04d}"
        if found["state"] == "complete":
            assert trial.value == pytest.approx(8 * trial.params["curriculum.alpha_format"])
            assert read_lines(folder / "metrics.jsonl")[-1]["step"] == 8
        if found["state"] == "invalid":
            assert "w_min 0.1 is above w_max 0.05" in found["reason"] and not folder.exists()
        if found["state"] == "failed":
            assert "exit code 1: step 1: not finite" in found["reason"]
    assert work(worker_of(worker.space, worker.shared)) == 0


def test_successive_halving_stops_and_saves_the_worse_half(make, monkeypatch):
    monkeypatch.setenv("FAKE_SECONDS", "0.1")
    halving = {"successive_halving": {"min_steps": 2, "reduction_factor": 2}}
    values = [0.9, 0.1, 0.2, 0.3]
    parameters = {"curriculum.alpha_format": {"choices": values}}
    worker = worker_of(*make(sampler="grid", parameters=parameters, pruner=halving))
    order = [point["curriculum.alpha_format"] for point in worker.space.grid()]
    assert work(worker) == 4
    reached = {}
    for slot, trial in queue.current(worker.study.get_trials()).items():
        folder = worker.folder / f"trial-{slot:04d}"
        reached[order[slot]] = int((folder / "checkpoint.txt").read_text())
        if ended(worker)[slot]["state"] == "pruned":
            assert trial.state.name == "PRUNED" and 2 <= reached[order[slot]] < 8
            assert ended(worker)[slot]["reason"].startswith("pruned at step ")
    assert reached[0.9] == 8
    assert sum(step < 8 for step in reached.values()) >= 1  # the seed's order decides how many


def test_the_value_may_be_the_best_of_a_run(make):
    falling = {"curriculum.alpha_format": {"choices": [0.25]}}
    space, shared = make(sampler="grid", parameters=falling, direction="minimize", value="best")
    worker = worker_of(space, shared)
    work(worker)
    assert [t.value for t in worker.study.get_trials()] == [0.0]  # step 0


def start(recipe, space, tmp_path, seconds: float, stale: float = 30.0) -> subprocess.Popen:
    words = [HERE / "fake_worker.py", recipe, space, tmp_path / "runs", stale]
    environment = os.environ | {"FAKE_SECONDS": str(seconds)}
    environment["PYTHONPATH"] = str(pathlib.Path(cli.__file__).parent.parent)
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def until(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.02)


def steps(folder: pathlib.Path) -> list[int]:
    path = folder / "steps.txt"
    return [int(line) for line in path.read_text().split()] if path.is_file() else []


def results(tmp_path) -> list[dict[str, str]]:
    with (tmp_path / "runs" / "some" / "results.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_workers_trial_goes_on_in_its_folder(recipe, write_space, tmp_path, how):
    space = write_space(sampler="grid", parameters=ALPHA)
    first, trial = start(recipe, space, tmp_path, 0.15), tmp_path / "runs/some/trial-0000"
    until(lambda: len(steps(trial)) >= 5)
    first.send_signal(how)
    out, _ = first.communicate(timeout=60)
    time.sleep(0.5)
    trained = steps(trial)
    assert 5 <= len(trained) < 8  # the run ended with its worker
    if how == signal.SIGTERM:
        assert first.returncode == 0 and "stopped and saved; free for any worker" in out
    # The values of the trial are tried to the end exactly once, from the checkpoint: step 3, or where SIGTERM saved.
    second = start(recipe, space, tmp_path, 0.0)
    out, _ = second.communicate(timeout=120)
    assert second.returncode == 0, out
    assert "trial 0: goes on: " in out
    resumed = {signal.SIGKILL: 3, signal.SIGTERM: len(trained)}[how]
    assert steps(trial) == [*trained, *range(resumed + 1, 9)]
    found = results(tmp_path)
    assert [row["state"] for row in found] == ["complete"] * 3
    assert [row["attempts"] for row in found] == ["2", "1", "1"]
    assert sorted(row["curriculum.alpha_format"] for row in found) == ["0.1", "0.2", "0.3"]
    assert [line["step"] for line in read_lines(trial / "metrics.jsonl") if "eval/reward" in line] == [0, 2, 4, 6, 8]  # fmt: skip


def test_a_worker_far_away_waits_for_the_beats_to_age(make):
    """A trial whose worker was on another machine: nothing can look its process up."""
    worker = worker_of(*make(sampler="grid", trials=1, parameters=ALPHA), stale=1.0)
    trial, _ = queue.take(worker.study, worker.space)
    trial.set_user_attr(queue.BEAT, {"time": time.time(), "worker": "far:x:1", "seconds": 7.0})
    begun = time.monotonic()
    assert work(worker) == 1
    assert time.monotonic() - begun > 0.9
    assert queue.attempts_seconds(worker.study.get_trials())[0] > 7.0


@pytest.mark.parametrize("stale", [1.0, 60.0])  # found out by a beat; by an evaluation
def test_a_run_taken_for_dead_is_ended_by_its_own_worker(make, monkeypatch, stale):
    """Two workers never train in one folder: the one that was only asleep finds out, and kills its run."""
    monkeypatch.setenv("FAKE_SECONDS", "0.3")
    worker = worker_of(*make(sampler="grid", trials=1, attempts=1, parameters=ALPHA), stale=stale)

    def fake_and_lose(config):
        queue.fail(worker.study, 0)  # as another worker does
        return fake_command(config)

    worker.command = fake_and_lose
    assert work(worker) == 0
    assert len(steps(worker.folder / "trial-0000")) < 8


@pytest.mark.parametrize("moment", ["first beat", "drawing", "folder"])
def test_a_trial_lost_before_its_run_begins_is_left_to_others(make, monkeypatch, capsys, moment):
    """Another worker ends it between two writes of this one, which goes on with what is left."""
    worker = worker_of(*make(sampler="grid", attempts=1, parameters=ALPHA))
    place, name = {
        "first beat": (queue, "take"),
        "drawing": (points, "suggest"),
        "folder": (points, "point_config"),
    }[moment]
    real, calls = getattr(place, name), []

    def lose_the_first(*args):
        calls.append(args)
        if moment == "first beat":
            found = real(*args)
            queue.fail(worker.study, 0)
            return found
        queue.fail(worker.study, 0)
        return real(*args)

    monkeypatch.setattr(place, name, lose_the_first)
    assert work(worker) == 2 and len(calls) >= 3
    assert "trial 0: another worker has it" in capsys.readouterr().out
    assert not (worker.folder / "trial-0000").exists()
    newest = queue.current(worker.study.get_trials()).values()
    assert [trial.state.name for trial in newest] == ["FAIL", "COMPLETE", "COMPLETE"]


def test_a_sweep_stopped_in_its_only_trial_has_not_failed(recipe, write_space, tmp_path):
    space = write_space(sampler="grid", trials=1, parameters=ALPHA)
    first, trial = start(recipe, space, tmp_path, 0.15), tmp_path / "runs/some/trial-0000"
    until(lambda: len(steps(trial)) >= 2)
    first.send_signal(signal.SIGTERM)
    out, _ = first.communicate(timeout=60)
    assert first.returncode == 0 and "1 trials: 1 waiting" in out


def test_a_sweep_whose_trials_were_all_lost_too_often_has_failed(recipe, write_space, monkeypatch):
    space = write_space(sampler="grid", trials=1, attempts=2, parameters=ALPHA)

    def fake(*args):
        return Worker(*args, command=lambda _: [sys.executable, "-c", LOST], poll=0.02)

    monkeypatch.setattr(command, "Worker", fake)
    with pytest.raises(RunStopped, match="all 1 trials failed; the first: its worker was lost 2"):
        command.run(recipe, space)


def test_two_workers_share_a_sweep(recipe, write_space, tmp_path):
    parameters = {"curriculum.alpha_format": {"choices": [i / 10 for i in range(1, 9)]}}
    space = write_space(sampler="grid", parameters=parameters)
    workers = [start(recipe, space, tmp_path, 0.02) for _ in range(2)]
    outs = [worker.communicate(timeout=200)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], outs
    assert all(out.count("complete at step 8;") >= 1 for out in outs)
    found = results(tmp_path)
    assert [row["state"] for row in found] == ["complete"] * 8
    assert {row["attempts"] for row in found} == {"1"}
    assert sorted(float(row["curriculum.alpha_format"]) for row in found) == [i / 10 for i in range(1, 9)]  # fmt: skip
    for slot in range(8):
        assert steps(tmp_path / f"runs/some/trial-{slot:04d}") == list(range(1, 9))


def test_all_workers_mean_one_sweep(make):
    study.open_study(*make(sampler="random", trials=2, parameters=ALPHA), None)
    study.open_study(*make(sampler="random", trials=9, parameters=ALPHA), None)  # more of them
    other = {"curriculum.alpha_format": {"choices": [0.1]}}
    with pytest.raises(UserError, match=r"begun with another space .*curriculum.alpha_format"):
        study.open_study(*make(sampler="random", trials=2, parameters=other), None)
    space, shared = make(sampler="random", trials=2, parameters=ALPHA)
    shared = shared.model_copy(update={"seed": 5})
    with pytest.raises(UserError, match=r"another config .seed: 0 there, 5 now"):
        study.open_study(space, shared, None)


def test_a_sweep_of_failures_says_so(recipe, write_space, monkeypatch):
    parameters = {"curriculum.alpha_think": {"choices": [9.0]}}
    space = write_space(sampler="grid", parameters=parameters)

    def fake(*args):
        return Worker(*args, command=fake_command, poll=0.02)

    monkeypatch.setattr(command, "Worker", fake)
    with pytest.raises(RunStopped, match="all 1 trials failed; the first: exit code 1: step 1"):
        command.run(recipe, space)


@pytest.mark.parametrize(
    ("storage", "said"),
    [
        ("mysterydb://x/y", "storage mysterydb://x/y"),
        ("postgresql://me:secret@nowhere/x", "storage postgresql://me"),
        ("{tmp}", "a folder; give the path of a journal file"),
    ],
)
def test_a_storage_that_cannot_be_used(recipe, write_space, tmp_path, capsys, storage, said):
    space = write_space(sampler="grid", parameters=ALPHA)
    words = ["sweep", str(recipe), str(space), "--storage", storage.format(tmp=tmp_path)]
    assert cli.main(words) == 2
    line = capsys.readouterr().err
    assert said in line and line.count("\n") == 1 and "secret" not in line
    assert not (tmp_path / "runs").exists()


def test_results_of_nothing_leave_nothing(recipe, write_space, tmp_path, capsys):
    space = write_space(sampler="grid", parameters=ALPHA)
    assert cli.main(["sweep", str(recipe), str(space), "--results"]) == 2
    assert "start the sweep first" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_local_workers_and_runs_that_are_refused(recipe, write_space, tmp_path, capsys):
    """The real processes: two workers, and trials whose model does not exist."""
    space = write_space(sampler="grid", parameters=ALPHA)
    assert cli.main(["sweep", str(recipe), str(space), "--workers", "2"]) == 1
    shown = capsys.readouterr()
    assert "all 3 trials failed; the first: exit code 2" in shown.err
    assert "3 trials: 3 failed" in shown.out
    assert all("nowhere" in row["reason"] for row in results(tmp_path))


def test_gpus_are_dealt_out(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,4,5")
    dealt = [environment["CUDA_VISIBLE_DEVICES"] for environment in process.environments(2)]
    assert dealt == ["0,1", "4,5"]
    with pytest.raises(UserError, match="--workers 3: the 4 GPUs"):
        process.environments(3)
