"""One page of one or more runs: an HTML file that needs no network, with curves, config differences and the token viewer.

    write_page(runs) -> <first run>/report.html, and report.csv beside it with every metric of every step

Reads what the runs wrote (metrics.jsonl, tokens.jsonl, config.yaml). The curves are Plotly's, the viewer is plain JavaScript
(assets/); what the runs hold goes into the page as JSON in which no markup can occur.
"""

import csv
import functools
import json
import math
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
from etils import epath

from rest_jax import __version__
from rest_jax import config as config_lib
from rest_jax.analysis.plotting import PALETTE, REGION_COLOURS
from rest_jax.analysis.report import SHOWN, Series, read_series
from rest_jax.errors import UserError
from rest_jax.evaluation.statistics import rate_interval
from rest_jax.files import Location, absolute, as_path, atomic_write, check_output, store_errors
from rest_jax.rollout.tokens import read_record
from rest_jax.run.folder import CONFIG_FILE
from rest_jax.run.metrics import (
    METRICS,
    METRICS_FILE,
    REGION_NAMES,
    TOKENS_FILE,
    in_order,
    read_lines,
    run_files,
)
from rest_jax.run.results import Rate, Result, read_results, steps_of_results
from rest_jax.texts import csv_cell, printable

PAGE_FILE, TABLE_FILE = "report.html", "report.csv"
MOST_BYTES = (
    2**24
)  # of tokens in a page, as they are in the file; of longer runs steps are left out evenly
REFRESH = 20  # seconds between two pages while runs go on
RESULTS = "Results"  # the section with the table of benchmarks
# What reading the tokens of a step raises where they are not as a run writes them.
_UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, RecursionError, zlib.error)
# Black shows nothing on a dark page; this grey leaves text on it legible.
DARK_COLOURS = REGION_COLOURS | {"other": "#A8A8A8"}
# What tells a region without its colour: the dashes of its curve (Plotly), the lines at its tokens (CSS).
REGION_MARKS = {
    "tag": ("dot", "underline double"),
    "scaffold": ("dashdot", "underline dotted"),
    "name": ("solid", "underline solid"),
    "param": ("dash", "underline dashed"),
    "think": ("longdash", "none"),
    "response": ("longdashdot", "underline wavy"),
    "other": ("2px,2px,2px,2px,8px,2px", "underline overline solid"),
}
# Of how many each rate is, which gives it Wilson's interval.
_COUNTS = {
    "eval/exact": "eval/prompts",
    "eval/format": "eval/prompts",
    "eval/truncated": "eval/prompts",
    "eval/spurious": "eval/prompts_without_calls",
    "eval/api_bank/soft": "eval/api_bank/items",
    "eval/api_bank/strict": "eval/api_bank/items",
}
_SIZES = ("prompts_per_step", "group_size")  # keys of rollout


class Panel(NamedTuple):
    """Curves in one frame: metric -> its label."""

    title: str
    unit: str
    metrics: dict[str, str]
    log: bool = False


def _by_region(kind: str, title: str, unit: str) -> Panel:
    return Panel(title, unit, {f"region/{name}/{kind}": name for name in REGION_NAMES})


