"""A comparison: several arms, each over the same seeds, on one page with paired differences. `rest-jax compare PLAN`.

In: a plan file (`Plan`). Out: run folders <output>/<plan>/<arm>-seed<seed>, and in the page's folder images/, the tables of
results.py, and README.md, which is rendered of these tables, with run folders or without (page.md.jinja). All arms share
policy, data, rollouts and optimiser: each is a config file merged over the same scale. Where the plan has learning rates,
each arm first chooses one, on seeds of its own. Runs are ordered seed by seed, so that a comparison broken off has the same
seeds of every arm.
"""

import functools
import itertools
import pathlib
from collections.abc import Container, Mapping
from typing import Annotated, Any, NamedTuple

import jinja2
import pydantic
from optuna.trial import Trial

from rest_jax import config as config_lib
from rest_jax.config import Config, NonNegativeInt, PositiveFloat, Section, check_command
from rest_jax.errors import RunStopped, UserError
from rest_jax.experiments import results, storage
from rest_jax.experiments.figures import write_figures
from rest_jax.experiments.results import Difference, MadeOf, RateRun, Results, Run
from rest_jax.experiments.worker import Engine, Experiment, Job, carry_out, is_finished
from rest_jax.files import atomic_write, local_path, store_errors
from rest_jax.texts import print_text

PAGE = "README.md"
_RATE = "optimizer.learning_rate"


class Rates(Section):
    """Learning rates of which each arm takes the best, by runs on these seeds."""

    values: Annotated[tuple[PositiveFloat, ...], pydantic.Field(min_length=2)]
    seeds: Annotated[tuple[NonNegativeInt, ...], pydantic.Field(min_length=1)]
    overrides: dict[str, Any] = pydantic.Field(default_factory=dict)  # for these runs alone


class Plan(Section):
    """A plan file. An arm is a method of configs/method, or METHOD+PLACEBO (`weights.placebo`). All are compared with
    `reference`, those with a placebo among the arms with it, and `pairs` besides.
    """

    title: str
    about: str = ""  # a paragraph for the page: what this world and this start are
    scale: str
    start: tuple[str, ...] = ()  # files of a supervised run that all runs start from
    arms: Annotated[tuple[str, ...], pydantic.Field(min_length=2)]
    reference: str
    pairs: tuple[tuple[str, str], ...] = ()
    seeds: Annotated[tuple[NonNegativeInt, ...], pydantic.Field(min_length=1)]
    rates: Rates | None = None  # None: that of the scale
    overrides: dict[str, Any] = pydantic.Field(default_factory=dict)
    # what the page calls a policy -> the gain.json that `rest-jax gain` wrote of it, shown where there is one
    gain: dict[str, pathlib.Path] = pydantic.Field(default_factory=dict)
    output: str = "runs/comparisons"

    @pydantic.model_validator(mode="after")
    def _consistent(self):
        for name in (self.reference, *itertools.chain(*self.pairs)):
            if name not in self.arms:
                raise ValueError(f"{name!r} of reference or pairs is not among the arms")
        unique = {"arms": self.arms, "seeds": self.seeds}
        if self.rates:
            unique |= {"rates.values": self.rates.values, "rates.seeds": self.rates.seeds}
        for name, values in (*unique.items(), *(("pairs", pair) for pair in self.pairs)):
            if len(set(values)) < len(values):
                raise ValueError(f"{name}: {list(values)} names one twice")
        if self.rates and (shared := set(self.rates.seeds) & set(self.seeds)):
            raise ValueError(f"rates.seeds: {sorted(shared)} are among seeds; name others")
        for arm in self.arms:
            if "+" in arm and arm.partition("+")[2] in ("", "none"):
                raise ValueError(f"arms: {arm}: name a placebo behind the +, such as shuffle")
        return self

    @property
    def all_pairs(self) -> list[tuple[str, str]]:
        """(arm, compared with)."""
        placebos = [(arm.partition("+")[0], arm) for arm in self.arms if "+" in arm]
        pairs = (
            *((arm, self.reference) for arm in self.arms if arm != self.reference),
            *(pair for pair in placebos if pair[0] in self.arms),
            *self.pairs,
        )
        return list(dict.fromkeys(pairs))

    @property
    def comparisons(self) -> int:
        """Of all pairs in all endpoints."""
        return len(self.all_pairs) * len(results.ENDPOINTS)

    def rate_jobs(self, name: str) -> dict[RateRun, Job]:
        """The runs that the learning rates are chosen by."""
        if self.rates is None:
            return {}
        return {
            (arm, rate, seed): self._job(
                name,
                arm,
                seed,
                f"rate{results.as_key(rate)}-",
                self.rates.overrides | {_RATE: rate},
            )
            for seed in self.rates.seeds
            for arm in self.arms
            for rate in self.rates.values
        }

    def jobs(self, name: str, rates: Mapping[str, float]) -> dict[Run, Job]:
        """The runs, seed by seed. `rates`: the learning rate of each arm, which a plan without any does not read."""
        return {
            (arm, seed): self._job(name, arm, seed, "", {_RATE: rates[arm]} if self.rates else {})
            for seed in self.seeds
            for arm in self.arms
        }

    @property
    def first_rates(self) -> dict[str, float]:
        """Each arm at the first of the learning rates, to look at configs with; empty without any."""
        return dict.fromkeys(self.arms, self.rates.values[0]) if self.rates else {}

    def folder(self, name: str) -> str:
        """Of the runs."""
        return f"{self.output}/{name}"

    def _job(self, name: str, arm: str, seed: int, prefix: str, values: Mapping[str, Any]) -> Job:
        method, _, placebo = arm.partition("+")
        run = f"{prefix}{arm.replace('+', '-')}-seed{seed}"
        values = {
            **self.overrides,
            **values,
            "output": self.folder(name),
            "seed": seed,
            "name": run,
        }
        if self.start:
            values["model.source"] = f"{self.folder(name)}/start"
        if placebo:
            values["weights.placebo"] = placebo
        return Job("train", (self.scale, f"method/{method}")).with_values(values)


