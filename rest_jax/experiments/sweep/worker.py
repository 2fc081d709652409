"""A worker of a sweep: take a trial, run it in a process of its own, watch its held-out metric, tell Optuna, again.

A trial is a process, not a call: jax gives no memory back to the next trial, a crash ends
one trial and not the worker, and the worker itself touches no device. What starting costs is mostly compiling: rollout
and evaluation come from jax's cache on disk; the update has the swept constants compiled in, in either case.

SIGTERM (and the first Ctrl-C): the run saves and stops, and the trial is free for another worker at once.
"""

import contextlib
import dataclasses
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rest_jax.config import Config, ConfigError
from rest_jax.experiments.sweep import points, queue
from rest_jax.experiments.sweep import study as study_lib
from rest_jax.experiments.sweep.process import Command, child_command, how_it_failed, running
from rest_jax.experiments.sweep.space import Space
from rest_jax.run.metrics import METRICS_FILE, read_lines
from rest_jax.run.signals import handled

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial, Trial

LOGS = "logs"
_ELSEWHERE = "another worker has it"
_BEATS_IN_STALE = 8


@dataclasses.dataclass
class Worker:
    """What one worker knows. `command` makes the process of a trial from its config file."""

    space: Space
    shared: Config
    study: "optuna.Study"
    stale: float = 120.0  # seconds without a beat after which a worker is taken for dead
    poll: float = 0.5  # seconds between looks at a run's metrics
    command: Command = child_command
    stopping: bool = False
    silent: dict[int, float] = dataclasses.field(default_factory=dict)  # of queue.release_stale

    @property
    def folder(self) -> pathlib.Path:
        return study_lib.sweep_folder(self.space, self.shared)


def work(worker: Worker, limit: int | None = None) -> int:
    """The loop; how many trials this worker brought to an end."""
    done, since = 0, None
    with _stops(worker):
        while not worker.stopping and (limit is None or done < limit):
            for slot in queue.release_stale(worker.study, worker.stale, worker.silent):
                _say(worker, slot, "its worker is gone; free again")
            taken = queue.take(worker.study, worker.space)
            if taken is not None:
                done, since = done + run_trial(worker, *taken), None
                continue
            trials = worker.study.get_trials(deepcopy=False)
            others = any(trial.state.name == "RUNNING" for trial in trials)
            since = since or time.monotonic()
            # Others' trials may turn out to be dead ones; after that long, all that still run have shown a beat.
            if not others or time.monotonic() - since > worker.stale + 2 * worker.poll:
                break
            time.sleep(min(worker.poll, worker.stale))
    return done


