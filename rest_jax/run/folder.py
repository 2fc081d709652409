"""A run's folder and its life: resolved config, metrics, checkpoints, resumption, the request to stop, the NaN guard.

runs/<name>/  config.yaml  metrics.jsonl  samples.jsonl  tokens.jsonl  digests.jsonl  checkpoints/  curves.png
              model/ (HF side files)  fork.json (of a fork)

Both loops use it. `open_run` takes the lock and reads; `Run.begin`, behind all that may refuse a launch, is the first to write,
so that a launch which is refused leaves the folder as it was. Order within a step: metrics lines are stored before the
checkpoint of the same step is begun, so that whatever checkpoint a restarted run finds, the lines up to it are there; those
after it are dropped and written again.
The folder is a local one, or a URL of an object store (docs/storage.md).
"""

import contextlib
import dataclasses
import json
import math
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from rest_jax import config as config_lib
from rest_jax.config import Config
from rest_jax.distributed import agree, is_first_process, say
from rest_jax.errors import RunStopped, UserError, full_disk
from rest_jax.files import (
    Location,
    absolute,
    as_path,
    atomic_folder,
    atomic_write,
    is_url,
    make_folder,
    store_errors,
    written_locally,
)
from rest_jax.models.hf.folder import copy_side_files
from rest_jax.models.hf.remote import checkpoint_path
from rest_jax.models.tokenizer import Tokenizer
from rest_jax.run.checkpoint import FOLDER as CHECKPOINTS
from rest_jax.run.checkpoint import Checkpoints, list_steps, read_loader_state
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
    STEPS_FILE,
    MetricsWriter,
    last_step,
)
from rest_jax.run.record import CERTIFICATE_FILE, step_line
from rest_jax.run.results import read_results
from rest_jax.run.stop import SIGTERM_CODE, StopRequest, end
from rest_jax.run.trackers import KINDS, NAME_FILE, check_packages, check_trackers
from rest_jax.types import Params, TrainState

