"""The figure of a run, `<run>/curves.png`: learning curves above; entropy, weight and weight share by region below.

It shows the metrics that the run has written, of reinforcement learning or of a supervised run.
"""

import pathlib
from typing import Any

from rest_jax.analysis.plotting import (
    LINE_STYLES,
    PALETTE,
    REGION_COLOURS,
    label_steps,
    new_figure,
    save,
)
from rest_jax.analysis.tables import Series, read_series

FILE = "curves.png"
# title, unit, metric -> its label
_REWARD = ("Reward", "mean reward", {"reward/mean": "sampled", "eval/reward": "held out, greedy"})
_LOSS = ("Loss", "nats", {"update/loss": "training"})
_RATES = (
    "Held-out rates, greedy",
    "fraction",
    {"eval/exact": "exact calls", "eval/format": "format", "eval/spurious": "spurious calls"},
)
_LENGTH = (
    "Length of the completions",
    "tokens",
    {"rollout/response_tokens": "sampled", "eval/response_tokens": "held out, greedy"},
)
_BY_REGION = tuple(
    (title, unit, {f"region/{name}/{kind}": name for name in REGION_COLOURS})
    for kind, title, unit in (
        ("entropy", "Entropy by region", "nats"),
        ("weight", "Mean weight by region, after normalisation", "weight"),
        ("weight_share", "Share of the total weight by region", "fraction"),
    )
)


def write_curves(run_dir: str | pathlib.Path) -> pathlib.Path:
    """Draws the figure and returns its path. UserError when the run has no metrics."""
    series = read_series(run_dir)
    panels = [_REWARD if "reward/mean" in series else _LOSS, _RATES, _LENGTH]
    if any(name.startswith("region/") for name in series):
        panels += _BY_REGION
    rows = len(panels) // 3
    figure = new_figure(14, 3.8 * rows)
    figure.suptitle(pathlib.Path(run_dir).resolve().name)
    steps = [step for curve in series.values() for step in curve.steps]
    # never empty, also after a single step
    margin = max(0.5, 0.02 * (max(steps) - min(steps)))
    for axes, panel in zip(figure.subplots(rows, 3).flat, panels, strict=True):
        _draw_panel(axes, series, *panel)
        axes.set_xlim(min(steps) - margin, max(steps) + margin)
    lines = {str(line.get_label()): line for axes in figure.axes[3:] for line in axes.lines}
    if lines:
        figure.legend(
            list(lines.values()), list(lines), loc="outside lower center", ncols=len(lines),
            title="regions (lower row)", frameon=False,
        )  # fmt: skip
    return save(figure, pathlib.Path(run_dir) / FILE)


def _draw_panel(
    axes: Any, series: dict[str, Series], title: str, unit: str, labels: dict[str, str]
) -> None:
    """One line for each metric that the run has; few points are marked."""
    label_steps(axes, title, unit)
    for i, (name, label) in enumerate(labels.items()):
        if name in series:
            steps, values = series[name]
            axes.plot(
                steps, values, label=label, linestyle=LINE_STYLES[i], markersize=4,
                marker="o" if len(steps) <= 20 else "", color=REGION_COLOURS.get(label, PALETTE[i]),
            )  # fmt: skip
    if not axes.lines:
        centre = {"ha": "center", "va": "center", "transform": axes.transAxes}
        axes.text(0.5, 0.5, "not measured in this run", color="0.4", **centre)
    elif not REGION_COLOURS.keys() >= set(labels.values()):
        axes.legend(fontsize="small", framealpha=0.8)
    if unit == "fraction":
        axes.set_ylim(-0.03, 1.03)
