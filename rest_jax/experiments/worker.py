"""Workers: each takes trials from a study, trains each as a child process, reports its held-out metric, prunes it.

In: an `Experiment` (which runs, judged by which metric) and an `Engine` (how many workers, which database).
Out: run folders, and their results in the study. A trial is a process because JAX gives no memory back to the next
trial, and because a crash then ends one trial and not the worker. SIGTERM (or the first Ctrl-C) to a worker: the run
saves and stops, and the trial is free for any worker at once. A run that fails ends its trial with its last line.
That process is `python -m rest_jax.experiments.worker WORDS...`: it does what `rest-jax WORDS...` does, and ends when
its standard input is closed, so that a worker that is killed takes its run along.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import pathlib
import re
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import Trial, TrialState

from rest_jax import config as config_lib
from rest_jax.config import Config, ConfigError
from rest_jax.errors import UNFINISHED, RunStopped, UserError
from rest_jax.experiments import storage
from rest_jax.files import open_bytes, store_errors
from rest_jax.run.environment import end_when_closed, handled
from rest_jax.run.metrics import METRICS_FILE, parse_lines
from rest_jax.texts import one_line, print_text


@dataclasses.dataclass(frozen=True)
class Job:
    """The words of a run: `rest-jax <command> <files> <overrides>`."""

    command: str
    files: tuple[str, ...]
    overrides: tuple[str, ...] = ()

    def config(self) -> Config:
        """Its resolved config, loaded once. ConfigError."""
        return _load(self)

    def with_values(self, values: Mapping[str, Any]) -> "Job":
        """The same run with other config values, by dotted key."""
        words = (f"{key}={json.dumps(value)}" for key, value in values.items())
        return dataclasses.replace(self, overrides=(*self.overrides, *words))


@functools.cache
def _load(job: Job) -> Config:
    return config_lib.load(job.files, job.overrides)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What all workers of a study share. It is pickled for the workers of this machine."""

    name: str
    folder: pathlib.Path  # of the database and the logs
    runs: Mapping[str, Mapping[str, Any]]  # run -> parameters that are fixed beforehand
    job: Callable[[Trial, str], Job]  # draws what is left of a run
    metric: str
    direction: str = "maximize"
    pruner: optuna.pruners.BasePruner = dataclasses.field(default_factory=optuna.pruners.NopPruner)
    definition: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Engine:
    """How an experiment is carried out."""

    workers: int = 1  # processes on this machine; 0: only results
    storage: str | None = None  # SQLAlchemy URL; None: study.db in the experiment's folder
    heartbeat: int = 30  # seconds; a worker silent for four times as long is taken for dead
    poll: float = 1.0  # seconds between looks at a run
    program: tuple[str, ...] = (sys.executable, "-m", "rest_jax.experiments.worker")


class _Lost(Exception):
    """The run was stopped before its end; the trial is free for any worker."""


class _Failed(Exception):
    """The run has ended without a value, and is not tried again."""


class _TakenAway(BaseException):
    """Another worker took the trial for stale. No Exception: Optuna could not end a trial that is ended already."""


def carry_out(experiment: Experiment, engine: Engine) -> optuna.Study:
    """Works until every trial is done, or until SIGTERM or Ctrl-C; the study as it is then.

    UserError when the database, or a study that was begun differently, forbids it; RunStopped when all workers fail.
    """
    worker = Worker(experiment, engine)
    if engine.workers == 1:
        worker.work()
    elif engine.workers:
        spawn = multiprocessing.get_context("spawn").Process
        words = [(experiment, engine, index) for index in range(engine.workers)]
        processes = [spawn(target=_work_on_share, args=arguments) for arguments in words]
        for process in processes:
            process.start()
        with handled(worker.stop, signal.SIGTERM, signal.SIGINT):
            while any(process.is_alive() for process in processes):
                for process in processes:
                    process.join(engine.poll)
                    if worker.stopping:
                        process.terminate()
        if not worker.stopping and all(process.exitcode for process in processes):
            raise RunStopped(f"{experiment.name}: every worker ended with an error")
    return worker.study


