"""A run's folder and its life: resolved config, metrics, checkpoints, resumption, the request to stop, the NaN guard.

runs/<name>/  config.yaml  metrics.jsonl  samples.jsonl  checkpoints/  model/ (HF side files)  curves.png

Both loops use it. Order within a step: metrics lines are on disk before the checkpoint of the same step is begun, so that
whatever checkpoint a restarted run finds, the lines up to it are there; those after it are dropped and written again.
"""

import contextlib
import dataclasses
import importlib.util
import math
import pathlib
import signal
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import filelock
import jax
import numpy as np

from rest_jax import config as config_lib
from rest_jax.config import Config
from rest_jax.distributed import any_process, is_first_process
from rest_jax.errors import RunStopped, UserError
from rest_jax.files import atomic_folder, atomic_write
from rest_jax.models.hf.folder import copy_side_files
from rest_jax.run.checkpoint import Checkpoints
from rest_jax.run.environment import handled
from rest_jax.run.metrics import MetricsWriter
from rest_jax.types import TrainState

CONFIG_FILE = "config.yaml"
MODEL_FOLDER = "model"
LOCK_FILE = ".lock"

# Keys that say what a run computes on, not what: a run may resume on other devices.
HARDWARE = ("mesh.", "distributed.", "rollout.tensor")

SUPERVISED_FINITE = ("update/loss", "update/grad_norm")
# Those of the rollout, too: broken weights sample completions whose rewards are all equal, and groups without advantage
# have neither loss nor gradient.
RL_FINITE = (*SUPERVISED_FINITE, "rollout/logp", "rollout/entropy")


class StopRequest:
    """The request to stop: a flag that a signal handler sets and the loop reads once a step."""

    received = False

    def receive(self, *_: Any) -> None:
        """Sets the flag."""
        self.received = True

    def agreed(self) -> bool:
        """Whether any process received one: all must save together or go on together."""
        return any_process(self.received)


@dataclasses.dataclass
class Run:
    """An open run: the resources that the loop writes to. `close` waits for the last checkpoint."""

    config: Config
    folder: pathlib.Path
    # In the first process only.
    metrics: MetricsWriter | None
    checkpoints: Checkpoints
    stop: StopRequest
    resources: contextlib.ExitStack

    def resume(
        self, fresh: TrainState, abstract: TrainState
    ) -> tuple[TrainState, dict[str, Any] | None, int]:
        """(state, loader state, step): the newest sound checkpoint, or the fresh state, None and 0."""
        state, loader_state, step = fresh, None, 0
        if self.checkpoints.latest() is not None:
            state, loader_state, step = self.checkpoints.restore(abstract)
        if self.metrics is not None:
            # The evaluation before the first step is a line of step 0.
            self.metrics.truncate_after(-1 if loader_state is None else step)
        return state, loader_state, step

    def save(self, step: int, state: TrainState, loader_state: Mapping[str, Any]) -> None:
        """Forces the metrics to disk, then saves a checkpoint in the background."""
        if self.metrics is not None:
            self.metrics.sync()
        self.checkpoints.save(step, state, loader_state)

    def write(
        self, step: int, values: Mapping[str, Any], samples: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        """One metrics line and the samples that go with it; nothing in processes other than the first."""
        if self.metrics is not None:
            self.metrics.write(step, values, samples)

    def check_finite(
        self,
        step: int,
        values: Mapping[str, float],
        names: Sequence[str],
        batch: Mapping[str, Any],
    ) -> None:
        """RunStopped that names those of `names` that are NaN or infinite, once the arrays of the batch are saved as .npz."""
        found = [name for name in names if not math.isfinite(values[name])]
        if not found:
            return
        path = self.folder / f"nan_step_{step}.{jax.process_index()}.npz"
        arrays: dict[str, Any] = {name: np.asarray(value) for name, value in batch.items()}
        np.savez(path, **arrays)
        raise RunStopped(
            f"step {step}: not finite: {', '.join(f'{name} {values[name]}' for name in found)}. "
            f"The batch is saved in {path}; the last checkpoint is from before it"
        )

    def close(self) -> None:
        """Waits for the last checkpoint; until then SIGTERM only sets the flag."""
        self.resources.close()


def open_run(config: Config, files: pathlib.Path) -> Run:
    """Makes or reopens the folder. UserError when another process trains in it, or it holds a run of another config.

    `files` is the folder with the model's HF side files; they are copied so that the run can be exported on its own.
    """
    folder = config.folder
    check_config(folder, config)
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_locked(folder))
        metrics = None
        if is_first_process():
            with atomic_write(folder / CONFIG_FILE) as partial:
                partial.write_text(config_lib.dump(config))
            if not (folder / MODEL_FOLDER).exists():
                with atomic_folder(folder / MODEL_FOLDER) as partial:
                    copy_side_files(files, partial)
            train = config.train
            metrics = MetricsWriter(folder, train.tensorboard, train.wandb_project)
            stack.callback(metrics.close)
        # Before the checkpoints, since resources are closed last to first.
        stop = StopRequest()
        stack.enter_context(handled(stop.receive, signal.SIGTERM))
        checkpoints = stack.enter_context(Checkpoints(folder, config.train.keep_checkpoints))
        return Run(config, folder, metrics, checkpoints, stop, stack.pop_all())


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[None]:
    """The first process holds the folder's lock, which the system releases however it ends; the others go by its word."""
    lock = filelock.FileLock(folder / LOCK_FILE)
    taken = False
    if is_first_process():
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            taken = True
    if any_process(taken):
        raise UserError(
            f"{folder}: another process trains this run; wait for it, or choose another name"
        )
    try:
        yield
    finally:
        lock.release()


def check_start(config: Config) -> None:
    """All that can be refused before a folder is made: another config there, absent packages."""
    check_config(config.folder, config)
    optional = {"tensorboard": config.train.tensorboard, "wandb": config.train.wandb_project}
    for package, wanted in optional.items():
        if wanted and importlib.util.find_spec(package) is None:
            raise UserError(f"train.{package}...: the package is missing: pip install {package}")


def check_config(folder: pathlib.Path, config: Config) -> None:
    """UserError when `folder` was made by another config; every difference is named. The devices may be others."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        return
    found = [
        one
        for one in config_lib.differences(config_lib.load([path]), config)
        if not one.path.startswith(HARDWARE)
    ]
    if found:
        named = "; ".join(f"{d.path}: {d.old!r} there, {d.new!r} now" for d in found)
        raise UserError(
            f"{folder} holds a run of another config ({named}); choose another name, or delete the folder"
        )
