"""`rest-jax sweep` whose runs are those of fake_train.py: CONFIG SPACE WORKERS STORAGE ("" for the default)."""

import pathlib
import sys

from rest_jax.experiments.search import sweep
from rest_jax.experiments.worker import Engine

if __name__ == "__main__":
    config, space, workers, storage = sys.argv[1:]
    program = (sys.executable, str(pathlib.Path(__file__).parent / "fake_train.py"))
    engine = Engine(int(workers), storage or None, heartbeat=1, poll=0.02, program=program)
    sweep([config], [], space, engine=engine, name="some")
