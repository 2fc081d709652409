"""Carries out the runs of studies: several processes at once, each on cores of its own, resumed where they were.

Every run is a process of its own, like a trial of a sweep: a crash takes one run with it, memory goes back to the system
between runs, and a study that is killed takes its running ones along. Finished runs are passed over; a run broken off goes
on from its checkpoint. SIGTERM or Ctrl-C stops the running ones cleanly.
"""

import concurrent.futures
import contextlib
import dataclasses
import os
import pathlib
import signal
import threading
from collections.abc import Sequence

from tqdm import tqdm

from rest_jax.config import Config
from rest_jax.errors import RunStopped, UserError
from rest_jax.evaluation.heldout import evaluations
from rest_jax.experiments.study.plan import PlannedRun
from rest_jax.experiments.sweep.process import child_command, how_it_failed, running
from rest_jax.run.folder import check_config
from rest_jax.run.metrics import METRICS_FILE
from rest_jax.run.signals import handled


@dataclasses.dataclass(frozen=True)
class Job:
    """One process to be: a config to train. `after`: a supervised start that must be finished before."""

    config: Config
    after: Config | None = None

    @property
    def label(self) -> str:
        return str(self.config.folder)


def carry_out(runs: Sequence[PlannedRun], workers: int) -> None:
    """Trains every run that is not finished. RunStopped when one fails (its log is named) or when stopped by a signal."""
    jobs = jobs_left(runs)
    if not jobs:
        return
    stop = threading.Event()
    stopping = handled(lambda *_: stop.set(), signal.SIGTERM, signal.SIGINT)
    with stopping, tqdm(total=len(jobs), unit="run", smoothing=0) as bar:
        pool = Pool(jobs, workers, stop, bar)
        pool.run()
    if pool.failures:
        raise RunStopped("study: " + "; ".join(pool.failures))
    if stop.is_set():
        raise RunStopped("study: stopped; the same command goes on")


def jobs_left(runs: Sequence[PlannedRun]) -> list[Job]:
    """What is left to do, supervised starts first. UserError when a folder holds a run of another config."""
    found = []
    for run in runs:
        check(run)
        if is_finished(run):
            continue
        found.append(Job(run.config))
    return found


def check(run: PlannedRun) -> None:
    """UserError when its folder, or that of its start, holds a run of another config."""
    check_config(run.config.folder, run.config)


def is_finished(run: PlannedRun) -> bool:
    """Whether its last step is evaluated (which comes after the last update) and on disk."""
    if not (run.config.folder / METRICS_FILE).is_file():
        return False
    lines = evaluations(run.config.folder)
    return bool(lines) and lines[-1]["step"] == run.config.train.steps


class Pool:
    """Workers that take jobs from one list. A resource of `carry_out`."""

    def __init__(self, jobs: Sequence[Job], workers: int, stop: threading.Event, bar: tqdm):
        self.waiting, self.stop, self.bar = list(jobs), stop, bar
        self.cores = shares(available_cores(), workers)
        self.lock = threading.Lock()
        self.failures: list[str] = []

    def run(self) -> None:
        """Until nothing is left, one fails, or `stop` is set."""
        with concurrent.futures.ThreadPoolExecutor(len(self.cores), "study") as threads:
            for future in [threads.submit(self._work, cores) for cores in self.cores]:
                future.result()

    def _work(self, cores: set[int]) -> None:
        while not self.stop.is_set():
            with self.lock:
                job = self._next()
                if job is None and not self.waiting:
                    return
                if job is not None:
                    self.waiting.remove(job)
            if job is None:  # everything left waits for a start that another worker trains
                self.stop.wait(1.0)
                continue
            code = train(job.config, cores, self.stop)
            with self.lock:
                if code and not self.stop.is_set():
                    self.failures.append(
                        f"{job.label}: {how_it_failed(code, log_file(job.config))}"
                    )
                    self.stop.set()
                elif not self.stop.is_set():
                    self.bar.update()

    def _next(self) -> Job | None:
        return next(iter(self.waiting), None)


def train(config: Config, cores: set[int], stop: threading.Event) -> int:
    """One run in a process on `cores`; its exit code. When `stop` is set the process is told to save and end."""
    with running(child_command, config, log_file(config)) as process:
        _pin(process.pid, cores)
        while process.poll() is None:
            if stop.wait(0.2):
                process.terminate()
                break
        return process.wait()


def log_file(config: Config) -> pathlib.Path:
    """Where a run's output goes: beside the run folders, with its config."""
    return pathlib.Path(config.output) / "logs" / f"{config.name}.log"


def available_cores() -> list[int]:
    """Cores this process may use; made-up numbers where the system does not say."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def shares(cores: Sequence[int], workers: int) -> list[set[int]]:
    """The cores of each worker, as even as can be. UserError for more workers than cores."""
    if workers > len(cores):
        raise UserError(
            f"--workers {workers}: this machine has {len(cores)} cores; use at most so many"
        )
    return [set(cores[i::workers]) for i in range(workers)]


def _pin(pid: int, cores: set[int]) -> None:
    if hasattr(os, "sched_setaffinity"):
        with contextlib.suppress(ProcessLookupError):  # it ended at once; its log says why
            os.sched_setaffinity(pid, cores)
