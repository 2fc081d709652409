"""The report of a run: a real PNG for runs of any length and kind, tables with the right ends."""

import errno
import os

import matplotlib.image
import numpy as np
import pytest

from rest_jax.analysis import report
from rest_jax.analysis.plotting import REGION_COLOURS, new_figure, save
from rest_jax.analysis.report import read_series, run_table, write_curves, write_report
from rest_jax.errors import UserError
from rest_jax.run.metrics import FILES, REGION_NAMES, MetricsWriter


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


def colours(path) -> set[tuple]:
    """The colours of a PNG, 0 to 255."""
    pixels = np.round(255 * matplotlib.image.imread(path)[..., :3]).astype(int)
    return {tuple(c) for c in np.unique(pixels.reshape(-1, 3), axis=0).tolist()}


def test_every_region_has_a_colour_of_its_own():
    assert tuple(REGION_COLOURS) == REGION_NAMES
    assert len(set(REGION_COLOURS.values())) == len(REGION_NAMES)


@pytest.mark.parametrize("steps", [1, pytest.param(2, marks=pytest.mark.slow), 40])
def test_curves_are_drawn_for_runs_of_any_length(tmp_run, steps):
    fill(tmp_run, steps)
    path = write_curves(tmp_run)
    assert path == tmp_run / "curves.png"
    picture = matplotlib.image.imread(path)
    assert picture.shape[0] > 700 and picture.shape[1] > 1000
    shown = colours(path)
    for colour in REGION_COLOURS.values():
        assert tuple(bytes.fromhex(colour[1:])) in shown
    names = sorted(p.name for p in tmp_run.iterdir())
    assert names == sorted(["curves.png", *FILES])


def test_of_a_run_that_may_only_be_read_the_table_is_printed(tmp_run, monkeypatch):
    fill(tmp_run, 1)

    def refuse(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(report, "save", refuse)
    table, last = write_report(tmp_run).rsplit("\n", 1)
    assert "reward/mean" in table
    assert last == "curves: not drawn, since the folder may only be read (Read-only file system)"


@pytest.mark.parametrize(
    "name", ["a$_$b", "$\\frac", "日本 👍🏽", "a\x1bb\udcff", "$\\mathdefault{$"]
)
def test_a_name_is_drawn_as_it_is(tmp_path, name, recwarn):
    run = tmp_path / name
    fill(run, 1, regions=False)
    assert write_curves(run).read_bytes().startswith(b"\x89PNG")
    assert not [str(w.message) for w in recwarn if "Glyph" in str(w.message)]


def test_names_at_ticks_are_no_formulas_and_powers_of_ten_are(tmp_path):
    figure = new_figure(4, 3)
    axes = figure.subplots()
    axes.plot([1, 1e5], [0, 1], label="$_$")
    axes.set_xscale("log")
    axes.set_yticks([0, 1], ["a$_$b", "$x"])
    axes.legend(title="$^$")
    save(figure, tmp_path / "drawn.png")
    labels = axes.get_xticklabels()
    assert any(t.get_text() == r"$\mathdefault{10^{2}}$" and t.get_parse_math() for t in labels)


def test_a_supervised_run_has_its_own_report(tmp_run):
    writer = MetricsWriter(tmp_run)
    writer.write(0, {"eval/exact": 0.25, "eval/format": 0.5})
    for step in (1, 2):
        writer.write(step, {"update/loss": 1.0 / step, "update/accuracy": 0.5, "time/step": 2.0})
    writer.close()
    lines = [line.split() for line in write_report(tmp_run).splitlines()]
    starts = [line[:6] for line in lines]
    assert ["update/loss", "1", "0.5", "-0.5", "1-2", "loss,"] in starts
    assert ["update/accuracy", "fraction", "0.5", "0.5", "0", "1-2"] in starts
    assert not any(line and line[0] in ("region", "reward/mean") for line in lines)
    # one row of panels: there are no regions
    assert matplotlib.image.imread(tmp_run / "curves.png").shape[0] < 600


def test_curves_of_a_run_with_one_metric(tmp_run):
    writer = MetricsWriter(tmp_run)
    writer.write(1, {"update/loss": 0.5})
    writer.close()
    assert len(write_curves(tmp_run).read_bytes()) > 10_000


def test_table_has_first_last_and_change(tmp_run):
    fill(tmp_run, 4)
    lines = [line.split() for line in run_table(read_series(tmp_run)).splitlines()]
    starts = [line[:6] for line in lines]
    assert ["eval/exact", "fraction", "0.25", "0.75", "0.5", "0-4"] in starts
    assert ["eval/format", "fraction", "0.5", "0.5", "0", "0-0"] in starts  # NaN is left out
    assert ["reward/mean", "1", "4", "3", "1-4", "mean"] in starts
    assert ["think", "5", "4.25", "5", "5", "-", "-"] in lines


def test_report_names_the_figure_and_refuses_a_folder_without_metrics(tmp_run):
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
