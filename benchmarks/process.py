"""One measured process: started as the program starts, one call timed, one JSON line out.

    start()                          before anything imports jax
    measure(case, work, repeats)     warm-up, timed calls -> the record

The warm-up is building the case and its first call, compilation included; it is reported, not counted. A call returns when
the device is done. Times are medians over the timed calls; CPU seconds are those of all threads of the process.
"""

import argparse
import dataclasses
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

from benchmarks import cpu_peak
from rest_jax.run import environment

ONE_CORE = "--xla_cpu_multi_thread_eigen=false"


@dataclasses.dataclass(frozen=True)
class Work:
    """What is timed. `call` gets the number of the call, 0 for the warm-up."""

    call: Callable[[int], Any]
    tokens: int
    flops: float  # model FLOPs of a call (`rest_jax.run.throughput`)
    # more fields of the record, read after the last call
    extra: Callable[[], dict[str, Any]] = dict
    close: Callable[[], None] = lambda: None  # after all of it


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the arguments in one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def positive(text: str) -> int:
    """A positive integer, from an argument."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: an integer of at least 1 is needed")
    return int(text)


def start() -> None:
    """XLA set up as the program sets it up; pinned to one core, it needs no threads for its matrix products."""
    flags = os.environ.get("XLA_FLAGS", "")
    if core_count() == 1 and "multi_thread_eigen" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {ONE_CORE}".strip()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    environment.configure()


def core_count() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def measure(case: str, make_work: Callable[[], Work], repeats: int) -> dict[str, Any]:
    """The record of one process, as the peers print it, and the share of the matrix-product rate that was reached."""
    import jax

    from rest_jax.run.throughput import peak_flops

    begun = time.perf_counter()
    work = make_work()
    try:
        work.call(0)
        warmup = time.perf_counter() - begun
        cpu, wall = zip(*(timed(work.call, number + 1) for number in range(repeats)), strict=True)
    finally:
        work.close()
    peak_bytes = peak_memory()
    rate = work.flops / statistics.median(wall)
    device = jax.local_devices()[0]
    best = (
        peak_flops(device, jax.numpy.bfloat16) or cpu_peak.measured_cpu_peak()
    )  # after the memory was read
    return {
        "case": case,
        "side": "rest_jax",
        "tokens": work.tokens,
        "cpu_seconds": statistics.median(cpu),
        "wall_seconds": statistics.median(wall),
        "tokens_per_cpu_second": work.tokens / statistics.median(cpu),
        "device": device.device_kind,
        "tokens_per_second": work.tokens / statistics.median(wall),
        "peak_bytes": peak_bytes,
        "device_peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),
        "warmup_seconds": warmup,
        "model_flops_per_second": rate,
        "matmul_flops_per_second": best,
        "flops_share": rate / best,
        **work.extra(),
    }


def timed(call: Callable[[int], Any], number: int) -> tuple[float, float]:
    """(CPU seconds, wall seconds) of one call."""
    cpu, wall = time.process_time(), time.perf_counter()
    call(number)
    return time.process_time() - cpu, time.perf_counter() - wall


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
