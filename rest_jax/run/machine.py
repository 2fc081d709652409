"""What the machine is and how XLA is set up for it; the one place.

    relaunch_tuned(), configure()        before anything imports jax: memory, compilation cache, XLA flags
    mesh_peak_flops(devices, dtype)      FLOP/s the hardware could do: the denominator of MFU

jax is imported inside the functions that need it: its XLA flags are read from the environment when it starts.

Environment. REST_JAX_CACHE: folder of the compilation cache, or "off". JAX_COMPILATION_CACHE_DIR,
JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS and XLA_FLAGS are jax's own; what the user set there always wins.
"""

import functools
import importlib.metadata
import importlib.util
import os
import pathlib
import re
import sys
import time
from collections.abc import Iterable
from typing import Any

# XLA aborts the process on a flag it does not know: a flag goes in here after a run with this jaxlib.
CHECKED_JAXLIB = "0.10."
CPU_XLA_FLAGS: dict[str, str] = {
    "xla_cpu_prefer_vector_width": "512",  # XLA's own choice is 256 bits
}
_NEEDED_CPU_FEATURE = {"xla_cpu_prefer_vector_width": "avx512f"}

_MIN_COMPILE_SECONDS = 0.05  # what compiles faster is not worth a file

# Published peak FLOP/s of one jax device: dense, no sparsity, by a pattern searched in `device_kind`; the first match
# counts. bfloat16: matrix units with float32 accumulation. float32: the FP32 units of a GPU, since the models ask
# for true float32 matmuls, not TF32; no such rate is published for TPUs. NVIDIA's sheets state most bfloat16 rates
# with sparsity: twice the dense ones.
_BFLOAT16, _FLOAT32 = "bfloat16", "float32"
PEAK_FLOPS: dict[str, dict[str, float]] = {
    # docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e: peak compute per chip; a chip is one jax device
    r"TPU v4$": {_BFLOAT16: 275e12},
    r"TPU v5 lite|TPU v5e": {_BFLOAT16: 197e12},
    r"TPU v5p?$": {_BFLOAT16: 459e12},
    r"TPU v6 lite|TPU v6e": {_BFLOAT16: 918e12},
    # docs.cloud.google.com/tpu/docs/tpu7x: 2307e12 a chip, and a chip is two jax devices
    r"TPU7x": {_BFLOAT16: 2307e12 / 2},
    # NVIDIA A100 datasheet (nvidia.com/en-us/data-center/a100); SXM and PCIe are alike
    r"\bA100\b": {_BFLOAT16: 312e12, _FLOAT32: 19.5e12},
    # NVIDIA H100 and H200 datasheets (nvidia.com/en-us/data-center/h100, h200): SXM unless named otherwise
    r"\bH100 PCIe": {_BFLOAT16: 1513e12 / 2, _FLOAT32: 51e12},
    r"\bH[12]00 NVL": {_BFLOAT16: 1671e12 / 2, _FLOAT32: 60e12},
    r"\bH[12]00\b": {_BFLOAT16: 1979e12 / 2, _FLOAT32: 67e12},
    # NVIDIA HGX page (nvidia.com/en-us/data-center/hgx): HGX B200, 36e15 sparse and 600e12, by 8 GPUs
    r"\bB200\b": {_BFLOAT16: 2250e12, _FLOAT32: 75e12},
    # NVIDIA L4, L40S and A10 datasheets (nvidia.com/en-us/data-center/l4, l40s, products/a10-gpu)
    r"\bL4\b": {_BFLOAT16: 242e12 / 2, _FLOAT32: 30.3e12},
    r"\bL40S\b": {_BFLOAT16: 362.05e12, _FLOAT32: 91.6e12},
    r"\bA10\b": {_BFLOAT16: 125e12, _FLOAT32: 31.2e12},
    # NVIDIA Ada GPU architecture whitepaper, appendix A; the laptop's and the "D" are other chips
    r"RTX 4090$": {_BFLOAT16: 165.2e12, _FLOAT32: 82.6e12},
}

_MATMULS = ((1024, 1024, 1024), (2048, 512, 2048), (512, 2048, 2048))  # rows, inner, columns


_HUGE_PAGES = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
_HUGE_PAGE_TUNABLE = "glibc.malloc.hugetlb=1"


def relaunch_tuned() -> None:
    """Starts this program over with large allocations on huge pages, where the kernel leaves that to the program.

    XLA allocates the buffers of every call anew, and on CPU a fifth of a step can go into faulting their small pages in.
    glibc reads the setting when a process starts, so it is the process that has to be replaced. Does nothing when
    GLIBC_TUNABLES is set, whatever it says, or elsewhere than on Linux. Only for entry points: never returns if it acts.
    """
    if "GLIBC_TUNABLES" in os.environ or "jax" in sys.modules:
        return
    try:
        left_to_programs = "[madvise]" in _HUGE_PAGES.read_text()
    except OSError:
        return
    if left_to_programs:
        os.environ["GLIBC_TUNABLES"] = _HUGE_PAGE_TUNABLE
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def configure(cache: str | None = None) -> None:
    """Sets up the persistent compilation cache and XLA's CPU flags; once, first thing in a process.

    `cache` is a folder or "off"; None takes $REST_JAX_CACHE, else rest_jax/xla in the user's cache folder. A folder that
    cannot be made or written means no cache and one line on stderr. Before jax is imported the settings go into the
    environment, which child processes inherit; after, into `jax.config`, and XLA's flags are left alone.
    """
    if "jax" not in sys.modules:
        flags = _xla_flags(os.environ.get("XLA_FLAGS", ""))
        if flags:
            os.environ["XLA_FLAGS"] = flags
    chosen = cache or os.environ.get("REST_JAX_CACHE")
    if not _is_set("jax_compilation_cache_dir", None):
        if chosen == "off":
            return
        try:
            folder = _writable(chosen)
        except (OSError, RuntimeError) as error:  # RuntimeError: no home folder
            print(f"rest-jax: warning: no compilation cache: {error}", file=sys.stderr)
            return
        _set("jax_compilation_cache_dir", folder)
    if not _is_set("jax_persistent_cache_min_compile_time_secs", 1.0):
        _set("jax_persistent_cache_min_compile_time_secs", _MIN_COMPILE_SECONDS)