class Worker:
    """One worker: its connection to the study, and whether it was told to stop."""

    def __init__(self, experiment: Experiment, engine: Engine):
        """Opens the study and enqueues its runs. UserError as of `carry_out`."""
        self.experiment, self.engine = experiment, engine
        url = engine.storage or f"sqlite:///{experiment.folder / 'study.db'}"
        self.stopping = False
        with storage.failures(experiment.name):
            self.study = optuna.create_study(
                storage=storage.open_storage(url, engine.heartbeat),
                study_name=experiment.name,
                direction=experiment.direction,
                pruner=experiment.pruner,
                load_if_exists=True,
            )
            storage.check_same(self.study, experiment.definition)
            storage.enqueue(self.study, experiment.runs)

    def stop(self, number: int, _: Any) -> None:
        """Handles a signal. A second Ctrl-C interrupts."""
        self.stopping = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def work(self) -> None:
        """Takes trials until all are done; while others work it waits, since they may die. RunStopped without storage."""
        with (
            storage.failures(self.experiment.name),
            handled(self.stop, signal.SIGTERM, signal.SIGINT),
        ):
            while not self.stopping:
                storage.retry_lost(self.study)
                states = {trial.state for trial in self.study.get_trials(deepcopy=False)}
                if TrialState.WAITING in states:
                    with contextlib.suppress(_TakenAway):
                        self.study.optimize(self.objective, n_trials=1, catch=(_Lost, _Failed))
                elif TrialState.RUNNING in states:
                    time.sleep(self.engine.poll)
                else:
                    return

    def objective(self, trial: Trial) -> float:
        """Trains one run to its end; its last value of the metric. _Lost, _Failed or TrialPruned when there is none."""
        # Optuna makes a trial without a run where another worker took the last that was waiting.
        run = trial.user_attrs.get(storage.RUN, "")
        try:
            found = self._train(trial, run)
        except (_Lost, _Failed, optuna.TrialPruned) as ended:
            self._say(run, str(ended))
            if not isinstance(ended, _Lost):
                trial.set_user_attr(storage.REASON, str(ended))
            raise
        except UpdateFinishedTrialError as error:
            self._say(run, "another worker has it")
            raise _TakenAway from error
        step = max(found)
        self._say(run, f"complete at step {step}; {self.experiment.metric} {found[step]:.4g}")
        return found[step]

    def _train(self, trial: Trial, run: str) -> dict[int, float]:
        """The evaluations of the run, step -> value."""
        chosen = storage.current(self.study).get(run)
        # Two workers may enqueue the same attempt.
        if chosen is None or chosen.number != trial.number:
            raise _Failed("duplicate")
        try:
            job = self.experiment.job(trial, run)
            config = job.config()
        except ConfigError as error:
            # A pruned trial and not a failed one: TPE learns from it.
            raise optuna.TrialPruned(f"{storage.INVALID}: {error}") from error
        verb = "resumes" if storage.attempts(chosen) > 1 else "begins"
        self._say(run, " ".join((verb, *(f"{k}={shown(v)}" for k, v in trial.params.items()))))
        evaluations = Evaluations(config, self.experiment.metric)
        reported = set(chosen.intermediate_values)
        if not is_finished(config, self.experiment.metric):
            log = self.experiment.folder / "logs" / f"{run}.log"
            words = [*self.engine.program, job.command, *job.files, *job.overrides]
            with _running(words, log) as child:
                while child.poll() is None:
                    self._look(trial, evaluations, reported)
                    time.sleep(self.engine.poll)
            self._check_end(evaluations, child.returncode, log)
        self._report(trial, evaluations, reported)
        return evaluations.read()

    def _look(self, trial: Trial, evaluations: "Evaluations", reported: set[int]) -> None:
        """Reports what is new. Raises, which ends the run, when the trial is pruned, is to stop, or is not ours."""
        if self.stopping:
            trial.set_user_attr(storage.STOPS, trial.user_attrs.get(storage.STOPS, 0) + 1)
            raise _Lost("stopped and saved; free for any worker")
        # UpdateFinishedTrialError when another worker took the trial.
        seconds = trial.user_attrs.get(storage.SECONDS, 0.0) + self.engine.poll
        trial.set_user_attr(storage.SECONDS, seconds)
        step = self._report(trial, evaluations, reported)
        last = evaluations.config.train.steps
        if step is not None and step != last and trial.should_prune():
            raise optuna.TrialPruned(f"pruned at step {step}")

    def _check_end(self, evaluations: "Evaluations", code: int, log: pathlib.Path) -> None:
        """Raises _Failed when the run did, and _Lost when it was stopped before its last step."""
        found, steps = evaluations.read(), evaluations.config.train.steps
        early = code == 0 and steps is not None and max(found, default=steps) < steps
        if code in (-signal.SIGTERM, UNFINISHED) or early:
            raise _Lost("its run was stopped; free for any worker")
        if code:
            raise _Failed(how_it_failed(code, log))
        if not found:
            raise _Failed(f"no {self.experiment.metric} in its metrics")

    def _report(self, trial: Trial, evaluations: "Evaluations", reported: set[int]) -> int | None:
        """Reports the evaluations that are new; the step of the last one, None without any."""
        step = None
        found = evaluations.read()
        for step in sorted(found.keys() - reported):
            trial.report(found[step], step)
            reported.add(step)
        return step

    def _say(self, run: str, text: str) -> None:
        print_text(f"{self.experiment.name} {run}: {one_line(text)}")


