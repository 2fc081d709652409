"""A run's folder and its life: resolved config, metrics, checkpoints, resumption, the request to stop, the NaN guard.

runs/<name>/  config.yaml  metrics.jsonl  samples.jsonl  tokens.jsonl  digests.jsonl  checkpoints/  curves.png
              model/ (HF side files)  fork.json (of a fork)

Both loops use it. Order within a step: metrics lines are stored before the checkpoint of the same step is begun, so that
whatever checkpoint a restarted run finds, the lines up to it are there; those after it are dropped and written again.
The folder is a local one, or a URL of an object store (docs/storage.md).
"""

import contextlib
import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from rest_jax import config as config_lib
from rest_jax.config import Config
from rest_jax.distributed import is_first_process, say
from rest_jax.errors import RunStopped, UserError, full_disk
from rest_jax.files import (
    Location,
    as_path,
    atomic_folder,
    atomic_write,
    is_url,
    make_folder,
    store_errors,
    written_locally,
)
from rest_jax.models.hf.folder import copy_side_files
from rest_jax.run.checkpoint import FOLDER as CHECKPOINTS
from rest_jax.run.checkpoint import Checkpoints, list_steps
from rest_jax.run.contents import BASE, MADE_OF, changed, check_same, kept_contents, refuse_base
from rest_jax.run.fork import FILE as FORK_FILE
from rest_jax.run.fork import (
    Origin,
    Start,
    find_origin,
    first_state,
    read_origin,
    same_order,
    write_origin,
)
from rest_jax.run.lock import check_free, locked
from rest_jax.run.metrics import (
    CONFIG_FILE,
    FILES,
    METRICS_FILE,
    MetricsWriter,
    read_lines,
)
from rest_jax.run.record import CERTIFICATE_FILE, step_line
from rest_jax.run.results import read_results
from rest_jax.run.stop import SIGTERM_CODE, StopRequest, end
from rest_jax.run.trackers import KINDS, check_packages, check_trackers
from rest_jax.types import Params, TrainState

MODEL_FOLDER = "model"

# What a run may resume under: where it computes and lies, how much at once, how long, how closely it is watched. Paths of what
# it is made of may change: `contents` sees to it that what they lead to does not.
MAY_CHANGE = (
    "name",
    "output",
    "mesh.",
    "distributed.",
    "model.source",
    "model.tokenizer",
    "model.remat",
    "data.train",
    "data.eval",
    "lora.base_dtype",
    "lora.adapter",
    "rollout.tensor",
    "rollout.decode_slots",
    "rollout.prompt_cache_entries",
    "rollout.cache_tokens",
    "rollout.allow_truncated_support",
    "reward.plugin_",
    "weights.allow_zero_constants",
    "loss.vocab_chunk",
    "optimizer.moments",
    "evaluation.",
    "train.steps",
    "train.epochs",
    "train.max_tokens_per_microbatch",
    "train.eval_",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.measure_",
    "train.samples_per_step",
    *(f"train.{key}" for key in KINDS),
)
# Beside the loader's state in a checkpoint, as MADE_OF is: that the evaluation of its step is still to be made.
EVALUATION = "evaluation"
SAVED_FILE = ".saved"  # there once a checkpoint was completed

SUPERVISED_FINITE = ("update/loss", "update/grad_norm", "update/param_norm")
# Those of the rollout, too: broken weights sample completions whose rewards are all equal, and groups without advantage
# have neither loss nor gradient.
RL_FINITE = (*SUPERVISED_FINITE, "rollout/logp", "rollout/entropy")


def not_finite(values: Mapping[str, float], names: Sequence[str]) -> str:
    """Those of `names` that are NaN or infinite, with their values; "" when none is."""
    return ", ".join(f"{name} {values[name]}" for name in names if not math.isfinite(values[name]))


