"""holds_lock.py CONFIG FILES: opens the run of a config and keeps it open until its standard input ends."""

import pathlib
import sys

from rest_jax import config
from rest_jax.run.folder import open_run

run = open_run(config.load([sys.argv[1]]), pathlib.Path(sys.argv[2]))
print("open", flush=True)
sys.stdin.read()
run.close()