MODEL_FOLDER = "model"
# What else `--restart` removes, beside the files that the run writes line by line and what was measured of it: `run.trackers`,
# `run.loop` and `analysis.report` write these.
_MADE_FOLDERS = ("tensorboard", "profile")
_MADE_FILES = ("curves.png", "nan_step_*.npz")

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
    """An open run: the resources that the loop writes to, from `begin` on. `close` waits for the last checkpoint."""

    config: Config
    folder: epath.Path
    files: pathlib.Path  # the folder with the model's HF side files
    tokenizer: Tokenizer | None  # in the place of the one there
    stop: StopRequest
    check_lock: Callable[[], None]  # RunStopped when another process has taken the folder
    resources: contextlib.ExitStack
    restart: bool = False  # what the folder holds is to be forgotten
    origin: Origin | None = None  # of a fork
    metrics: MetricsWriter | None = None  # in the first process only
    checkpoints: Checkpoints = dataclasses.field(init=False, repr=False)
    marked: bool = False  # SAVED_FILE is there
    total: int | None = None  # steps in all, which the loop knows
    complete: bool = False  # and has done, with the evaluation of the last one
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
        run was made of something else: that is the last refusal of a launch, behind which it begins. `params`, the weights that a
        fresh state begins with, are deleted before a checkpoint is read: there need not be room for both.

        The loader state has EVALUATION if the evaluation that is due after the step is still to be made; what lines there are of
        it are dropped.
        """
        if not self.restart and list_steps(self.folder / CHECKPOINTS):
            self._check_newest()
            jax.tree.map(lambda x: x.delete(), params)
            # One is complete, so that what a killed save has left, which this removes, is of no use.
            self._open_checkpoints()
            state, loader_state, step = self._restore(abstract)
            self.begin(step, EVALUATION not in loader_state)
        elif self.origin is None:
            state, loader_state = fresh(), self.first_loader_state(start.loader_state)
            step = 0
            self.begin()
        else:
            jax.tree.map(lambda x: x.delete(), params)
            forked, saved = self.begin_fork(self.origin, abstract, start)
            self.begin()
            self.save(self.origin.step, forked, saved)
            self.wait()
            del forked
            state, loader_state, step = self._restore(abstract)
        if self.metrics is not None and self.launch:
            self.metrics.write_launch(step, self.launch)
        return state, loader_state, step

    def _check_newest(self) -> None:
        """UserError when the run was made of something else, by the newest checkpoint of which that can be read: before anything
        of them is removed or put aside.
        """
        folder = checkpoint_path(absolute(self.folder) / CHECKPOINTS)
        for step in sorted(list_steps(folder), reverse=True):
            try:
                saved = read_loader_state(folder / str(step)).get(MADE_OF, {})
            except (ValueError, OSError):
                continue  # damaged, which is told when it is restored
            check_same(saved, self.made_of, f"{self.folder}: checkpoint {step}")
            return

    def _restore(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any], int]:
        with self._in_time("restoring the checkpoint"):
            state, loader_state, step = self.checkpoints.restore(abstract)
        where = f"{self.folder}: checkpoint {step}"
        check_same(loader_state.pop(MADE_OF, {}), self.made_of, where)
        return state, loader_state, step

    def begin(self, step: int | None = None, evaluated: bool = True) -> None:
        """Makes the folder that of this launch, which nothing refuses any more, and opens what the loop writes to. Every process
        calls it; killed within it, the same command begins again.

        `step`: of the checkpoint that is continued behind, and whether it was `evaluated`; None: there is none, and no line is
        kept.
        """
        self.check_lock()  # compiling took minutes, in which another may have taken a folder in a store
        fault, timeout = None, self.config.distributed.save_timeout
        with self._in_time(f"{self.folder}: the beginning of the run"):
            if is_first_process():
                try:
                    self._write_begin(step, evaluated)
                except (UserError, RunStopped) as error:
                    fault = error
            agree(fault, timeout)
        if step is None:
            # Behind the cut of the metrics, since this removes what a save that was killed has left: lines without it are those
            # of a run that has lost its checkpoints (`check_history`).
            self._open_checkpoints()

    def _write_begin(self, step: int | None, evaluated: bool) -> None:
        with tempfile.TemporaryDirectory() as staged:
            # What cannot be read is refused before anything is forgotten.
            if step is None or not _has_model_files(self.folder / MODEL_FOLDER):
                self._stage_model_files(pathlib.Path(staged))
            self._write_folder(step, evaluated, pathlib.Path(staged))

    def _write_folder(self, step: int | None, evaluated: bool, staged: pathlib.Path) -> None:
        if self.restart:
            _forget(self.folder)
        # Before anything else is there: the same command takes a folder with it for its fork.
        if step is None and self.origin is not None:
            write_origin(self.folder, self.origin)
        self.metrics = MetricsWriter(self.folder, self.config)
        self.metrics.truncate_after(-1 if step is None else step, evaluated)
        # Before the config: lines that are to go are judged by the one they were written under.
        self.metrics.sync()
        with atomic_write(self.folder / CONFIG_FILE) as partial:
            partial.write_text(config_lib.dump(self.config))
        self._write_steps(step is not None and step >= (self.total or 0) and evaluated)
        _put_model_files(staged, self.folder / MODEL_FOLDER, anew=step is None)

    def _stage_model_files(self, staged: pathlib.Path) -> None:
        copy_side_files(self.files, staged)
        if self.tokenizer is not None:
            self.tokenizer.write_files(staged)

    def _open_checkpoints(self) -> None:
        keep, timeout = self.config.train.keep_checkpoints, self.config.distributed.save_timeout
        self.checkpoints = self.resources.enter_context(Checkpoints(self.folder, keep, timeout))
        self.resources.callback(self._end)

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

    def _end(self) -> None:
        self.wait()
        if self.complete and self.metrics is not None:
            self._write_steps(True)

    def _write_steps(self, complete: bool) -> None:
        """For `rest-jax runs`: a config may count in epochs, and the last line is written before its step is saved."""
        if self.total is not None:
            with atomic_write(self.folder / STEPS_FILE) as partial:
                partial.write_text(json.dumps({"steps": self.total, "complete": complete}))

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
            self.resources.close()

    def close_metrics(self) -> None:
        """The files and trackers, if they were opened."""
        if self.metrics is not None:
            self.metrics.close()

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
    config: Config,
    files: pathlib.Path,
    restart: bool = False,
    origin: Origin | None = None,
    tokenizer: Tokenizer | None = None,
) -> Run:
    """Takes the folder, which is made, and changes nothing in it: that is for `Run.begin`. UserError when another process trains
    in it, it holds a run of another config, or its checkpoints are gone; with `restart` the run that it holds is to be forgotten.
    `origin`: where a new fork comes from.

    `files` is the folder with the model's HF side files; they are copied so that the run can be exported on its own, with the
    files of `tokenizer` where the config names one (`model.tokenizer`).
    """
    folder = config.folder
    if not restart:
        check_config(folder, config)
        check_history(config)
    make_folder(folder)
    with contextlib.ExitStack() as stack:
        check_lock = stack.enter_context(locked(folder))
        if origin is None and not restart:
            origin = read_origin(folder)
        stop = StopRequest(config.distributed)
        if config.model.tokenizer is None:
            tokenizer = None  # that of `files`
        run = Run(config, folder, files, tokenizer, stop, check_lock, stack, restart, origin)
        # Resources are closed last to first: signals are caught until the last checkpoint is there, and no longer.
        stack.callback(run.close_metrics)
        stack.enter_context(stop.watched())
        run.resources = stack.pop_all()
        return run


def _put_model_files(staged: pathlib.Path, folder: epath.Path, anew: bool) -> None:
    """Puts the side files of the model into their folder, once, or `anew` in place of another launch's. In a store they are
    complete when config.json, put last, is there.
    """
    if not anew and _has_model_files(folder):
        return
    with store_errors(folder):
        if anew and is_url(folder):
            (folder / "config.json").unlink(missing_ok=True)
        if anew and folder.is_dir():
            folder.rmtree()
        write = written_locally if is_url(folder) else atomic_folder
        with write(folder, last="config.json") as partial:
            shutil.copytree(staged, partial, dirs_exist_ok=True)


def _has_model_files(folder: epath.Path) -> bool:
    with store_errors(folder):
        return (folder / "config.json" if is_url(folder) else folder).exists()


def _forget(folder: epath.Path) -> None:
    """Removes what a run has made of its folder, the lock and the model's files apart, and what was measured of its weights and
    steps. The metrics go last: until then a launch that does not restart is told what is missing, or resumes.
    """
    with store_errors(folder):
        for name in (CHECKPOINTS, *_MADE_FOLDERS):
            if (folder / name).is_dir():
                (folder / name).rmtree()
        files = [path for pattern in _MADE_FILES for path in folder.glob(pattern)]
        others = [name for name in FILES if name != METRICS_FILE]
        named = (
            FORK_FILE,
            *others,
            *read_results(folder),
            CERTIFICATE_FILE,
            SAVED_FILE,
            STEPS_FILE,
            NAME_FILE,
        )
        for path in (*files, *(folder / name for name in (*named, METRICS_FILE))):
            path.unlink(missing_ok=True)


def check_start(
    config: Config, restart: bool = False, fork_of: Location | Origin | None = None
) -> Origin | None:
    """All that can be refused before a model is loaded and a folder is made: another process or another config there,
    checkpoints that are gone, absent packages, a tracker that cannot be reached. Where a new fork comes from, of the run in the
    folder `fork_of` or of a checkpoint, as another fork did that is made again.
    """
    recorded = config.folder / CONFIG_FILE
    if is_first_process():
        check_free(config.folder)
    origin = None if fork_of is None else find_origin(fork_of, config, restart)
    if origin is not None and origin is not fork_of:
        theirs = config_lib.load([as_path(origin.run) / CONFIG_FILE])
        say(
            f"{config.folder} forks {origin} under another config: {_named(config_lib.differences(theirs, config))}"
        )
    elif origin is None and not restart:
        if found := check_config(config.folder, config):
            say(f"{config.folder} resumes under another config: {_named(found)}{_of_length(found)}")
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


def _of_length(found: Sequence[config_lib.Difference]) -> str:
    """What follows from a change of the run's length, to be said with it; "" for others."""
    if not any(d.path in ("train.steps", "train.epochs") for d in found):
        return ""
    return "; what takes its length from that of the run (learning rate, curriculum, reward.dynamic) continues by the new one"


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
        # By the config that the lines were written under: that of now may ask for a checkpoint sooner.
        written = folder / CONFIG_FILE
        wrote = config_lib.load([written]) if written.is_file() else config
        lost = emptied and last_step(metrics) > wrote.train.checkpoint_every
    if gone or lost:
        raise UserError(
            f"{checkpoints}: no checkpoint is left of the run whose metrics are in {metrics}; put them back (is a disk not "
            "mounted?), or forget that run with --restart"
        )
