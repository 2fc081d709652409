"""A sweep: many runs of one config, with values drawn for some of its keys. `rest-jax sweep FILES... --space SPACE`.

In: config files and overrides, and a space file (`Space`): parameters, metric, sampler, pruner. Out: run folders
<output>/<name>/trial-0000, ..., and beside them results.csv and Optuna's plots. The points of a grid are enqueued before
anything starts. Others are drawn when a trial begins, by a sampler seeded by the trial, so that random points are the
same whoever draws them.
"""

import csv
import dataclasses
import functools
import itertools
import math
import pathlib
import random
import warnings
from collections.abc import Sequence
from typing import Annotated, Any, Literal, cast

import optuna
import pydantic
from optuna import pruners, samplers
from optuna.trial import FrozenTrial, Trial, TrialState

from rest_jax import config as config_lib
from rest_jax.analysis import plotting
from rest_jax.config import ConfigError, NonNegativeInt, PositiveInt, Section
from rest_jax.errors import RunStopped, UserError
from rest_jax.experiments import storage
from rest_jax.experiments.worker import Engine, Experiment, Job, carry_out, shown
from rest_jax.files import atomic_write, local_path
from rest_jax.run.metrics import METRICS, summary_table
from rest_jax.texts import csv_cell, print_text

Scalar = str | int | float | bool | None
PRUNERS = {
    "median": pruners.MedianPruner,
    "percentile": pruners.PercentilePruner,
    "successive_halving": pruners.SuccessiveHalvingPruner,
    "hyperband": pruners.HyperbandPruner,
}
_STATES = ("complete", "pruned", "running", "waiting", "lost", "invalid", "failed")
_MOST_TRIALS = 10**5
_ENOUGH = 8  # complete trials before importances mean anything


class Parameter(Section):
    """Values of one config key: `choices`, or a range with both ends."""

    choices: tuple[Scalar, ...] | None = None
    low: float | None = None
    high: float | None = None
    step: float | None = None
    log: bool = False  # uniform in the logarithm
    integer: bool = pydantic.Field(default=False, alias="int")

    @pydantic.model_validator(mode="after")
    def _sound(self):
        if self.choices is not None and len(self.model_fields_set) > 1:
            raise ValueError("choices stand alone, without low, high, step, log or int")
        if self.choices is None and (self.low is None or self.high is None):
            raise ValueError("give choices, or low and high")
        if self.integer and any(x and x % 1 for x in (self.low, self.high, self.step)):
            raise ValueError("int: low, high and step must be whole numbers")
        try:
            self.suggest(optuna.create_study().ask(), "")
        except ArithmeticError as error:  # of what Optuna calculates with the ends
            ends = f"low {self.low}, high {self.high}, step {self.step}"
            raise ValueError(
                f"{ends}: no number can be drawn; take ends that are nearer"
            ) from error
        return self

    def suggest(self, trial: Trial, key: str) -> Any:
        """The value that the trial has or that the study's sampler draws. ValueError for a range that is none."""
        if self.choices is not None:
            return trial.suggest_categorical(key, self.choices)
        low, high, step = cast(Any, (self.low, self.high, self.step))
        if self.integer:
            return trial.suggest_int(key, low, high, step=step or 1, log=self.log)
        return trial.suggest_float(key, low, high, step=step, log=self.log)

    @property
    def _range(self) -> tuple[float, float, float]:
        """(low, high, step); a step of 0: there are values between any two."""
        low, high = cast(Any, (self.low, self.high))
        return low, high, self.step or (1 if self.integer and not self.log else 0)

    @property
    def count(self) -> float:
        """Of its values; infinite for a range that has no end of them."""
        if self.choices is not None:
            return len(self.choices)
        low, high, step = self._range
        count = (high - low) / step + 1e-9 if step else math.inf
        return float(math.floor(count)) + 1 if math.isfinite(count) else math.inf

    def grid(self) -> tuple[Scalar, ...]:
        """All values, of which `count` must be finite."""
        if self.choices is not None:
            return self.choices
        low, _, step = self._range
        values = (round(low + i * step, 12) for i in range(int(self.count)))
        return tuple(int(value) if self.integer else value for value in values)


