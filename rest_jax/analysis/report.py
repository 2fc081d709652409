"""What a run looks like afterwards: the figure of its curves and its table, both read from metrics.jsonl."""

import pathlib

from rest_jax.analysis.curves import write_curves
from rest_jax.analysis.tables import read_series, run_table


def write_report(run_dir: str | pathlib.Path) -> str:
    """Redraws `<run>/curves.png` and returns the table of the run, with the path of the figure as its last line.

    UserError when the folder has no metrics.
    """
    figure = write_curves(run_dir)
    return f"{run_table(read_series(run_dir))}\n\ncurves: {figure}"
