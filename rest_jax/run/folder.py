"""A run's folder and its life: resolved config, metrics, checkpoints, resumption, SIGTERM, NaN. Shared by train and sft.

runs/<name>/  config.yaml  metrics.jsonl  samples.jsonl  checkpoints/  model/ (HF side files)  curves.png

Order within a step: metrics lines are on disk before the checkpoint of the same step is begun, so that whatever checkpoint
a restarted run finds, the lines up to it are there, and those after it are dropped and written again.
"""

import dataclasses
import importlib.util
import math
import os
import pathlib
import shutil
import signal
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from rest_jax import config as config_lib
from rest_jax.config import Config
from rest_jax.distributed import is_first_process, num_data_shards
from rest_jax.errors import RunStopped, UserError
from rest_jax.files import atomic_write
from rest_jax.run.checkpoint import Checkpoints
from rest_jax.run.metrics import MetricsWriter
from rest_jax.types import TrainState

CONFIG_FILE = "config.yaml"
MODEL_FOLDER = "model"


MUST_BE_FINITE = ("update/loss", "update/grad_norm", "rollout/logp", "rollout/entropy")


class TrainingStopped(RunStopped):
    """A number that must be finite is not."""

    def __init__(self, step: int, values: dict[str, float], batch: pathlib.Path):
        found = ", ".join(f"{name} {values[name]}" for name in not_finite(values))
        super().__init__(
            f"step {step}: not finite: {found}. "
            f"The batch is saved in {batch}; the last checkpoint is from before it"
        )


def not_finite(values: dict[str, float]) -> list[str]:
    """Which of the step's numbers stop the run. Those of the rollout belong to it: broken weights sample answers whose
    rewards are all equal, and groups without advantage have neither loss nor gradient.
    """
    return [name for name in MUST_BE_FINITE if not math.isfinite(values.get(name, 0.0))]


class StopRequest:
    """Turns SIGTERM into a flag that the loop reads once a step, so that what it reads is what it acts on."""

    def __init__(self):
        self.received = False
        self._previous = signal.signal(signal.SIGTERM, self._receive)

    def _receive(self, *_: Any) -> None:
        self.received = True

    def agreed(self) -> bool:
        """Whether any process received it: all must save together or go on together."""
        if jax.process_count() == 1:
            return self.received
        return bool(np.any(multihost_utils.process_allgather(np.asarray(self.received))))

    def close(self) -> None:
        """Puts the earlier handler back."""
        signal.signal(signal.SIGTERM, self._previous)


@dataclasses.dataclass
class Run:
    """An open run: the resources that the loop writes to."""

    config: Config
    folder: pathlib.Path
    metrics: MetricsWriter | None  # in the first process only
    checkpoints: Checkpoints
    stop: StopRequest

    def resume(
        self, fresh: TrainState, abstract: TrainState
    ) -> tuple[TrainState, dict[str, Any] | None, int]:
        """(state, loader state, step): the newest sound checkpoint, or the fresh state, None and 0."""
        if self.checkpoints.latest() is None:
            self._truncate(-1)
            return fresh, None, 0
        state, loader_state, step = self.checkpoints.restore(abstract)
        self._truncate(step)
        return state, loader_state, step

    def save(self, step: int, state: TrainState, loader_state: dict[str, Any]) -> None:
        """Metrics to disk, then the checkpoint in the background."""
        if self.metrics is not None:
            self.metrics.sync()
        self.checkpoints.save(step, state, loader_state, config_lib.dump(self.config))

    def write(
        self, step: int, values: dict[str, Any], samples: Sequence[dict[str, Any]] = ()
    ) -> None:
        """One metrics line and the samples that go with it; nothing in processes other than the first."""
        if self.metrics is not None:
            self.metrics.write(step, values)
            self.metrics.write_samples(step, samples)

    def _truncate(self, step: int) -> None:
        if self.metrics is not None:
            self.metrics.truncate_after(step)

    def close(self) -> None:
        """Waits for the last checkpoint."""
        self.checkpoints.close()
        if self.metrics is not None:
            self.metrics.close()
        self.stop.close()


def open_run(config: Config, files: pathlib.Path) -> Run:
    """Makes or reopens the folder. UserError when it holds a run of another config (every difference is named).

    `files` is the folder with the model's HF side files; they are copied so that the run can be exported on its own.
    """
    folder = config.folder
    check_config(folder, config)
    folder.mkdir(parents=True, exist_ok=True)
    if is_first_process():
        with atomic_write(folder / CONFIG_FILE) as partial:
            partial.write_text(config_lib.dump(config))
        copy_side_files(files, folder / MODEL_FOLDER)
    return Run(
        config=config,
        folder=folder,
        metrics=_writer(folder, config) if is_first_process() else None,
        checkpoints=Checkpoints(folder, config.train.keep_checkpoints),
        stop=StopRequest(),
    )


def _writer(folder: pathlib.Path, config: Config) -> MetricsWriter:
    return MetricsWriter(folder, config.train.tensorboard, config.train.wandb_project)


def check_start(config: Config, mesh: Mesh) -> None:
    """All that can be refused before a folder is made: another config there, absent packages, a mesh across hosts."""
    check_config(config.folder, config)
    optional = {"tensorboard": config.train.tensorboard, "wandb": config.train.wandb_project}
    for package, wanted in optional.items():
        if wanted and importlib.util.find_spec(package) is None:
            raise UserError(f"train.{package}...: the package is missing: pip install {package}")
    processes, ways = jax.process_count(), num_data_shards(mesh)
    owners = np.vectorize(lambda device: device.process_index)(mesh.devices).reshape(ways, -1)
    expected = (np.arange(ways) * processes // ways)[:, None]
    if processes > 1 and (ways % processes or (owners != expected).any()):
        raise UserError(
            f"mesh {dict(mesh.shape)}: data x fsdp = {ways} ways do not lie whole on {processes} processes in order; "
            "keep tensor and expert within a host"
        )


def check_config(folder: pathlib.Path, config: Config) -> None:
    """UserError when `folder` was made by another config."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        return
    found = config_lib.differences(config_lib.load([path]), config)
    if found:
        named = "; ".join(f"{d.path}: {d.old!r} there, {d.new!r} now" for d in found)
        raise UserError(
            f"{folder} holds a run of another config ({named}); choose another name, or delete the folder"
        )


def copy_side_files(source: pathlib.Path, target: pathlib.Path) -> None:
    """Config, tokenizer and chat template, not the weights; whole or not at all."""
    if target.exists():
        return
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for path in sorted(source.iterdir()):
        weights = path.suffix in (".safetensors", ".bin", ".gguf") or path.name.endswith(
            ".index.json"
        )
        if path.is_file() and not weights:
            shutil.copy2(path, partial / path.name)
    os.replace(partial, target)


def save_batch(folder: pathlib.Path, step: int, arrays: dict[str, Any]) -> pathlib.Path:
    """The arrays of a step that went wrong, as one .npz."""
    path = folder / f"nan_step_{step}.{jax.process_index()}.npz"
    plain: dict[str, Any] = {name: np.asarray(value) for name, value in arrays.items()}
    np.savez(path, **plain)
    return path
