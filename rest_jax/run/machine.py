"""What the machine is and how XLA is set up for it; the one place.

    relaunch_tuned(), configure()        before anything imports jax: memory, compilation cache, XLA flags

jax is imported inside the functions that need it: its XLA flags are read from the environment when it starts.

Environment. REST_JAX_CACHE: folder of the compilation cache, or "off". JAX_COMPILATION_CACHE_DIR,
JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS and XLA_FLAGS are jax's own; what the user set there always wins.
"""

import importlib.metadata
import importlib.util
import os
import pathlib
import sys
from typing import Any

# XLA aborts the process on a flag it does not know: a flag goes in here after a run with this jaxlib.
CHECKED_JAXLIB = "0.10."
CPU_XLA_FLAGS: dict[str, str] = {
    "xla_cpu_prefer_vector_width": "512",  # XLA's own choice is 256 bits
}
_NEEDED_CPU_FEATURE = {"xla_cpu_prefer_vector_width": "avx512f"}

_MIN_COMPILE_SECONDS = 0.05  # what compiles faster is not worth a file

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
