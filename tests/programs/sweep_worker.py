"""`rest-jax sweep` on a config, a space and a database, with a short heartbeat: fake|real CONFIG SPACE WORKERS STORAGE.

The runs are those of fake_train.py, or real ones. STORAGE is "" for the default.
"""

import pathlib
import sys

from rest_jax.experiments.search import sweep
from rest_jax.experiments.worker import Engine

if __name__ == "__main__":
    kind, config, space, workers, storage = sys.argv[1:]
    fake = (sys.executable, str(pathlib.Path(__file__).parent / "fake_train.py"))
    program = fake if kind == "fake" else Engine().program
    engine = Engine(int(workers), storage or None, heartbeat=1, poll=0.02, program=program)
    sweep([config], [], space, engine=engine, name="some")
