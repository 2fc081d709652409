"""The pictures of a study: rates and paired differences; learning curves; entropy by region; weight and mass by region.

Colours are those of Okabe and Ito. A method has the same colour and mark in every picture; the reference is black.
"""

import pathlib
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rest_jax.analysis.plotting import new_figure, save, tidy
from rest_jax.experiments.study.results import EXACT, MAIN_REGIONS, StudyResult, mean_curve
from rest_jax.run.metrics import REGION_NAMES

_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442")
_STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
DPI = 90  # a page has many of them
WINDOW = 5  # steps of the running mean


def write_figures(result: StudyResult, folder: pathlib.Path) -> list[pathlib.Path]:
    """Draws all of them into `folder`."""
    return [
        save(draw(result), folder / f"{result.study.name}_{kind}.png", DPI)
        for kind, draw in (
            ("rates", rates),
            ("curves", curves),
            ("entropy", entropies),
            ("weights", weights),
        )
    ]


def rates(result: StudyResult) -> Figure:
    """Left: the held-out exact rate of each method, every seed a dot; right: paired differences to the reference."""
    figure = new_figure(11, 0.5 * len(result.methods) + 1.8)
    left, right = figure.subplots(1, 2, sharey=True)
    for place, method in enumerate(result.methods):
        colour = style(result, method)["color"]
        values = list(result.values(method, EXACT).values())
        found = result.level(method, EXACT)
        left.plot(
            np.multiply(100, values), [place + 0.22] * len(values), ".", color=colour, alpha=0.6
        )
        _interval(left, found, place, colour)
        if method != result.study.reference:
            _interval(right, result.difference(method, EXACT), place, colour)
    left.set_yticks(range(len(result.methods)), result.methods)
    left.invert_yaxis()
    left.set_xlabel("held-out exact answers, greedy, %")
    right.axvline(0, color="black", linewidth=0.8)
    right.set_xlabel(f"difference to {result.study.reference}, paired by seed, points")
    for axes in (left, right):
        tidy(axes)
    figure.suptitle(
        f"{result.study.title}: mean over seeds; thick: 95 % bootstrap, thin: 95 % t interval"
    )
    return figure


def curves(result: StudyResult) -> Figure:
    """Rewards and exact rates, gradient noise and norm, answer length, policy entropy, time of a step."""
    figure = new_figure(16, 7.2)
    panels = (
        ("reward/mean", "Sampled reward (a dynamic scale moves)", ""),
        ("reward/exact", "Exact answers, sampled", "fraction"),
        (EXACT, "Exact answers, held out, greedy", "fraction"),
        ("update/grad_noise", "Gradient variance / squared norm", ""),
        ("update/grad_norm", "Norm of the gradient", ""),
        ("rollout/response_tokens", "Length of sampled answers", "tokens"),
        ("rollout/entropy", "Entropy of the policy", "nats"),
        ("time/cpu", "CPU time of a step", "s"),
    )
    for axes, (name, title, unit) in zip(figure.subplots(2, 4).flat, panels, strict=True):
        _lines(axes, result, name, 1 if name.startswith("eval/") else WINDOW)
        _label(axes, title, unit)
    _legend(figure, result)
    return figure


def entropies(result: StudyResult) -> Figure:
    """Mean entropy of every region over the steps."""
    figure = new_figure(13, 3.6)
    for axes, region in zip(figure.subplots(1, len(MAIN_REGIONS)), MAIN_REGIONS, strict=True):
        _lines(axes, result, f"region/{region}/entropy", WINDOW)
        _label(axes, region, "entropy, nats" if region == MAIN_REGIONS[0] else "")
        axes.set_ylim(bottom=0)
    _legend(figure, result)
    return figure


def weights(result: StudyResult) -> Figure:
    """Above: realised mean weight of a token of each region; below: the regions' shares of the total weight, stacked."""
    figure = new_figure(2.3 * len(result.methods) + 1.2, 5.6)
    columns = figure.subplots(2, len(result.methods), sharey="row", squeeze=False)
    regions = [
        n for n in REGION_NAMES if any(f"region/{n}/weight_share" in r.curves for r in result.runs)
    ]
    for column, method in enumerate(result.methods):
        above, below = columns[0, column], columns[1, column]
        runs = list(result.of(method).values())
        stacked = []
        for place, region in enumerate(regions):
            weight = mean_curve(runs, f"region/{region}/weight", WINDOW)
            mass = mean_curve(runs, f"region/{region}/weight_share", WINDOW)
            if weight is not None:
                above.plot(weight.steps, weight.values, color=_COLOURS[place], label=region)
            if mass is not None:
                stacked.append((place, mass))
        if stacked:
            below.stackplot(
                stacked[0][1].steps,
                [mass.values for _, mass in stacked],
                colors=[_COLOURS[place] for place, _ in stacked],
            )
            below.set_ylim(0, 1)
        _label(above, method, "weight" if column == 0 else "")
        _label(below, "", "share of the weight" if column == 0 else "")
    handles, labels = columns[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


def style(result: StudyResult, method: str) -> dict[str, Any]:
    """Line style of a method, the same in every picture."""
    if method == result.study.reference:
        return {"color": "black", "linestyle": "-"}
    others = [m for m in result.study.methods if m != result.study.reference]
    place = others.index(method)
    return {
        "color": _COLOURS[place % len(_COLOURS)],
        "linestyle": _STYLES[(place + place // len(_COLOURS)) % len(_STYLES)],
    }


def _interval(axes: Any, found: Any, place: int, colour: str) -> None:
    axes.plot(100 * found.mean, place, "o", color=colour)
    if found.count > 1:
        axes.plot([100 * found.t_low, 100 * found.t_high], [place] * 2, color=colour, linewidth=1)
        axes.plot([100 * found.low, 100 * found.high], [place] * 2, color=colour, linewidth=3.5)


def _lines(axes: Any, result: StudyResult, name: str, window: int) -> None:
    for method in result.methods:
        curve = mean_curve(list(result.of(method).values()), name, window)
        if curve is not None:
            marker = "o" if len(curve.steps) < 10 else ""
            axes.plot(
                curve.steps, curve.values, label=method, marker=marker, markersize=3,
                **style(result, method),
            )  # fmt: skip


def _label(axes: Any, title: str, unit: str) -> None:
    axes.set_title(title, fontsize="small")
    axes.set_xlabel("step", fontsize="small")
    axes.set_ylabel(unit, fontsize="small")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    tidy(axes)


def _legend(figure: Figure, result: StudyResult) -> None:
    handles, labels = figure.axes[0].get_legend_handles_labels()
    columns = min(len(labels), 7)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    figure.suptitle(f"{result.study.title}: means over seeds, running mean of {WINDOW} steps")