def run_trial(worker: Worker, trial: "Trial", taken: "FrozenTrial") -> bool:
    """Runs a trial that is this worker's; whether it came to an end here (not stopped, not taken away)."""
    slot, started = taken.user_attrs[queue.SLOT], time.time()
    worker.study.sampler = study_lib.make_sampler(worker.space, slot)
    try:
        with _beats(trial, started, worker.stale) as taken_away:
            ended = _attempt(worker, trial, taken, taken_away)
            queue.beat(trial, started)
    except _finished_error():  # from any of the writes to the trial
        _say(worker, slot, _ELSEWHERE)
        return False
    if ended is not None:
        return _tell(worker, trial, slot, ended)
    if taken_away.is_set():
        _say(worker, slot, _ELSEWHERE)
        return False
    if worker.stopping:
        with contextlib.suppress(_finished_error()):
            trial.set_user_attr(queue.ENDED, {"state": "stopped", "reason": "stopped and saved"})
    queue.fail(worker.study, taken.number)
    _say(worker, slot, "stopped and saved; free for any worker")
    return False


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a trial ended: complete (with its value), pruned, failed or invalid, and why."""

    state: str
    reason: str
    value: float | None = None


def _attempt(
    worker: Worker, trial: "Trial", taken: "FrozenTrial", taken_away: threading.Event
) -> Ended | None:
    """Draws the point and runs it; as `_watch`."""
    slot = taken.user_attrs[queue.SLOT]
    folder = worker.folder / f"trial-{slot:04d}"
    point = points.suggest(worker.space, trial)
    try:
        config = points.point_config(worker.shared, point, folder)
    except ConfigError as error:
        return Ended("invalid", f"not a config: {str(error).removeprefix('point: ')}")
    trial.set_user_attr(queue.FOLDER, str(folder))
    again = "goes on: " if taken.user_attrs[queue.ATTEMPT] else ""
    _say(worker, slot, again + points.point_text(point))
    return _watch(worker, trial, taken, config, taken_away)


def _watch(
    worker: Worker,
    trial: "Trial",
    taken: "FrozenTrial",
    config: Config,
    taken_away: threading.Event,
) -> Ended | None:
    """Runs the process to its end, reporting every evaluation; None when the trial was not finished here."""
    found, pruned, read = dict(taken.intermediate_values), None, None
    metrics = worker.folder / config.name / METRICS_FILE
    log = worker.folder / LOGS / f"{config.name}.log"
    with running(worker.command, config, log) as process:
        while True:
            ended = process.poll() is not None
            if taken_away.is_set():
                return None
            if worker.stopping and not ended:
                process.terminate()  # it saves first
                process.wait()
                return None
            mark = _mark(metrics)
            if mark != read or ended:
                read = mark
                for step, value in evaluations(metrics, worker.space.metric):
                    if step in found:
                        continue
                    found[step] = value
                    trial.report(value, step)
                    at_end = ended or step == config.train.steps
                    if pruned is None and not at_end and trial.should_prune():
                        shown = f"{worker.space.metric} {value:.4g}"
                        pruned = Ended("pruned", f"pruned at step {step}: {shown}")
                        process.terminate()
            if ended:
                return pruned or _ended(worker, config, process.returncode, found, log)
            time.sleep(worker.poll)


def _ended(
    worker: Worker, config: Config, code: int, found: dict[int, float], log: pathlib.Path
) -> Ended | None:
    steps = config.train.steps
    if code == -signal.SIGTERM:  # before it could catch it
        return None
    if code != 0:
        return Ended("failed", how_it_failed(code, log))
    if worker.stopping:
        return None  # SIGTERM reached the run itself, maybe before its first evaluation
    if not found:
        return Ended("failed", f"no {worker.space.metric} in its metrics (log: {log})")
    if steps is not None and max(found) < steps:
        return None  # SIGTERM reached the run alone
    best = max if worker.space.direction == "maximize" else min
    value = found[max(found)] if worker.space.value == "last" else best(found.values())
    return Ended("complete", f"complete at step {max(found)}", value)


def evaluations(metrics: pathlib.Path, name: str) -> list[tuple[int, float]]:
    """(step, value) of a held-out metric so far, in order; empty before the first."""
    if not metrics.is_file():
        return []
    lines = read_lines(metrics)
    return [(line["step"], line[name]) for line in lines if line.get(name) is not None]


@contextlib.contextmanager
def _beats(trial: "Trial", started: float, stale: float) -> Iterator[threading.Event]:
    """Beats in a thread. The event is set when others have taken the trial for dead, or soon may."""
    over, taken_away = threading.Event(), threading.Event()

    def loop() -> None:
        last = time.monotonic()
        while not over.wait(stale / _BEATS_IN_STALE):
            try:
                queue.beat(trial, started)
                last = time.monotonic()
            except _finished_error():
                break
            except Exception as error:  # a storage out of reach comes back, or it does not
                print(f"trial {trial.number}: no beat: {error}", file=sys.stderr, flush=True)
                if time.monotonic() - last > stale * 0.75:
                    break
        else:
            return
        taken_away.set()

    queue.beat(trial, started)
    thread = threading.Thread(target=loop, name="beats", daemon=True)
    thread.start()
    try:
        yield taken_away
    finally:
        over.set()
        thread.join()


@contextlib.contextmanager
def _stops(worker: Worker) -> Iterator[None]:
    """SIGTERM and the first Ctrl-C ask the worker to stop; a second Ctrl-C interrupts."""

    def ask(number: int, _: Any) -> None:
        worker.stopping = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    with handled(ask, signal.SIGTERM, signal.SIGINT):
        yield


def _tell(worker: Worker, trial: "Trial", slot: int, ended: Ended) -> bool:
    """Ends the trial in the study. False when it is no longer this worker's."""
    import optuna

    states = optuna.trial.TrialState
    # An impossible point counts as pruned: TPE learns from pruned trials, and ignores failed ones.
    known = {"complete": states.COMPLETE, "failed": states.FAIL}
    try:
        trial.set_user_attr(queue.ENDED, {"state": ended.state, "reason": ended.reason})
        worker.study.tell(trial, ended.value, state=known.get(ended.state, states.PRUNED))
    except (ValueError, _finished_error()):
        _say(worker, slot, _ELSEWHERE)
        return False
    shown = "" if ended.value is None else f"; {worker.space.metric} {ended.value:.4g}"
    _say(worker, slot, ended.reason + shown)
    return True


def _say(worker: Worker, slot: int, text: str) -> None:
    print(f"{worker.space.name} trial {slot}: {text}", flush=True)


def _mark(path: pathlib.Path) -> tuple[int, int] | None:
    """Changes when the file does."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def _finished_error() -> Any:
    import optuna

    return optuna.exceptions.UpdateFinishedTrialError
