"""Results of a sweep, read from its study at any time: results.csv, a table (best first), two pictures.

One row a trial: a trial that several workers had in turn is one row, with the seconds of all of them.
"""

import csv
import pathlib
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from rest_jax.experiments.sweep import queue
from rest_jax.experiments.sweep.points import point_text, shown
from rest_jax.experiments.sweep.space import Scalar, Space
from rest_jax.files import atomic_write
from rest_jax.run.metrics import summary_table

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

CSV_FILE = "results.csv"
_ORDER = ("complete", "pruned", "running", "waiting", "failed", "invalid")
_ENOUGH = 8  # complete trials before importances mean anything


class Row(NamedTuple):
    """One trial of the sweep. `value` is final for complete ones, else that of the last evaluation."""

    number: int
    state: str
    value: float | None
    point: dict[str, Scalar]
    step: int | None  # of the last evaluation
    seconds: float
    attempts: int
    folder: str
    reason: str
    curve: dict[int, float]  # step -> metric


def rows(trials: Sequence["FrozenTrial"], space: Space) -> list[Row]:
    """The trials begun so far, by number."""
    seconds = queue.attempts_seconds(trials)
    return [_row(slot, t, space, seconds[slot]) for slot, t in queue.current(trials).items()]


def ranked(found: Sequence[Row], space: Space) -> list[Row]:
    """Best first: complete ones by value, then the others."""
    sign = -1.0 if space.direction == "maximize" else 1.0

    def key(row: Row) -> tuple[int, float, int]:
        value = float("inf") if row.value is None else sign * row.value
        return _ORDER.index(row.state), value, row.number

    return sorted(found, key=key)


def table(found: Sequence[Row], space: Space) -> str:
    """Best first; parameters by the last part of their names where that is unambiguous."""
    names = short_names(list(space.parameters))
    head = ["trial", "state", space.metric, *names.values(), "step", "seconds", "note"]
    body = [
        [
            row.number,
            row.state,
            row.value,
            *(shown(row.point.get(name)) for name in names),
            row.step,
            round(row.seconds),
            _note(row),
        ]
        for row in ranked(found, space)
    ]
    return summary_table([head, *body])


def write_csv(path: pathlib.Path, found: Sequence[Row], space: Space) -> None:
    """All rows by number, whole or not at all."""
    head = ["number", "state", space.metric, *space.parameters]
    head += ["step", "seconds", "attempts", "folder", "reason"]
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial, partial.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(head)
        for row in found:
            point = [row.point.get(name) for name in space.parameters]
            ending = [row.step, round(row.seconds, 1), row.attempts, row.folder, row.reason]
            writer.writerow([row.number, row.state, row.value, *point, *ending])


def write(study: "optuna.Study", space: Space, folder: pathlib.Path) -> str:
    """Writes everything to `folder`; returns what to print."""
    from rest_jax.experiments.sweep import pictures

    trials = study.get_trials(deepcopy=False)
    found = rows(trials, space)
    write_csv(folder / CSV_FILE, found, space)
    files = [CSV_FILE, *pictures.write(found, space, folder)]
    parts = [table(found, space), _importances(study, space)] if found else []
    parts += [summary(found, space), f"{folder}: {', '.join(files)}"]
    return "\n\n".join(part for part in parts if part)


def summary(found: Sequence[Row], space: Space) -> str:
    """Counts by state, and the best trial."""
    counts = {state: sum(row.state == state for row in found) for state in _ORDER}
    text = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    left = space.size() - len(found)
    text = ", ".join(part for part in (text, f"{left} to come" if left > 0 else "") if part)
    text = f"{space.name}, {max(space.size(), len(found))} trials: {text}"
    best = next(iter(ranked(found, space)), None)
    if best is None or best.state != "complete":
        return text
    return f"{text}\nbest: trial {best.number}, {space.metric} {best.value:.4g}: {point_text(best.point)}"


def short_names(names: Sequence[str]) -> dict[str, str]:
    """name -> its last part, or all of it where two end alike."""
    ends = [name.rpartition(".")[2] for name in names]
    return {n: end if ends.count(end) == 1 else n for n, end in zip(names, ends, strict=True)}


def _row(slot: int, trial: "FrozenTrial", space: Space, seconds: float) -> Row:
    curve = dict(sorted(trial.intermediate_values.items()))
    value = trial.value if trial.state.name == "COMPLETE" else None
    attrs, attempts = trial.user_attrs, trial.user_attrs[queue.ATTEMPT] + 1
    state, reason = trial.state.name.lower(), ""
    if queue.lost(trial):
        times = queue.losses(trial)
        state, reason = "waiting", "its worker was lost or stopped"
        if times >= space.attempts:
            state, reason = "failed", f"its worker was lost {times} times"
    elif trial.state.is_finished():
        state, reason = attrs[queue.ENDED]["state"], attrs[queue.ENDED]["reason"]
    return Row(
        number=slot,
        state=state,
        value=next(reversed(curve.values()), None) if value is None else value,
        point=dict(trial.params),
        step=max(curve, default=None),
        seconds=seconds,
        attempts=attempts,
        folder=attrs.get(queue.FOLDER, ""),
        reason=reason,
        curve=curve,
    )


def _note(row: Row) -> str:
    again = f"{row.attempts} attempts" if row.attempts > 1 else ""
    reason = "" if row.state == "complete" else row.reason[:80]
    return "; ".join(part for part in (again, reason) if part)


def _importances(study: "optuna.Study", space: Space) -> str:
    """Optuna's PED-ANOVA; "" before there are enough trials, or when all values are equal."""
    import optuna

    values = [t.value for t in study.get_trials(deepcopy=False) if t.state.name == "COMPLETE"]
    if len(values) < _ENOUGH or len(set(values)) == 1 or len(space.parameters) == 1:
        return ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    listed = ", ".join(f"{name} {share:.2f}" for name, share in found.items())
    return f"importance (PED-ANOVA, {len(values)} complete trials): {listed}"