SECTIONS: tuple[tuple[str, str, tuple[Panel, ...]], ...] = (
    (
        RESULTS,
        "Held-out values are of greedy completions. Bands and bars are 95 % intervals: of rates Wilson's, of means the "
        "normal one; completions of a prompt are a cluster. The band of a smoothed curve is smoothed alike.",
        (
            Panel("Reward", "reward", {"reward/mean": "sampled", "eval/reward": "held out"}),
            Panel(
                "Reward by part",
                "reward",
                {
                    "reward/format_part": "format",
                    "reward/correctness_part": "correctness",
                    "reward/plugin_part": "plug-in",
                },
            ),
            Panel(
                "Sampled completions",
                "fraction",
                {
                    "reward/exact": "exact",
                    "reward/format_score": "format",
                    "reward/accuracy": "S_acc",
                    "reward/spurious": "spurious calls",
                },
            ),
            Panel(
                "Held out",
                "fraction",
                {
                    "eval/exact": "exact",
                    "eval/format": "format",
                    "eval/accuracy": "S_acc",
                    "eval/spurious": "spurious calls",
                },
            ),
            Panel(
                "Benchmark: API-Bank",
                "fraction",
                {"eval/api_bank/soft": "soft", "eval/api_bank/strict": "strict"},
            ),
        ),
    ),
    (
        "The method at a glance",
        "Under ResT regions of low entropy weigh more; the curriculum moves weight from the format to parameters and reasoning.",
        (
            _by_region("entropy", "Entropy by region", "nats"),
            _by_region("base", "Weight in force by region, before normalisation", "weight"),
            _by_region("weight", "Mean weight by region, after normalisation", "weight"),
            _by_region("weight_share", "Share of the total weight by region", "fraction"),
            _by_region("count", "Tokens by region", "tokens"),
            Panel(
                "Curriculum",
                "fraction",
                {"curriculum/nu": "progress", "curriculum/format_score": "format score, averaged"},
            ),
        ),
    ),
    (
        "Completions",
        "",
        (
            Panel(
                "Entropy",
                "nats",
                {"rollout/entropy": "sampled tokens", "update/entropy": "in the update"},
            ),
            Panel(
                "Length",
                "tokens",
                {
                    "rollout/response_tokens": "mean",
                    "rollout/response_tokens_max": "greatest",
                    "eval/response_tokens": "held out",
                    "rollout/prompt_tokens": "prompts",
                },
            ),
            Panel(
                "Not ended within the limit",
                "fraction",
                {"rollout/truncated": "sampled", "eval/truncated": "held out"},
            ),
            Panel(
                "Groups without advantage",
                "fraction",
                {"reward/equal_groups": "equal rewards", "update/skipped_groups": "skipped"},
            ),
            Panel(
                "Spread of the reward",
                "reward",
                {"reward/std": "over the batch", "reward/group_std": "within the groups"},
            ),
        ),
    ),
    (
        "Optimisation",
        "",
        (
            Panel(
                "Loss",
                "",
                {"update/loss": "loss", "update/policy_loss": "policy loss", "update/nll": "NLL"},
            ),
            Panel("Accuracy (supervised)", "fraction", {"update/accuracy": "targets"}),
            Panel(
                "Clip fractions",
                "fraction",
                {
                    "update/clip_low_fraction": "low",
                    "update/clip_high_fraction": "high",
                    "update/dual_clip_fraction": "dual",
                },
            ),
            Panel(
                "Probability ratio to the sampler", "", {"update/ratio_max": "greatest"}, log=True
            ),
            Panel(
                "KL",
                "nats",
                {"update/approx_kl": "from the sampler", "update/kl": "from the reference"},
            ),
            Panel("Learning rate", "", {"update/learning_rate": "learning rate"}),
            Panel(
                "Norms", "", {"update/grad_norm": "gradient", "update/update_norm": "update"}, True
            ),
            Panel(
                "Gradient noise", "", {"update/grad_noise": "variance over squared norm"}, log=True
            ),
            Panel(
                "Sampler and trainer: mismatch of log-probs",
                "nats",
                {"rollout/logp_mismatch": "mean difference"},
                log=True,
            ),
            Panel(
                "Experts",
                "",
                {"router/load_max": "greatest load", "router/unused_experts": "without a token"},
            ),
        ),
    ),
    (
        "Machine",
        "",
        (
            Panel(
                "Throughput",
                "tokens/s",
                {
                    "time/tokens_per_second": "of the step",
                    "time/rollout_tokens_per_second": "rollout",
                    "time/update_tokens_per_second": "update",
                },
                log=True,
            ),
            Panel(
                "Utilisation",
                "fraction",
                {
                    "rollout/decode_slot_utilisation": "decode slots",
                    "time/rollout_mfu": "MFU, rollout",
                    "time/update_mfu": "MFU, update",
                    "update/padding": "padding",
                },
            ),
            Panel(
                "Time of a step",
                "s",
                {
                    "time/step": "step",
                    "time/rollout": "rollout",
                    "time/update": "update",
                    "time/score_wait": "waiting for scores",
                    "time/data": "waiting for data",
                },
            ),
            Panel(
                "Most memory in use",
                "GiB",
                {"time/device_memory": "device", "time/host_memory": "host"},
            ),
        ),
    ),
)


