"""The Optuna study behind an experiment: where it is stored, its queue of trials, and the retries of lost ones.

All trials are enqueued before a worker starts, each with the name of its run in the user attribute `run`. A trial whose
worker is gone is failed by Optuna (its heartbeat is too old) and enqueued again by `retry_lost` with its parameters and
intermediate values. Two workers may enqueue the same attempt of the same run at once: of these trials the one with the
lowest number is done (`current`), so no lock is needed.
"""

import contextlib
import copy
import logging
import pathlib
import random
import re
import time
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import optuna
import sqlalchemy
import sqlalchemy.event
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from rest_jax import config as config_lib
from rest_jax.errors import RunStopped, UserError

# User attributes of a trial. REASON: why it ended, "" while it has not. STOPS: how often its worker was told to stop.
RUN, REASON, STOPS, SECONDS = "run", "reason", "stops", "seconds"
INVALID = "not a config"
MAX_LOSSES = 4  # a trial whose workers died more often has failed
_OPEN_TRIES = 20
_UNUSABLE = (ImportError, ValueError, SQLAlchemyError, optuna.exceptions.OptunaError)
_SILENT = sqlalchemy.text(
    "SELECT trials.trial_id FROM trials JOIN studies ON studies.study_id = trials.study_id "
    "LEFT JOIN trial_heartbeats ON trial_heartbeats.trial_id = trials.trial_id "
    "WHERE studies.study_name = :name AND trials.state = 'RUNNING' AND trial_heartbeats.trial_id IS NULL"
)
_CREATED_MEANWHILE = re.compile("already exists|unique|duplicate", re.IGNORECASE)

# What Optuna says at its own level is noise here: workers print a line for each trial, and its heartbeat is experimental.
optuna.logging.set_verbosity(logging.ERROR)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