@dataclasses.dataclass
class Run:
    """An open run: the resources that the loop writes to. `close` waits for the last checkpoint."""

    config: Config
    folder: epath.Path
    # In the first process only.
    metrics: MetricsWriter | None
    checkpoints: Checkpoints
    stop: StopRequest
    check_lock: Callable[[], None]  # RunStopped when another process has taken the folder
    resources: contextlib.ExitStack
    origin: Origin | None = None  # of a fork
    marked: bool = False  # SAVED_FILE is there
    launch: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # `record.launch`

    @property
    def made_of(self) -> Mapping[str, str]:
        """Those of `contents.digests` that a checkpoint is compared by."""
        return kept_contents(self.launch)

    def resume(
        self,
        fresh: Callable[[], TrainState],
        abstract: TrainState,
        params: Params,
        start: Start,
    ) -> tuple[TrainState, dict[str, Any], int]:
        """(state, loader state, step) of the newest sound checkpoint; without one what the run begins with. UserError when the
        run was made of something else. `params`, the weights that a fresh state begins with, are deleted before a checkpoint is
        read: there need not be room for both.

        The loader state has EVALUATION if the evaluation that is due after the step is still to be made; what lines there are of
        it are dropped.
        """
        begun = self.checkpoints.latest() is not None
        if not begun and self.origin is None:
            state, step = fresh(), 0
            loader_state = self.first_loader_state(start.loader_state)
        else:
            jax.tree.map(lambda x: x.delete(), params)
            if not begun and self.origin is not None:
                forked, saved = self.begin_fork(self.origin, abstract, start)
                self.save(self.origin.step, forked, saved)
                self.wait()
                del forked
            with self._in_time("restoring the checkpoint"):
                state, loader_state, step = self.checkpoints.restore(abstract)
            where = f"{self.folder}: checkpoint {step}"
            check_same(loader_state.pop(MADE_OF, {}), self.made_of, where)
        if self.metrics is not None:
            evaluated = EVALUATION not in loader_state
            self.metrics.truncate_after(step if self.checkpoints.latest() else -1, evaluated)
            if self.launch:
                self.metrics.write_launch(step, self.launch)
        return state, loader_state, step

    def begin_fork(
        self, origin: Origin, abstract: TrainState, start: Start
    ) -> tuple[TrainState, dict[str, Any]]:
        """What a fork begins with, as of `resume`; UserError when the checkpoint it came from is gone."""
        with self._in_time(f"restoring {origin}"):
            state, saved = first_state(origin, self.config.seed, abstract, start)
        other = changed(saved.pop(MADE_OF, {}), self.made_of)
        if BASE in other:
            refuse_base(origin)
        continues = "records" not in other and same_order(saved, start.loader_state)
        made = f" with other {', '.join(other)}" if other else ""
        data = "continues where it was" if continues else "begins anew"
        say(f"{self.folder}: fork of {origin}{made}; the data {data}")
        return state, self.first_loader_state(saved if continues else start.loader_state)

    def first_loader_state(self, loader_state: Mapping[str, Any]) -> dict[str, Any]:
        """That of a run, or a fork, before its first step."""
        due = {EVALUATION: True} if self.config.train.eval_before else {}
        return {**loader_state, **due}

    def save(self, step: int, state: TrainState, loader_state: Mapping[str, Any]) -> None:
        """Stores the metrics, then saves a checkpoint in the background. `loader_state` as of `resume`."""
        self.check_lock()
        with self._in_time(f"{self.folder}: the checkpoint of step {step}, or the one before,"):
            if self.metrics is not None:
                try:
                    self.metrics.sync()
                except UserError as error:
                    # It could be written when the run began.
                    raise RunStopped(f"step {step}: {error}") from error
            kept = {MADE_OF: dict(self.made_of)} if self.made_of else {}
            self.checkpoints.save(step, state, {**loader_state, **kept})

    def wait(self) -> None:
        """Until the checkpoint under way is stored."""
        with self._in_time(f"{self.folder}: the last checkpoint"):
            self.checkpoints.wait()
            self._mark_saved()

    def _mark_saved(self) -> None:
        """Leaves a file once a checkpoint is complete, so that the loss of them all is seen."""
        if not self.marked and self.metrics is not None and self.checkpoints.has_complete():
            with full_disk(self.folder / SAVED_FILE), store_errors(self.folder):
                (self.folder / SAVED_FILE).write_text("")
            self.marked = True

    def write(
        self,
        step: int,
        values: Mapping[str, Any],
        samples: Sequence[Mapping[str, Any]] = (),
        tokens: Mapping[str, Any] | None = None,
        sums: Mapping[str, Any] | None = None,
    ) -> None:
        """One metrics line and the samples, tokens and digests (`contents.sums_of_bits`) that go with it; nothing in processes
        other than the first.
        """
        if self.metrics is not None:
            digests = None if sums is None else step_line(sums, self.launch)
            self.metrics.write(step, values, samples, tokens, digests)
            self._mark_saved()

    def save_batch(self, step: int, batch: Mapping[str, Any]) -> epath.Path:
        """Saves the arrays of a batch that went wrong; returns the file."""
        path = self.folder / f"nan_step_{step}.{jax.process_index()}.npz"
        arrays: dict[str, Any] = {name: np.asarray(value) for name, value in batch.items()}
        with atomic_write(path) as partial, partial.open("wb") as file:
            np.savez(file, **arrays)
        return path

    def close(self) -> None:
        """Waits for the last checkpoint; until then SIGTERM only sets the flag."""
        with self._in_time(f"{self.folder}: the last checkpoint"):
            try:
                self.checkpoints.wait()
                self._mark_saved()
            finally:
                self.resources.close()

    @contextlib.contextmanager
    def _in_time(self, what: str) -> Iterator[None]:
        """Around saving and restoring: ends the process when it takes too long, also by Orbax's own account.

        Threads that still write, and processes that wait for this one, would keep it from ending otherwise.
        """
        try:
            with self.stop.waiting(what):
                yield
        except (TimeoutError, jax.errors.JaxRuntimeError) as error:
            if jax.process_count() == 1 and not isinstance(error, TimeoutError):
                raise
            reason = " ".join(str(error).split())[:300]
            end(f"{what} failed: {reason}", SIGTERM_CODE if self.stop.received else 1)