class Space(Section):
    """A space file."""

    metric: str = "eval/reward"
    direction: Literal["maximize", "minimize"] = "maximize"
    sampler: Literal["grid", "random", "tpe"] = "tpe"
    seed: NonNegativeInt = 0
    # None: the whole grid
    trials: Annotated[PositiveInt, pydantic.Field(le=_MOST_TRIALS)] | None = None
    pruner: dict[str, dict[str, Any]] = pydantic.Field(default_factory=dict)
    overrides: dict[str, Any] = pydantic.Field(default_factory=dict)
    parameters: Annotated[dict[str, Parameter], pydantic.Field(min_length=1)]

    @pydantic.model_validator(mode="after")
    def _consistent(self):
        measured = [name for name in METRICS if name.startswith("eval/")]
        if self.metric not in measured:
            hint = config_lib.nearest(self.metric, measured)
            raise ValueError(f"metric {self.metric!r}: not a held-out metric{hint}")
        for name in (*self.parameters, *self.overrides):
            if name in ("name", "output"):
                raise ValueError(f"{name}: every trial has its own, so it cannot be set")
        for name in self.parameters.keys() & self.overrides.keys():
            raise ValueError(f"{name}: in parameters and in overrides")
        counts = {name: parameter.count for name, parameter in self.parameters.items()}
        endless = [name for name, count in counts.items() if math.isinf(count)]
        if self.sampler == "grid" and endless:
            raise ValueError(f"sampler grid: {', '.join(endless)}: give choices or step")
        if self.sampler == "grid" and (points := math.prod(counts.values())) > _MOST_TRIALS:
            raise ValueError(
                f"sampler grid: {points:,.0f} points, at most {_MOST_TRIALS:,} can be tried; give fewer values or take sampler "
                "random"
            )
        if self.sampler != "grid" and self.trials is None:
            raise ValueError(f"trials: sampler {self.sampler} needs a number of them")
        self.make_pruner()
        return self

    def make_pruner(self) -> pruners.BasePruner:
        """Optuna's, made of its own options. ValueError for options that it does not take."""
        for name, options in self.pruner.items():
            if name not in PRUNERS or len(self.pruner) > 1:
                raise ValueError(f"pruner {', '.join(self.pruner)}: one of {', '.join(PRUNERS)}")
            try:
                return PRUNERS[name](**options)
            except TypeError as error:
                raise ValueError(f"pruner {name}: {error}") from error
        return pruners.NopPruner()

    def make_sampler(self, index: int) -> samplers.BaseSampler:
        """Optuna's, for trial `index`: two workers do not draw the same values."""
        seed = self.seed + 10_007 * index
        if self.sampler == "random":
            return samplers.RandomSampler(seed)
        return samplers.TPESampler(seed=seed, constant_liar=True)

    def points(self) -> dict[str, dict[str, Scalar]]:
        """trial -> the values that are fixed beforehand: all of them for a grid, in an order drawn by the seed, else none."""
        points: list[dict[str, Scalar]] = [{}] * (self.trials or 0)
        if self.sampler == "grid":
            values = itertools.product(*(p.grid() for p in self.parameters.values()))
            points = [dict(zip(self.parameters, point, strict=True)) for point in values]
            random.Random(self.seed).shuffle(points)
        return {f"trial-{i:04d}": point for i, point in enumerate(points[: self.trials])}


def sweep(
    files: Sequence[str],
    overrides: Sequence[str],
    space: str,
    *,
    engine: Engine | None = None,
    trials: int | None = None,
    name: str | None = None,
) -> pathlib.Path:
    """Carries out a sweep, or helps to; the folder of its results. `trials` replaces the number in the space file.

    UserError before anything starts for a space, config or storage that cannot be used; RunStopped when every trial of
    the sweep has failed.
    """
    path = config_lib.builtin_file(space, "sweeps")
    mapping = config_lib.read_mapping(path) | ({} if trials is None else {"trials": trials})
    found = config_lib.validate_as(Space, mapping, f"space {path}")
    job = shared_job(found, files, overrides)
    shared = job.config()
    name = f"{shared.name}-{path.stem}" if name is None else shared.renamed(name, "--name").name
    folder = local_path("output", shared.output) / name
    experiment = Experiment(
        name=name,
        folder=folder,
        runs=found.points(),
        job=functools.partial(draw, found, job, folder),
        metric=found.metric,
        direction=found.direction,
        pruner=found.make_pruner(),
        definition={
            "space": found.model_dump(mode="json", by_alias=True, exclude={"trials"}),
            "config": shared.model_dump(mode="json"),
        },
    )
    rows = write_results(carry_out(experiment, engine or Engine()), found, folder)
    if all(row["state"] == "failed" for row in rows):
        raise RunStopped(f"{name}: all {len(rows)} trials failed; the first: {rows[0]['reason']}")
    return folder