@contextlib.contextmanager
def _running(words: Sequence[str], log: pathlib.Path) -> Iterator[subprocess.Popen[bytes]]:
    """The process of a run, its output appended to `log`. It saves and stops when its trial ends before it, and is
    killed when anything else leaves the block.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    # Ctrl-C is ours to pass on, hence a session of its own.
    with (
        log.open("ab") as out,
        subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=out, stderr=out, start_new_session=True
        ) as process,
    ):
        try:
            yield process
        except (_Lost, optuna.TrialPruned):
            process.terminate()
            process.wait()
            raise
        finally:
            process.kill()


class Evaluations:
    """The values of a held-out metric of a run that trains: what is new is read alone, whatever the lines before it."""

    def __init__(self, config: Config, metric: str):
        self.config, self.metric = config, metric
        self._path = config.folder / METRICS_FILE
        self._begin()

    def _begin(self) -> None:
        self._found: dict[int, float] = {}
        self._lines = self._offset = 0
        self._last = b""  # the line that ends at the offset

    def read(self) -> dict[int, float]:
        """step -> value so far, in order; empty before the first. A line that cannot be read ends them, as a power cut may have
        left one: the run drops it when it resumes, or is refused for it.
        """
        with store_errors(self._path):
            if not self._path.is_file():
                return {}
            with open_bytes(self._path) as file:
                file.seek(self._offset - len(self._last))
                if file.read(len(self._last)) != self._last:  # a resumed run has cut its file
                    self._begin()
                    file.seek(0)
                *lines, _ = file.read().split(b"\n")
        first = self._lines + 1
        try:
            found = parse_lines(self._path, lines, first=first)
        except UserError:
            lines = list(itertools.takewhile(self._is_readable, lines))
            found = parse_lines(self._path, lines, first=first)
        for line in found:
            if line.get(self.metric) is not None:
                self._found[line["step"]] = line[self.metric]
        if lines:
            self._lines += len(lines)
            self._offset += sum(len(line) + 1 for line in lines)
            self._last = lines[-1] + b"\n"
        return dict(self._found)

    def _is_readable(self, line: bytes) -> bool:
        try:
            return bool(parse_lines(self._path, [line]))
        except UserError:
            return False


def is_finished(config: Config, metric: str) -> bool:
    """Whether the run's folder holds the evaluation of its last step. UserError when it is another config's."""
    # Imports jax, which a run is to do for itself.
    from rest_jax.run.folder import check_config

    check_config(config.folder, config)
    return config.train.steps in Evaluations(config, metric).read()


def how_it_failed(code: int, log: pathlib.Path) -> str:
    """Exit code and last words of a process: its error's, which jax's remark on tracebacks may follow."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines[-200:] if line.startswith("rest-jax: error: ")]
    raised = [line for line in lines[-10:] if re.match(r"[\w.]*(Error|Exception)\b", line)]
    last = (errors or raised or lines or ["no output"])[-1].removeprefix("rest-jax: error: ")
    ended = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    return f"{ended}: {last[:300]} (log: {log})"


def shown(value: Any) -> str:
    """A parameter as text: floats with 4 digits, null for None."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _work_on_share(experiment: Experiment, engine: Engine, index: int) -> None:
    """A worker process of this machine, on every n-th CPU core and listed GPU where there are enough of them. It ends with the
    process that started it.
    """
    if (parent := multiprocessing.parent_process()) is not None:
        end_when_closed(parent.sentinel)
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[index :: engine.workers] or cores)
    gpus = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu.strip()]
    if own := gpus[index :: engine.workers]:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(own)
    try:
        Worker(experiment, engine).work()
    except (UserError, RunStopped) as error:
        sys.exit(f"rest-jax: error: {one_line(str(error))}")


if __name__ == "__main__":
    end_when_closed(0)
    runpy.run_module("rest_jax", run_name="__main__")
