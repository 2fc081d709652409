"""What a run looks like afterwards: the picture of its curves and its table, both read from metrics.jsonl."""

import pathlib

from rest_jax.analysis.curves import write_curves
from rest_jax.analysis.series import read_series
from rest_jax.analysis.tables import run_table

__all__ = ["run_table", "write_curves", "write_report"]


def write_report(run_dir: str | pathlib.Path) -> str:
    """Redraws `<run>/curves.png` and returns the table of the run, with the picture's place as the last line.

    UserError when the folder has no metrics.
    """
    picture = write_curves(run_dir)
    return f"{run_table(read_series(run_dir))}\n\ncurves: {picture}"
