"""What the two training loops share: resumption, one clock, metrics read a step late, evaluation, checkpoints, the end.

    state, loader_state = loop.resume(fresh, abstract, params, start)
    with loop.stoppable():
        for step in loop.steps():
            ...                                   dispatch the step
            loop.end_step(step, pending, state, loader_state)

The metrics of a step are read while the next one runs, so that the host never waits for a value it has just asked for. A
step with an evaluation or a checkpoint reads its own first: whatever checkpoint a restarted run finds, the lines up to it
are on disk.
"""

import contextlib
import dataclasses
import json
import math
import operator
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from etils import epath

from rest_jax.config import Config
from rest_jax.distributed import exchange, is_first_process, say
from rest_jax.errors import RunStopped, UserError
from rest_jax.files import list_files, written_locally
from rest_jax.rl.update import NOT_FINITE
from rest_jax.run.folder import EVALUATION, Run, not_finite
from rest_jax.run.fork import Start
from rest_jax.run.metrics import metric, shown_value
from rest_jax.run.progress import Progress
from rest_jax.run.stop import StopNow
from rest_jax.run.symptoms import Watch
from rest_jax.run.throughput import memory_in_use
from rest_jax.types import Params, TrainState

NOT_FINITE_LIMIT = 3  # updates in a row that are not finite and stop the run
_MOST = 2**31 - 1  # records of a run: each has a row id
_NOT_SAID = ("eval/truncated",)  # rates that the line of an evaluation leaves out
EVAL_SAMPLES = 8  # held-out completions written to samples.jsonl after each evaluation

Evaluation = tuple[dict[str, float], list[dict[str, Any]]]  # eval/ metrics, one sample a prompt


class Clock:
    """Laps of wall-clock and CPU time without gaps between them: they sum to `elapsed`."""

    def __init__(self) -> None:
        self.start = self.last = time.monotonic()
        self.last_cpu = time.process_time()

    def lap(self) -> tuple[float, float]:
        """Seconds since the last lap: wall-clock, and CPU time of all threads."""
        now, cpu = time.monotonic(), time.process_time()
        lap = now - self.last, cpu - self.last_cpu
        self.last, self.last_cpu = now, cpu
        return lap

    @property
    def elapsed(self) -> float:
        """Seconds from the start to the end of the last lap."""
        return self.last - self.start


class Tracer:
    """Traces step `wanted` of a run into <run>/profile, for Perfetto (ui.perfetto.dev) or xprof; None: no step."""

    def __init__(self, run: epath.Path, wanted: int | None):
        self.folder, self.wanted, self.written = run / "profile", wanted, False

    @contextlib.contextmanager
    def step(self, number: int, wait: Callable[[], object]) -> Iterator[None]:
        """Around a step. For the step traced, `wait` is called to see the device's work to its end."""
        if number != self.wanted:
            with jax.profiler.StepTraceAnnotation("step", step_num=number):
                yield
            return
        options = jax.profiler.ProfileOptions()
        # Not every Python call: a Perfetto trace ends with its millionth event, and they would fill it before the update.
        options.python_tracer_level = 0
        with (
            written_locally(self.folder) as folder,
            jax.profiler.trace(folder, create_perfetto_trace=True, profiler_options=options),
        ):
            with jax.profiler.StepTraceAnnotation("step", step_num=number):
                yield
            wait()
        self.written = True

    def report(self, say: Callable[[str], None]) -> None:
        """One line on where the trace is, or why there is none."""
        if self.wanted is None:
            return
        if self.written:
            found = [n for n in list_files(self.folder) if n.endswith("perfetto_trace.json.gz")]
            say(
                f"trace of step {self.wanted}: {self.folder / max(found)} opens in ui.perfetto.dev, {self.folder} in xprof"
            )
        else:
            say(f"no trace: step {self.wanted} was not among the steps run")


def check_profile(profile: int | None, steps: int) -> None:
    """UserError for a step to trace that the run does not have."""
    if profile is not None and profile > steps:
        raise UserError(f"--profile {profile}: the run has {steps} steps; name one of them")


