"""A run that continues from a checkpoint of another one, under a name and a config of its own: `--fork NEW_NAME`.

The fork has the weights, the optimiser's moments and the curriculum of the newest sound checkpoint, step N, of the run it comes
from. Its steps are counted on from N, of `train.steps` in all; the learning rate is that of its own schedule at N, and random
keys are those of its own seed. The data continues where the other run was, if they are the same records in batches of the same
size and with the same seed; else it begins anew. `fork.json` in its folder says where it came from.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import pydantic
from etils import epath

from rest_jax.config import Config
from rest_jax.errors import UserError
from rest_jax.files import Location, absolute, as_path, atomic_write, store_errors
from rest_jax.rl.optimizer import move_schedule
from rest_jax.rl.step import first_key
from rest_jax.run import checkpoint
from rest_jax.types import Params, TrainState

FILE = "fork.json"
_GONE = "gone, or not what it was when this run was forked from it"


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a fork came from."""

    run: str  # the folder of the other run
    step: int  # of its checkpoint
    digest: str  # `checkpoint.manifest_digest` of it

    @property
    def checkpoint(self) -> epath.Path:
        """The folder of the checkpoint."""
        return as_path(self.run) / checkpoint.FOLDER / str(self.step)

    def __str__(self) -> str:
        return f"{self.run} at step {self.step}"


class Start(NamedTuple):
    """What the loop knows of a run's first step."""

    loader_state: Mapping[str, Any]  # of its data at their beginning
    updates: int  # optimiser updates of a step


def find_origin(source: Location | Origin, config: Config, restart: bool) -> Origin | None:
    """The newest sound checkpoint of the run in the folder `source`, or that of a fork which is made again; None when the folder
    of `config` holds a fork of it already, which then resumes. UserError for a folder that holds something else, and when there
    is no such checkpoint.
    """
    again, folder = isinstance(source, Origin), absolute(config.folder)
    run = as_path(source.run) if isinstance(source, Origin) else absolute(source)
    if folder == run and not again:
        raise UserError(f"--fork {config.name}: the run itself has that name; choose another one")
    with store_errors(folder):
        # A process that is about to use the folder may have hidden files there, one that was killed a part of FILE.
        exists = folder.is_dir() and any(
            path.name[0] != "." and path.suffix != ".partial" for path in folder.iterdir()
        )
    if exists and not restart:
        origin = read_origin(folder)
        if origin is not None and (origin == source if again else origin.run == str(run)):
            return None
        if again:
            raise UserError(
                f"reproduce {config.name}: {folder} exists and is no fork of {source}; choose another name"
            )
        raise UserError(
            f"--fork {config.name}: {folder} exists and is no fork of {run}; choose another name, or forget what it holds with "
            "--restart"
        )
    if isinstance(source, Origin):
        if not is_there(source):
            raise UserError(f"{source.checkpoint}: {_GONE}; put it back")
        return source
    if not (run / checkpoint.FOLDER).is_dir() or not checkpoint.list_steps(run / checkpoint.FOLDER):
        raise UserError(
            f"--fork {config.name}: {run} has no checkpoint to go on from; the config's name and output say which run that is"
        )
    path = checkpoint.newest(run)
    return Origin(str(run), int(path.name), checkpoint.manifest_digest(path))


def read_origin(folder: epath.Path) -> Origin | None:
    """Where the run in a folder came from; None for one that is no fork. UserError when that cannot be read."""
    path = folder / FILE
    with store_errors(folder):
        if not path.is_file():
            return None
        text = path.read_bytes()
    try:
        return pydantic.TypeAdapter(Origin).validate_json(text)
    except pydantic.ValidationError as error:
        raise UserError(
            f"{path}: does not say where the run was forked from; put it back, or fork anew with --restart"
        ) from error


def write_origin(folder: epath.Path, origin: Origin) -> None:
    """Writes it into the folder of the fork."""
    with atomic_write(folder / FILE) as partial:
        partial.write_text(json.dumps(dataclasses.asdict(origin), indent=1))


def is_there(origin: Origin) -> bool:
    """Whether the checkpoint is what it was when the run was forked from it, by its manifest."""
    path = origin.checkpoint / checkpoint.MANIFEST
    with store_errors(path):
        return path.is_file() and checkpoint.manifest_digest(path.parent) == origin.digest


def check_origin(origin: Origin, params: Params, steps: int) -> None:
    """UserError when a run of these parameters and of so many steps cannot go on from the checkpoint."""
    checkpoint.check_params(origin.checkpoint, params)
    if origin.step >= steps:
        raise UserError(
            f"fork of {origin}: the steps are counted on from there, and this run has {steps}; raise train.steps or train.epochs"
        )


def first_state(
    origin: Origin, seed: int, abstract: TrainState, start: Start
) -> tuple[TrainState, dict[str, Any]]:
    """The state and the loader state of the checkpoint with the fork's own random key and schedule. UserError when it is gone, or
    is not what it was. Every process calls it.

    What the other run had sampled ahead is sampled anew.
    """
    if not is_there(origin):
        raise UserError(f"{origin.checkpoint}: {_GONE}; fork anew with --restart")
    try:
        checkpoint.verify(origin.checkpoint, thorough=True)
    except checkpoint.DamagedError as error:
        raise UserError(
            f"{origin.checkpoint}: damaged: {error}; put it back, or fork anew with --restart"
        ) from error
    state, loader_state = checkpoint.read(origin.checkpoint, abstract)
    loader_state.pop(checkpoint.AHEAD, None)
    updates = origin.step * start.updates
    moved = move_schedule(state.opt_state, updates)
    rng = first_key(seed, abstract.rng.sharding)
    return dataclasses.replace(state, rng=rng, opt_state=moved), loader_state


def same_order(saved: Mapping[str, Any], start: Mapping[str, Any]) -> bool:
    """Whether two loader states are of as many records, in batches of the same size and with the same seed."""
    return all(saved.get(name) == value for name, value in start.items() if name != "grain")