class Compared(NamedTuple):
    """A plan, the config of each arm, what its runs measured, and which pairs of arms share a seed."""

    name: str
    plan: Plan
    configs: dict[str, Config]
    results: Results
    pairs: list[tuple[str, str]]
    stored: int  # runs of the plan in the tables, those of a seed without the reference among them


def compare(plan: str, *, output: str | None = None, engine: Engine | None = None) -> pathlib.Path:
    """Carries out the runs of a plan, or helps to, and writes their page; its path. `output` None: page/ beside the runs.

    UserError before anything starts for input that cannot be used, and without any result; RunStopped when runs fail,
    after the page of the others is written.
    """
    if output is not None:
        local_path("--output", output)
    engine, path = engine or Engine(), config_lib.builtin_file(plan, "comparisons")
    loaded = config_lib.validate_as(Plan, config_lib.read_mapping(path), f"plan {path}")
    name = path.stem
    folder = local_path("--output", output or f"{loaded.folder(name)}/page")
    check_page(folder / PAGE, name)
    compared = loaded.jobs(name, loaded.first_rates)
    for (arm, *_), job in (*loaded.rate_jobs(name).items(), *compared.items()):
        check_run(job.config(), arm, f"plan {name}")
    found, failed = gather(name, loaded, folder), []
    if engine.workers:
        failed = train(name, loaded, folder, engine)
        found = gather(name, loaded, folder)
    if not found.results.runs and not found.results.rates:
        if failed:
            raise RunStopped(f"{len(failed)} runs failed; the first: {failed[0]}")
        raise UserError(f"{name}: no finished run, and no results in {folder}")
    write_figures(found.results, name, loaded, folder / "images")
    page = write_page(found, folder)
    sentences = [line for line in page.read_text().splitlines() if line.startswith("- ")]
    print_text("\n".join([*sentences, f"page: {page}"]))
    if failed:
        raise RunStopped(f"{len(failed)} runs failed; the first: {failed[0]}")
    return page


