"""Points of a space, and the runs that they are: the shared config, the check of a space, one point's config.

`base(space, path, overrides)` -> what all trials share; `check(space, shared)` builds the config at both ends of every
parameter; `suggest(space, trial)` draws a point; `point_config(...)` is its run.
"""

import json
import pathlib
import random
from collections.abc import Mapping, Sequence
from typing import Any

from rest_jax import config as config_lib
from rest_jax.config import Config, ConfigError
from rest_jax.errors import UserError
from rest_jax.experiments.sweep.space import Scalar, Space

_DRAWS = 64  # combinations tried before a space is called impossible


def base(
    space: Space,
    config: str | pathlib.Path,
    overrides: Sequence[str] = (),
    based_on: str | None = None,
) -> Config:
    """What all trials share: the config file (on another base than its own, if asked), then the space's overrides, then
    `key=value` of the command line.
    """
    keys = {override.partition("=")[0] for override in overrides}
    for key in sorted(keys & (space.parameters.keys() | {"name"})):
        what = "the name of the sweep" if key == "name" else "a parameter of the sweep"
        raise UserError(f"{key}=...: {what} is set in its space file; change it there")
    shared = [f"{key}={json.dumps(value)}" for key, value in space.overrides.items()]
    return config_lib.load([config], [*shared, *overrides])


def point_config(shared: Config, point: Mapping[str, Scalar], folder: pathlib.Path) -> Config:
    """The config of the run in `folder` at a point. ConfigError when these values do not go together."""
    raw = shared.model_dump(mode="json")
    for key, value in point.items():
        _set(raw, key, value)
    raw |= {"name": folder.name, "output": str(folder.parent)}
    return config_lib.from_overrides(raw)


def check(space: Space, shared: Config) -> None:
    """Builds the config at the ends of each parameter and at drawn combinations. UserError for a value no run takes.

    Values that only fail together with others are left to the sweep, as long as some combination is sound.
    """
    if shared.data.eval is None:
        raise UserError(f"data.eval: null: {space.metric} needs held-out data")
    if space.pruner is not None and not shared.train.eval_every:
        raise UserError(
            "train.eval_every: 0: successive_halving decides at evaluations; set it above 0"
        )
    faults = []
    for key, parameter in space.parameters.items():
        for value in parameter.ends():
            reason = _refusal(shared, {key: value})
            if reason is not None and _own(reason, key):
                hint = " (set int: true)" if "valid integer" in reason else ""
                faults.append(reason + hint)
                break
    if faults:
        raise UserError(f"space {space.name}: " + "; ".join(faults))
    rng, reason = random.Random(space.seed), None
    for _ in range(_DRAWS):
        point = {key: parameter.draw(rng) for key, parameter in space.parameters.items()}
        reason = _refusal(shared, point)
        if reason is None:
            return
    raise UserError(
        f"space {space.name}: none of {_DRAWS} drawn combinations is a config; the last: {reason}"
    )


def suggest(space: Space, trial: Any) -> dict[str, Scalar]:
    """The trial's point; what it lacks is drawn by the study's sampler."""
    return {key: parameter.suggest(trial, key) for key, parameter in space.parameters.items()}


def point_text(point: Mapping[str, Scalar]) -> str:
    """As overrides of a command line."""
    return " ".join(f"{name}={shown(value)}" for name, value in point.items())


def shown(value: Scalar) -> str:
    """A value as text, floats with 4 digits."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _refusal(shared: Config, point: Mapping[str, Scalar]) -> str | None:
    try:
        point_config(shared, point, pathlib.Path("runs/check"))
    except ConfigError as error:
        return str(error).removeprefix("point: ")
    return None


def _own(reason: str, key: str) -> bool:
    """Whether it is the key or its value that is refused, and not what several fields are together."""
    return reason.startswith(f"{key}: ") or ": unknown key" in reason


def _set(raw: dict[str, Any], key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    node: Any = raw
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise UserError(f"parameters.{key}: {parent} is a value of the config, not a section")
    node[leaf] = value
