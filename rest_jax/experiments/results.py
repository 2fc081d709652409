"""What the runs of a comparison measured: a summary and the curves of each run, and what follows from them.

`store` adds run folders to <plan>_runs.csv, <plan>_rates.csv, <plan>_gain.csv and <plan>_curves.csv.gz beside the page; `read`
makes the `Results` of a page of these. A run that stands there is done, wherever it was carried out: what it was made of
stands beside it. Two runs of one seed see the same prompts in the same order, which is why differences are paired by seed.
"""

import csv
import dataclasses
import gzip
import hashlib
import io
import itertools
import json
import math
import pathlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rest_jax import config as config_lib
from rest_jax.analysis.report import read_series
from rest_jax.config import Config
from rest_jax.errors import UserError
from rest_jax.evaluation.statistics import (
    Estimate,
    estimate,
    holm,
    least_difference,
    paired,
    paired_differences,
)
from rest_jax.files import atomic_write
from rest_jax.run.metrics import CONFIG_FILE, DIGESTS_FILE, read_lines

EXACT, AREA = "eval/exact", "area/exact"
# What arms are compared by, fixed before any run: the mean of the held-out curve over the first half of the steps, and the
# rate at the end. With each how pages and figures say where something is shown.
ENDPOINTS = {AREA: "in the mean over the first half", EXACT: "at the end"}
REGIONS = ("tag", "scaffold", "name", "param", "think")
SIGNS = ("positive", "negative")
NOISE, SAMPLED = "early/grad_noise", "late/exact"
_FINAL = (
    EXACT,
    *(
        f"eval/{n}"
        for n in ("accuracy", "format", "spurious", "reward", "response_tokens", "prompts")
    ),
)
_MEANS = (
    "update/effective_tokens",
    *(f"region/{r}/weight_share" for r in REGIONS),
    *(f"region/{r}/change_{sign}" for r in REGIONS for sign in SIGNS),
)
# kept of every step; all of an evaluation is
_CURVES = (
    *_MEANS,
    *(f"region/{r}/entropy" for r in REGIONS),
    *("reward/mean", "reward/exact", "rollout/entropy", "rollout/response_tokens"),
    *("update/grad_norm", "update/grad_noise"),
)
# How config keys begin that may differ between two machines that carry out the same run.
_MAY_DIFFER = (
    *("name", "output", "mesh.", "distributed.", "model.source", "model.tokenizer", "model.remat"),
    *("train.checkpoint_every", "train.keep_checkpoints", "train.samples_per_step"),
)

Curve = Mapping[int, float]  # step -> value
Run = tuple[str, int]  # arm, seed
RateRun = tuple[str, float, int]  # arm, learning rate, seed
Values = Mapping[str, float]  # by name


class MadeOf(NamedTuple):
    """Digests of what a run was made of: `config_digest`, and the weights that it began with, "" where it recorded none."""

    config: str
    weights: str


class Difference(NamedTuple):
    """Of an arm less another in an endpoint. `p`: of no difference, two-sided, t test over seeds, after Holm's correction for all
    comparisons of the plan.
    """

    estimate: Estimate
    p: float

    @property
    def shown(self) -> bool:
        """At 5 %."""
        return self.p < 0.05


class Power(NamedTuple):
    """What a comparison can find with probability 80 %: `single` as the only one at 5 %, `first` with all others at Holm's first
    step. `deviation`: median standard deviation of a paired difference over the arms.
    """

    deviation: float
    seeds: int
    single: float
    first: float


