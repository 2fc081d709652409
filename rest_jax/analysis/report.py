"""What a run looks like afterwards, read from its metrics.jsonl: figure and table of `rest-jax report` (the page: page.py).

The figure `<run>/curves.png` has learning curves above, and entropy, weight and weight share by region below. The table has
what moved from the first step to the last. Both show the metrics that the run has, of reinforcement learning or supervised.
"""

from typing import Any, NamedTuple

from etils import epath

from rest_jax.analysis.plotting import (
    LINE_STYLES,
    PALETTE,
    REGION_COLOURS,
    label_steps,
    new_figure,
    save,
)
from rest_jax.errors import UserError
from rest_jax.files import READ_ONLY, Location, absolute, as_path
from rest_jax.run.metrics import METRICS, METRICS_FILE, REGION_NAMES, read_lines, summary_table

SHOWN = (
    "eval/exact",
    "eval/format",
    "eval/spurious",
    "eval/accuracy",
    "eval/reward",
    "eval/api_bank/soft",
    "eval/api_bank/strict",
    "reward/mean",
    "reward/exact",
    "reward/format_score",
    "reward/equal_groups",
    "rollout/response_tokens",
    "rollout/truncated",
    "rollout/entropy",
    "update/loss",
    "update/accuracy",
    "update/grad_norm",
    "curriculum/nu",
    "time/tokens_per_second",
)
SHOWN_BY_REGION = ("entropy", "weight", "weight_share")
FILE = "curves.png"
# title, unit, metric -> its label
_REWARD = ("Reward", "mean reward", {"reward/mean": "sampled", "eval/reward": "held out, greedy"})
_LOSS = ("Loss", "nats", {"update/loss": "training"})
_RATES = (
    "Held-out rates, greedy",
    "fraction",
    {
        "eval/exact": "exact calls",
        "eval/format": "format",
        "eval/spurious": "spurious calls",
        "eval/api_bank/soft": "API-Bank, soft",
        "eval/api_bank/strict": "API-Bank, strict",
    },
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


class Series(NamedTuple):
    """Values of one metric in the order written, at least one; steps where it was NaN are left out."""

    steps: list[int]
    values: list[float]


def read_series(run_dir: Location) -> dict[str, Series]:
    """Every metric of a run by name. UserError when the folder has no metrics, or none of any step."""
    path = as_path(run_dir) / METRICS_FILE
    series: dict[str, Series] = {}
    for line in read_lines(path):
        step = line.pop("step")
        for name, value in line.items():
            if value is not None:
                own = series.setdefault(name, Series([], []))
                own.steps.append(step)
                own.values.append(value)
    if not series:
        raise UserError(f"{path}: no metrics yet; the run has not finished its first step")
    return series


def run_table(series: dict[str, Series]) -> str:
    """First and last value of the main metrics that a run has; then of the entropy, weight and weight share by region."""
    rows: list[list[Any]] = [["metric", "unit", "first", "last", "change", "steps", "what it is"]]
    for name in SHOWN:
        if name in series:
            steps, values = series[name]
            ends = [values[0], values[-1], values[-1] - values[0]]
            of = f"{steps[0]}-{steps[-1]}"
            rows.append([name, METRICS[name].unit, *ends, of, METRICS[name].meaning])
    header = [f"{kind} {end}" for kind in SHOWN_BY_REGION for end in ("first", "last")]
    by_region: list[list[Any]] = [["region", *header]]
    for region in REGION_NAMES:
        curves = [series.get(f"region/{region}/{kind}") for kind in SHOWN_BY_REGION]
        if any(curves):
            ends = [(c.values[0], c.values[-1]) if c else (None, None) for c in curves]
            by_region.append([region, *(value for pair in ends for value in pair)])
    return "\n\n".join(summary_table(t) for t in (rows, by_region) if len(t) > 1)


def write_report(run_dir: Location) -> str:
    """Redraws `<run>/curves.png` and returns the table of the run, with the path of the figure as its last line, or why it was
    not drawn: a run may be another's, of which the page goes elsewhere.

    UserError when the folder has no metrics.
    """
    try:
        figure = str(write_curves(run_dir))
    except OSError as error:
        if error.errno not in READ_ONLY:
            raise
        figure = f"not drawn, since the folder may only be read ({error.strerror})"
    return f"{run_table(read_series(run_dir))}\n\ncurves: {figure}"


def write_curves(run_dir: Location) -> epath.Path:
    """Draws the figure and returns its path. UserError when the run has no metrics."""
    series = read_series(run_dir)
    panels = [_REWARD if "reward/mean" in series else _LOSS, _RATES, _LENGTH]
    if any(name.startswith("region/") for name in series):
        panels += _BY_REGION
    rows = len(panels) // 3
    figure = new_figure(14, 3.8 * rows)
    figure.suptitle(absolute(run_dir).name)
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
    return save(figure, as_path(run_dir) / FILE)


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