def check_run(config: Config, arm: str, plan: str) -> None:
    """UserError for a run that is none of `rest-jax train` or would have no endpoints, and for a placebo that changes nothing."""
    check_command(config, supervised=False)
    said = f"{plan}: run {config.name}"
    if config.train.steps is None:
        raise UserError(f"{said}: train.steps must be set")
    if config.data.eval is None:
        raise UserError(f"{said}: data.eval must be set: arms are compared by held-out records")
    if not 0 < config.train.eval_every <= config.train.steps / 2:
        raise UserError(
            f"{said}: train.eval_every {config.train.eval_every} of {config.train.steps} steps: the first half of the steps must "
            "have an evaluation, since its mean is an endpoint"
        )
    if "+" in arm and config.weights.is_uniform:
        raise UserError(
            f"{plan}: arm {arm}: all tokens of the method weigh alike, so that a placebo changes nothing; take it out"
        )


def check_page(page: pathlib.Path, name: str) -> None:
    """UserError for a file that holds something that `write_page` did not write for that comparison."""
    if not page.exists():
        return
    with store_errors(page):
        text = page.read_text(errors="replace")
    if text.strip() and f"`rest-jax compare {name}` writes this page" not in text:
        raise UserError(f"{page}: is no page of {name}; name another folder: --output")


def train(name: str, plan: Plan, folder: pathlib.Path, engine: Engine) -> list[str]:
    """Carries out the runs of a plan that the tables in `folder` do not have, its supervised start first, then those for the
    learning rates; why runs failed. RunStopped when told to stop.
    """
    stored = results.read(name, folder)
    done = {*stored.runs, *stored.rates}

    def carry(stage: str, jobs: Mapping[Any, Job]) -> list[str]:
        place = local_path("output", plan.folder(name))
        return _carry_out(f"{name}{stage}", jobs, done, place, engine)

    rate_jobs = plan.rate_jobs(name)
    if done >= {*rate_jobs, *itertools.product(plan.arms, plan.seeds)}:
        return []
    if plan.start:
        job = Job("sft", plan.start).with_values({"name": "start", "output": plan.folder(name)})
        if failed := carry("-start", {"start": job}):
            return failed
        weights = results.trained_weights(local_path("output", job.config().folder))
        results.check_weights({**stored.made_of, ("start",): MadeOf("", weights)})
    if failed := carry("-rates", rate_jobs):
        return failed
    rates = gather(name, plan, folder).results.rates
    if missing := len(rate_jobs) - len(rates):
        raise UserError(
            f"plan {name}: {missing} finished runs for the learning rates are not in {plan.folder(name)}; workers on several "
            "machines need the folder on a shared file system"
        )
    return carry("", plan.jobs(name, results.chosen_rates(rates)))


def _carry_out(
    stage: str, jobs: Mapping[Any, Job], done: Container[Any], folder: pathlib.Path, engine: Engine
) -> list[str]:
    """Those that are not done; why runs failed."""
    runs = {job.config().name: job for job in jobs.values()}
    missing = {job.config().name: {} for key, job in jobs.items() if key not in done}
    draw = functools.partial(planned, runs)
    experiment = Experiment(stage, folder, missing, draw, results.EXACT)
    trials = storage.current(carry_out(experiment, engine))
    states = {run: storage.state(trial) for run, trial in trials.items() if run in missing}
    if any(state in ("waiting", "running", "lost") for state, _ in states.values()):
        raise RunStopped(f"{stage}: stopped; the same command resumes it")
    return [f"{run}: {why}" for run, (state, why) in states.items() if state != "complete"]


def planned(jobs: Mapping[str, Job], _: Trial, run: str) -> Job:
    """The run of a trial; nothing is drawn."""
    return jobs[run]