def open_run(
    config: Config, files: pathlib.Path, restart: bool = False, origin: Origin | None = None
) -> Run:
    """Makes or reopens the folder. UserError when another process trains in it, it holds a run of another config, or its
    checkpoints are gone; with `restart` the run that it holds is forgotten. `origin`: where a new fork comes from.

    `files` is the folder with the model's HF side files; they are copied so that the run can be exported on its own.
    """
    folder = config.folder
    if not restart:
        check_config(folder, config)
        check_history(config)
    make_folder(folder)
    with contextlib.ExitStack() as stack:
        check_lock = stack.enter_context(locked(folder))
        metrics = None
        if is_first_process():
            if restart:
                _forget(folder)
            if origin is not None:
                write_origin(folder, origin)
            with atomic_write(folder / CONFIG_FILE) as partial:
                partial.write_text(config_lib.dump(config))
            _copy_model_files(files, folder / MODEL_FOLDER)
            metrics = MetricsWriter(folder, config)
            stack.callback(metrics.close)
        # Before the checkpoints, since resources are closed last to first.
        stop = StopRequest(config.distributed)
        stack.enter_context(stop.watched())
        keep, timeout = config.train.keep_checkpoints, config.distributed.save_timeout
        checkpoints = stack.enter_context(Checkpoints(folder, keep, timeout))
        # Every process has come past the making of the checkpoints: what the first wrote before is there.
        origin = origin or read_origin(folder)
        return Run(config, folder, metrics, checkpoints, stop, check_lock, stack.pop_all(), origin)


def _copy_model_files(files: pathlib.Path, folder: epath.Path) -> None:
    """Copies the side files of a model, once. In a store they are complete when config.json, put last, is there."""
    if is_url(folder):
        with store_errors(folder):
            if not (folder / "config.json").exists():
                with written_locally(folder, last="config.json") as partial:
                    copy_side_files(files, partial)
    elif not folder.exists():
        with atomic_folder(folder) as partial:
            copy_side_files(files, partial)


def _forget(folder: epath.Path) -> None:
    """Removes what a run has made of its folder, the lock apart, and what was measured of its weights and steps."""
    measured = [*read_results(folder), CERTIFICATE_FILE]
    with store_errors(folder):
        for name in (CHECKPOINTS, MODEL_FOLDER):
            if (folder / name).is_dir():
                (folder / name).rmtree()
        for name in (SAVED_FILE, *FILES, FORK_FILE, *measured):
            (folder / name).unlink(missing_ok=True)


