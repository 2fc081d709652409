"""The tables shown at the end of a run: what moved from the first to the last step, and the same by region."""

from typing import Any

from rest_jax.analysis.series import Series
from rest_jax.run.metrics import METRICS, REGION_NAMES, summary_table

SHOWN = (
    "eval/exact",
    "eval/format",
    "eval/spurious",
    "eval/accuracy",
    "eval/reward",
    "eval/loss",
    "reward/mean",
    "reward/exact",
    "reward/format_score",
    "reward/equal_groups",
    "rollout/response_tokens",
    "rollout/truncated",
    "rollout/entropy",
    "update/loss",
    "update/grad_norm",
    "curriculum/nu",
    "time/tokens_per_second",
)
SHOWN_BY_REGION = ("entropy", "weight", "weight_share")


def run_table(series: dict[str, Series]) -> str:
    """First and last value of the main metrics, then entropy, weight and mass of each region, first and last."""
    rows: list[list[Any]] = [["metric", "unit", "first", "last", "change", "steps"]]
    for name in SHOWN:
        if name in series:
            steps, values = series[name]
            ends = [values[0], values[-1], values[-1] - values[0]]
            rows.append([name, METRICS[name].unit, *ends, f"{steps[0]}-{steps[-1]}"])
    text = summary_table(rows)
    regions = [name for name in REGION_NAMES if f"region/{name}/entropy" in series]
    if not regions:
        return text
    header = [f"{kind} {end}" for kind in SHOWN_BY_REGION for end in ("first", "last")]
    by_region: list[list[Any]] = [["region", *header]]
    for region in regions:
        row: list[Any] = [region]
        for kind in SHOWN_BY_REGION:
            found = series.get(f"region/{region}/{kind}")
            row += [None, None] if found is None else [found.values[0], found.values[-1]]
        by_region.append(row)
    return f"{text}\n\n{summary_table(by_region)}"
