"""The report of a run: a real PNG for runs of any length and kind, tables with the right ends."""

import matplotlib.image
import numpy as np
import pytest

from rest_jax.analysis.report import run_table, write_curves, write_report
from rest_jax.analysis.series import read_series
from rest_jax.errors import UserError
from rest_jax.run.metrics import REGION_NAMES, MetricsWriter


def fill(run, steps: int, regions: bool = True):
    """A run of `steps` steps, evaluated before the first and after the last."""
    writer = MetricsWriter(run)
    writer.write(0, {"eval/exact": 0.25, "eval/format": 0.5})
    for step in range(1, steps + 1):
        values = {"reward/mean": float(step), "update/loss": 0.5}
        for i, name in enumerate(REGION_NAMES if regions else ()):
            values[f"region/{name}/entropy"] = i + 1 / step
            values[f"region/{name}/weight"] = 1.0 + i
        writer.write(step, values)
    writer.write(steps, {"eval/exact": 0.75, "eval/format": float("nan")})
    writer.close()


@pytest.mark.parametrize("steps", [1, 2, 40])
def test_curves_are_drawn_for_runs_of_any_length(tmp_run, steps):
    fill(tmp_run, steps)
    path = write_curves(tmp_run)
    assert path == tmp_run / "curves.png"
    picture = matplotlib.image.imread(path)
    assert picture.shape[0] > 500 and picture.shape[1] > 1000
    assert len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 50
    assert sorted(p.name for p in tmp_run.iterdir()) == [
        "curves.png",
        "metrics.jsonl",
        "samples.jsonl",
    ]


def test_curves_of_a_run_without_rewards_or_regions(tmp_run):
    writer = MetricsWriter(tmp_run)
    writer.write(1, {"update/loss": 0.5})
    writer.close()
    assert write_curves(tmp_run).stat().st_size > 10_000


def test_table_has_first_last_and_change(tmp_run):
    fill(tmp_run, 4)
    lines = [line.split() for line in run_table(read_series(tmp_run)).splitlines()]
    assert ["eval/exact", "fraction", "0.25", "0.75", "0.5", "0-4"] in lines
    assert ["eval/format", "fraction", "0.5", "0.5", "0", "0-0"] in lines  # NaN is left out
    assert ["reward/mean", "1", "4", "3", "1-4"] in lines
    assert ["think", "5", "4.25", "5", "5", "-", "-"] in lines


def test_report_names_the_picture_and_refuses_a_folder_without_metrics(tmp_run):
    with pytest.raises(UserError, match="no such file"):
        write_report(tmp_run)
    fill(tmp_run, 2, regions=False)
    text = write_report(tmp_run)
    assert text.splitlines()[-1] == f"curves: {tmp_run / 'curves.png'}"
    assert "region" not in text


def test_an_empty_run_says_so(tmp_run):
    MetricsWriter(tmp_run).close()
    with pytest.raises(UserError, match="no metrics yet"):
        write_report(tmp_run)
