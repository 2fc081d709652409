"""A recipe, whole: its supervised warm start where it names one, then its own run. What `rest-jax train` and `sft` call.

    run(config)        warm start (an ordinary run in <output>/<its name>/) -> the run itself, which starts from that folder

A warm start is trained once and shared by every recipe with the same one: its folder is locked while it is trained, and
passed over once it is finished. Interrupted in either stage, the same command goes on.
"""

import contextlib
import pathlib
from collections.abc import Iterator

import filelock
import jax
import numpy as np
from jax.experimental import multihost_utils

from rest_jax import sft, train
from rest_jax.config import Config
from rest_jax.distributed import is_first_process
from rest_jax.errors import UserError
from rest_jax.run.folder import check_config
from rest_jax.run.policy import is_run

FINISHED = "finished"  # a file in the folder of a supervised run whose last step is saved


def run(config: Config, dry_run: bool = False, profile: int | None = None) -> int:
    """Both stages; 0 at the end, after SIGTERM in either, or after the checks of a dry run. Errors as `train.run`."""
    if config.trainer == "sft":
        if profile is not None:
            raise UserError(f"--profile {profile}: only for reinforcement runs, not trainer sft")
        finish_supervised(config, dry_run)
        return 0
    start = config.warm_start
    if start is None:
        return train.run(config, dry_run, profile)
    warmed = from_warm_start(config)
    check_config(warmed.folder, warmed)  # before hours are spent on the start
    if dry_run:
        finish_supervised(start, dry_run=True)
        without = config.model_copy(update={"warm_start": None})
        return train.run(warmed if is_finished(start) else without, dry_run=True)
    if not finish_supervised(start):
        return 0
    return train.run(warmed, profile=profile)


def from_warm_start(config: Config) -> Config:
    """The second stage on its own: the policy comes from the run of the first. This is what its folder records."""
    assert config.warm_start is not None
    model = config.model.model_copy(update={"source": str(config.warm_start.folder)})
    return config.model_copy(update={"model": model, "warm_start": None})


def finish_supervised(config: Config, dry_run: bool = False) -> bool:
    """Trains a supervised run, or what is left of it; whether it is finished and nothing told this process to stop. One
    process at a time works on a folder: another one waits here, and then finds it done.
    """
    if dry_run:
        sft.run(config, dry_run=True)
        return is_finished(config)
    with _locked(config):
        if _agreed(is_finished(config)):
            check_config(config.folder, config)
            _say(f"{config.name}: finished, in {config.folder}")
            return True
        ending = sft.complete(config)
        if ending.finished and is_first_process():
            (config.folder / FINISHED).touch()
    _barrier()
    return ending.finished and not ending.stopped


def is_finished(config: Config) -> bool:
    """Whether the folder holds this supervised run with its last step."""
    return is_run(str(config.folder)) and (config.folder / FINISHED).is_file()


@contextlib.contextmanager
def _locked(config: Config) -> Iterator[None]:
    """The first process holds the lock, the others go by its word. Refused input leaves no trace of the lock."""
    if not is_first_process():
        yield
        return
    output = pathlib.Path(config.output)
    made = [path for path in (output, *output.parents) if not path.exists()]
    output.mkdir(parents=True, exist_ok=True)
    path = output / f".{config.name}.lock"
    lock = filelock.FileLock(path)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        _say(f"{config.name}: another process trains it; waiting")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
        if not config.folder.is_dir():
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # something else is in there by now
                for parent in made:
                    parent.rmdir()


def _agreed(value: bool) -> bool:
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(value)))


def _barrier() -> None:
    """No process reads the folder before all of it is written."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("supervised run finished")


def _say(line: str) -> None:
    if is_first_process():
        print(line, flush=True)
