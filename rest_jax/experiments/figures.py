"""The figures of a comparison: rates and paired differences; learning curves; entropy by region; weights by region.

A method has the same colour and line in every figure; the reference is black.
"""

import pathlib
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from rest_jax.analysis import plotting
from rest_jax.evaluation.statistics import Estimate
from rest_jax.experiments.results import EXACT, Curve, Results

_REGIONS = ("tag", "scaffold", "name", "param", "think")
_WINDOW = 5  # steps of the running mean
_DPI = 90
_CURVES = {
    "reward/mean": ("Sampled reward (a dynamic scale moves)", ""),
    "reward/exact": ("Exact answers, sampled", "fraction"),
    EXACT: ("Exact answers, held out, greedy", "fraction"),
    "update/grad_noise": ("Gradient variance / squared norm", ""),
    "update/grad_norm": ("Norm of the gradient", ""),
    "rollout/response_tokens": ("Length of sampled answers", "tokens"),
    "rollout/entropy": ("Entropy of the policy", "nats"),
    "time/cpu": ("CPU time of a step", "s"),
}
_ENTROPIES = {f"region/{region}/entropy": (region, "entropy, nats") for region in _REGIONS}
_WEIGHTS = {f"region/{region}/weight": (region, "mean weight") for region in _REGIONS}


def write_figures(
    results: Results, name: str, title: str, reference: str, folder: pathlib.Path
) -> None:
    """Draws <name>_rates.png, _curves.png, _entropy.png and _weights.png into the folder."""
    styles: dict[str, Any] = {reference: {"color": "black", "linestyle": "-"}}
    for i, method in enumerate(method for method in results.curves if method != reference):
        round_, place = divmod(i, len(plotting.PALETTE))
        line = plotting.LINE_STYLES[(place + round_) % len(plotting.LINE_STYLES)]
        styles[method] = {"color": plotting.PALETTE[place], "linestyle": line}
    folder.mkdir(parents=True, exist_ok=True)
    smoothed = f"{title}: means over seeds, running mean of {_WINDOW} steps"
    for kind, figure in (
        ("rates", _rates(results, reference, styles)),
        ("curves", _panels(results, _CURVES, styles)),
        ("entropy", _panels(results, _ENTROPIES, styles)),
        ("weights", _panels(results, _WEIGHTS, styles)),
    ):
        intervals = f"{title}: mean over seeds; thick: 95 % bootstrap, thin: 95 % t interval"
        figure.suptitle(intervals if kind == "rates" else smoothed)
        plotting.save(figure, folder / f"{name}_{kind}.png", _DPI)


def _rates(results: Results, reference: str, styles: dict[str, Any]) -> Figure:
    """Left: the held-out exact rate of each method, a dot for each seed; right: paired differences to the reference."""
    figure = plotting.new_figure(11, 0.5 * len(results.curves) + 1.8)
    left, right = figure.subplots(1, 2, sharey=True)
    for y, method in enumerate(results.curves):
        colour = styles[method]["color"]
        values = np.multiply(100, list(results.values(method, EXACT).values()))
        left.plot(values, [y + 0.22] * len(values), ".", color=colour, alpha=0.6)
        _interval(left, results.mean(method, EXACT), y, colour)
        if method != reference:
            _interval(right, results.difference(method, reference, EXACT), y, colour)
    left.set_yticks(range(len(results.curves)), list(results.curves))
    left.invert_yaxis()
    left.set_xlabel("held-out exact answers, greedy, %")
    right.axvline(0, color="black", linewidth=0.8)
    right.set_xlabel(f"difference to {reference}, paired by seed, points")
    plotting.tidy(left)
    plotting.tidy(right)
    return figure


def _interval(axes: Any, found: Estimate, y: int, colour: str) -> None:
    axes.plot(100 * found.mean, y, "o", color=colour)
    if found.count > 1:
        axes.plot([100 * found.t_low, 100 * found.t_high], [y] * 2, color=colour, linewidth=1)
        axes.plot([100 * found.low, 100 * found.high], [y] * 2, color=colour, linewidth=3.5)


def _panels(results: Results, shown: dict[str, Any], styles: dict[str, Any]) -> Figure:
    """One panel for each metric, one line for each method."""
    rows = 2 if len(shown) > len(_REGIONS) else 1
    figure = plotting.new_figure(16 if rows > 1 else 13, 3.6 * rows)
    for axes, (name, (title, unit)) in zip(
        figure.subplots(rows, len(shown) // rows).flat, shown.items(), strict=True
    ):
        for method, curves in results.curves.items():
            if name in curves:
                steps, values = smooth(curves[name], 1 if name.startswith("eval/") else _WINDOW)
                marker = "o" if len(steps) < 10 else ""
                axes.plot(
                    steps, values, label=method, marker=marker, markersize=3, **styles[method]
                )
        plotting.label_steps(axes, title, unit)
        if shown is not _CURVES:
            axes.set_ylim(bottom=0)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(len(labels), 7), frameon=False
    )
    return figure


def smooth(curve: Curve, window: int) -> tuple[list[int], np.ndarray]:
    """(steps, centred running mean); at the ends the mean is over what there is."""
    values, half = np.array(list(curve.values())), window // 2
    means = [values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))]
    return list(curve), np.array(means)