def gather(name: str, plan: Plan, folder: pathlib.Path) -> Compared:
    """Adds what the finished runs measured to the tables beside the page, and reads from these what the plan asks for.

    UserError when a run is another config's than the plan's, or began with other weights than the others. A seed without the
    reference is left out: nothing could be paired with it.
    """
    rate_jobs = plan.rate_jobs(name)
    for_rates = _finished(rate_jobs)
    results.store({}, for_rates, {}, name, folder)
    known = results.read(name, folder).restricted(rate_jobs).rates
    complete = len(known) == len(rate_jobs)
    jobs = plan.jobs(name, results.chosen_rates(known)) if complete else {}
    gains = {label: path for label, path in plan.gain.items() if path.is_file()}
    results.store(_finished(jobs), {}, gains, name, folder)
    stored = results.read(name, folder)
    paired = [key for key in jobs if (plan.reference, key[1]) in stored.runs]
    found = stored.restricted([*rate_jobs, *paired], plan.gain)
    _check_configs(found, {**rate_jobs, **jobs}, folder)
    seeds = {arm: {s for a, s in found.runs if a == arm} for arm in plan.arms}
    pairs = [(a, b) for a, b in plan.all_pairs if seeds[a] & seeds[b]]
    shown = plan.jobs(name, plan.first_rates)
    configs = {arm: shown[arm, plan.seeds[0]].config() for arm in plan.arms}
    return Compared(name, plan, configs, found, pairs, len(jobs.keys() & stored.runs.keys()))


def _check_configs(found: Results, jobs: Mapping[Any, Job], folder: pathlib.Path) -> None:
    """UserError for a stored run that is another config's than the plan's now."""
    for key, made in found.made_of.items():
        if made.config != results.config_digest(jobs[key].config()):
            raise UserError(
                f"{folder}: its tables have run {jobs[key].config().name} of another config than the plan's; "
                "restore the plan, or write the tables to another folder"
            )


def _finished(jobs: Mapping[Any, Job]) -> dict[Any, pathlib.Path]:
    """The folders of those that are. UserError when one is another config's."""
    configs = {key: job.config() for key, job in jobs.items()}
    return {
        key: local_path("output", config.folder)
        for key, config in configs.items()
        if is_finished(config, results.EXACT)
    }


def verdict(
    found: Compared, differences: Mapping[tuple[str, str, str], Difference], arm: str
) -> str:
    """What the corrected comparisons say of an arm, and in which endpoint; with token weights it is better only where it is
    better than its placebos.
    """

    def shown(other: str, better: bool) -> set[str]:
        """The endpoints in which it is shown to be better, or worse."""
        each = {name: differences[arm, other, name] for name in results.ENDPOINTS}
        return {name for name, d in each.items() if d.shown and (d.estimate.mean > 0) == better}

    def where(endpoints: set[str]) -> str:
        both = len(endpoints) == len(results.ENDPOINTS)
        return "in both endpoints" if both else results.ENDPOINTS[next(iter(endpoints))]

    reference = found.plan.reference
    above, below = shown(reference, True), shown(reference, False)
    placebos = {b for a, b, _ in differences if a == arm and b.startswith(f"{arm}+")}
    if not above:
        return f"Worse {where(below)}." if below else "No difference is shown."
    if below:
        return f"Better {where(above)}, worse {where(below)}."
    if found.configs[arm].weights.is_uniform:
        return f"Better {where(above)}."
    is_open = "whether the choice of tokens does it is open"
    if not placebos:
        return f"Above {reference} {where(above)}; {is_open}, since no placebo was run."
    if beyond := above & set.intersection(*(shown(placebo, True) for placebo in placebos)):
        return f"Better {where(beyond)}, than its placebo{'s' * (len(placebos) > 1)} too."
    return (
        f"Above {reference} {where(above)}, but not shown to be above its placebo there: {is_open}."
    )


def write_page(found: Compared, folder: pathlib.Path) -> pathlib.Path:
    """Renders page.md.jinja to README.md."""
    loader = jinja2.PackageLoader("rest_jax.experiments", "")
    environment = jinja2.Environment(
        loader=loader, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    measured, reference = found.results, found.plan.reference
    against = [pair for pair in found.pairs if pair[1] == reference]
    comparisons = found.plan.comparisons
    differences = measured.differences(found.pairs, comparisons)
    text = environment.get_template("page.md.jinja").render(
        **found._asdict(), module=results, rates=results.chosen_rates(measured.rates), against=against,
        config=found.configs[reference], differences=differences,
        power=[measured.power(against, name, comparisons) for name in results.ENDPOINTS],
        verdicts={arm: verdict(found, differences, arm) for arm, _ in against if "+" not in arm},
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / PAGE) as partial:
        partial.write_text(text, encoding="utf-8")
    return folder / PAGE
