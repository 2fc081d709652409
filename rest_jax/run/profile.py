"""The trace of one step, for Perfetto (ui.perfetto.dev) or xprof: what the device and the host's stages did and when."""

import contextlib
import pathlib
from collections.abc import Callable, Iterator

import jax

FOLDER = "profile"


class Tracer:
    """Traces step `wanted` of a run into <run>/profile; None: no step."""

    def __init__(self, run: pathlib.Path, wanted: int | None):
        self.folder, self.wanted, self.written = run / FOLDER, wanted, False

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
        with jax.profiler.trace(self.folder, create_perfetto_trace=True, profiler_options=options):
            with jax.profiler.StepTraceAnnotation("step", step_num=number):
                yield
            wait()
        self.written = True

    def report(self, say: Callable[[str], None]) -> None:
        """One line on where the trace is, or why there is none."""
        if self.wanted is None:
            return
        if self.written:
            files = sorted(self.folder.rglob("perfetto_trace.json.gz"))
            say(
                f"trace of step {self.wanted}: {files[-1]} opens in ui.perfetto.dev, {self.folder} in xprof"
            )
        else:
            say(f"no trace: step {self.wanted} was not among the steps run")
