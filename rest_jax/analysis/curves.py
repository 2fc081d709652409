"""The picture of a run, `<run>/curves.png`: learning curves above, entropies, weights and mass of the regions below.

Colours are those of Okabe and Ito, which people with any kind of colour blindness can tell apart; line styles repeat
the distinction for print.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rest_jax.analysis.plotting import new_figure, save, tidy
from rest_jax.analysis.series import Series, read_series
from rest_jax.run.metrics import REGION_NAMES

FILE = "curves.png"
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
_STYLES = ("-", "--", "-", "--", "-.", "-.", ":")


def write_curves(run_dir: str | pathlib.Path) -> pathlib.Path:
    """Draws the picture and returns its path. UserError when the run has no metrics."""
    series = read_series(run_dir)
    figure = new_figure(14, 7.6)
    figure.suptitle(pathlib.Path(run_dir).resolve().name)
    above, below = figure.subplots(2, 3)
    if "reward/mean" in series:
        _lines(above[0], series, [("reward/mean", "sampled"), ("eval/reward", "held out, greedy")])
        _label(above[0], "Reward", "mean reward")
    else:
        _lines(above[0], series, [("update/loss", "training"), ("eval/loss", "held out")])
        _label(above[0], "Loss", "nats")
    rates = [
        ("eval/exact", "exact calls"),
        ("eval/format", "format"),
        ("eval/spurious", "spurious calls"),
    ]
    _lines(above[1], series, rates)
    _label(above[1], "EvalExample-out rates (greedy)", "fraction", (-0.03, 1.03))
    _lines(
        above[2],
        series,
        [("rollout/response_tokens", "sampled"), ("eval/response_tokens", "held out, greedy")],
    )
    _label(above[2], "Length of the answers", "tokens")
    for axes, kind, title, unit in (
        (below[0], "entropy", "Entropy by region", "nats"),
        (below[1], "weight", "Weight by region (realised mean)", "weight"),
        (below[2], "weight_share", "Share of the total weight by region", "fraction"),
    ):
        _lines(
            axes, series, [(f"region/{name}/{kind}", name) for name in REGION_NAMES], legend=False
        )
        _label(axes, title, unit)
    steps = [step for found in series.values() for step in found.steps]
    margin = max(0.5, 0.02 * (max(steps) - min(steps)))  # never empty, also after a single step
    for axes in (*above, *below):
        axes.set_xlim(min(steps) - margin, max(steps) + margin)
    _region_legend(figure, below)
    return save(figure, pathlib.Path(run_dir) / FILE)


def _lines(
    axes: Any, series: dict[str, Series], wanted: Sequence[tuple[str, str]], legend: bool = True
) -> None:
    """One line a metric that the run has, its colour by its place in `wanted`; few points are marked."""
    for place, (name, label) in enumerate(wanted):
        if name in series:
            steps, values = series[name]
            marker = "o" if len(steps) <= 20 else ""
            style = {"color": _COLOURS[place], "linestyle": _STYLES[place]}
            axes.plot(steps, values, label=label, marker=marker, markersize=4, **style)
    if not axes.lines:
        place = {"ha": "center", "va": "center", "transform": axes.transAxes}
        axes.text(0.5, 0.5, "not measured in this run", color="0.4", **place)
    elif legend:
        axes.legend(fontsize="small", framealpha=0.8)


def _label(axes: Any, title: str, unit: str, limits: tuple[float, float] | None = None) -> None:
    axes.set_title(title, fontsize="medium")
    axes.set_xlabel("step")
    axes.set_ylabel(unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    tidy(axes)
    if limits is not None:
        axes.set_ylim(*limits)


def _region_legend(figure: Figure, panels: Sequence[Any]) -> None:
    shown = {line.get_label(): line for axes in panels for line in axes.lines}
    if shown:
        figure.legend(
            list(shown.values()),
            list(shown),
            loc="outside lower center",
            ncols=len(shown),
            title="regions (lower row)",
            frameon=False,
        )
