"""Pictures of a sweep: parallel.png (a line a complete or pruned trial across its parameters), curves.png (metric by step).

Colour is the value, dark to bright; what is not complete is grey and dashed. The best trial is drawn thick.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rest_jax.analysis.plotting import new_figure, save, tidy
from rest_jax.experiments.sweep.results import Row, ranked, short_names
from rest_jax.experiments.sweep.space import Parameter, Scalar, Space

PARALLEL, CURVES = "parallel.png", "curves.png"
_COLOURS = colormaps["viridis"].resampled(256)
_GREY = "0.6"
_JUDGED = ("complete", "pruned")
_BEST = "#D55E00"  # vermilion of Okabe and Ito: far from every colour of the map


def write(found: Sequence[Row], space: Space, folder: pathlib.Path) -> list[str]:
    """Draws what there is to draw; the names of the files."""
    written = []
    judged = [row for row in ranked(found, space) if row.state in _JUDGED and row.value is not None]
    if judged:
        save(_parallel(judged, space), folder / PARALLEL)
        written.append(PARALLEL)
    if any(row.curve for row in found):
        save(_curves(found, space), folder / CURVES)
        written.append(CURVES)
    return written


def _parallel(shown: Sequence[Row], space: Space) -> Figure:
    names = list(space.parameters)
    figure = new_figure(max(6.0, 1.7 * (len(names) + 1)), 4.6)
    axes: Any = figure.subplots()
    scale = _scale(shown)
    for row in reversed(shown):  # the best last, on top
        heights = [_height(space.parameters[name], row.point[name]) for name in names]
        heights.append(float(scale(row.value or 0.0)))
        axes.plot(range(len(heights)), heights, **_style(row, shown[0], scale))
    for x, name in enumerate(names):
        axes.axvline(x, color="0.8", linewidth=0.8, zorder=0)
        for height, label in _ticks(space.parameters[name]):
            axes.annotate(
                label, (x, height), xytext=(-4, 0), textcoords="offset points", ha="right", va="center",
                fontsize="small", bbox={"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 0.5},
            )  # fmt: skip
    axes.axvline(len(names), color="0.8", linewidth=0.8, zorder=0)
    axes.set_xticks(
        range(len(names) + 1), [*short_names(names).values(), space.metric], fontsize="small"
    )
    axes.set_xlim(-0.6, len(names) + 0.15)
    axes.set_ylim(-0.06, 1.06)
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    figure.suptitle(f"{space.name}: {len(shown)} trials", fontsize="medium")
    bar = figure.colorbar(ScalarMappable(scale, _COLOURS), ax=axes, pad=0.01)
    bar.set_label(space.metric)
    return figure


def _curves(found: Sequence[Row], space: Space) -> Figure:
    figure = new_figure(8.0, 4.6)
    axes: Any = figure.subplots()
    shown = [row for row in ranked(found, space) if row.curve]
    scale = _scale(shown)
    for row in reversed(shown):
        steps, values = list(row.curve), list(row.curve.values())
        marker = "o" if len(steps) <= 20 else ""
        best = row is shown[0] and row.state == "complete"
        style = _style(row, shown[0], scale) | {
            "label": f"best: trial {row.number}" if best else None
        }
        axes.plot(steps, values, marker=marker, markersize=3.5, **style)
        ending = {"pruned": "x", "failed": "s"}.get(row.state)
        if ending:
            axes.plot(steps[-1], values[-1], ending, color="0.3", markersize=7)
    axes.set_xlabel("step")
    axes.set_ylabel(space.metric)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    tidy(axes)
    for mark, state in (("x", "pruned"), ("s", "failed")):
        if any(row.state == state for row in shown):
            axes.plot([], [], mark, color="0.3", label=state)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small", framealpha=0.8)
    figure.suptitle(f"{space.name}: {space.metric} by step", fontsize="medium")
    return figure


def _scale(shown: Sequence[Row]) -> Normalize:
    values = [row.value for row in shown if row.value is not None]
    low, high = min(values), max(values)
    return Normalize(low, high if high > low else low + 1.0)


def _style(row: Row, best: Row, scale: Normalize) -> dict[str, Any]:
    if row.state != "complete":
        return {"color": _GREY, "linestyle": "--", "linewidth": 1.0}
    if row is best:
        return {"color": _BEST, "linewidth": 2.8}
    return {"color": _COLOURS(scale(row.value or 0.0)), "linewidth": 1.4}


def _height(parameter: Parameter, value: Scalar) -> float:
    """Place of a value on its axis, in [0, 1]."""
    if parameter.choices is not None:
        place = [(type(c), c) for c in parameter.choices].index((type(value), value))
        return (place + 0.5) / len(parameter.choices)
    low, high, x = (float(v) for v in (parameter.low, parameter.high, value))  # pyright: ignore
    if parameter.log:
        low, high, x = np.log([low, high, x]).tolist()
    return (x - low) / (high - low)


def _ticks(parameter: Parameter) -> list[tuple[float, str]]:
    if parameter.choices is not None:
        return [(_height(parameter, c), "null" if c is None else str(c)) for c in parameter.choices]
    assert parameter.low is not None and parameter.high is not None
    return [(_height(parameter, x), f"{x:.4g}") for x in (parameter.low, parameter.high)]
