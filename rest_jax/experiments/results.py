"""What the runs of a comparison measured: a summary of each run, mean curves of each method, estimates over seeds.

`store` reads run folders and leaves <plan>_runs.csv and <plan>_curves.csv.gz beside the page; `read` makes the `Results`
of a page of these two. Two runs of one seed see the same prompts in the same order, which is why differences are paired
by seed. Seeds are few (five is usual). The percentile bootstrap is too narrow then; Student's t is wider and holds its
level better. A difference counts as found only where both 95 % intervals exclude zero.
"""

import csv
import dataclasses
import gzip
import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rest_jax.analysis.report import read_series
from rest_jax.evaluation.statistics import Estimate, estimate, paired
from rest_jax.files import atomic_write

EXACT, SAMPLED, NOISE = COMPARED = "eval/exact", "sampled/exact", "early/grad_noise"
_FINAL = (
    EXACT,
    *(f"eval/{n}" for n in ("accuracy", "format", "spurious", "reward", "response_tokens")),
)
LAST_STEPS = 10  # training steps whose sampled rate is averaged
_COMPILING_STEPS = 3  # left out of step times

Curve = Mapping[int, float]  # step -> value


@dataclasses.dataclass(frozen=True)
class Results:
    """`runs`: (method, seed) -> summary values by name. `curves`: method -> metric -> means over seeds."""

    runs: Mapping[tuple[str, int], Mapping[str, float]]
    curves: Mapping[str, Mapping[str, Curve]]

    def values(self, method: str, name: str) -> dict[int, float]:
        """A summary value of a method by seed."""
        return {seed: values[name] for (m, seed), values in self.runs.items() if m == method}

    def mean(self, method: str, name: str) -> Estimate:
        """Over seeds."""
        return estimate(list(self.values(method, name).values()))

    def difference(self, method: str, other: str, name: str) -> Estimate:
        """Of `method` less `other`, paired by seed."""
        return paired(self.values(method, name), self.values(other, name))

    def sampled_share(self, region: str) -> float:
        """Share of a region among all sampled tokens."""
        counts = {
            name: sum(sum(curves[name].values()) for curves in self.curves.values())
            for name in next(iter(self.curves.values()))
            if name.startswith("region/") and name.endswith("/count")
        }
        return counts[f"region/{region}/count"] / sum(counts.values())


def store(runs: Mapping[tuple[str, int], pathlib.Path], name: str, folder: pathlib.Path) -> None:
    """Writes the summaries and the curves of finished runs, given as (method, seed) -> run folder."""
    found: dict[str, dict[int, Mapping[str, Curve]]] = {}
    for (method, seed), run in runs.items():
        curves = {n: dict(zip(*series, strict=True)) for n, series in read_series(run).items()}
        found.setdefault(method, {})[seed] = curves
    rows = [{"method": m, "seed": seed, **summarise(found[m][seed])} for m, seed in runs]
    points = [
        {"method": method, "metric": metric, "step": step, "mean": value}
        for method, seeds in found.items()
        for metric, curve in mean_curves(list(seeds.values())).items()
        for step, value in curve.items()
    ]
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / f"{name}_runs.csv", rows)
    _write(folder / f"{name}_curves.csv.gz", points)


def summarise(curves: Mapping[str, Curve]) -> dict[str, float]:
    """Final held-out values; the start's exact rate; the sampled exact rate of the last steps; the gradient's noise in the
    first quarter (later it is nearly all noise under every method); seconds of a step. NaN for what was not measured.
    """

    def values(name: str) -> list[float]:
        return list(curves.get(name, {0: float("nan")}).values())

    noise = values("update/grad_noise")
    summary = {name: values(name)[-1] for name in _FINAL} | {
        "start/exact": values(EXACT)[0],
        SAMPLED: float(np.mean(values("reward/exact")[-LAST_STEPS:])),
        NOISE: float(np.mean(noise[: max(1, len(noise) // 4)])),
        "rollout/tokens": float(sum(values("rollout/tokens"))),
    }
    for name in ("time/step", "time/cpu"):
        summary[name] = float(np.median(values(name)[_COMPILING_STEPS:] or values(name)))
    return summary


def mean_curves(runs: Sequence[Mapping[str, Curve]]) -> dict[str, Curve]:
    """The mean of each metric over the runs that have it, at the steps that all of these have."""
    means = {}
    for name in sorted(set().union(*runs)):
        curves = [run[name] for run in runs if name in run]
        steps = sorted(set.intersection(*map(set, curves)))
        if steps and name != "time/elapsed":
            means[name] = {
                step: float(np.mean([curve[step] for curve in curves])) for step in steps
            }
    return means


def read(name: str, folder: pathlib.Path) -> Results:
    """What `store` left in the folder; empty without it."""
    if not (folder / f"{name}_runs.csv").is_file():
        return Results({}, {})
    with (folder / f"{name}_runs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    runs = {(row.pop("method"), int(row.pop("seed"))): row for row in rows}
    curves: dict[str, dict[str, dict[int, float]]] = {}
    with gzip.open(folder / f"{name}_curves.csv.gz", "rt", newline="") as file:
        for row in csv.DictReader(file):
            curve = curves.setdefault(row["method"], {}).setdefault(row["metric"], {})
            curve[int(row["step"])] = float(row["mean"])
    numbers = {key: {n: float(v or "nan") for n, v in row.items()} for key, row in runs.items()}
    return Results(numbers, curves)


def _write(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Six digits of every number; the same bytes for the same rows."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(rows[0])
    for row in rows:
        writer.writerow(f"{x:.6g}" if isinstance(x, float) else x for x in row.values())
    content = text.getvalue().encode()
    with atomic_write(path) as partial:
        partial.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