def peak_flops(device: Any, dtype: Any) -> float | None:
    """Published dense peak FLOP/s of a jax device computing in `dtype`; None where none is published or known."""
    import jax.numpy as jnp

    if "MIG" in device.device_kind:  # a slice of the card
        return None
    for pattern, peaks in PEAK_FLOPS.items():
        if re.search(pattern, device.device_kind):
            return peaks.get(jnp.dtype(dtype).name)
    return None


@functools.cache
def measured_cpu_peak(seconds: float = 0.2) -> float:
    """FLOP/s of the fastest of a few float32 matmuls on this process's CPU: best of the runs `seconds` allow.

    Every shape is compiled and run once beforehand, outside the time, and timed at least once. XLA spreads one matmul
    over all cores the process has, so this is the rate of the machine, not of a core.
    """
    import jax
    import jax.numpy as jnp

    device = jax.local_devices(backend="cpu")[0]
    multiply = jax.jit(functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST))
    best = 0.0
    auto = (jax.sharding.AxisType.Auto,)
    alone = jax.make_mesh((1,), ("one",), axis_types=auto, devices=[device])
    with jax.set_mesh(alone):  # a mesh the caller may be in has other devices
        for rows, inner, columns in _MATMULS:
            shapes = ((rows, inner), (inner, columns))
            a, b = (jnp.ones(shape, jnp.float32, device=device) for shape in shapes)
            jax.block_until_ready(multiply(a, b))
            end = time.perf_counter()
            deadline = end + seconds / len(_MATMULS)
            while True:
                start = time.perf_counter()
                jax.block_until_ready(multiply(a, b))
                end = time.perf_counter()
                best = max(best, 2 * rows * inner * columns / (end - start))
                if end >= deadline:
                    break
    return best


def mesh_peak_flops(devices: Iterable[Any], dtype: Any) -> float | None:
    """Peak FLOP/s of all `devices` (of a mesh: `mesh.devices.flat`); None when that of one is unknown.

    CPU devices of a process share its cores: however many there are, they count once, with the measured float32 rate
    whatever the dtype. Another process's CPU is taken to be like this one's, and its own.
    """
    devices = list(devices)
    processes = {device.process_index for device in devices if device.platform == "cpu"}
    total = 0.0
    for device in devices:
        if device.platform != "cpu":
            peak = peak_flops(device, dtype)
            if peak is None:
                return None
            total += peak
    return total + len(processes) * measured_cpu_peak() if processes else total


def _xla_flags(present: str) -> str:
    """XLA_FLAGS with the flags of the table that this machine can use and the user did not set."""
    # libtpu reads XLA_FLAGS too and has a list of flags of its own
    if not _jaxlib_version().startswith(CHECKED_JAXLIB) or importlib.util.find_spec("libtpu"):
        return present
    if present.strip() and not present.lstrip().startswith("-"):  # the name of a file of flags
        return present
    features = _cpu_features()
    added = [
        f"--{name}={value}"
        for name, value in CPU_XLA_FLAGS.items()
        if name not in present and _NEEDED_CPU_FEATURE.get(name) in {None, *features}
    ]
    return " ".join([present, *added]).strip() if added else present


def _jaxlib_version() -> str:
    try:
        return importlib.metadata.version("jaxlib")
    except importlib.metadata.PackageNotFoundError:
        return ""


def _cpu_features() -> set[str]:
    """Instruction sets of the CPU as Linux names them; empty elsewhere."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return set()
    found = (line for line in lines if line.startswith(("flags", "Features")))
    return set(next(found, "").partition(":")[2].split())


def _writable(chosen: str | None) -> str:
    """The cache folder, made if absent. OSError where that fails; a URL (gs://..) is jax's business."""
    if chosen and "://" in chosen:
        return chosen
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = pathlib.Path(chosen or os.path.join(base, "rest_jax", "xla")).expanduser().absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} is not writable")
    return str(folder)


def _is_set(option: str, default: Any) -> bool:
    """Whether the user set a jax option, in the environment or in `jax.config`."""
    if option.upper() in os.environ:
        return True
    return "jax" in sys.modules and getattr(sys.modules["jax"].config, option) != default


def _set(option: str, value: Any) -> None:
    if "jax" not in sys.modules:
        os.environ[option.upper()] = str(value)
        return
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    jax.config.update(option, value)
    compilation_cache.reset_cache()  # jax settles on cache or none at its first compilation