def open_storage(url: str, heartbeat: int) -> RDBStorage:
    """The database, its tables made if absent. UserError, without the password, when it cannot be used.

    A running trial without a heartbeat for four times `heartbeat` seconds is stale.
    """
    sqlite = url.startswith("sqlite:///")
    if sqlite:
        pathlib.Path(url.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    options = {"connect_args": {"timeout": 60}} if sqlite else {"pool_pre_ping": True}
    for attempt in range(_OPEN_TRIES):
        try:
            found = RDBStorage(
                url, options, heartbeat_interval=heartbeat, grace_period=4 * heartbeat
            )
            if sqlite:
                _check_pages(found.engine)
            break
        except _UNUSABLE as error:
            cause = error.__cause__ or error
            reason = str(getattr(cause, "orig", None) or cause)
            # Workers that start together all find no tables, and only one of them can make each.
            if attempt + 1 == _OPEN_TRIES or not _CREATED_MEANWHILE.search(reason):
                raise UserError(_without_password(url, reason)) from error
            time.sleep(random.uniform(0.1, 1.0))
    if sqlite:
        _lock_at_begin(found.engine)
    return found


def _without_password(url: str, reason: str) -> str:
    """Why a database cannot be used. Of a URL that is read otherwise than it was meant, the scheme alone is told: its parts,
    which the reason names, may be the password's.
    """
    scheme, is_url, _ = url.partition("://")
    try:
        read = sqlalchemy.make_url(url)
        misread = not url.startswith("sqlite:") and "@" in f"{read.host}{read.port}{read.database}"
    except (ValueError, SQLAlchemyError):
        read, misread = None, True
    if read is None or misread:
        return (
            f"storage {scheme}{is_url}: cannot be read; write sqlite:///FILE, or a URL of SQLAlchemy's, with %40 for @ in its "
            "password, %2F for / and so on"
        )
    hint = '; pip install "rest-jax[postgres]"' if "psycopg" in reason else ""
    secrets = [v for name, v in read.query.items() if re.search("pass|secret|token|key", name)]
    for secret in filter(None, [read.password, *secrets]):
        reason = re.sub(rf"(?<!\w){re.escape(str(secret))}(?!\w)", "***", reason)
    return f"storage {read.set(query={}).render_as_string()}: {reason}{hint}"


@contextlib.contextmanager
def failures(name: str) -> Iterator[None]:
    """Makes one RunStopped, of the experiment `name`, of a storage that fails once it is open."""
    try:
        yield
    except (StorageInternalError, SQLAlchemyError) as error:
        cause = error.__cause__ or error
        reason = " ".join(str(getattr(cause, "orig", None) or cause).split())[:300]
        raise RunStopped(
            f"{name}: storage: {reason}; the same command continues once it can be used"
        ) from error


def enqueue(study: optuna.Study, runs: Mapping[str, Mapping[str, Any]]) -> None:
    """Enqueues the runs (name -> fixed parameters, possibly none) that the study does not have yet."""
    known = current(study)
    for run, fixed in runs.items():
        if run not in known:
            study.enqueue_trial(dict(fixed), user_attrs={RUN: run})


def current(study: optuna.Study) -> dict[str, FrozenTrial]:
    """run -> the trial of its last attempt, in the order of the trials; duplicates are left out."""
    found: dict[str, FrozenTrial] = {}
    for trial in study.get_trials(deepcopy=False):
        run = trial.user_attrs.get(RUN)
        if run and (run not in found or attempts(trial) > attempts(found[run])):
            found[run] = trial
    return found


def attempts(trial: FrozenTrial) -> int:
    """How many workers had this run, this one included."""
    return 1 + len(RetryHeartbeatStaleTrialCallback.retry_history(trial))


def state(trial: FrozenTrial) -> tuple[str, str]:
    """In words: complete, pruned, running, waiting, lost, failed or invalid (its values are not a config); and why.

    A worker that was told to stop (pre-empted) counts as one that died, but not towards MAX_LOSSES.
    """
    reason = trial.user_attrs.get(REASON, "")
    if trial.state == TrialState.FAIL:
        if reason:
            return "failed", reason
        if attempts(trial) - trial.user_attrs.get(STOPS, 0) > MAX_LOSSES:
            return "failed", f"its workers were lost, {attempts(trial)} attempts"
        return "lost", "its worker was lost or stopped"
    if trial.state == TrialState.PRUNED and reason.startswith(INVALID):
        return "invalid", reason
    return trial.state.name.lower(), reason


def retry_lost(study: optuna.Study) -> None:
    """Fails the stale trials and enqueues every lost one again, with its parameters and what it reported."""
    # Optuna takes a trial without a heartbeat for alive: that of a worker which was killed before its first. It is given one, so
    # that its silence counts from now on.
    database: Any = study._storage
    with database._backend.engine.connect() as connection:
        silent = connection.execute(_SILENT, {"name": study.study_name}).scalars().all()
    for trial_id in silent:
        database.record_heartbeat(trial_id)
    optuna.storages.fail_stale_trials(study)
    again = RetryHeartbeatStaleTrialCallback(inherit_intermediate_values=True)
    for trial in current(study).values():
        if state(trial)[0] == "lost":
            # A copy: Optuna appends to the history of the trial that it is given.
            again(study, copy.deepcopy(trial))


def check_same(study: optuna.Study, definition: Mapping[str, Any]) -> None:
    """Remembers in the study what it is a study of. UserError with every difference when it was begun as another one."""
    before = study.user_attrs.get("definition")
    if before is None:
        study.set_user_attr("definition", definition)
    elif found := config_lib.differences(before, definition):
        named = "; ".join(f"{d.path}: {d.old!r} there, {d.new!r} now" for d in found)
        raise UserError(f"{study.study_name} was begun differently ({named}); choose another name")


def _check_pages(engine: Any) -> None:
    """ValueError for a SQLite file that is damaged: queries that do not meet the damage would be answered."""
    with engine.connect() as connection:
        found = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()
    if found != "ok":
        raise ValueError(
            f"the file is damaged ({' '.join(found.split())}); put a sound copy in its place, or move it away to begin anew"
        )


def _lock_at_begin(engine: Any) -> None:
    """Makes each transaction of SQLite take its lock before it reads (SQLAlchemy's recipe for pysqlite).

    Optuna reads the state of a trial and then changes it, under a row lock that SQLite does not have: without this, two
    workers now and then get the same trial.
    """
    sqlalchemy.event.listen(
        engine, "connect", lambda connection, _: setattr(connection, "isolation_level", None)
    )
    sqlalchemy.event.listen(
        engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE")
    )
    engine.dispose()
