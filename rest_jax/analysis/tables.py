"""The metrics of a run as series, read from its metrics.jsonl, and the table of what moved from the first step to the last."""

import pathlib
from typing import Any, NamedTuple

from rest_jax.errors import UserError
from rest_jax.run.metrics import METRICS, METRICS_FILE, REGION_NAMES, read_lines, summary_table

SHOWN = (
    "eval/exact",
    "eval/format",
    "eval/spurious",
    "eval/accuracy",
    "eval/reward",
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


class Series(NamedTuple):
    """Values of one metric in the order written, at least one; steps where it was NaN are left out."""

    steps: list[int]
    values: list[float]


def read_series(run_dir: str | pathlib.Path) -> dict[str, Series]:
    """Every metric of a run by name. UserError when the folder has no metrics, or none of any step."""
    path = pathlib.Path(run_dir) / METRICS_FILE
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
    rows: list[list[Any]] = [["metric", "unit", "first", "last", "change", "steps"]]
    for name in SHOWN:
        if name in series:
            steps, values = series[name]
            ends = [values[0], values[-1], values[-1] - values[0]]
            rows.append([name, METRICS[name].unit, *ends, f"{steps[0]}-{steps[-1]}"])
    header = [f"{kind} {end}" for kind in SHOWN_BY_REGION for end in ("first", "last")]
    by_region: list[list[Any]] = [["region", *header]]
    for region in REGION_NAMES:
        curves = [series.get(f"region/{region}/{kind}") for kind in SHOWN_BY_REGION]
        if any(curves):
            ends = [(c.values[0], c.values[-1]) if c else (None, None) for c in curves]
            by_region.append([region, *(value for pair in ends for value in pair)])
    return "\n\n".join(summary_table(t) for t in (rows, by_region) if len(t) > 1)
