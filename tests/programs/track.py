"""Checks the trackers of a config and writes two lines of metrics: track.py FOLDER KEY=VALUE...; a UserError is printed."""

import pathlib
import sys

from rest_jax import config as config_lib
from rest_jax.errors import UserError
from rest_jax.run.metrics import MetricsWriter
from rest_jax.run.trackers import check_trackers

if __name__ == "__main__":
    folder = pathlib.Path(sys.argv[1])
    raw = {"name": "tiny", "output": str(folder), "model": {"source": "hf"}}
    config = config_lib.from_overrides(raw, sys.argv[2:])
    try:
        check_trackers(config)
    except UserError as error:
        print(error)
        sys.exit(2)
    writer = MetricsWriter(folder, config)
    for step in (3, 4):
        writer.write(step, {"reward/mean": 0.5, "reward/max": float("nan")})
    writer.close()
