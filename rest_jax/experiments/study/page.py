"""The page of one or more studies: Markdown that states what the intervals support, and no more.

A difference is called shown only where the bootstrap and the t interval both leave zero out (`statistics.Estimate.shown`);
everything else is reported as not shown, with its interval.
"""

import pathlib
from collections.abc import Sequence

import numpy as np

from rest_jax.evaluation.statistics import Estimate
from rest_jax.experiments.study.results import (
    COMPARED,
    EXACT,
    LAST_STEPS,
    MAIN_REGIONS,
    NOISE,
    SAMPLED,
    StudyResult,
)
from rest_jax.files import atomic_write

FILE, IMAGES = "README.md", "images"


def write_page(results: Sequence[StudyResult], folder: pathlib.Path, command: str) -> pathlib.Path:
    """Writes `README.md`; `command` is what makes it again. Notes in `tried.md` beside it are linked."""
    notes = (
        ["What was tried besides: [tried.md](tried.md)."] if (folder / "tried.md").is_file() else []
    )
    text = "\n\n".join([_head(results, command), *notes, *map(section, results)])
    path = folder / FILE
    with atomic_write(path) as partial:
        partial.write_text(text.rstrip() + "\n", encoding="utf-8")
    return path


def _head(results: Sequence[StudyResult], command: str) -> str:
    comparisons = len(COMPARED) * sum(len(r.comparisons) for r in results)
    return (
        f"# Studies\n\nMade by `{command}`. Do not edit: the command writes it anew.\n\n"
        "Every method is a config file laid over one base, so policy, prompts, number of rollouts, optimiser and steps "
        "are equal; two methods of one seed see the same prompts in the same order. All runs of a study start from one "
        "policy, so the intervals cover what differs between seeds (sampling, order of prompts), not other starts or "
        "other data.\n\n"
        "**Rate**: held-out prompts whose greedy answer is exact (format and all calls, or rightly none). **[ ]**: 95 % "
        "percentile bootstrap over seeds; **( )**: 95 % Student t. With few seeds the bootstrap is too narrow, so a "
        "difference counts as *shown* only where both leave zero out. The intervals are not corrected for the number of "
        f"comparisons ({comparisons} in all: held out, sampled, noise)."
    )


def section(result: StudyResult) -> str:
    """One study: setting, tables, what is shown, pictures."""
    if not result.methods:
        return f"## {result.study.title}\n\nNo finished runs yet."
    name, title = result.study.name, result.study.title
    parts = [
        f"## {title}",
        *([result.study.about.strip()] if result.study.about else []),
        _setting(result),
        _table(result),
        _differences(result),
        "\n".join(claims(result)),
        f"![Rates and paired differences]({IMAGES}/{name}_rates.png)",
        f"![Learning curves]({IMAGES}/{name}_curves.png)",
        f"![Entropy by region]({IMAGES}/{name}_entropy.png)",
        f"![Realised weight and mass by region]({IMAGES}/{name}_weights.png)",
        _regions(result),
        f"Numbers: [runs]({name}_runs.csv), [methods]({name}_methods.csv), [curves]({name}_curves.csv).",
    ]
    return "\n\n".join(parts)


def _setting(result: StudyResult) -> str:
    study, runs = result.study, result.runs
    seeds = sorted({run.seed for run in runs})
    tokens = [run.summary["rollout/tokens"] for run in runs]
    missing = result.planned - len(runs)
    unfinished = f" **{missing} of {result.planned} runs are not finished.**" if missing else ""
    steps = int(runs[0].curves["reward/mean"].steps[-1])
    start = runs[0].summary["start/exact"]
    return (
        f"Base `{study.base}`, seeds {', '.join(map(str, seeds))}, {steps} steps; "
        f"{result.rollout.prompts_per_step} prompts x {result.rollout.group_size} answers a step, "
        f"{np.mean(tokens) / steps:,.0f} sampled tokens a step on average, "
        f"{think_share(result):.0%} of them reasoning. Exact rate of the start: {start:.1%}.{unfinished}"
    )


def think_share(result: StudyResult) -> float:
    """Share of THINK among the sampled tokens of all runs."""
    think = total = 0.0
    for run in result.runs:
        for name, curve in run.curves.items():
            if name.startswith("region/") and name.endswith("/count"):
                total += sum(curve.values)
                think += sum(curve.values) if name == "region/think/count" else 0.0
    return think / total


