"""Restarts with huge pages and prints, as JSON, what the process is then. Arguments: a stand-in for the kernel's file, a log."""

import json
import os
import pathlib
import sys

from rest_jax import cli
from rest_jax.run import environment

kernel, log, *words = sys.argv[1:]
with open(log, "a") as file:
    file.write("started\n")
environment.HUGE_PAGES = pathlib.Path(kernel)
cli.restart_with_huge_pages()
assert "jax" not in sys.modules
print(json.dumps([os.getpid(), os.environ.get("GLIBC_TUNABLES"), words, sys.flags.utf8_mode]))
