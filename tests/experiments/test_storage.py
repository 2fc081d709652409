"""The queue of trials: each run once, whoever enqueues it; lost ones again; storages that cannot be used."""

import pathlib
import time

import optuna
import pytest

from rest_jax.errors import RunStopped, UserError
from rest_jax.experiments import storage

FAIL = optuna.trial.TrialState.FAIL


@pytest.fixture
def study(tmp_path) -> optuna.Study:
    database = storage.open_storage(f"sqlite:///{tmp_path / 'x.db'}", 1)
    return optuna.create_study(storage=database, study_name="x")


def test_runs_enqueued_by_two_workers_at_once_are_done_once(study):
    for _ in range(2):
        study.enqueue_trial({}, user_attrs={storage.RUN: "a"})
    storage.enqueue(study, {"a": {}, "b": {}})
    assert {run: t.number for run, t in storage.current(study).items()} == {"a": 0, "b": 2}


def test_lost_trials_are_retried_so_often(study):
    """Being told to stop is free; a worker that dies is not."""
    storage.enqueue(study, {"a": {}})
    for _ in range(3):
        trial = study.ask()
        trial.report(0.5, len(storage.current(study)["a"].intermediate_values))
        trial.set_user_attr(storage.STOPS, trial.user_attrs.get(storage.STOPS, 0) + 1)
        study.tell(trial, state=FAIL)
        storage.retry_lost(study)
    for _ in range(storage.MAX_LOSSES):
        study.tell(study.ask(), state=FAIL)
        assert storage.state(storage.current(study)["a"])[0] == "lost"
        storage.retry_lost(study)
    assert storage.current(study)["a"].intermediate_values == {0: 0.5, 1: 0.5, 2: 0.5}
    study.tell(study.ask(), state=FAIL)
    storage.retry_lost(study)
    state = storage.state(storage.current(study)["a"])
    assert state == ("failed", "its workers were lost, 8 attempts")
    assert not any(trial.state.name == "WAITING" for trial in study.trials)


@pytest.mark.slow
def test_the_trial_of_a_worker_killed_before_its_first_heartbeat_is_lost_after_a_while(study):
    storage.enqueue(study, {"a": {}})
    study.ask()  # runs from now on, and nobody works on it
    begun = time.monotonic()
    while storage.attempts(storage.current(study)["a"]) == 1:
        storage.retry_lost(study)
        assert time.monotonic() - begun < 30
        time.sleep(0.1)
    assert time.monotonic() - begun > 3  # the grace is four times the heartbeat


def test_failed_trials_are_not_retried(study):
    storage.enqueue(study, {"a": {}})
    trial = study.ask()
    trial.set_user_attr(storage.REASON, "exit code 1")
    study.tell(trial, state=FAIL)
    storage.retry_lost(study)
    assert [storage.state(trial) for trial in study.trials] == [("failed", "exit code 1")]


def test_all_workers_mean_the_same(study):
    storage.check_same(study, {"config": {"seed": 0}, "space": {"a": 1}})
    storage.check_same(study, {"config": {"seed": 0}, "space": {"a": 1}})
    with pytest.raises(UserError, match=r"begun differently \(config.seed: 0 there, 5 now\)"):
        storage.check_same(study, {"config": {"seed": 5}, "space": {"a": 1}})


@pytest.mark.parametrize("damage", ["torn", "garbled"])
def test_a_damaged_file_is_one_line_before_anything_is_read(tmp_path, damage):
    path = tmp_path / "x.db"
    url = f"sqlite:///{path}"
    optuna.create_study(storage=storage.open_storage(url, 1), study_name="x")
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] + (b"" if damage == "torn" else b"\xa5" * middle))
    with pytest.raises(UserError, match=r"x\.db: .*(malformed|damaged)") as stop:
        storage.open_storage(url, 1)
    assert "\n" not in str(stop.value)


def test_a_storage_that_fails_later_is_one_line(study):
    study.optimize(lambda trial: 1.0, n_trials=1)
    engine = study._storage._backend.engine
    engine.dispose()
    pathlib.Path(engine.url.database).write_bytes(b"no database" * 1000)
    with (
        pytest.raises(RunStopped, match=r"x: storage: file is not a database") as stop,
        storage.failures("x"),
    ):
        study.tell(0, state=FAIL)
    assert "\n" not in str(stop.value)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("mysterydb://x/y", "storage mysterydb://x/y: "),
        ("study.db", "storage study.db: cannot be read"),
        ("postgresql+psycopg://me:secret@localhost:1/x", "storage postgresql+psycopg://me:***@localhost:1/x: "),
        ("postgresql+psycopg://localhost:1/x?user=me&password=secret", "storage postgresql+psycopg://localhost:1/x: "),
        ("postgresql+psycopg://me:p@secret@localhost:1/x", "storage postgresql+psycopg://: cannot be read"),
        ("postgresql+psycopg://me:p@s/secret@localhost:1/x", "storage postgresql+psycopg://: cannot be read"),
        ("postgresql+psycopg://me:p@localhost:secret/x", "storage postgresql+psycopg://: cannot be read"),
        ("mysql://me:b@x/y?token=secret", "storage mysql://me:***@x/y: No module named 'MySQLdb'"),
        ("mysterydb://me:secret@x/y?token=secret", "storage mysterydb://me:***@x/y: "),
    ],
)  # fmt: skip
def test_a_storage_that_cannot_be_used(url, said):
    with pytest.raises(UserError) as stop:
        storage.open_storage(url, 1)
    assert said in str(stop.value) and "secret" not in str(stop.value)
