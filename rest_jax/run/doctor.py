"""What is installed here and what it will run on: the command `rest-jax doctor`. It needs no network.

jax is started in a process of its own: it ends its process when XLA does not know a flag, and may wait for other hosts.
"""

import importlib.metadata
import importlib.util
import os
import pathlib
import platform
import subprocess
import sys

PACKAGES = ("rest-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers")
# A module that each extra of the package installs (`pip install "rest-jax[cuda]"`).
EXTRAS = {
    "tpu": "libtpu",
    "cuda": "jax_cuda12_plugin",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "postgres": "psycopg",
}
# Where Linux says whether programs get huge pages: always, on their request (madvise), or never.
HUGE_PAGES = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
PROBE = """
import jax
for d in jax.local_devices():
    memory = (d.memory_stats() or {}).get("bytes_limit")
    print(d, d.device_kind, f"{memory / 2**30:.1f} GiB" if memory else "memory of the host", sep=", ")
"""
PROBE_SECONDS = 120


def diagnose() -> str:
    """One line a fact, each beginning with what it is about."""
    rows = [("python", f"{platform.python_version()} on {platform.platform()}")]
    for package in PACKAGES:
        try:
            rows.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((package, "missing"))
    rows += [("device", line) for line in _devices()]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
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
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        return [f"jax does not start: no answer in {PROBE_SECONDS} s"]
    if done.returncode == 0:
        return done.stdout.splitlines()
    said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return [f"jax does not start: {said[-1]}"]
