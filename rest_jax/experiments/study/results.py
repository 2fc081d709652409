"""What the runs of a study measured: final rates with intervals, differences paired by seed, curves over steps.

All come from the runs' own metrics.jsonl. Two runs of one seed see the same prompts in the same order and the same number of
rollouts, which is why differences are paired by seed. `write_tables` leaves them as CSV.
"""

import csv
import dataclasses
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rest_jax.analysis.tables import Series, read_series
from rest_jax.config import RolloutConfig
from rest_jax.evaluation.statistics import Estimate, estimate, paired
from rest_jax.experiments.study.plan import PlannedRun, Study
from rest_jax.experiments.study.runner import check, is_finished
from rest_jax.files import atomic_write

EXACT, SAMPLED, NOISE = COMPARED = "eval/exact", "sampled/exact", "early/grad_noise"
MAIN_REGIONS = ("tag", "scaffold", "name", "param", "think")
FINAL = (
    EXACT,
    "eval/accuracy",
    "eval/format",
    "eval/spurious",
    "eval/reward",
    "eval/response_tokens",
)
LAST_STEPS = 10  # training steps whose sampled rate is averaged
WARM_UP_STEPS = 3  # left out of step times: they compile


@dataclasses.dataclass(frozen=True)
class RunResult:
    """One finished run: summary values by name, and every series."""

    method: str
    seed: int
    summary: dict[str, float]
    curves: dict[str, Series]


@dataclasses.dataclass(frozen=True)
class StudyResult:
    """The finished runs of a study, how many there should be, and the rollouts they all share."""

    study: Study
    runs: list[RunResult]
    planned: int
    rollout: RolloutConfig

    def of(self, method: str) -> dict[int, RunResult]:
        """Its runs by seed."""
        return {run.seed: run for run in self.runs if run.method == method}

    def values(self, method: str, name: str) -> dict[int, float]:
        """A summary value by seed."""
        return {seed: run.summary[name] for seed, run in self.of(method).items()}

    def level(self, method: str, name: str) -> Estimate:
        """Mean over seeds with its intervals."""
        return estimate(list(self.values(method, name).values()))

    def difference(self, method: str, name: str, other: str | None = None) -> Estimate:
        """Mean difference to the reference, or to `other`, paired by seed."""
        return paired(self.values(method, name), self.values(other or self.study.reference, name))

    @property
    def comparisons(self) -> list[tuple[str, str]]:
        """Every pair (method, compared with) that shares a seed: with the reference, then the study's own pairs."""
        wanted = [(m, self.study.reference) for m in self.methods if m != self.study.reference]
        wanted += self.study.pairs
        return [(a, b) for a, b in wanted if self.of(a).keys() & self.of(b).keys()]

    @property
    def methods(self) -> list[str]:
        """Those with a finished run that shares a seed with the reference, in the study's order."""
        reference = self.of(self.study.reference)
        return [m for m in self.study.methods if self.of(m).keys() & reference.keys()]


def collect(study: Study, runs: Sequence[PlannedRun]) -> StudyResult:
    """Reads every finished run. UserError when a folder holds a run of another config."""
    finished = [run for run in runs if is_finished(run)]
    for run in finished:
        check(run)
    found = [read_run(run) for run in finished]
    return StudyResult(study, found, len(runs), runs[0].config.rollout)


def read_run(run: PlannedRun) -> RunResult:
    """One run's series and summary."""
    curves = read_series(run.config.folder)
    return RunResult(run.method, run.seed, summarise(curves), curves)


def summarise(curves: Mapping[str, Series]) -> dict[str, float]:
    """Final held-out values, the start's exact rate, the sampled exact rate of the last steps, the gradient's noise in the first
    quarter (later it is nearly all noise under every method; NaN where it was not measured), seconds of a step: by the
    clock, and of the CPU, which other work on the machine hardly changes (NaN where a run has none).
    """
    summary = {name: float(curves[name].values[-1]) for name in FINAL}
    summary["start/exact"] = float(curves[EXACT].values[0])
    summary[SAMPLED] = float(np.mean(curves["reward/exact"].values[-LAST_STEPS:]))
    noise = _values(curves, "update/grad_noise")
    summary[NOISE] = float(np.mean(noise[: max(1, len(noise) // 4)]))
    for name in ("time/step", "time/cpu"):
        values = _values(curves, name)
        values = values[WARM_UP_STEPS:] or values
        summary[name] = float(np.median(values))
    tokens = sum(curves["rollout/tokens"].values)
    return summary | {"rollout/tokens": float(tokens)}


def _values(curves: Mapping[str, Series], name: str) -> list[float]:
    """Those of a metric that not every run has; a NaN where it has none."""
    return curves[name].values if name in curves else [float("nan")]


def mean_curve(runs: Iterable[RunResult], name: str, window: int = 1) -> Series | None:
    """The mean over runs at the steps that all have, smoothed by a running mean over `window` steps; None without data."""
    curves = [run.curves[name] for run in runs if name in run.curves]
    shared = set.intersection(*(set(c.steps) for c in curves)) if curves else set()
    if not shared:
        return None
    by_step = [dict(zip(c.steps, c.values, strict=True)) for c in curves]
    steps = sorted(shared)
    values = np.array([np.mean([found[step] for found in by_step]) for step in steps])
    return Series(steps, smooth(values, window).tolist())


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred running mean; at the ends over what there is."""
    half = window // 2
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])


def write_tables(result: StudyResult, folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes `<study>_runs.csv` (a line a run), `<study>_methods.csv` (estimates: levels, and differences of `method` less
    `less`) and `<study>_curves.csv` (means over seeds).
    """
    name = result.study.name
    return [
        _write(folder / f"{name}_runs.csv", _run_rows(result)),
        _write(folder / f"{name}_methods.csv", _method_rows(result)),
        _write(folder / f"{name}_curves.csv", _curve_rows(result)),
    ]


def _run_rows(result: StudyResult) -> list[dict[str, Any]]:
    return [{"method": r.method, "seed": r.seed, **_rounded(r.summary)} for r in result.runs]


def _method_rows(result: StudyResult) -> list[dict[str, Any]]:
    found = [
        ({"method": method, "less": "", "metric": name}, result.level(method, name))
        for method in result.methods
        for name in result.runs[0].summary
    ]
    found += [
        ({"method": method, "less": other, "metric": name}, result.difference(method, name, other))
        for method, other in result.comparisons
        for name in result.runs[0].summary
    ]
    return [row | _rounded(dataclasses.asdict(value)) for row, value in found]


def _curve_rows(result: StudyResult) -> list[dict[str, Any]]:
    rows = []
    for method in result.methods:
        runs = list(result.of(method).values())
        for name in sorted(set().union(*(run.curves for run in runs))):
            curve = mean_curve(runs, name)
            if curve is not None and name != "time/elapsed":
                points = zip(*curve, strict=True)
                rows += [
                    {"method": method, "metric": name, "step": step, **_rounded({"mean": value})}
                    for step, value in points
                ]
    return rows


def _rounded(values: Mapping[str, float]) -> dict[str, float | str]:
    """Six digits; nothing where there is no number."""
    return {k: "" if np.isnan(v) else float(f"{v:.6g}") for k, v in values.items()}


def _write(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> pathlib.Path:
    with atomic_write(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)
    return path
