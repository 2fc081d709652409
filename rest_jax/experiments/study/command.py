"""Carries out studies, or goes on with them, and writes their page: `rest-jax study`."""

import pathlib
from collections.abc import Sequence

from rest_jax.errors import UserError
from rest_jax.experiments.study.figures import write_figures
from rest_jax.experiments.study.page import IMAGES, points, write_page
from rest_jax.experiments.study.plan import PlannedRun, load_study, planned_runs
from rest_jax.experiments.study.results import EXACT, StudyResult, collect, write_tables
from rest_jax.experiments.study.runner import available_cores, carry_out, is_finished
from rest_jax.run.metrics import summary_table


def run(
    names: Sequence[str],
    *,
    workers: int | None,
    output: str,
    overrides: Sequence[str],
    report_only: bool,
    dry_run: bool,
) -> int:
    """Carries out every study (not with `report_only`), writes the page and prints the tables; 0 when done.

    `dry_run` only says what would run. UserError for input that cannot be used, RunStopped when a run fails.
    """
    studies = [load_study(name) for name in names]
    if len({study.name for study in studies}) < len(studies):
        raise UserError(f"studies {', '.join(names)}: two of them share a name")
    planned = [(study, planned_runs(study, overrides)) for study in studies]
    every = [run for _, runs in planned for run in runs]
    print(_summary(every), flush=True)
    if dry_run:
        return 0
    if not report_only:
        carry_out(every, workers or len(available_cores()))
    results = [collect(study, runs) for study, runs in planned]
    if not any(result.runs for result in results):
        raise UserError("study: no finished runs to report; leave --report out to make them")
    print(report(results, pathlib.Path(output), "rest-jax study " + " ".join(names)))
    return 0


def report(results: Sequence[StudyResult], folder: pathlib.Path, command: str) -> str:
    """Writes tables, pictures and the page; returns a short text for the terminal."""
    (folder / IMAGES).mkdir(parents=True, exist_ok=True)
    texts = []
    for result in results:
        if result.methods:
            write_tables(result, folder)
            write_figures(result, folder / IMAGES)
            texts.append(terminal_table(result))
    texts.append(f"page: {write_page(results, folder, command)}")
    return "\n\n".join(texts)


def terminal_table(result: StudyResult) -> str:
    """Rates and paired differences of one study."""
    rows: list[list[object]] = [[result.study.title, "exact, %", "difference, points", "shown"]]
    for method in result.methods:
        row: list[object] = [method, points(result.level(method, EXACT)), "", ""]
        if method != result.study.reference:
            found = result.difference(method, EXACT)
            row[2:] = [points(found, sign=True), "yes" if found.shown else "no"]
        rows.append(row)
    return summary_table(rows)


def _summary(runs: Sequence[PlannedRun]) -> str:
    done = sum(map(is_finished, runs))
    return f"{len(runs)} runs, {done} finished"