def shared_job(space: Space, files: Sequence[str], overrides: Sequence[str]) -> Job:
    """What all trials share. UserError for a key, or an end of a range, that no run takes.

    Values that only fail together with others are left to the sweep, which calls these trials invalid.
    """
    for key in (override.partition("=")[0] for override in overrides):
        if key in space.parameters:
            raise UserError(f"{key}=...: a parameter of the sweep; change it in the space")
    job = Job("train", tuple(files)).with_values(space.overrides)
    job = dataclasses.replace(job, overrides=(*job.overrides, *overrides))
    shared = job.config()
    if shared.data.eval is None:
        raise UserError(f"data.eval: null: {space.metric} needs held-out data")
    if space.pruner and not shared.train.eval_every:
        raise UserError("train.eval_every: 0: a pruner decides at evaluations; set it above 0")
    for key, parameter in space.parameters.items():
        ends = parameter.choices or (parameter.low, parameter.high)
        errors = []
        for value in ends:
            try:
                job.with_values({key: value}).config()
            except ConfigError as error:
                errors.append(error)
                if "unknown key" in str(error) or f" {key}: " in str(error):
                    raise
        if len(errors) == len(ends):
            raise errors[0]
    return job


def draw(space: Space, job: Job, folder: pathlib.Path, trial: Trial, run: str) -> Job:
    """The run of a trial; values that are not fixed beforehand are drawn."""
    trial.study.sampler = space.make_sampler(int(run.rpartition("-")[2]))
    values = {key: parameter.suggest(trial, key) for key, parameter in space.parameters.items()}
    return job.with_values(values | {"name": run, "output": str(folder)})


def write_results(study: optuna.Study, space: Space, folder: pathlib.Path) -> list[dict[str, Any]]:
    """Writes results.csv and Optuna's plots, prints the table; its rows, best first."""
    trials = storage.current(study).values()
    sign = -1 if space.direction == "maximize" else 1
    rows = sorted(
        (_row(trial, space) for trial in trials),
        key=lambda row: (_STATES.index(row["state"]), sign * (row[space.metric] or 0.0)),
    )
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / "results.csv") as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in sorted(rows, key=lambda row: row["trial"]):
            writer.writerow({name: csv_cell(value) for name, value in row.items()})
    print_text(summary_table([list(rows[0]), *([shown(v) for v in row.values()] for row in rows)]))
    _plot(study, space, folder)
    if rows[0]["state"] == "complete":
        best = " ".join(f"{key}={shown(rows[0][key])}" for key in space.parameters)
        print_text(f"best: {rows[0]['trial']}, {space.metric} {rows[0][space.metric]:.4g}: {best}")
    print_text(f"results: {folder}")
    return rows


def _row(trial: FrozenTrial, space: Space) -> dict[str, Any]:
    curve, (state, reason) = trial.intermediate_values, storage.state(trial)
    return {
        "trial": trial.user_attrs[storage.RUN],
        "state": state,
        space.metric: curve[max(curve)] if curve else None,
        **{name: trial.params.get(name) for name in space.parameters},
        "step": max(curve, default=None),
        "seconds": round(trial.user_attrs.get(storage.SECONDS, 0.0)),
        "attempts": storage.attempts(trial),
        "reason": reason,
    }


def _plot(study: optuna.Study, space: Space, folder: pathlib.Path) -> None:
    """Draws Optuna's pictures, if a trial is complete."""
    # A worker does not need pyplot.
    import matplotlib.style
    from matplotlib.ticker import MaxNLocator
    from optuna.visualization import matplotlib as optuna_plots

    values = [trial.value for trial in study.get_trials(states=(TrialState.COMPLETE,))]
    if not values:
        return
    named = {"target_name": space.metric}
    pictures: dict[str, Any] = {
        "curves": optuna_plots.plot_intermediate_values,
        "history": functools.partial(optuna_plots.plot_optimization_history, **named),
    }
    if len(values) > 1:
        pictures["parallel"] = functools.partial(optuna_plots.plot_parallel_coordinate, **named)
    if len(values) >= _ENOUGH and len(set(values)) > 1:
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        plot = optuna_plots.plot_param_importances
        pictures["importances"] = functools.partial(plot, evaluator=evaluator, **named)
    with warnings.catch_warnings():
        # Of axes along which all trials are equal.
        warnings.simplefilter("ignore")
        for name, plot in pictures.items():
            with matplotlib.style.context("default"):  # Optuna sets a style for good
                axes = plot(study)
            if name == "parallel":
                axes.figure.set_size_inches(2 * (len(space.parameters) + 2), 4.5)
            elif name != "importances":
                axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            if name == "curves":
                axes.set_ylabel(space.metric)
            # The names below the parallel axes lie outside of the figure.
            plotting.save(axes.figure, folder / f"{name}.png", bbox_inches="tight")