@dataclasses.dataclass(frozen=True)
class Results:
    """Summaries and curves of the runs, the summaries of those that learning rates were chosen by, what all of them were made of,
    and what one step of each method gains at some policies.
    """

    runs: Mapping[Run, Values]
    curves: Mapping[Run, Mapping[str, Curve]]
    rates: Mapping[RateRun, Values]
    gain: Mapping[tuple[str, str], Values]  # (method as `rest-jax gain` calls it, policy)
    made_of: Mapping[Run | RateRun, MadeOf]

    def restricted(self, keep: Iterable[Run | RateRun], policies: Iterable[str] = ()) -> "Results":
        """To some of the runs and the gains at some policies, in their order."""
        keep = list(keep)

        def picked(values: Mapping[Any, Any]) -> dict[Any, Any]:
            return {key: values[key] for key in keep if key in values}

        runs, curves, rates = picked(self.runs), picked(self.curves), picked(self.rates)
        gain = {key: row for name in policies for key, row in self.gain.items() if key[1] == name}
        return Results(runs, curves, rates, gain, picked(self.made_of))

    @property
    def arms(self) -> list[str]:
        """Those with a run, in the order of the plan."""
        return list(dict.fromkeys(arm for arm, _ in self.runs))

    @property
    def policies(self) -> list[str]:
        """At which gains were measured, in the order of the plan."""
        return list(dict.fromkeys(policy for _, policy in self.gain))

    @property
    def methods(self) -> list[str]:
        """Whose gains were measured, as `rest-jax gain` calls them; placebos among them."""
        return list(dict.fromkeys(method for method, _ in self.gain))

    def values(self, arm: str, name: str) -> dict[int, float]:
        """A summary value of an arm by seed."""
        return {seed: values[name] for (a, seed), values in self.runs.items() if a == arm}

    def mean(self, arm: str, name: str) -> Estimate:
        """Over seeds."""
        return estimate(list(self.values(arm, name).values()))

    def average(self, arm: str, name: str) -> float:
        """The mean over seeds, without an interval."""
        return float(np.mean(list(self.values(arm, name).values())))

    def difference(self, arm: str, other: str, name: str) -> Estimate:
        """Of `arm` less `other`, paired by seed."""
        return paired(self.values(arm, name), self.values(other, name))

    def differences(
        self, pairs: Sequence[tuple[str, str]], comparisons: int
    ) -> dict[tuple[str, str, str], Difference]:
        """(arm, other, endpoint) -> difference, corrected for so many comparisons, those to come among them."""
        keys = list(itertools.product(pairs, ENDPOINTS))
        found = [self.difference(*pair, name) for pair, name in keys]
        to_come = [1.0] * (comparisons - len(keys))
        adjusted = holm([*(each.p for each in found), *to_come])
        return {
            (*pair, name): Difference(each, p)
            for (pair, name), each, p in zip(keys, found, adjusted, strict=False)
        }

    def power(self, pairs: Sequence[tuple[str, str]], name: str, comparisons: int) -> Power | None:
        """Of an endpoint, by the spread that these pairs have; None with fewer than three seeds."""
        shared = [paired_differences(self.values(a, name), self.values(b, name)) for a, b in pairs]
        spread = [np.std(values, ddof=1) for values in shared if len(values) >= 3]
        if not spread:
            return None
        deviation, seeds = float(np.median(spread)), max(map(len, shared))
        single, first = (least_difference(deviation, seeds, 0.05 / n) for n in (1, comparisons))
        return Power(deviation, seeds, single, first)

    def of_rate(self, arm: str, rate: float) -> list[float]:
        """Both endpoints of an arm at a learning rate, means over the seeds that it was chosen by; NaN without any."""
        own = [v for (a, r, _), v in self.rates.items() if (a, r) == (arm, rate)]
        return [float(np.mean([v[name] for v in own] or [np.nan])) for name in ENDPOINTS]

    def by_seed(self, arm: str, metric: str) -> dict[int, Curve]:
        """seed -> curve."""
        return {
            seed: curves[metric]
            for (a, seed), curves in self.curves.items()
            if a == arm and metric in curves
        }

    def at_an_edge(self, arm: str, rate: float) -> bool:
        """Whether a learning rate is the least or the greatest of those that the arm was tried with."""
        tried = {r for a, r, _ in self.rates if a == arm}
        return rate in (min(tried), max(tried))

    @property
    def hours(self) -> float:
        """Of the runs, those for the rates included, from their first step to their last evaluation."""
        every = (*self.runs.values(), *self.rates.values())
        return sum(values["time/total"] for values in every) / 3600


