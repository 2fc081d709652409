"""The figures of a comparison: endpoints of every arm; held-out curves against the reference's; weight shares by region; what one
step of every method gains.
"""

import itertools
import math
import pathlib
from typing import Any

import numpy as np
import scipy

from rest_jax.analysis import plotting
from rest_jax.evaluation.statistics import Estimate, paired_differences
from rest_jax.experiments.results import ENDPOINTS, EXACT, REGIONS, Results

_DPI = 90
_COLUMNS = 5  # of small panels


def write_figures(results: Results, name: str, plan: Any, folder: pathlib.Path) -> None:
    """Draws <name>_endpoints.png, _curves.png and _shares.png of a `compare.Plan` into the folder where there are runs, and
    _gain.png where gains were measured.
    """
    figures = {}
    if results.runs:
        figures["endpoints"] = _endpoints(results, plan.reference)
        figures["curves"] = _curves(results, plan.reference)
        figures["shares"] = _shares(results)
    if results.gain:
        figures["gain"] = _gains(results)
    for kind, figure in figures.items():
        folder.mkdir(parents=True, exist_ok=True)
        plotting.save(figure, folder / f"{name}_{kind}.png", _DPI)


def _endpoints(results: Results, reference: str) -> Any:
    """The paired difference of each arm to the reference in both endpoints, a dot for each seed; intervals of few seeds go beyond
    the figure.
    """
    arms = [arm for arm in results.arms if arm != reference]
    figure = plotting.new_figure(11, 0.34 * max(len(arms), 3) + 1.4)
    for axes, name in zip(figure.subplots(1, 2, sharey=True), ENDPOINTS, strict=True):
        base, seen = results.values(reference, name), [0.0]
        for y, arm in enumerate(arms):
            colour = plotting.GREY if "+" in arm else plotting.BLUE
            points = 100 * np.array(paired_differences(results.values(arm, name), base))
            axes.plot(points, [y] * len(points), ".", color=colour, alpha=0.25, markersize=4)
            _interval(axes, results.difference(arm, reference, name), y, colour)
            seen += points.tolist()
        axes.set_xlim(min(seen) - 1, max(seen) + 1)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_xlabel(f"{ENDPOINTS[name]}: less {reference}, points")
        plotting.tidy(axes)
    figure.axes[0].set_yticks(range(len(arms)), arms)
    figure.axes[0].invert_yaxis()
    figure.suptitle(
        "Exact completions, held out: differences paired by seed; bars: 95 % t intervals; grey: placebos"
    )
    return figure


def _interval(axes: Any, found: Estimate, y: int, colour: str) -> None:
    axes.plot(100 * found.mean, y, "o", color=colour)
    if found.count > 1:
        axes.plot([100 * found.t_low, 100 * found.t_high], [y] * 2, color=colour, linewidth=2)


def _panels(arms: list[str]) -> tuple[Any, dict[str, Any]]:
    """A figure with a small panel for each arm."""
    rows = math.ceil(len(arms) / _COLUMNS)
    figure = plotting.new_figure(14, 2.1 * rows + 0.8)
    grid = np.atleast_2d(figure.subplots(rows, _COLUMNS, sharex=True, sharey=True)).ravel()
    for axes in grid[len(arms) :]:
        axes.set_visible(False)
    return figure, dict(zip(arms, grid, strict=False))


def _label_lowest(panels: dict[str, Any]) -> None:
    """Steps are below the lowest panel of each column alone."""
    for i, axes in enumerate(panels.values()):
        lowest = i + _COLUMNS >= len(panels)
        axes.tick_params(labelbottom=lowest)
        if not lowest:
            axes.set_xlabel("")