def write_page(
    runs: Sequence[Location], output: Location | None = None, refresh: int | None = None
) -> epath.Path:
    """Writes page and table; returns the path of the page (None: in the first run's folder). `refresh`: seconds after which the
    page asks its own file again. UserError for a run without metrics.
    """
    found = [read_series(run) for run in runs]
    path = as_path(output) if output else as_path(runs[0]) / PAGE_FILE
    table = path.with_suffix(".csv")
    if table == path:
        raise UserError(f"--output {output}: the table of the page goes there; name an HTML file")
    for written in (path, table):
        check_output(written, [file for run in runs for file in run_files(run)])
    names = _names(runs)
    data = page_data(runs, names, found) | {"refresh": refresh}
    with store_errors(path), atomic_write(path) as partial:
        partial.write_text(_render(data, ", ".join(names)), encoding="utf-8")
    with (
        store_errors(table),
        atomic_write(table) as partial,
        partial.open("w", newline="", encoding="utf-8") as file,
    ):
        _write_table(csv.writer(file), runs, names)
    return path


def watch(runs: Sequence[Location], output: Location | None = None) -> Iterator[epath.Path]:
    """Yields the path each time that the page was written anew, because a run has written, or a benchmark of it has ended;
    does not end. A run may have no metrics yet; UserError where there is no folder.
    """
    seen: list[Any] = []
    for run in runs:
        if not as_path(run).is_dir():
            raise UserError(f"{run}: no such folder; start the run first")
    while True:
        if (state := [_shown_files(run) for run in runs]) != seen:
            metrics = [as_path(run) / METRICS_FILE for run in runs]
            if all(file.is_file() and read_lines(file) for file in metrics):
                yield write_page(runs, output, REFRESH)
            seen = state
        time.sleep(REFRESH)


def _shown_files(run: Location) -> dict[str, tuple[Any, ...]]:
    """Length and time of each file of a run that the page is made of, by its name."""
    folder = as_path(run)
    with store_errors(folder):
        files = [*(folder / name for name in (METRICS_FILE, TOKENS_FILE)), *folder.glob("*.json")]
        found = {file.name: file.stat() for file in files if file.is_file()}
    return {name: (stat.length, stat.mtime) for name, stat in found.items()}


