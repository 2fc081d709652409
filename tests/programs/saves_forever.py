"""saves_forever.py RUN: saves checkpoint after checkpoint, from the newest one on, until it is killed."""

import itertools
import sys

from rest_jax.run.checkpoint import Checkpoints
from tests.programs.states import make_state

with Checkpoints(sys.argv[1], keep=2) as checkpoints:
    for step in itertools.count((checkpoints.latest() or 0) + 1):
        checkpoints.save(step, make_state(step), {"seen": step * 10})
        print("saving", flush=True)
