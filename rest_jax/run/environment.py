"""The environment in which a command runs: XLA's compilation cache and CPU flags, and quiet libraries.

`configure()` sets environment variables. An entry point calls it once, before anything imports jax, which reads them when it
starts; child processes inherit them. What the user has set always wins: JAX_COMPILATION_CACHE_DIR,
JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS and XLA_FLAGS are jax's own, REST_JAX_CACHE is a folder for the cache, or "off".
"""

import importlib.metadata
import importlib.util
import os
import pathlib
import sys

# XLA aborts the process on a flag it does not know: this one was tried with the jaxlib named here. XLA's own choice is 256.
CHECKED_JAXLIB = "0.10."
VECTOR_WIDTH = "xla_cpu_prefer_vector_width"
_CPU_INFO = pathlib.Path("/proc/cpuinfo")

_CACHE = "JAX_COMPILATION_CACHE_DIR"
# A program that compiles faster than this many seconds is not worth a file.
_MIN_COMPILE_SECONDS = "0.05"


def configure() -> None:
    """Sets the variables. A cache folder that cannot be made or written means no cache and one line on stderr."""
    # transformers says on every start that PyTorch is missing; only its tokenizers are used here.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    if flags := xla_flags(os.environ.get("XLA_FLAGS", "")):
        os.environ["XLA_FLAGS"] = flags
    if _CACHE not in os.environ:
        chosen = os.environ.get("REST_JAX_CACHE")
        if chosen == "off":
            return
        try:
            os.environ[_CACHE] = _writable(chosen)
        except (OSError, RuntimeError) as error:  # RuntimeError: no home folder
            print(f"rest-jax: warning: no compilation cache: {error}", file=sys.stderr)
            return
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", _MIN_COMPILE_SECONDS)


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
