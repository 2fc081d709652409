"""A comparison: several methods, each over the same seeds, on one page with paired intervals. `rest-jax compare PLAN...`.

In: plan files (`Plan`). Out: run folders <output>/<plan>/<method>-seed<seed>, and in the page's folder images/, the tables
of results.py, and README.md, which is rendered of these tables, with run folders or without (page.md.jinja). All methods
share policy, data, rollouts and optimiser: each is a config file merged over the same scale. Runs are ordered seed by
seed, so that a comparison broken off has the same seeds of every method.
"""

import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import jinja2
import pydantic
from optuna.trial import Trial

from rest_jax import config as config_lib
from rest_jax.config import Config, NonNegativeInt, Section
from rest_jax.errors import RunStopped, UserError
from rest_jax.experiments import results, storage
from rest_jax.experiments.figures import write_figures
from rest_jax.experiments.worker import Engine, Experiment, Job, carry_out, is_finished
from rest_jax.files import atomic_write, local_path


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
    engine, folder = engine or Engine(), local_path("--output", output)
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
    for name, plan, _, measured, _ in found:
        if measured.runs:
            write_figures(measured, name, plan.title, plan.reference, folder / "images")
    page = write_page(found, folder)
    sentences = [line for line in page.read_text().splitlines() if line.startswith("- ")]
    print("\n".join([*sentences, f"page: {page}"]), flush=True)
    if failed:
        raise RunStopped(f"{len(failed)} runs failed; the first: {failed[0]}")
    return page


def train(name: str, plan: Plan, engine: Engine) -> list[str]:
    """Carries out the runs of a plan, its supervised start first; why runs failed. RunStopped when told to stop."""
    jobs = {f"{method}-seed{seed}": job for (method, seed), job in plan.jobs(name).items()}
    folder, stages = local_path("output", plan.output) / (plan.runs or name), {name: jobs}
    if plan.start:
        start = Job("sft", plan.start).with_values({"name": "start", "output": str(folder)})
        stages = {f"{name}-start": {"start": start}} | stages
    for stage, runs in stages.items():
        draw = functools.partial(planned, runs)
        experiment = Experiment(stage, folder, {run: {} for run in runs}, draw, results.EXACT)
        trials = storage.current(carry_out(experiment, engine))
        states = {run: storage.state(trial) for run, trial in trials.items()}
        if any(state in ("waiting", "running", "lost") for state, _ in states.values()):
            raise RunStopped(f"{stage}: stopped; the same command resumes it")
        failed = [f"{run}: {why}" for run, (state, why) in states.items() if state != "complete"]
        if failed:
            return failed
    return []


def planned(jobs: Mapping[str, Job], _: Trial, run: str) -> Job:
    """The run of a trial; nothing is drawn."""
    return jobs[run]


def gather(name: str, plan: Plan, folder: pathlib.Path) -> Compared:
    """What the finished runs measured or, where there are none, what is stored beside the page.

    A seed without the reference is left out: nothing could be paired with it.
    """
    configs = {key: job.config() for key, job in plan.jobs(name).items()}
    finished = {
        key: local_path("output", c.folder)
        for key, c in configs.items()
        if is_finished(c, results.EXACT)
    }
    paired = {key: run for key, run in finished.items() if (plan.reference, key[1]) in finished}
    if paired:
        results.store(paired, name, folder)
    found = results.read(name, folder)
    return Compared(name, plan, next(iter(configs.values())), found, plan.comparisons(found))


def write_page(found: Sequence[Compared], folder: pathlib.Path) -> pathlib.Path:
    """Renders page.md.jinja to README.md. Notes in tried.md beside it are linked."""
    loader = jinja2.PackageLoader("rest_jax.experiments", "")
    environment = jinja2.Environment(
        loader=loader, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    notes = (folder / "tried.md").is_file()
    text = environment.get_template("page.md.jinja").render(
        compared=found, notes=notes, exact=results.EXACT, sampled=results.SAMPLED, noise=results.NOISE,
        last_steps=results.LAST_STEPS,
    )  # fmt: skip
    with atomic_write(folder / "README.md") as partial:
        partial.write_text(text, encoding="utf-8")
    return folder / "README.md"