def _curves(results: Results, reference: str) -> Any:
    """The held-out curve of each arm over that of the reference, means over the seeds whose curves both have, with t intervals,
    which of few seeds go beyond the figure.
    """
    figure, panels = _panels(results.arms)
    base, seen = results.by_seed(reference, EXACT), []
    for arm, axes in panels.items():
        own = results.by_seed(arm, EXACT)
        seeds = sorted(own.keys() & base.keys())
        for curves, colour in ((base, plotting.BLACK), (own, plotting.BLUE)):
            if (curves is own and arm == reference) or not seeds:
                continue
            steps = sorted(set.intersection(*(set(curves[seed]) for seed in seeds)))
            values = 100 * np.array([[curves[seed][step] for step in steps] for seed in seeds])
            mean = values.mean(axis=0)
            seen += values.ravel().tolist()
            axes.plot(steps, mean, color=colour, linewidth=1.5, marker=".", markersize=4)
            if len(seeds) > 1:
                half = scipy.stats.t.isf(0.025, len(seeds) - 1) * values.std(axis=0, ddof=1)
                half /= len(seeds) ** 0.5
                axes.fill_between(steps, mean - half, mean + half, color=colour, alpha=0.15)
        plotting.label_steps(axes, arm, "")
    if seen:
        figure.axes[0].set_ylim(min(seen) - 1, max(seen) + 1)  # of all: they share it
    _label_lowest(panels)
    said = f"Exact completions, held out, %; black: {reference}"
    figure.suptitle(f"{said}; bands: 95 % t intervals of the mean over seeds, not paired")
    return figure


def _shares(results: Results) -> Any:
    """Share of each region in the total weight of a step, means over the seeds with curves, one upon the other."""
    figure, panels = _panels(results.arms)
    legend = {}
    for arm, axes in panels.items():
        shares = [results.by_seed(arm, f"region/{region}/weight_share") for region in REGIONS]
        if all(shares):
            steps = sorted(set.intersection(*(set(c) for own in shares for c in own.values())))
            layers = [
                [100 * np.mean([curve[step] for curve in own.values()]) for step in steps]
                for own in shares
            ]
            colours = [plotting.REGION_COLOURS[region] for region in REGIONS]
            areas = axes.stackplot(steps, layers, colors=colours, linewidth=0)
            legend = dict(zip(REGIONS, areas, strict=True))
        axes.set_ylim(0, 100)
        plotting.label_steps(axes, arm, "")
    _label_lowest(panels)
    figure.legend(
        list(legend.values()), list(legend), loc="outside lower center", ncols=len(REGIONS),
        frameon=False,
    )  # fmt: skip
    figure.suptitle("Share in the total token weight, %; above: responses and other tokens")
    return figure


def _gains(results: Results) -> Any:
    """Methods by policies: what one step gains against uniform weights, along the gradient and as Adam's first; bold where the
    interval has no zero in it. Placebos are in the page's tables alone.
    """
    methods = [method for method in results.methods if "+" not in method]
    policies = results.policies
    width = 2.4 + 2 * (0.5 * len(policies) + 0.6)
    figure = plotting.new_figure(max(width, 6), 0.26 * len(methods) + 2.2)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, quantity, title in zip(
        panels, ("gain", "adam"), ("along the gradient", "first Adam step"), strict=True
    ):
        values = np.full((len(methods), len(policies)), np.nan)
        for (y, method), (x, policy) in itertools.product(enumerate(methods), enumerate(policies)):
            row = results.gain.get((method, policy), {})
            value = values[y, x] = row.get(quantity, np.nan)
            if not math.isnan(value):
                shown = row[f"{quantity}_low"] * row[f"{quantity}_high"] > 0
                axes.text(
                    x, y, f"{100 * value:+.0f}", ha="center", va="center", fontsize=7,
                    fontweight="bold" if shown else "normal", alpha=1 if shown else 0.6,
                )  # fmt: skip
        axes.imshow(values, cmap="RdBu", vmin=-1, vmax=1, aspect="auto", alpha=0.75)
        axes.set_xticks(range(len(policies)), policies, rotation=60, ha="right")
        axes.set_title(title, fontsize="medium")
    panels[0].set_yticks(range(len(methods)), methods)
    figure.suptitle(
        "What one step gains against uniform weights, %\nbold: 95 % interval without zero"
    )
    return figure
