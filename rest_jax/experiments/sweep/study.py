"""The Optuna study of a sweep: where it is stored, its sampler and pruner, and that all workers mean the same sweep."""

import logging
import pathlib
import random
import re
import time
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from rest_jax import config as config_lib
from rest_jax.config import Config
from rest_jax.errors import UserError
from rest_jax.experiments.sweep import queue
from rest_jax.experiments.sweep.space import Space

if TYPE_CHECKING:
    import optuna

JOURNAL = "journal.log"
_SPACE, _CONFIG = "space", "config"
_TRIES = 20  # to open a database whose tables others make at the same moment
_MADE_MEANWHILE = re.compile("already exists|unique|duplicate", re.IGNORECASE)
_FREE = ("trials", "attempts")  # may be changed while a sweep goes on


def open_study(space: Space, shared: Config, storage: str | None) -> "optuna.Study":
    """The study, made if it is not there. UserError when it was begun with another space or config.

    `storage` is a path (journal file) or a database URL; None is `journal.log` in the sweep's folder.
    """
    import optuna

    study = optuna.create_study(
        storage=_storage(storage or sweep_folder(space, shared) / JOURNAL, create=True),
        study_name=space.name,
        direction=space.direction,
        load_if_exists=True,
        pruner=make_pruner(space),
    )
    _same(study, _SPACE, space.model_dump(mode="json", by_alias=True), _FREE)
    _same(study, _CONFIG, shared.model_dump(mode="json"), ("name",))
    return study


def load_study(space: Space, shared: Config, storage: str | None) -> "optuna.Study":
    """The study as it is, for reading. UserError when there is none."""
    import optuna

    place = storage or sweep_folder(space, shared) / JOURNAL
    try:
        return optuna.load_study(study_name=space.name, storage=_storage(place, create=False))
    except KeyError as error:
        raise UserError(
            f"storage {without_password(str(place))}: no sweep {space.name}; start it first"
        ) from error


def sweep_folder(space: Space, shared: Config) -> pathlib.Path:
    """<output>/<name of the sweep>: the trials' run folders and the results."""
    return pathlib.Path(shared.output) / space.name


def make_sampler(space: Space, slot: int) -> "optuna.samplers.BaseSampler":
    """The sampler of one trial. Seeded by sweep and slot, so that workers with one seed do not draw the same points."""
    import optuna

    seed = int(np.random.SeedSequence([space.seed, slot]).generate_state(1)[0])
    if space.sampler == "tpe":
        return _quietly(lambda: optuna.samplers.TPESampler(seed=seed, constant_liar=True))
    return optuna.samplers.RandomSampler(seed=seed)  # of a grid, every value is fixed already


def make_pruner(space: Space) -> "optuna.pruners.BasePruner":
    """Optuna's pruner, blind to trials whose worker was lost: their next attempt holds the same values."""
    import optuna

    if space.pruner is None:
        return optuna.pruners.NopPruner()
    halving = space.pruner.successive_halving
    inner = optuna.pruners.SuccessiveHalvingPruner(
        min_resource=halving.min_steps, reduction_factor=halving.reduction_factor
    )

    class WithoutLost(optuna.pruners.BasePruner):
        def prune(self, study: Any, trial: Any) -> bool:
            return inner.prune(_WithoutLost(study), trial)  # pyright: ignore[reportArgumentType]

    return WithoutLost()


class _WithoutLost:
    """A study that leaves out lost trials; everything else is the study's own."""

    def __init__(self, study: "optuna.Study"):
        self._inner = study

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def get_trials(self, *args: Any, **options: Any) -> list[Any]:
        found = self._inner.get_trials(*args, **options)
        return [trial for trial in found if not queue.lost(trial)]


def _storage(place: str | pathlib.Path, create: bool) -> Any:
    import optuna
    from optuna.storages import journal

    optuna.logging.set_verbosity(logging.WARNING)
    if "://" in str(place):
        return _database(str(place))
    path = pathlib.Path(place)
    if not create and not path.is_file():
        raise UserError(f"storage {path}: no such file; start the sweep first, or give --storage")
    if path.is_dir():
        raise UserError(
            f"storage {path}: a folder; give the path of a journal file, or a database URL"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    return optuna.storages.JournalStorage(journal.JournalFileBackend(str(path)))


def _database(url: str) -> Any:
    import optuna
    import sqlalchemy.exc

    sqlite = url.startswith("sqlite")
    # Workers of one sqlite file wait for each other instead of failing.
    waiting = {"connect_args": {"timeout": 60}} if sqlite else {}
    for attempt in range(_TRIES):
        try:
            storage = optuna.storages.RDBStorage(url, engine_kwargs=waiting)
        except ImportError as error:
            raise UserError(
                f"storage {without_password(url)}: its driver is missing; install the one of this database, "
                "e.g. pip install psycopg (postgresql+psycopg://...)"
            ) from error
        except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.OptunaError, ValueError) as error:
            cause = error.__cause__ or error
            reason = str(getattr(cause, "orig", None) or cause)
            # Workers that start together all find no tables, and one is first to make them.
            if attempt + 1 < _TRIES and _MADE_MEANWHILE.search(reason):
                time.sleep(random.uniform(0.1, 1.0))
                continue
            raise UserError(f"storage {without_password(url)}: {reason}") from error
        if sqlite:
            _lock_at_begin(storage.engine)
        return storage


def _lock_at_begin(engine: Any) -> None:
    """Each transaction of sqlite takes its lock before it reads (SQLAlchemy's recipe for pysqlite).

    Optuna reads a trial's state and then changes it, under a row lock that sqlite does not have: without this, two
    workers now and then get one trial.
    """
    import sqlalchemy.event

    def no_own_begin(connection: Any, _: Any) -> None:
        connection.isolation_level = None

    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    sqlalchemy.event.listen(engine, "connect", no_own_begin)
    sqlalchemy.event.listen(engine, "begin", begin)
    engine.dispose()  # connections from before


def without_password(url: str) -> str:
    """A database URL as it may be shown; a path as it is."""
    if "://" not in url:
        return url
    scheme, _, rest = url.partition("://")
    account, at, place = rest.rpartition("@")
    return f"{scheme}://{account.partition(':')[0]}{at}{place}"


def _same(study: "optuna.Study", key: str, value: dict[str, Any], free: tuple[str, ...]) -> None:
    """Remembers a tree in the study, or compares it with what is remembered."""
    there = study.user_attrs.get(key)
    if there is None:
        study.set_user_attr(key, value)
        return
    found = [
        f"{path}: {old!r} there, {new!r} now"
        for path, old, new in config_lib.differences(there, value)
        if path not in free
    ]
    if found:
        raise UserError(
            f"sweep {study.study_name} was begun with another {key} ({'; '.join(found)}); choose another name"
        )


def _quietly(make: Callable[[], Any]) -> Any:
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return make()
