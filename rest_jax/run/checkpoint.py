"""Checkpoints of a run: Orbax, asynchronous, atomic, each verified when it is read.

`<run>/checkpoints/<step>/` holds three items: `params` (nested dict of arrays), `rest` (every other leaf of the state
under its dotted path), `extra` (JSON: loader state, config, and for every leaf its shape, dtype and fingerprint).
A checkpoint that cannot be read or does not match its fingerprints is named on stderr and the one before it is used.
"""

import dataclasses
import hashlib
import json
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from rest_jax.errors import UserError
from rest_jax.run import storage
from rest_jax.types import Params, TrainState

FOLDER = "checkpoints"
DAMAGED = ".damaged"  # suffix of a checkpoint put aside; Orbax does not see it
_ITEMS = ("params", "rest", "extra")


class Checkpoints:
    """The checkpoints of one run. A resource: `close` (or a with statement) waits for the last save."""

    def __init__(self, run_dir: str | pathlib.Path, keep: int = 3):
        self.folder = pathlib.Path(run_dir).resolve() / FOLDER
        self._manager = ocp.CheckpointManager(
            self.folder,
            item_names=_ITEMS,
            options=ocp.CheckpointManagerOptions(
                create=True,
                cleanup_tmp_directories=True,  # what a killed run left half-written
                lightweight_initialize=True,
                preservation_policy=ocp.checkpoint_managers.LatestN(keep),
            ),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def latest(self) -> int | None:
        """The newest step that was saved to its end (not yet verified); None when there is none."""
        return self._manager.latest_step()

    def save(
        self, step: int, state: TrainState, loader_state: Mapping[str, Any], config_yaml: str
    ) -> None:
        """Copies the state off the devices, then writes it in the background; it counts once it is whole.

        `state` may be donated as soon as this returns. `loader_state` is anything JSON holds. A step that exists
        already is left as it is: the same run has the same state there.
        """
        if step in self._manager.all_steps():
            return
        params, rest = _split(state)
        described = {
            "params": storage.describe(storage.named(params)),
            "rest": storage.describe(rest),
            "loader_state": loader_state,
            "config": config_yaml,
        }
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(params),  # pyright: ignore[reportCallIssue]
                rest=ocp.args.StandardSave(rest),  # pyright: ignore[reportCallIssue]
                extra=ocp.args.JsonSave(_seal(described)),  # pyright: ignore[reportCallIssue]
            ),
            force=True,
        )

    def restore(
        self, abstract_state: TrainState, step: int | None = None
    ) -> tuple[TrainState, dict[str, Any], int]:
        """The state, the loader state and the step of the newest sound checkpoint, or of `step` exactly.

        `abstract_state` has a ShapeDtypeStruct for every leaf; each array comes back bit for bit in the sharding given
        there (none: the first device), whatever mesh it was saved from. Damaged checkpoints passed over are named on
        stderr and renamed to `<step>.damaged`. UserError when no sound one is left, or when it belongs to another model
        or optimiser.
        """
        self.wait()
        abstract_params, abstract_rest = _split(abstract_state)
        damaged = []
        for candidate in self._candidates(step):
            try:
                extra = _extra(self._manager, candidate)
                storage.compare(self._path(candidate), extra["rest"], abstract_rest)
                path = self._path(candidate)
                params = storage.read(path / "params", extra["params"], abstract_params)
                rest = storage.read(path / "rest", extra["rest"], abstract_rest)
            except storage.DamagedError as error:
                damaged.append(candidate)
                _warn(self._path(candidate), error)
                continue
            self._put_aside(damaged)
            return _join(abstract_state, params, rest), extra["loader_state"], candidate
        raise _none_left(self.folder, step, damaged)

    def config(self, step: int) -> str:
        """The resolved config (YAML) that the checkpoint of `step` was saved under. UserError when it is damaged."""
        try:
            return _extra(self._manager, step)["config"]
        except storage.DamagedError as error:
            raise UserError(f"checkpoint {self._path(step)} is damaged: {error}") from error

    def wait(self) -> None:
        """Blocks until the save under way is on disk; raises what it raised."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then frees the threads of the manager."""
        self.wait()
        self._manager.close()

    def _path(self, step: int) -> pathlib.Path:
        return self.folder / str(step)

    def _candidates(self, step: int | None) -> list[int]:
        steps = sorted(self._manager.all_steps(), reverse=True)
        return steps if step is None else [s for s in steps if s == step]

    def _put_aside(self, steps: list[int]) -> None:
        # Only now that a sound one is known: with every checkpoint renamed, the next start would begin afresh.
        for step in steps if jax.process_index() == 0 else []:
            target = self._path(step).with_name(f"{step}{DAMAGED}")
            copies = 1
            while target.exists():
                copies += 1
                target = target.with_name(f"{step}{DAMAGED}.{copies}")
            self._path(step).rename(target)
        if steps:
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices("damaged checkpoints put aside")
            self._manager.reload()


