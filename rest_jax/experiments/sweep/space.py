"""A sweep's space: SPACE.yaml as frozen records, every fault of the file reported at once. `load(path)` -> `Space`."""

import itertools
import json
import math
import pathlib
import random
from typing import Annotated, Any, Literal

import pydantic

from rest_jax import config as config_lib
from rest_jax.config import NonNegativeInt, PositiveInt, Section
from rest_jax.run.metrics import METRICS

Scalar = str | int | float | bool | None
_RESERVED = ("name", "output")  # each trial's own
_GRID = 100_000


class Parameter(Section):
    """Values of one config key: `choices`, or a range with both ends."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    choices: Annotated[tuple[Scalar, ...], pydantic.Field(min_length=1)] | None = None
    low: float | None = None
    high: float | None = None
    step: Annotated[float, pydantic.Field(gt=0)] | None = None
    log: bool = False  # uniform in the logarithm
    integer: bool = pydantic.Field(default=False, alias="int")

    @pydantic.model_validator(mode="after")
    def _one_kind(self):
        bounds = (self.low, self.high)
        if self.choices is not None:
            if bounds != (None, None) or self.step is not None or self.log or self.integer:
                raise ValueError("choices stand alone, without low, high, step, log or int")
            if len(set(map(json.dumps, self.choices))) < len(self.choices):
                raise ValueError("the same choice twice")
            return self
        if self.low is None or self.high is None:
            raise ValueError("give choices, or low and high")
        if self.low >= self.high:
            raise ValueError(f"low {self.low:g} is not below high {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"log needs low above 0, not {self.low:g}")
        if self.log and self.step is not None:
            raise ValueError("step and log exclude each other")
        numbers = [x for x in (*bounds, self.step) if x is not None]
        if self.integer and any(x != int(x) for x in numbers):
            raise ValueError("int: low, high and step must be whole numbers")
        return self

    def ends(self) -> tuple[Scalar, ...]:
        """What is checked beforehand: every choice, or both ends and a value between them as drawing would give it."""
        if self.choices is not None:
            return self.choices
        points = self.grid()
        if points is not None:
            return points[0], points[len(points) // 2], points[-1]
        assert self.low is not None and self.high is not None
        inner = self.low + (self.high - self.low) * 0.381966
        return tuple(self._number(x) for x in (self.low, inner, self.high))

    def grid(self) -> tuple[Scalar, ...] | None:
        """All values; None for a range without step."""
        if self.choices is not None:
            return self.choices
        step = self.step or (1.0 if self.integer and not self.log else None)
        if step is None:
            return None
        assert self.low is not None and self.high is not None
        count = int((self.high - self.low) / step + 1e-9) + 1
        return tuple(self._number(round(self.low + i * step, 12)) for i in range(count))

    def suggest(self, trial: Any, name: str) -> Scalar:
        """The value that the trial has or is given by the study's sampler."""
        if self.choices is not None:
            return trial.suggest_categorical(name, self.choices)
        low, high = self._number(self.low), self._number(self.high)
        if self.integer:
            step = 1 if self.step is None else int(self.step)
            return trial.suggest_int(name, low, high, step=step, log=self.log)
        return trial.suggest_float(name, low, high, step=self.step, log=self.log)

    def draw(self, rng: random.Random) -> Scalar:
        """A plain random value, for the check of combinations."""
        points = self.grid()
        if points is not None:
            return rng.choice(points)
        assert self.low is not None and self.high is not None
        return self._number(rng.uniform(self.low, self.high))

    def _number(self, value: Any) -> Any:
        return round(value) if self.integer else value


class SuccessiveHalving(Section):
    """Of the trials that reach min_steps x reduction_factor^k training steps, about one in reduction_factor goes on."""

    min_steps: PositiveInt
    reduction_factor: Annotated[int, pydantic.Field(ge=2)] = 2


class Pruner(Section):
    """One of them; without a pruner every trial runs to its end."""

    successive_halving: SuccessiveHalving


class Space(Section):
    """A sweep, whole."""

    name: Annotated[str, pydantic.Field(pattern=r"^[A-Za-z0-9._-]+$")]
    metric: str = "eval/reward"
    direction: Literal["maximize", "minimize"] = "maximize"
    value: Literal["last", "best"] = "last"  # of the metric over the evaluations of a run
    sampler: Literal["grid", "random", "tpe"] = "tpe"
    seed: NonNegativeInt = 0
    trials: PositiveInt | None = None  # grid: None is all of it
    attempts: PositiveInt = 5  # a trial whose worker is lost this often has failed
    pruner: Pruner | None = None
    overrides: dict[str, Any] = pydantic.Field(default_factory=dict)
    parameters: Annotated[dict[str, Parameter], pydantic.Field(min_length=1)]

    @pydantic.field_validator("pruner", mode="before")
    @classmethod
    def _none_by_name(cls, value: Any) -> Any:
        return None if value == "none" else value

    @pydantic.model_validator(mode="after")
    def _consistent(self):
        measured = [name for name in METRICS if name.startswith("eval/")]
        if self.metric not in measured:
            raise ValueError(
                f"metric {self.metric!r}: not a held-out metric{config_lib.nearest(self.metric, measured)}"
            )
        for name in self.parameters.keys() & self.overrides.keys():
            raise ValueError(f"{name}: in parameters and in overrides")
        for name in (*self.parameters, *self.overrides):
            if name in _RESERVED:
                raise ValueError(f"{name}: every trial has its own, so it cannot be set")
        if self.sampler == "grid":
            open_ended = [name for name, p in self.parameters.items() if p.grid() is None]
            if open_ended:
                raise ValueError(f"sampler grid: {', '.join(open_ended)}: give choices or step")
            if self._grid_size() > _GRID:
                raise ValueError(
                    f"sampler grid: {self._grid_size():,} points; give fewer values, or take random or tpe"
                )
        elif self.trials is None:
            raise ValueError(f"trials: sampler {self.sampler} needs a number of them")
        return self

    def grid(self) -> list[dict[str, Scalar]]:
        """Every point of a grid, in an order shuffled by the seed: the first n are spread over it."""
        values = [p.grid() or () for p in self.parameters.values()]
        points = [
            dict(zip(self.parameters, point, strict=True)) for point in itertools.product(*values)
        ]
        random.Random(self.seed).shuffle(points)
        return points

    def size(self) -> int:
        """How many trials the sweep has."""
        if self.sampler != "grid":
            return self.trials or 0
        points = self._grid_size()
        return min(self.trials or points, points)

    def _grid_size(self) -> int:
        return math.prod(len(p.grid() or ()) for p in self.parameters.values())


def load(path: str | pathlib.Path) -> Space:
    """Reads SPACE.yaml. UserError lists every fault with its path and, for a typo, the nearest name."""
    path = pathlib.Path(path)
    return config_lib.validate_as(Space, config_lib.read_mapping(path), f"space {path}")
