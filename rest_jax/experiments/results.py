"""What the runs of a comparison measured: a summary of each run, mean curves of each method, estimates over seeds.

`collect` reads them from run folders; `write` leaves them beside the page as <plan>_runs.csv, <plan>_curves.csv.gz and
<plan>_methods.csv; `read` makes the same `Results` of the first two, so that a page can be rendered without the runs.
Two runs of one seed see the same prompts in the same order, which is why differences are paired by seed.
"""

import csv
import dataclasses
import gzip
import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rest_jax.evaluation.statistics import Estimate, estimate, paired
from rest_jax.files import atomic_write
from rest_jax.run.metrics import METRICS_FILE, read_lines

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

    def ends(self, method: str, name: str) -> list[float]:
        """The first and the last value of a mean curve."""
        values = list(self.curves[method][name].values())
        return [values[0], values[-1]]


def collect(folders: Mapping[tuple[str, int], pathlib.Path]) -> Results:
    """The results of finished runs, by (method, seed)."""
    found = {key: read_curves(folder) for key, folder in folders.items()}
    methods = dict.fromkeys(method for method, _ in found)
    means = {m: mean_curves([found[key] for key in found if key[0] == m]) for m in methods}
    curves = {m: {name: rounded(curve) for name, curve in means[m].items()} for m in means}
    return Results({key: rounded(summarise(run)) for key, run in found.items()}, curves)


def read_curves(folder: pathlib.Path) -> dict[str, dict[int, float]]:
    """Every metric of a run, step -> value; steps where it was NaN are left out."""
    curves: dict[str, dict[int, float]] = {}
    for line in read_lines(folder / METRICS_FILE):
        for name in line.keys() - {"step"}:
            if line[name] is not None:
                curves.setdefault(name, {})[line["step"]] = line[name]
    return curves


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


def write(
    results: Results, name: str, pairs: Sequence[tuple[str, str]], folder: pathlib.Path
) -> None:
    """Writes the runs, the curves (compressed, the same bytes for the same curves) and the estimates."""
    rows = [{"method": m, "seed": seed, **run} for (m, seed), run in results.runs.items()]
    _write(folder / f"{name}_runs.csv", rows)
    names = list(next(iter(results.runs.values())))
    found = [
        ({"method": m, "less": ""}, n, results.mean(m, n)) for m in results.curves for n in names
    ]
    for a, b in pairs:
        found += [({"method": a, "less": b}, n, results.difference(a, b, n)) for n in names]
    estimates = [keys | {"metric": n} | rounded(dataclasses.asdict(e)) for keys, n, e in found]
    _write(folder / f"{name}_methods.csv", estimates)
    points = [
        {"method": method, "metric": metric, "step": step, "mean": value}
        for method, curves in results.curves.items()
        for metric, curve in curves.items()
        for step, value in curve.items()
    ]
    _write(folder / f"{name}_curves.csv.gz", points)


def read(name: str, folder: pathlib.Path) -> Results | None:
    """What `write` left in the folder; None without it."""
    if not (folder / f"{name}_runs.csv").is_file():
        return None
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


def rounded(values: Mapping[Any, float]) -> dict[Any, float]:
    """Six digits, as they are stored."""
    return {key: float(f"{value:.6g}") for key, value in values.items()}


def _write(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    for row in rows:
        # What was not measured (NaN) is left empty.
        writer.writerow({key: "" if value != value else value for key, value in row.items()})
    content = text.getvalue().encode()
    with atomic_write(path) as partial:
        partial.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
