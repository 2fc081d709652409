"""The process in which a command runs: XLA's compilation cache and CPU flags, signals, and the command `rest-jax doctor`.

`configure()` sets environment variables. An entry point calls it once, before anything imports jax, which reads them when it
starts; child processes inherit them. What the user has set always wins: JAX_COMPILATION_CACHE_DIR,
JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS, XLA_FLAGS and XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB are jax's own, LIBTPU_INIT_ARGS is
libtpu's, MALLOC_ARENA_MAX and GLIBC_TUNABLES are glibc's, REST_JAX_CACHE is a folder for the cache, or "off".
"""

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import os
import pathlib
import platform
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from rest_jax.cache_folder import user_cache
from rest_jax.errors import UserError
from rest_jax.texts import warn

# XLA aborts the process on a flag it does not know: this one was tried with the jaxlib named here. XLA's own choice is 256.
CHECKED_JAXLIB = "0.10."
VECTOR_WIDTH = "xla_cpu_prefer_vector_width"
_CPU_INFO = pathlib.Path("/proc/cpuinfo")
# Where Linux says whether programs get huge pages: always, on their request (madvise), or never.
HUGE_PAGES = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")

# Flags of libtpu. No product becomes a ring of partial products over the contracted, fsdp-sharded dimension: each step of a ring
# reads and writes the complete result and rounds it to bfloat16. Qwen3-1.7B on v5e:4x4, fsdp 16, a micro-batch of 10,240
# positions a chip: 3,598 ms of libtpu's estimated cycles with rings, 1,317 without. Flags for asynchronous collectives, on TPU
# and GPU, change nothing or hide less (docs/performance.md), so that none is set.
LIBTPU_FLAGS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
LIBTPU_VARIABLE = "LIBTPU_INIT_ARGS"

# Arenas from which glibc's malloc serves the threads of a process; its own choice is eight a core. Each keeps what its threads
# have freed, so that a run of dozens of threads, which saves now and then, grows for thousands of steps (docs/reliability.md).
ARENAS, ARENA_VARIABLE, ARENA_TUNABLE = 4, "MALLOC_ARENA_MAX", "glibc.malloc.arena_max"
_M_ARENA_MAX = -8  # malloc.h

# The memory of the host that a process with GPUs may use beside them, for moments and for copies of the state. XLA's own limit of
# 64 GB is less than the 12 bytes a parameter of an 8B model.
HOST_LIMIT = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"

_CACHE = "JAX_COMPILATION_CACHE_DIR"
# A program that compiles faster than this many seconds is not worth a file.
_MIN_COMPILE_SECONDS = "0.05"

PACKAGES = ("rest-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers")
# A module that each extra of the package installs (`pip install "rest-jax[cuda]"`).
EXTRAS = {
    "tpu": "libtpu",
    "cuda": "jax_cuda12_plugin",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "trackio": "trackio",
    "postgres": "psycopg",
    "gcs": "gcsfs",
    "s3": "s3fs",
}
# jax is started in a process of its own: it ends its process when XLA does not know a flag, and may wait for other hosts.
PROBE = """
from rest_jax.run.environment import end_when_closed
end_when_closed(0)
import jax
for d in jax.local_devices():
    memory = (d.memory_stats() or {}).get("bytes_limit")
    print(d, d.device_kind, f"{memory / 2**30:.1f} GiB" if memory else "memory of the host", sep=", ")
"""
PROBE_SECONDS = 120
ORPHANED = 70  # exit code of a process whose parent is gone


def configure() -> None:
    """Sets the variables. A cache folder that cannot be made or written means no cache and one line on stderr."""
    # transformers says on every start that PyTorch is missing; only its tokenizers are used here.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    limit_arenas()
    os.environ.setdefault(HOST_LIMIT, str(host_memory() >> 30))
    if flags := xla_flags(os.environ.get("XLA_FLAGS", "")):
        os.environ["XLA_FLAGS"] = flags
    os.environ[LIBTPU_VARIABLE] = libtpu_flags(os.environ.get(LIBTPU_VARIABLE, ""))
    if _CACHE not in os.environ:
        chosen = os.environ.get("REST_JAX_CACHE")
        if chosen == "off":
            return
        try:
            os.environ[_CACHE] = _writable(chosen)
        except (OSError, RuntimeError, UserError) as error:  # RuntimeError: ~ and no home folder
            warn(f"no compilation cache: {error}")
            return
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", _MIN_COMPILE_SECONDS)