def page_data(
    runs: Sequence[Location], names: Sequence[str], found: Sequence[Mapping[str, Series]]
) -> dict[str, Any]:
    """What the page shows, as plain JSON values."""
    configs = [_config(run) for run in runs]
    own = [
        {
            "name": name,
            # as it was typed: where a machine keeps its files is not for the readers of a page
            "folder": str(run),
            "steps": f"{min(steps := _steps(series))} to {max(steps)}",
            "series": {n: [s.steps, [_short(x) for x in s.values]] for n, s in series.items()},
            "ends": intervals(series, config),
            "tokens": tokens_of(run, MOST_BYTES // len(runs)),
        }
        for run, name, series, config in zip(runs, names, found, configs, strict=True)
    ]
    present = {name for series in found for name in series}
    results = [read_results(run) for run in runs]
    benchmarks = benchmark_rows(names, results, [steps_of_results(run) for run in runs])
    sections = []
    for title, note, panels in SECTIONS:
        shown = [p._asdict() for p in panels if not present.isdisjoint(p.metrics)]
        table = benchmarks if title == RESULTS else []
        if shown or table:
            sections.append({"title": title, "note": note, "panels": shown, "table": table})
    return {
        "runs": own,
        "differences": config_differences(configs),
        "summary": _summary(names, found),
        "sections": sections,
        "metrics": METRICS,
        "regions": {"light": REGION_COLOURS, "dark": DARK_COLOURS},
        "marks": REGION_MARKS,
        "region_names": REGION_NAMES,
        "palette": PALETTE,
    }


def intervals(
    series: Mapping[str, Series], config: Mapping[str, Any]
) -> dict[str, list[list[float]]]:
    """{metric: [lower ends, upper ends]} of 95 % intervals, one for each of its values: of rates over items, of means over the
    held-out prompts, and of the mean reward of a step, from its spread within and between the groups (what is between them is
    rather over- than understated).
    """
    found = {}

    def around(name: str, errors: Sequence[float]) -> None:
        pairs = list(zip(series[name].values, errors, strict=True))
        found[name] = [[_short(mean + sign * 1.96 * e) for mean, e in pairs] for sign in (-1, 1)]

    def given(*names: str) -> bool:
        return all(n in series and series[n].steps == series[names[0]].steps for n in names)

    for name, counted in _COUNTS.items():
        if not given(name, counted):
            continue
        pairs = list(zip(series[name].values, series[counted].values, strict=True))
        # without a prompt that should have no call nothing can be spurious
        if all(0 <= rate <= 1 and 1 <= n < 2**53 for rate, n in pairs):
            ends = [rate_interval(round(rate * n), round(n)) for rate, n in pairs]
            found[name] = [[_short(end[i]) for end in ends] for i in (0, 1)]
    for name in ("eval/reward", "eval/accuracy"):
        if given(name, spread := f"{name}_std", "eval/prompts"):
            pairs = zip(series[spread].values, series["eval/prompts"].values, strict=True)
            around(name, [std / math.sqrt(max(n, 1)) for std, n in pairs])
    rollout = config.get("rollout")
    sizes = [rollout.get(k) for k in _SIZES] if isinstance(rollout, Mapping) else []
    # a file that is no config may say anything
    sizes = [size for size in sizes if isinstance(size, int) and size > 0]
    if len(sizes) == 2 and given("reward/mean", "reward/std", "reward/group_std"):
        pairs = zip(series["reward/std"].values, series["reward/group_std"].values, strict=True)
        prompts, group = sizes
        variances = [
            max(std**2 - own**2, 0) / prompts + own**2 / (prompts * group) for std, own in pairs
        ]
        around("reward/mean", [math.sqrt(x) for x in variances])
    return found


def benchmark_rows(
    names: Sequence[str],
    found: Sequence[Mapping[str, Result]],
    steps: Sequence[Mapping[str, int]],
) -> list[list[str | int | None]]:
    """The table of the results of benchmarks, a header and a row for each rate; empty where no run has a result. `steps` as of
    `steps_of_results`: of a checkpoint that is gone the step is unknown.

    Several runs have a column each: what stands side by side is of one file name, benchmark, harness, version, score and group.
    """
    rates: dict[tuple[str, ...], dict[str, tuple[Rate, int | None]]] = {}
    for name, results, kept in zip(names, found, steps, strict=True):
        for file, result in results.items():
            of = file, result.benchmark, result.harness, result.version
            step = kept.get(result.checkpoint_sha256)
            for score, group, rate in result.lines():
                rates.setdefault((*of, score, group), {})[name] = rate, step
    if not rates:
        return []
    head = ["file", "benchmark", "harness", "rest_jax", "score", "group"]
    if len(names) == 1:
        lines = [(of, *x) for of, own in rates.items() for x in own.values()]
        rows = [[*of, step, x.count, f"{x.rate:.1%}", x.interval] for of, x, step in lines]
        return [[*head, "step", "items", "rate", "95 % interval"], *rows]
    rows = [[*of, *(_said(own.get(name)) for name in names)] for of, own in rates.items()]
    return [[*head, *names], *rows]


def _said(found: tuple[Rate, int | None] | None) -> str | None:
    """A rate, and the step that it is of, in one cell."""
    if found is None:
        return None
    rate, step = found
    items = "" if rate.count is None else f", {rate.count} items"
    at = "unknown" if step is None else step
    return f"{rate.rate:.1%} ({rate.interval}){items}, step {at}"


def config_differences(configs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """[key, value in each run] of the keys that are not the same in all of them; the name and the folder apart."""
    first = configs[0]
    others = [
        {d.path: d.new for d in config_lib.differences(dict(first), dict(c))} for c in configs
    ]
    theirs = {d.path: d.old for c in configs for d in config_lib.differences(dict(first), dict(c))}
    return [
        [key, *(str(other.get(key, value)) for other in others)]
        for key, value in sorted(theirs.items())
        if key not in ("name", "output")
    ]


def tokens_of(run: Location, most: int) -> dict[str, Any]:
    """What the viewer has of a run: {"steps", "data" (as in the file), "index", "left_out"}. Of more than `most` bytes steps are
    left out evenly, the last never.

    A row of the index is a completion: step (its number in "steps"), prompt, completion, reward, format score, spurious, largest
    weight, largest mismatch (None where it is not known).
    """
    path = as_path(run) / TOKENS_FILE
    lines = read_lines(path, missing_ok=True)
    for line in lines:
        if not isinstance(line.get("tokens"), str):
            raise UserError(f"{path}: step {line['step']} cannot be read: it has no tokens")
    every = max(1, math.ceil(sum(len(line["tokens"]) for line in lines) / most))
    kept = lines[::-1][::every][::-1]
    index = []
    for number, line in enumerate(kept):
        try:
            index += [[number, *row] for row in _index(read_record(line)["prompts"])]
        except _UNREADABLE as error:
            raise UserError(f"{path}: step {line['step']} cannot be read: {error}") from error
    return {
        "steps": [line["step"] for line in kept],
        "data": [line["tokens"] for line in kept],
        "index": index,
        "left_out": len(lines) - len(kept),
    }


def _index(prompts: Sequence[Mapping[str, Any]]) -> Iterator[list[Any]]:
    """The rows of one step, without its number."""
    for i, prompt in enumerate(prompts):
        for j, one in enumerate(prompt["completions"]):
            tokens, score = one["tokens"], one["score"]
            largest = [_largest(tokens.get(kind)) for kind in ("weight", "mismatch")]
            row = [i, j, score["reward"], score["format_score"], int(score["spurious"]), *largest]
            if not all(x is None or math.isfinite(x) for x in row):
                raise ValueError("a number is not finite")
            yield row


def embedded(data: Any) -> str:
    """JSON (ASCII) for a script element: nothing in it can end the element or begin markup."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return functools.reduce(lambda t, c: t.replace(c, f"\\u{ord(c):04x}"), "<>&", text)


def _render(data: Mapping[str, Any], title: str) -> str:
    # a second to import, which only pages need
    from plotly.offline import get_plotlyjs

    loader = jinja2.PackageLoader("rest_jax.analysis", "assets")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined
    )
    read = functools.partial(loader.get_source, environment)
    return environment.get_template("page.html.jinja").render(
        title=printable(title),
        version=__version__,
        css=read("page.css")[0],
        curves=read("curves.js")[0],
        viewer=read("viewer.js")[0],
        plotly=get_plotlyjs(),
        data=embedded(data),
    )


def _summary(
    names: Sequence[str], found: Sequence[Mapping[str, Series]]
) -> list[list[str | float | None]]:
    """The main metrics: of one run the first and the last value, of several the last ones."""
    shown = [name for name in SHOWN if any(name in series for series in found)]
    if len(found) == 1:
        (series,) = found
        rows = [
            [
                n,
                METRICS[n].unit,
                series[n].values[0],
                series[n].values[-1],
                series[n].values[-1] - series[n].values[0],
                METRICS[n].meaning,
            ]
            for n in shown
        ]
        return [["metric", "unit", "first", "last", "change", "what it is"], *rows]
    rows = []
    for n in shown:
        last = [s[n].values[-1] if n in s else None for s in found]
        rows.append([n, METRICS[n].unit, *last, METRICS[n].meaning])
    return [["last value of", "unit", *names, "what it is"], *rows]


def _write_table(table: Any, runs: Sequence[Location], names: Sequence[str]) -> None:
    """A row for each line of the metrics, a column for each metric that one of the runs has."""
    lines = [
        (name, line)
        for run, name in zip(runs, names, strict=True)
        for line in read_lines(as_path(run) / METRICS_FILE)
    ]
    present = set().union(*(line for _, line in lines)) - {"step"}
    columns = in_order(present)
    columns += sorted(present - {*columns})  # of other versions
    table.writerow(["run", "step", *columns])
    for name, line in lines:
        table.writerow([csv_cell(name), line["step"], *(line.get(column) for column in columns)])


def _names(runs: Sequence[Location]) -> list[str]:
    """The names of the folders, numbered where two have the same."""
    names = [absolute(run).name for run in runs]
    return [
        name if names.count(name) == 1 else f"{name} ({names[: i + 1].count(name)})"
        for i, name in enumerate(names)
    ]


def _steps(series: Mapping[str, Series]) -> list[int]:
    return [step for curve in series.values() for step in curve.steps]


def _config(run: Location) -> dict[str, Any]:
    """Of a run; empty where it has none."""
    path = as_path(run) / CONFIG_FILE
    with store_errors(path):
        if not path.is_file():
            return {}
    return config_lib.read_recorded(path)


def _largest(values: Sequence[float | None] | None) -> float | None:
    known = [abs(x) for x in values or () if x is not None]
    return max(known) if known else None


def _short(x: float) -> float:
    return float(f"{x:.6g}")