def total_steps(config: Config, records: int, key: str) -> int:
    """`train.steps`, or the complete steps in `train.epochs`; the value `key` is the number of records of a step.

    UserError when the data or the epochs do not make one.
    """
    size, epochs = operator.attrgetter(key)(config), config.train.epochs
    if records < size:
        raise UserError(
            f"data.train {config.data.train}: {records} records, fewer than {key} {size}; lower it or add data"
        )
    steps = config.train.steps or int(min(records // size * epochs, _MOST))
    if steps * size > _MOST:
        named = f"train.steps {steps}" if config.train.steps else f"train.epochs {epochs}"
        raise UserError(f"{named}: more than {_MOST} records in all; lower it")
    if steps == 0:
        raise UserError(f"train.epochs {epochs}: less than one step of {records} records; raise it")
    return steps


@dataclasses.dataclass
class PendingStep:
    """A step whose metrics are still on the device, and its batch in case they are not finite."""

    device: tuple[Any, ...]  # metrics; the last are the Totals of the step's updates
    read: Callable[..., dict[str, Any]]  # from the tree, on the host, to named values
    host: dict[str, float]
    rates: Callable[[Mapping[str, float]], dict[str, float]]  # from the times of the step
    must_be_finite: Sequence[str]  # names of values
    batch: Mapping[str, Any]  # arrays to save then
    dispatched: float  # time at which the update was handed to the device
    samples: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    # makes the line of the token viewer from values on the device, in the first process; None: this step has none
    tokens: Callable[[], dict[str, Any]] | None = None
    sums: Any = None  # on the device, too: `record.make_sums` of the step
    step: int = 0
    update_seconds: float | None = None  # None: the device was not seen to be done
    lap: tuple[float, float] | None = None  # None: the step has not ended
    elapsed: float = 0.0

    def wait(self) -> None:
        """Until the device is done with the update."""
        if self.update_seconds is None:
            jax.block_until_ready(self.device)
            self.update_seconds = time.monotonic() - self.dispatched


class Loop:
    """The steps of one run, from its newest checkpoint to `total`."""

    def __init__(
        self,
        run: Run,
        total: int,
        evaluate: Callable[[Params], Evaluation] | None,
        shown: Mapping[str, str],
        profile: int | None = None,
    ):
        """`evaluate`: held-out metrics of the parameters; None: there is no held-out data. `shown`: labels and metrics of
        the progress line. `profile`: a step to trace.
        """
        self.run, self.total, self.evaluate, self.shown = run, total, evaluate, shown
        run.total = total
        self.tracer = Tracer(run.folder, profile)
        self.pending: PendingStep | None = None
        self.last = total  # the step to end at
        # steps of which there is a checkpoint, and steps that have ended
        self.start = self.done = 0
        self.finished = True  # False once the run was told to stop before its last step
        self.evaluation_due = False  # that of the step `done`
        self._extra: dict[str, float] = {}
        self._symptoms = Watch()
        self._broken_in_a_row = 0
        self._fault = ""  # why the run has to stop

    def resume(
        self,
        fresh: Callable[[], TrainState],
        abstract: TrainState,
        params: Params,
        start: Start,
    ) -> tuple[TrainState, dict[str, Any]]:
        """The state and the loader's state of the newest sound checkpoint; without one, what the run begins with. See
        `Run.resume`.
        """
        self.state, loader_state, self.start = self.run.resume(fresh, abstract, params, start)
        self.done, self.evaluation_due = self.start, loader_state.pop(EVALUATION, False)
        if self.start >= self.total:
            say(f"{self.run.folder}: all {self.total} steps are done")
        elif self.start:
            say(f"{self.run.folder}: resumes after step {self.start}")
        self.progress = Progress(self.total, self.start)
        return self.state, loader_state

    def steps(self) -> Iterator[int]:
        """The numbers (from 1) of the steps to do. `end_step` must be called in each."""
        self.clock, train = Clock(), self.run.config.train
        self.run.stop.check()
        if self.evaluation_due:
            self._evaluate(self.start)
        for step in range(self.start + 1, self.last + 1):
            with self.tracer.step(step, lambda: jax.block_until_ready(self.state.params)):
                self._close_lap()
                yield step
            ends = step == self.total
            due = ends or (train.eval_every and step % train.eval_every == 0)
            self.evaluation_due = bool(due) and self.evaluate is not None
            self.run.stop.check()
            if self.evaluation_due:
                self._evaluate(step)
            if ends or step % train.checkpoint_every == 0:
                self._save(step)
            if self._fault:
                self._stop(step)

    @contextlib.contextmanager
    def stoppable(self) -> Iterator[None]:
        """Around the steps. When told to stop it throws the step under way away and saves the one before, and that its
        evaluation is due if it has not been made: the run that resumes does both again.
        """
        try:
            yield
        except StopNow:
            if self.done > self.start:
                self._save(self.done)
            self.run.wait()
            if self._fault:
                self._stop(self.done)
            self.finished = self.done == self.total and not self.evaluation_due
            saved = (
                f"saved at step {self.done}"
                if self.done
                else "stopped before the end of its first step"
            )
            if not self.finished:
                self.progress.message(
                    f"{self.run.stop.name}: {saved}; run the same command to resume"
                )
        self._flush()
        self.run.complete = self.finished
        self.progress.close()
        self.tracer.report(self.progress.message)

    def keep(self, state: TrainState) -> None:
        """Takes a copy of the state that the step under way began with, whose own arrays are about to go: a request to stop saves
        the copy.
        """
        self.state = state

    def end_step(
        self,
        step: int,
        pending: PendingStep,
        state: TrainState,
        loader_state: Callable[[], dict[str, Any]],
    ) -> None:
        """Writes the metrics of the step before, and keeps those of this one, which the device still computes. `loader_state` is
        called when there is a checkpoint.
        """
        self._flush()
        pending.step = step
        self.pending, self.state, self.loader_state = pending, state, loader_state
        self.done = step

    def _close_lap(self) -> None:
        """The step before ends where this one begins, unless it ended before an evaluation or a checkpoint."""
        if self.pending is not None and self.pending.lap is None:
            self.pending.wait()
            self.pending.lap = self.clock.lap()
            self.pending.elapsed = self.clock.elapsed

    def _flush(self) -> None:
        """Reads the pending step's metrics, looks for NaN, writes its lines."""
        if self.pending is None:
            return
        self._close_lap()
        p, self.pending = self.pending, None
        read, sums = jax.device_get((p.device, p.sums))
        values = {name: float(v) for name, v in p.read(*read).items()}
        self._check_finite(p, values, [bool(totals.sums[NOT_FINITE]) for totals in read[-1]])
        assert p.lap is not None and p.update_seconds is not None
        seconds, cpu = p.lap
        times = {name: value for name, value in p.host.items() if name.startswith("time/")}
        times |= {"time/step": seconds, "time/cpu": cpu, "time/update": p.update_seconds}
        times = self._of_all(times | self._extra | memory_in_use() | {"time/elapsed": p.elapsed})
        values |= p.host | times | p.rates(times)
        self._extra = {}
        if is_first_process():
            self.run.write(p.step, values, p.samples, p.tokens() if p.tokens else None, sums)
            for line in self._symptoms.look(values):
                self.progress.message(f"step {p.step}: {line}")
            shown = [
                f"{label} {shown_value(name, values[name])}" for label, name in self.shown.items()
            ]
            rate = f"{values['time/tokens_per_second']:,.0f} tokens/s"
            self.progress.update(p.step, ", ".join([*shown, rate]))

    def _check_finite(
        self, p: PendingStep, values: Mapping[str, float], skipped: Sequence[bool]
    ) -> None:
        """Says which updates were skipped, and notes a fault when there were too many in a row. RunStopped when the weights
        are broken: no later step could mend them, and none of the checkpoints has them.
        """
        found = not_finite(values, p.must_be_finite)
        for broken in skipped if any(skipped) else [bool(found)]:
            self._broken_in_a_row = self._broken_in_a_row + 1 if broken else 0
            if self._broken_in_a_row == NOT_FINITE_LIMIT:
                saved = self.run.save_batch(p.step, p.batch)
                self._fault = (
                    f"step {p.step}: not finite: {found}, as in the {NOT_FINITE_LIMIT} updates up to it. They changed no "
                    f"weights. The batch is saved in {saved}"
                )
        if not math.isfinite(values["update/param_norm"]):
            saved, good = self.run.save_batch(p.step, p.batch), self.run.checkpoints.latest()
            said = "there is no checkpoint yet" if good is None else f"checkpoint {good} is good"
            raise RunStopped(
                f"step {p.step}: not finite: {found}. The batch is saved in {saved}; {said}"
            )
        if found and not self._fault:
            self.progress.message(
                f"warning: step {p.step}: not finite: {found}; the update is skipped"
            )

    def _stop(self, step: int) -> None:
        """Saves this step, so that a restarted run does not repeat those before it, and raises RunStopped."""
        self._save(step)
        self.run.wait()
        raise RunStopped(
            f"{self._fault}; checkpoint {step} is good, and the same command continues behind it"
        )

    def _of_all(self, times: Mapping[str, float]) -> dict[str, float]:
        """Of all processes, which must all call it: the longest of their times, and their CPU times together."""
        with self.run.stop.waiting("the other processes"):
            said = exchange(json.dumps(dict(times)), self.run.stop.limits.save_timeout)
        found = [json.loads(text) for text in said]
        joined = {name: sum if name == "time/cpu" else max for name in times}
        return {name: join(own[name] for own in found) for name, join in joined.items()}

    def _evaluate(self, step: int) -> None:
        """Held-out metrics, as a line of their own."""
        self._flush()
        if self.evaluate is None:
            return
        values, samples = self.evaluate(self.state.params)
        times = self._of_all({"time/eval": self.clock.lap()[0]})
        shown = [{"split": "eval", **sample} for sample in samples[:EVAL_SAMPLES]]
        self.run.write(step, values | times, shown)
        self.evaluation_due = False
        rates = ", ".join(
            f"{name.removeprefix('eval/').replace('/', ' ')} {shown_value(name, value)}"
            for name, value in values.items()
            if metric(name).unit == "fraction" and name not in _NOT_SAID
        )
        found = values.get("eval/reward")
        reward = "" if found is None else f", reward {shown_value('eval/reward', found)}"
        self.progress.message(f"held out at step {step}: {rates}{reward}")

    def _save(self, step: int) -> None:
        self._flush()
        due = {EVALUATION: True} if self.evaluation_due else {}
        self.run.save(step, self.state, {**self.loader_state(), **due})
        self._extra["time/checkpoint"] = self.clock.lap()[0]
