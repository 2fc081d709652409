"""blocked_save.py RUN SAVE_TIMEOUT STOP_TIMEOUT [ADDRESS INDEX COUNT]: a run whose store blocks in the save of step 1.

Says "saving" once it waits for the save, and "ended" if it is ever over.
"""

import contextlib
import sys
import time

import jax

run, save_timeout, stop_timeout, *several = sys.argv[1:]
if several:
    jax.distributed.initialize(several[0], int(several[2]), int(several[1]))

import pathlib

import numpy as np
from jax.sharding import Mesh

from rest_jax import config as config_lib
from rest_jax.run import checkpoint
from rest_jax.run.folder import open_run
from tests.programs.states import make_state, place

checkpoint.write_manifest = lambda folder: time.sleep(600)
files = pathlib.Path(run, "files")
with contextlib.suppress(FileExistsError):
    files.mkdir(parents=True)
(files / "config.json").write_text("{}")
raw = {"name": "run", "output": run, "model": {"source": "hf"}}
limits = {"save_timeout": int(save_timeout), "stop_timeout": int(stop_timeout)}
config = config_lib.from_overrides(raw | {"distributed": limits})
with contextlib.closing(open_run(config, files)) as opened:
    opened.begin()
    mesh = Mesh(np.array(jax.devices()), ("data",))
    opened.save(1, jax.tree.map(lambda x: place(x, mesh), make_state(1)), {})
    print("saving", flush=True)
print("ended", flush=True)