def summarise(curves: Mapping[str, Curve]) -> dict[str, float]:
    """Endpoints, other final held-out values, the start's rate, the gradient's noise in the first quarter (later it is nearly
    all noise under every arm), sampled rate and entropy in the last, means over the steps, seconds. NaN for what was not
    measured. Six digits, as they are stored, so that a choice made of them is the same of both.
    """

    def values(name: str) -> list[float]:
        return list(curves.get(name, {0: float("nan")}).values())

    def quarter(name: str, last: bool) -> float:
        count = max(1, len(values(name)) // 4)
        return float(np.mean(values(name)[-count:] if last else values(name)[:count]))

    found = {
        AREA: area(curves.get(EXACT, {0: float("nan")})),
        **{name: values(name)[-1] for name in _FINAL},
        "start/exact": values(EXACT)[0],
        SAMPLED: quarter("reward/exact", last=True),
        NOISE: quarter("update/grad_noise", last=False),
        "end/entropy": quarter("rollout/entropy", last=True),
        **{f"mean/{name}": float(np.mean(values(name))) for name in _MEANS},
        "rollout/tokens": float(sum(values("rollout/tokens"))),
        "time/total": float(np.nansum([*values("time/step"), *values("time/eval")])),
    }
    return {name: float(f"{value:.6g}") for name, value in found.items()}


def area(curve: Curve) -> float:
    """The mean of a curve over the first half of its steps, straight between its points."""
    steps, values = np.array(list(curve), float), np.array(list(curve.values()))
    half = steps[-1] / 2
    if not half:
        return float(values[0])
    inner = (steps > steps[0]) & (steps < half)
    x = np.array([steps[0], *steps[inner], half])
    return float(np.trapezoid(np.interp(x, steps, values), x) / (half - steps[0]))


def held_out_records(found: Iterable[Values]) -> str:
    """How many the runs were evaluated on."""
    counts = sorted({values["eval/prompts"] for values in found})
    return " or ".join(f"{count:.0f}" for count in counts)


def chosen_rates(rates: Mapping[RateRun, Values]) -> dict[str, float]:
    """The learning rate of each arm with the greatest mean of both endpoints over seeds; of equal ones the lowest."""
    by_arm: dict[str, dict[float, list[float]]] = {}
    for (arm, rate, _), values in sorted(rates.items()):
        by_arm.setdefault(arm, {}).setdefault(rate, []).extend(values[name] for name in ENDPOINTS)
    return {
        arm: max(found, key=lambda rate, found=found: float(np.mean(found[rate])))
        for arm, found in by_arm.items()
    }


def config_digest(config: Config) -> str:
    """Of all that may change what a run measures, defaults apart: a key of a later version leaves it as it is."""
    found = config_lib.differences({}, config.model_dump(mode="json", exclude_defaults=True))
    kept = {one.path: one.new for one in found if not one.path.startswith(_MAY_DIFFER)}
    text = json.dumps(kept, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def read_run(folder: pathlib.Path) -> dict[str, dict[int, float]]:
    """metric -> step -> value."""
    return {n: dict(zip(*series, strict=True)) for n, series in read_series(folder).items()}


def read_made_of(folder: pathlib.Path) -> MadeOf:
    """Of a finished run."""
    # Imports jax, which a run is to do for itself.
    from rest_jax.run.contents import MADE_OF

    config = config_lib.load([folder / CONFIG_FILE])
    recorded = _digests(folder)
    first = next((line["launch"][MADE_OF] for line in recorded if "launch" in line), {})
    return MadeOf(config_digest(config), first.get("weights", ""))


def trained_weights(folder: pathlib.Path) -> str:
    """The digest of the weights that a run ended with; "" where it recorded none."""
    return next((x["params"] for x in reversed(_digests(folder)) if "params" in x), "")


def _digests(folder: pathlib.Path) -> list[dict[str, Any]]:
    return read_lines(folder / DIGESTS_FILE, missing_ok=True)


def store(
    runs: Mapping[Run, pathlib.Path],
    rates: Mapping[RateRun, pathlib.Path],
    gains: Mapping[str, pathlib.Path],
    name: str,
    folder: pathlib.Path,
) -> None:
    """Adds finished runs, given by their folders, to the tables, and measured gains, given by their files. A run or a policy that
    stands there already is written again. UserError for runs that did not all begin with the same weights.
    """
    stored = read(name, folder)
    folders = {**runs, **rates}
    new = {key: read_run(run) for key, run in folders.items()}
    made_of = {**stored.made_of, **{key: read_made_of(run) for key, run in folders.items()}}
    check_weights(made_of)
    summaries = {key: summarise(curves) for key, curves in new.items()}

    def write(
        table: str, columns: tuple[str, ...], old: Mapping[Any, Values], keys: Mapping[Any, Any]
    ):
        if not keys:
            return
        found = {**old, **{key: summaries[key] for key in keys}}
        rows = (
            {
                **dict(zip(columns, map(as_key, key), strict=True)),
                **made_of[key]._asdict(),
                **found[key],
            }
            for key in sorted(found)
        )
        _write(folder / f"{name}_{table}.csv", rows)

    if gains:
        kept = {key: row for key, row in stored.gain.items() if key[1] not in gains}
        rows = ({"method": key[0], "policy": key[1], **row} for key, row in kept.items())
        _write(folder / f"{name}_gain.csv", (*rows, *_gain_rows(gains)))
    write("rates", ("arm", "rate", "seed"), stored.rates, rates)
    write("runs", ("arm", "seed"), stored.runs, runs)
    if runs:
        curves = {**stored.curves, **{key: new[key] for key in runs}}
        _write(folder / f"{name}_curves.csv.gz", _points(dict(sorted(curves.items()))))


def as_key(value: Any) -> str:
    """A part of a key as text that is read back equal: a learning rate with six digits, or with all where these are not it."""
    short = f"{value:g}" if isinstance(value, float) else str(value)
    return repr(value) if isinstance(value, float) and float(short) != value else short


def check_weights(made_of: Mapping[Any, MadeOf]) -> None:
    """UserError for runs that did not all begin with the same weights, as far as they recorded them."""
    first: dict[str, str] = {}
    for key, made in made_of.items():
        if made.weights:
            first.setdefault(made.weights, "/".join(map(str, key)))
    if len(first) > 1:
        (one, run), (other, another), *_ = first.items()
        raise UserError(
            f"run {run} began with the weights {one}, run {another} with {other}: they cannot be compared; put the start of the "
            "stored runs in place, or write the tables to another folder"
        )


def _points(found: Mapping[Run, Mapping[str, Curve]]) -> Iterable[dict[str, Any]]:
    """A row for each run and step."""
    every = set().union(*found.values())
    names = [*sorted(n for n in every if n.startswith("eval/")), *sorted(every & {*_CURVES})]
    for (arm, seed), curves in found.items():
        for step in sorted(set().union(*(curves.get(n, ()) for n in names))):
            values = {n: curves.get(n, {}).get(step, "") for n in names}
            yield {"arm": arm, "seed": seed, "step": step, **values}


def _gain_rows(gains: Mapping[str, pathlib.Path]) -> Iterable[dict[str, Any]]:
    """A row for each policy and method. UserError for a file that is none of `rest-jax gain`."""
    for policy, path in gains.items():
        try:
            arms = json.loads(path.read_text())["arms"]
            rows = [{"method": name, "policy": policy, **_gain_row(arms[name])} for name in arms]
            if not rows:
                raise ValueError("no arms")
        except (ValueError, LookupError, TypeError) as error:
            raise UserError(
                f"gain {policy}: {path}: not what `rest-jax gain` writes; measure it anew, or take it out of the plan"
            ) from error
        yield from rows


def _gain_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """What was not measured (None) is left empty."""
    values = {"cosine": row["cosine"]}
    kinds = [("relative", ""), *([("lead", "_lead")] if "placebo_of" in row else [])]
    for (kind, said), quantity in itertools.product(kinds, ("gain", "adam")):
        low, high = row[f"{quantity}_{kind}_interval"]
        name, found = f"{quantity}{said}", (row[f"{quantity}_{kind}"], low, high)
        values |= dict(zip((name, f"{name}_low", f"{name}_high"), found, strict=True))
    return {name: None if value is None else float(value) for name, value in values.items()}


class _Table(NamedTuple):
    """Columns that a table must have: how the cells of a row's key are read, texts, and numbers that are known of every row."""

    key: Mapping[str, Callable[[str], Any]]
    texts: tuple[str, ...] = ()
    known: tuple[str, ...] = ()


_RUN = {"arm": str, "seed": int}
_RUNS = _Table(_RUN, MadeOf._fields, tuple(ENDPOINTS))
_RATES = _Table({"arm": str, "rate": float, "seed": int}, MadeOf._fields, tuple(ENDPOINTS))
_GAINS = _Table({"method": str, "policy": str})
_POINTS = _Table({**_RUN, "step": int})


def read(name: str, folder: pathlib.Path) -> Results:
    """What `store` left in the folder; empty without it. UserError for a table that is damaged: a run whose row is cut would
    count as carried out.
    """
    made_of: dict[Run | RateRun, MadeOf] = {}
    runs: dict[Run, Values] = {}
    rates: dict[RateRun, Values] = {}
    unknown = summarise({})  # of a version that measured less
    for table, columns, found in (("runs", _RUNS, runs), ("rates", _RATES, rates)):
        for key, texts, numbers in _rows(folder / f"{name}_{table}.csv", columns):
            made_of[key], found[key] = MadeOf(*texts), unknown | numbers
    gain = {key: numbers for key, _, numbers in _rows(folder / f"{name}_gain.csv", _GAINS)}
    curves: dict[Run, dict[str, dict[int, float]]] = {}
    for (arm, seed, step), _, numbers in _rows(folder / f"{name}_curves.csv.gz", _POINTS):
        own = curves.setdefault((arm, seed), {})
        for metric, value in numbers.items():
            if value == value:
                own.setdefault(metric, {})[step] = value
    return Results(runs, curves, rates, gain, made_of)


def _rows(
    path: pathlib.Path, table: _Table
) -> Iterator[tuple[tuple[Any, ...], list[str], dict[str, float]]]:
    """(key, texts, numbers) of the rows of a table; none where there is no file. UserError for a line that `_write` does not
    write.
    """
    if not path.is_file():
        return
    text = _text(path)
    reader, seen = csv.reader(io.StringIO(text, newline="")), set()
    try:
        header = next(reader, [])
        for name in (*table.key, *table.texts, *table.known):
            if name not in header:
                raise ValueError(f"no column {name}")
        for cells in filter(None, reader):
            if len(cells) != len(header):
                raise ValueError(f"{len(cells)} cells of {len(header)}")
            row = dict(zip(header, cells, strict=True))
            key = tuple(cell(row.pop(name)) for name, cell in table.key.items())
            texts = [row.pop(name) for name in table.texts]
            numbers = {name: float(value or "nan") for name, value in row.items()}
            if unknown := [name for name in table.known if not math.isfinite(numbers[name])]:
                raise ValueError(f"no value of {unknown[0]}")
            if key in seen:
                raise ValueError(f"a second one of {'/'.join(map(str, key))}")
            seen.add(key)
            yield key, texts, numbers
        if not text.endswith("\n"):
            raise ValueError("the file ends within it")
    except (ValueError, csv.Error) as error:
        where = f"{path}, line {max(1, reader.line_num)}"
        raise UserError(f"{where}: no row of a comparison: {error}; restore the file") from error


def _text(path: pathlib.Path) -> str:
    """UserError for a file that is cut, or none of its kind."""
    content = path.read_bytes()
    try:
        return (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
    except (EOFError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise UserError(f"{path}: no table of a comparison: {error}; restore the file") from error


def _write(path: pathlib.Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Six digits of every float, nothing where a row has no such column; the same bytes for the same rows."""
    rows, text = list(rows), io.StringIO()
    writer = csv.DictWriter(text, dict.fromkeys(name for row in rows for name in row))
    writer.writeheader()
    for row in rows:
        writer.writerow({n: f"{x:.6g}" if isinstance(x, float) else x for n, x in row.items()})
    content = text.getvalue().encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        partial.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