def host_memory() -> int:
    """Bytes of memory that this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def limit_arenas() -> None:
    """For this process, whose malloc has read the environment already, and its children. Only glibc has arenas."""
    if ARENA_VARIABLE in os.environ or ARENA_TUNABLE in os.environ.get("GLIBC_TUNABLES", ""):
        return
    os.environ[ARENA_VARIABLE] = str(ARENAS)
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, ARENAS)


def xla_flags(present: str) -> str:
    """`present` (XLA_FLAGS as it is) with 512-bit vectors, where the CPU has them and nothing speaks against it."""
    # A first word without "-" is a file of flags. libtpu reads XLA_FLAGS too and has a list of flags of its own.
    theirs = VECTOR_WIDTH in present or present.strip()[:1] not in ("", "-")
    if theirs or importlib.util.find_spec("libtpu"):
        return present
    try:
        known = importlib.metadata.version("jaxlib").startswith(CHECKED_JAXLIB)
        able = "avx512f" in _CPU_INFO.read_text(errors="replace").split()
    except (importlib.metadata.PackageNotFoundError, OSError):
        return present
    return f"{present} --{VECTOR_WIDTH}=512".strip() if known and able else present


def libtpu_flags(present: str) -> str:
    """`present` (LIBTPU_INIT_ARGS as it is) with `LIBTPU_FLAGS`, those that it names excepted."""
    ours = (f"--{name}={value}" for name, value in LIBTPU_FLAGS.items() if name not in present)
    return " ".join([present, *ours]).strip()


def _writable(chosen: str | None) -> str:
    """The cache folder, made if absent. OSError where that fails; a URL (gs://..) is jax's business."""
    if chosen and "://" in chosen:
        return chosen
    folder = pathlib.Path(chosen).expanduser().absolute() if chosen else user_cache() / "xla"
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} is not writable")
    return str(folder)


@contextlib.contextmanager
def handled(handler: Callable[[int, Any], Any], *numbers: int) -> Iterator[None]:
    """Within the block `handler` (number, frame) gets these signals; afterwards the earlier handlers do. Main thread only."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)


def end_when_closed(pipe: int) -> None:
    """Has a thread end this process at once, with exit code ORPHANED, when the other end of a pipe is closed. The process that
    started this one holds it, and loses it however it ends.
    """

    def wait() -> None:
        select.select([pipe], [], [])
        # Not sys.exit: the main thread may be inside XLA, where no exception reaches it.
        os._exit(ORPHANED)

    threading.Thread(target=wait, daemon=True, name="parent").start()


def versions() -> dict[str, str]:
    """The version of each of PACKAGES, or "missing"."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "missing"
    return found


def cpu_model() -> str:
    """What the CPU calls itself; the architecture where Linux does not say."""
    lines = _CPU_INFO.read_text(errors="replace").splitlines() if _CPU_INFO.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def diagnose() -> str:
    """What is installed here and what it will run on: one line a fact. It needs no network."""
    rows = [("python", f"{platform.python_version()} on {platform.platform()}")]
    rows += versions().items()
    rows += [("device", line) for line in _devices()]
    memory = host_memory() / 2**30
    kernel = HUGE_PAGES.read_text().strip() if HUGE_PAGES.is_file() else "unknown"
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", "")
    usable = "://" in cache or os.access(cache, os.W_OK | os.X_OK)
    rows += [
        ("host", f"{os.cpu_count()} cores, {memory:.1f} GiB memory"),
        ("compilation cache", f"{cache or 'none'}{'' if usable else ', not writable'}"),
        ("XLA_FLAGS", os.environ.get("XLA_FLAGS") or "none"),
        ("huge pages", f"{kernel}; GLIBC_TUNABLES={os.environ.get('GLIBC_TUNABLES', '')}"),
    ]
    for extra, module in EXTRAS.items():
        found = importlib.util.find_spec(module) is not None
        fix = f'{module} is missing: pip install "rest-jax[{extra}]"'
        rows.append((f"extra {extra}", "installed" if found else fix))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def _devices() -> list[str]:
    """A line for each device of this process, or one that says why there are none."""
    command = [sys.executable, "-c", PROBE]
    watched, held = os.pipe()
    try:
        done = subprocess.run(
            command, stdin=watched, capture_output=True, text=True, timeout=PROBE_SECONDS
        )
    except subprocess.TimeoutExpired:
        return [f"jax does not start: no answer in {PROBE_SECONDS} s"]
    finally:
        os.close(watched)
        os.close(held)
    if done.returncode == 0:
        return done.stdout.splitlines()
    said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return [f"jax does not start: {said[-1]}"]
