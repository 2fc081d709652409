"""What a study is: a YAML file naming a base config, methods and seeds, and the runs that follow from it.

Every method is a config file laid over the base, so all share policy, data, rollouts and optimiser. Runs are ordered seed by
seed: a study broken off has the same seeds of every method.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Annotated

import pydantic

from rest_jax import config as config_lib
from rest_jax.config import Config, NonNegativeInt, Section
from rest_jax.errors import UserError


class Study(Section):
    """A study file. `reference` is the method the others are compared with, `pairs` are compared besides (the first less the
    second); `overrides` hold for every run.
    """

    name: Annotated[str, pydantic.Field(pattern=r"^[a-z0-9_]+$")]
    title: str
    about: str = ""  # a paragraph for the page: what this world and this start are
    base: str
    warm_start: str | None = (
        None  # a supervised recipe, on the same base: every run starts from its run
    )
    methods: Annotated[tuple[str, ...], pydantic.Field(min_length=2)]
    reference: str
    pairs: tuple[tuple[str, str], ...] = ()
    seeds: Annotated[tuple[NonNegativeInt, ...], pydantic.Field(min_length=1)]
    overrides: tuple[str, ...] = ()
    output: str = "runs/study"
    runs: str | None = None  # the study whose folder of runs is shared, for those that both have

    @pydantic.model_validator(mode="after")
    def _consistent(self):
        if self.reference not in self.methods:
            raise ValueError(f"reference {self.reference!r} is not among the methods")
        for pair in self.pairs:
            if unknown := [name for name in pair if name not in self.methods]:
                raise ValueError(f"pairs: {unknown[0]!r} is not among the methods")
        for name, values in (("methods", self.methods), ("seeds", self.seeds)):
            if len(set(values)) < len(values):
                raise ValueError(f"{name}: {list(values)} names one twice")
        return self

    @property
    def folder(self) -> pathlib.Path:
        """Where its runs live."""
        return pathlib.Path(self.output) / (self.runs or self.name)


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """One run of a study."""

    method: str
    seed: int
    config: Config


def load_study(path: str) -> Study:
    """Reads a study file, or a shipped one by its bare name. UserError names every fault."""
    file = config_lib.builtin_file(path, "studies")
    return config_lib.validate_as(Study, config_lib.read_mapping(file), f"study {file}")


def planned_runs(study: Study, overrides: Sequence[str] = ()) -> list[PlannedRun]:
    """Every run, seed by seed, with its config resolved. UserError for a method or a base that is not there, or does not fit."""
    shared = [*study.overrides, *overrides, f"output={study.folder}"]
    found = []
    for seed in study.seeds:
        for method in study.methods:
            own = [f"name={method}-seed{seed}", f"seed={seed}"]
            files = [study.base, f"method/{method}"]
            config = config_lib.load(files, [*shared, *own])
            if config.train.steps is None:
                raise UserError(f"study {study.name}: base {study.base}: train.steps must be set")
            found.append(PlannedRun(method, seed, config))
    return found