def check_start(
    config: Config, restart: bool = False, fork_of: Location | None = None
) -> Origin | None:
    """All that can be refused before a model is loaded and a folder is made: another process or another config there,
    checkpoints that are gone, absent packages, a tracker that cannot be reached. Where a new fork of the run in the folder
    `fork_of` comes from.
    """
    recorded = config.folder / CONFIG_FILE
    if is_first_process():
        check_free(config.folder)
    origin = None if fork_of is None else find_origin(fork_of, config, restart)
    if origin is not None:
        theirs = config_lib.load([as_path(origin.run) / CONFIG_FILE])
        say(
            f"{config.folder} forks {origin} under another config: {_named(config_lib.differences(theirs, config))}"
        )
    elif not restart:
        if found := check_config(config.folder, config):
            say(f"{config.folder} resumes under another config: {_named(found)}")
        check_history(config)
    check_packages(config)
    if is_first_process():
        # It is empty where a machine was lost as it was written.
        launched = recorded.is_file() and recorded.stat().length > 0
        resumes = launched and origin is None and not restart
        check_trackers(config, config_lib.load([recorded]) if resumes else None)
    return origin


def check_config(folder: epath.Path, config: Config) -> list[config_lib.Difference]:
    """The differences to the config that made `folder`, all of which may change. UserError that names those which may not."""
    path = folder / CONFIG_FILE
    with store_errors(path):
        if not path.is_file() or not _has_begun(folder):
            return []
        if not path.stat().length:
            raise UserError(
                f"{path}: is empty, as a lost machine may leave a file; put it back (`rest-jax config show` prints that of your "
                "words), or forget the run with --restart"
            )
    there = config_lib.load([path])
    found = config_lib.differences(there, config)
    free = (*may_change(there, config), *config_lib.only_evaluated(config))
    refused = [d for d in found if not d.path.startswith(free)]
    if refused:
        raise UserError(
            f"{folder} holds a run of another config ({_named(refused)}); --fork NEW_NAME continues from its newest "
            f"checkpoint, model.source={folder} with another name starts from its weights, --restart forgets that run"
        )
    return found


def may_change(before: Config, now: Config) -> tuple[str, ...]:
    """How the keys begin in which a run may resume under another config: those of MAY_CHANGE, but that no adapters are put under
    a KL term's reference, or taken from it.
    """
    same = before.refers_to_adapters == now.refers_to_adapters
    return MAY_CHANGE if same else tuple(key for key in MAY_CHANGE if key != "lora.adapter")


def _named(found: Sequence[config_lib.Difference]) -> str:
    return "; ".join(f"{d.path}: {d.old!r} there, {d.new!r} now" for d in found)


def _has_begun(folder: epath.Path) -> bool:
    """Whether a run has anything to lose: a launch that ended before its first line, as for want of memory, has not."""
    metrics = folder / METRICS_FILE
    written = metrics.exists() and metrics.stat().length > 0
    saved = (folder / SAVED_FILE).exists() or list_steps(folder / CHECKPOINTS, damaged=True)
    return written or bool(saved)


def check_history(config: Config) -> None:
    """UserError when the checkpoints of a run are gone that has metrics: it would begin again and overwrite them."""
    folder = config.folder
    checkpoints, metrics = folder / CHECKPOINTS, folder / METRICS_FILE
    with store_errors(folder):
        if not metrics.exists() or not metrics.stat().length or list_steps(checkpoints):
            return
        # A run that ended before its first checkpoint may begin again. Its folder of checkpoints is there all the same.
        gone = (folder / SAVED_FILE).exists() or not (is_url(folder) or checkpoints.is_dir())
        # One was put aside because another was sound, and that is gone.
        gone = gone or bool(list_steps(checkpoints, damaged=True))
        # Where that file is not, either: a run that was killed in its first save has left a part of it.
        emptied = not (checkpoints.is_dir() and any(checkpoints.iterdir()))
        lines = read_lines(metrics)
    if gone or (emptied and lines and lines[-1]["step"] > config.train.checkpoint_every):
        raise UserError(
            f"{checkpoints}: no checkpoint is left of the run whose metrics are in {metrics}; put them back (is a disk not "
            "mounted?), or forget that run with --restart"
        )