def _table(result: StudyResult) -> str:
    head = (
        f"| method | rate, % | accuracy | sampled, last {LAST_STEPS} steps, % | answer tokens "
        "| gradient noise, first quarter | CPU s a step | clock s a step |\n| --- | --- | --- | --- | --- | --- | --- | --- |"
    )
    rows = [
        f"| {method} | {points(result.level(method, EXACT))} | {result.level(method, 'eval/accuracy').mean:.3f} "
        f"| {points(result.level(method, SAMPLED))} | {result.level(method, 'eval/response_tokens').mean:.1f} "
        f"| {number(result.level(method, NOISE).mean)} | {number(result.level(method, 'time/cpu').mean)} "
        f"| {number(result.level(method, 'time/step').mean)} |"
        for method in result.methods
    ]
    note = (
        "Gradient noise: variance of the mini-batch gradient over its squared norm (1: nothing but noise), mean over the "
        "first quarter of the steps. Seconds a step: median over steps, mean over seeds. CPU seconds are those of all threads "
        "of the process; by the clock other runs and other work on the machine are in it, so it says little about methods."
    )
    return "\n".join([head, *rows, "", note])


def _differences(result: StudyResult) -> str:
    """Paired differences of the held-out rate, the sampled one and the gradient's early noise, and whether they are shown."""
    rows = [
        "| difference | held out, points | shown | sampled, points | shown | gradient noise x 100, first quarter | shown |",
        "| --- |" + " --- |" * 6,
    ]
    for method, other in result.comparisons:
        cells = []
        for name in COMPARED:
            found = result.difference(method, name, other)
            cells += [points(found, sign=True), "**yes**" if found.shown else "no"]
        rows.append(f"| {method} - {other} | {' | '.join(cells)} |")
    return "\n".join(rows)


def number(value: float) -> str:
    """Two digits; a dash where it was not measured."""
    return "-" if np.isnan(value) else f"{value:.2f}"


def points(found: Estimate, sign: bool = False) -> str:
    """An estimate of a rate in percent points with both intervals."""
    plus = "+" if sign else ""
    mean = f"{100 * found.mean:{plus}.1f}"
    if found.count < 2:
        return mean
    inner = f"{100 * found.low:{plus}.1f}, {100 * found.high:{plus}.1f}"
    outer = f"{100 * found.t_low:{plus}.1f}, {100 * found.t_high:{plus}.1f}"
    return f"{mean} [{inner}] ({outer})"


def claims(result: StudyResult) -> list[str]:
    """One line a comparison: what its paired difference shows, of the held-out rate and, where they do, of the others."""
    lines = []
    for method, other in result.comparisons:
        found, sampled, noise = (result.difference(method, name, other) for name in COMPARED)
        if found.count < 2:
            verdict = "one seed: nothing can be said"
        elif found.shown:
            word = "more" if found.mean > 0 else "fewer"
            verdict = f"{word} exact answers on held-out tools, {100 * found.mean:+.1f} points"
        else:
            verdict = (
                f"no difference on held-out tools is shown (a loss of {max(0.0, -100 * found.t_low):.1f} "
                f"and a gain of {max(0.0, 100 * found.t_high):.1f} points are both compatible with it)"
            )
        if sampled.shown:
            word = "more" if sampled.mean > 0 else "fewer"
            verdict += f"; {word} exact answers among those sampled in training, {100 * sampled.mean:+.1f} points"
        if noise.shown:
            word = "more" if noise.mean > 0 else "less"
            verdict += f"; {word} noise in the gradient of the first quarter, {noise.mean:+.2f}"
        lines.append(f"- `{method}` against `{other}`: {verdict}.")
    return lines


def _regions(result: StudyResult) -> str:
    """Realised weight and mass of the main regions at the first and the last step."""
    head = "| method | " + " | ".join(f"{r}: weight, share" for r in MAIN_REGIONS) + " |"
    rows = [head, "| --- |" + " --- |" * len(MAIN_REGIONS)]
    for method in result.methods:
        runs = list(result.of(method).values())
        cells = []
        for region in MAIN_REGIONS:
            ends = {
                kind: [
                    np.mean([run.curves[f"region/{region}/{kind}"].values[at] for run in runs])
                    for at in (0, -1)
                ]
                for kind in ("weight", "weight_share")
            }
            weight, mass = ends["weight"], ends["weight_share"]
            cells.append(f"{weight[0]:.2f} -> {weight[1]:.2f}, {mass[0]:.0%} -> {mass[1]:.0%}")
        rows.append(f"| {method} | " + " | ".join(cells) + " |")
    return (
        "Realised weight of a token and share of the total weight, first step -> last step:\n\n"
        + "\n".join(rows)
    )
