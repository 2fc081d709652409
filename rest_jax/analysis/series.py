"""The metrics of a run as series: name -> (steps, values), in the order written."""

import pathlib
from typing import NamedTuple

from rest_jax.errors import UserError
from rest_jax.run.metrics import METRICS_FILE, read_lines


class Series(NamedTuple):
    """Values of one metric; both lists have the same length, at least 1. Steps where it was NaN are left out."""

    steps: list[int]
    values: list[float]


def read_series(run_dir: str | pathlib.Path) -> dict[str, Series]:
    """Every metric of a run. UserError when the folder has no metrics, or none of any step."""
    path = pathlib.Path(run_dir) / METRICS_FILE
    found: dict[str, Series] = {}
    for line in read_lines(path):
        step = line.pop("step")
        for name, value in line.items():
            if value is not None:
                series = found.setdefault(name, Series([], []))
                series.steps.append(step)
                series.values.append(value)
    if not found:
        raise UserError(f"{path}: no metrics yet; the run has not finished its first step")
    return found
