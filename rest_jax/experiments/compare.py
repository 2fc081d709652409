"""A comparison: several methods, each over the same seeds, on one page with paired intervals. `rest-jax compare PLAN...`.

In: plan files (`Plan`). Out: run folders <output>/<plan>/<method>-seed<seed>, and in the page's folder README.md
(page.md.jinja), images/ and the tables of results.py. All methods share policy, data, rollouts and optimiser: each is a
config file merged over the same scale. Runs are ordered seed by seed, so that a comparison broken off has the same seeds
of every method. Without any run folder the page is rendered from the tables.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import jinja2
import numpy as np
import pydantic
from optuna.trial import Trial

from rest_jax import config as config_lib
from rest_jax.config import Config, NonNegativeInt, Section
from rest_jax.errors import RunStopped, UserError
from rest_jax.evaluation.statistics import Estimate
from rest_jax.experiments import results, storage
from rest_jax.experiments.figures import write_figures
from rest_jax.experiments.worker import Engine, Experiment, Job, carry_out, is_finished
from rest_jax.files import atomic_write


class Plan(Section):
    """A plan file. `reference` is the method that the others are compared with; `pairs` are compared besides."""

    title: str
    about: str = ""  # a paragraph for the page: what this world and this start are
    scale: str
    start: tuple[str, ...] = ()  # files of a supervised run that all runs start from
    methods: Annotated[tuple[str, ...], pydantic.Field(min_length=2)]
    reference: str
    pairs: tuple[tuple[str, str], ...] = ()
    seeds: Annotated[tuple[NonNegativeInt, ...], pydantic.Field(min_length=1)]
    overrides: dict[str, Any] = pydantic.Field(default_factory=dict)
    output: str = "runs/comparisons"
    runs: str | None = None  # the plan whose run folders it shares

    @pydantic.model_validator(mode="after")
    def _consistent(self):
        for name in (self.reference, *(name for pair in self.pairs for name in pair)):
            if name not in self.methods:
                raise ValueError(f"{name!r} of reference or pairs is not among the methods")
        for name, values in (("methods", self.methods), ("seeds", self.seeds)):
            if len(set(values)) < len(values):
                raise ValueError(f"{name}: {list(values)} names one twice")
        return self

    def jobs(self, name: str) -> dict[tuple[str, int], Job]:
        """(method, seed) -> its run, seed by seed."""
        folder = f"{self.output}/{self.runs or name}"
        shared = self.overrides | {"output": folder}
        if self.start:
            shared["model.source"] = f"{folder}/start"
        return {
            (method, seed): Job("train", (self.scale, f"method/{method}")).with_values(
                shared | {"seed": seed, "name": f"{method}-seed{seed}"}
            )
            for seed in self.seeds
            for method in self.methods
        }

    def comparisons(self, found: results.Results) -> list[tuple[str, str]]:
        """The pairs (method, compared with) that share a seed."""
        pairs = [*((m, self.reference) for m in self.methods if m != self.reference), *self.pairs]
        seeds = {method: found.values(method, results.EXACT).keys() for method in self.methods}
        return [(a, b) for a, b in pairs if seeds[a] & seeds[b]]


class Compared(NamedTuple):
    """A plan, the config of its first run, what its runs measured, and which pairs of methods share a seed."""

    name: str
    plan: Plan
    config: Config
    results: results.Results
    pairs: list[tuple[str, str]]


def compare(
    plans: Sequence[str], *, output: str = "docs/study", engine: Engine | None = None
) -> pathlib.Path:
    """Carries out the runs of the plans, or helps to, and writes their page; its path.

    UserError before anything starts for input that cannot be used, and without any result; RunStopped when runs fail,
    after the page of the others is written.
    """
    engine, folder = engine or Engine(), pathlib.Path(output)
    loaded = {}
    for word in plans:
        path = config_lib.builtin_file(word, "comparisons")
        mapping = config_lib.read_mapping(path)
        loaded[path.stem] = config_lib.validate_as(Plan, mapping, f"plan {path}")
    for name, plan in loaded.items():
        for config in (job.config() for job in plan.jobs(name).values()):
            if config.train.steps is None:
                raise UserError(f"plan {name}: train.steps must be set")
            is_finished(config, results.EXACT)
    failed = [
        line for name in loaded if engine.workers for line in train(name, loaded[name], engine)
    ]
    found = [gather(name, plan, folder) for name, plan in loaded.items()]
    if not any(each.results.runs for each in found):
        raise UserError(f"{', '.join(loaded)}: no finished run, and no results in {folder}")
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for each in found:
        if each.results.runs:
            results.write(each.results, each.name, each.pairs, folder)
            plan = each.plan
            write_figures(each.results, each.name, plan.title, plan.reference, folder / "images")
    page = write_page(found, folder)
    sentences = [line for line in page.read_text().splitlines() if line.startswith("- ")]
    print("\n".join([*sentences, f"page: {page}"]), flush=True)
    if failed:
        raise RunStopped(f"{len(failed)} runs failed; the first: {failed[0]}")
    return page


def train(name: str, plan: Plan, engine: Engine) -> list[str]:
    """Carries out the runs of a plan, its supervised start first; why runs failed. RunStopped when told to stop."""
    jobs = {f"{method}-seed{seed}": job for (method, seed), job in plan.jobs(name).items()}
    folder, stages = pathlib.Path(plan.output) / (plan.runs or name), [(name, jobs)]
    if plan.start:
        start = Job("sft", plan.start).with_values({"name": "start", "output": str(folder)})
        stages.insert(0, (f"{name}-start", {"start": start}))
    for stage, runs in stages:
        draw = functools.partial(planned, runs)
        experiment = Experiment(stage, folder, {run: {} for run in runs}, draw, results.EXACT)
        study = carry_out(experiment, engine)
        states = {run: storage.state(t) for run, t in storage.current(study.trials).items()}
        if any(state in ("waiting", "running") for state, _ in states.values()):
            raise RunStopped(f"{stage}: stopped; the same command resumes it")
        failed = [f"{run}: {why}" for run, (state, why) in states.items() if state != "complete"]
        if failed:
            return failed
    return []


def planned(jobs: Mapping[str, Job], _: Trial, run: str) -> Job:
    """The run of a trial; nothing is drawn."""
    return jobs[run]


def gather(name: str, plan: Plan, folder: pathlib.Path) -> Compared:
    """What the finished runs measured or, where there are none, what is stored beside the page."""
    jobs = plan.jobs(name)
    configs = {key: job.config() for key, job in jobs.items()}
    finished = {key: c.folder for key, c in configs.items() if is_finished(c, results.EXACT)}
    seeds = {seed for method, seed in finished if method == plan.reference}
    paired = {method for method, seed in finished if seed in seeds}
    finished = {key: folder for key, folder in finished.items() if key[0] in paired}
    found = results.collect(finished) if finished else results.read(name, folder)
    found = found or results.Results({}, {})
    return Compared(name, plan, next(iter(configs.values())), found, plan.comparisons(found))


def write_page(found: Sequence[Compared], folder: pathlib.Path) -> pathlib.Path:
    """Renders page.md.jinja to README.md. Notes in tried.md beside it are linked."""
    loader = jinja2.PackageLoader("rest_jax.experiments", "")
    environment = jinja2.Environment(
        loader=loader, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters |= {"points": points, "change": change, "number": number}
    notes = (folder / "tried.md").is_file()
    text = environment.get_template("page.md.jinja").render(
        compared=found, notes=notes, exact=results.EXACT, sampled=results.SAMPLED, noise=results.NOISE,
        last_steps=results.LAST_STEPS,
    )  # fmt: skip
    with atomic_write(folder / "README.md") as partial:
        partial.write_text(text, encoding="utf-8")
    return folder / "README.md"


def points(found: Estimate, sign: str = "") -> str:
    """A rate, or with sign "+" a difference of rates, in percent points: mean [bootstrap] (t)."""
    mean, low, high, t_low, t_high, _ = (f"{100 * x:{sign}.1f}" for x in dataclasses.astuple(found))
    return f"{mean} [{low}, {high}] ({t_low}, {t_high})" if found.count > 1 else mean


def change(found: Estimate) -> str:
    """A difference in words, with the interval that holds both of its intervals."""
    if found.count < 2:
        return f"{100 * found.mean:+.1f} points (one seed)"
    low, high = min(found.low, found.t_low), max(found.high, found.t_high)
    return f"{100 * found.mean:+.1f} points (95 % CI {100 * low:+.1f} to {100 * high:+.1f})"


def number(value: float) -> str:
    """Two digits; a dash for what was not measured."""
    return "-" if np.isnan(value) else f"{value:.2f}"