def restore_params(
    run_dir: str | pathlib.Path, abstract_params: Params, step: int | None = None
) -> tuple[Params, int]:
    """The parameters and the step of the newest sound checkpoint of a run (or of `step`); changes nothing on disk.

    Shapes, dtypes and shardings as in `Checkpoints.restore`; the optimiser's state is not read.
    """
    folder = pathlib.Path(run_dir).resolve() / FOLDER
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; is {run_dir} the folder of a run?")
    options = ocp.CheckpointManagerOptions(create=False, lightweight_initialize=True)
    damaged = []
    with ocp.CheckpointManager(folder, item_names=_ITEMS, options=options) as manager:
        for candidate in sorted(manager.all_steps(), reverse=True):
            if step not in (None, candidate):
                continue
            try:
                recorded = _extra(manager, candidate)["params"]
                path = folder / str(candidate) / "params"
                return storage.read(path, recorded, abstract_params), candidate
            except storage.DamagedError as error:
                damaged.append(candidate)
                _warn(folder / str(candidate), error)
    raise _none_left(folder, step, damaged)


def _split(state: TrainState) -> tuple[Params, storage.Leaves]:
    """The parameters, and every other leaf under its dotted path; keys as their integer data."""
    rest = storage.named(dataclasses.replace(state, params=None))
    return state.params, {name: storage.plain(leaf) for name, leaf in rest.items()}


def _join(abstract: TrainState, params: Params, rest: storage.Leaves) -> TrainState:
    empty = dataclasses.replace(abstract, params=None)
    leaves = []
    for name, like in storage.named(empty).items():
        leaf = rest[name]
        if storage.is_key(like):
            leaf = jax.random.wrap_key_data(leaf, impl=storage.key_impl(like))
        leaves.append(leaf)
    state = jax.tree.unflatten(jax.tree.structure(empty), leaves)
    return dataclasses.replace(state, params=params)


def _seal(content: dict[str, Any]) -> dict[str, str]:
    text = json.dumps(content)
    return {"content": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def _extra(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    """The JSON item, verified. storage.DamagedError otherwise."""
    restore = ocp.args.JsonRestore()
    sealed = storage.guard(
        lambda: manager.restore(step, args=ocp.args.Composite(extra=restore))["extra"], "extra"
    )
    text = sealed.get("content", "") if isinstance(sealed, dict) else ""
    if not text or hashlib.sha256(text.encode()).hexdigest() != sealed.get("sha256"):
        raise storage.DamagedError("extra: its checksum does not match")
    return json.loads(text)


def _warn(path: pathlib.Path, error: storage.DamagedError) -> None:
    if jax.process_index() == 0:
        print(f"warning: checkpoint {path} is damaged and not used: {error}", file=sys.stderr)


def _none_left(folder: pathlib.Path, step: int | None, damaged: list[int]) -> UserError:
    wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
    if not damaged:
        return UserError(f"{folder}: there is no {wanted}")
    names = ", ".join(map(str, damaged))
    return UserError(
        f"{folder}: no sound {wanted} is left (damaged: {names}); move the run folder away to start afresh"
    )
