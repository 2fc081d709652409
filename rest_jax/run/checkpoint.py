"""Checkpoints of a run: written and read by Orbax, asynchronous, atomic, each verified before it is read.

`<run>/checkpoints/<step>/` holds three items, `params`, `rest` (the other fields of the TrainState) and `loader` (JSON: where the
loader is), under `rollout.staleness` a fourth, `ahead` (the batch sampled for the next step), and `manifest.json`: the
fingerprint (`files.fingerprints`) of every file of the items. The manifest is written before Orbax completes the checkpoint
(renames its folder, or in an object store puts `commit_success.txt`), so a checkpoint has one or does not exist. One that does
not match its manifest is named on stderr, and the one before it is used.
"""

import contextlib
import dataclasses
import itertools
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import flatten_dict
from orbax.checkpoint._src.serialization import tensorstore_utils

from rest_jax.distributed import any_process, exchange, is_first_process
from rest_jax.errors import RunStopped, UserError, full_disk
from rest_jax.files import (
    Location,
    absolute,
    as_path,
    file_digest,
    find_damage,
    fingerprints,
    flush,
    is_url,
    list_files,
    make_folder,
    move_folder,
    store_errors,
)
from rest_jax.models.hf import store
from rest_jax.models.hf.remote import ATOMICITY, checkpoint_path, is_complete
from rest_jax.texts import warn
from rest_jax.types import Params, TrainState

FOLDER = "checkpoints"
MANIFEST = "manifest.json"
# Suffix of a checkpoint that was put aside; Orbax does not see it.
DAMAGED = ".damaged"
# Orbax logs, with a traceback for each of its threads, what it then raises.
logging.getLogger("absl").setLevel(logging.CRITICAL)
# TensorStore never frees the lists that it makes of its metrics; Orbax asks for them with every save, for its own log alone.
tensorstore_utils.print_ts_debug_data = lambda *_: None
tensorstore_utils.get_tensorstore_raw_bytes = lambda *_, **__: 0
AHEAD = "ahead"  # of a loader state: a tree of arrays, kept as an item of its own
_ITEMS = ("params", "rest", "loader")


class DamagedError(Exception):
    """A checkpoint that is not what was saved; the text says in which way."""


class Checkpoints:
    """The checkpoints of one run. A resource: the end of its with statement waits for the last save."""

    def __init__(self, run_dir: Location, keep: int = 3, timeout: int = 1800):
        """`timeout`: seconds that a save may take in the background."""
        self.folder = checkpoint_path(absolute(run_dir) / FOLDER)
        self._timeout = timeout
        self._saving = 0
        processes = jax.process_count()
        # Orbax makes no folder when it is told who takes part.
        if is_first_process():
            make_folder(self.folder)
        any_process(False, timeout)
        self._manager = ocp.CheckpointManager(
            self.folder,
            item_names=(*_ITEMS, AHEAD),
            options=ocp.CheckpointManagerOptions(
                create=False,
                # What a killed run left half-written.
                cleanup_tmp_directories=True,
                lightweight_initialize=True,
                preservation_policy=ocp.checkpoint_managers.LatestN(keep),
                atomicity_options=ATOMICITY if is_url(self.folder) else None,
                # Told who takes part, Orbax waits for them through the coordinator, which has a time-out, and not in
                # collectives, which have none.
                multiprocessing_options=ocp.options.MultiprocessingOptions(
                    active_processes=set(range(processes)) if processes > 1 else None
                ),
                async_options=ocp.AsyncOptions(
                    timeout_secs=timeout,
                    # Orbax calls it in the first process, when all have written and before it completes the checkpoint.
                    post_finalization_callback=self._seal,
                ),
            ),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()
        # Frees the manager's threads.
        self._manager.close()

    def latest(self) -> int | None:
        """The newest step that was saved to its end (not yet verified); None when there is none."""
        return self._manager.latest_step()

    def has_complete(self) -> bool:
        """Whether a checkpoint is complete; said only while none is under way."""
        return self.latest() is not None and not self._manager.is_saving_in_progress()

    def save(self, step: int, state: TrainState, loader_state: Mapping[str, Any]) -> None:
        """Copies the state off the devices and writes it in the background; it counts once all of it is on disk.

        `state` may be donated as soon as this returns. `loader_state` is anything JSON holds, with arrays under AHEAD alone. A
        step that exists already is left as it is: the same run has the same state there.
        """
        self.wait()
        if step in self._manager.all_steps():
            return
        self._saving = step
        rest = dataclasses.replace(state, params=None)
        position = dict(loader_state)
        ahead = position.pop(AHEAD, None)
        optional = {} if ahead is None else {AHEAD: ocp.args.StandardSave(ahead)}  # pyright: ignore[reportCallIssue]
        # Orbax's own barriers give up after 300 s: all are here before the first of them.
        any_process(False, self._timeout)
        with self._failing_store():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(state.params, _one_chunk_a_layer(state.params)),  # pyright: ignore[reportCallIssue]
                    rest=ocp.args.StandardSave(rest),  # pyright: ignore[reportCallIssue]
                    loader=ocp.args.JsonSave(position),  # pyright: ignore[reportCallIssue]
                    **optional,
                ),
                force=True,
            )

    def restore(self, abstract_state: TrainState) -> tuple[TrainState, dict[str, Any], int]:
        """The state, the loader state (arrays under AHEAD as NumPy, those of all processes) and the step of the newest sound
        checkpoint.

        `abstract_state` has a ShapeDtypeStruct for every leaf; each array comes back bit for bit in the sharding given
        there (none: the first device), whatever mesh it was saved from. Damaged checkpoints passed over are named on
        stderr and renamed to `<step>.damaged`. UserError when no sound one is left, or when it belongs to another model
        or optimiser.
        """
        self.wait()
        found, damaged = _newest_sound(self.folder, (*_ITEMS, AHEAD))
        state, loader_state = read(self.folder / str(found), abstract_state)
        self._put_aside(damaged)
        return state, loader_state, found

    def wait(self) -> None:
        """Blocks until the save under way is stored; raises what it raised, RunStopped when a store failed or a disk is full."""
        with self._failing_store():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _failing_store(self) -> Iterator[None]:
        try:
            with full_disk(f"{self.folder}/{self._saving}: not saved"):
                yield
        except (TimeoutError, jax.errors.JaxRuntimeError, RunStopped):
            raise
        except Exception as error:  # of TensorStore, gcsfs or s3fs
            if not is_url(self.folder):
                raise
            reason = " ".join(str(error).split())[:300]
            raise RunStopped(
                f"{self.folder}/{self._saving}: not saved: {reason}; the same command resumes from the checkpoint before"
            ) from error

    def _seal(self) -> None:
        """Writes the manifest of the step that is being saved, while its folder has its temporary name or no commit file."""
        if is_url(self.folder):
            write_manifest(self.folder / str(self._saving))
            return
        # A pattern that is another one for every step would be kept, compiled, by the standard library.
        begins = f"{self._saving}{ocp.path.step.TMP_DIR_SUFFIX}"
        (folder,) = (path for path in self.folder.iterdir() if path.name.startswith(begins))
        write_manifest(folder)

    def _put_aside(self, steps: list[int]) -> None:
        # Only now that a sound one is known: with every checkpoint renamed, the next start would begin afresh.
        for step in steps if is_first_process() else []:
            names = (f"{step}{DAMAGED}{f'.{n}' if n > 1 else ''}" for n in itertools.count(1))
            free = next(name for name in names if not (self.folder / name).exists())
            move_folder(self.folder / str(step), self.folder / free)
        # No process continues before they are renamed.
        any_process(False)
        self._manager.reload()


def list_steps(folder: epath.Path, damaged: bool = False) -> list[int]:
    """The steps of which there is a checkpoint in the folder of a run's checkpoints; `damaged`: also those put aside."""
    if not folder.is_dir():
        return []
    found = {path: path.name.partition(DAMAGED) for path in folder.iterdir()}
    return [
        int(step)
        for path, (step, aside, _) in found.items()
        if step.isdigit() and (damaged if aside else is_complete(path))
    ]


def run_of(source: Location) -> epath.Path:
    """The folder of a run that is given by its folder, or by that of one of its checkpoints (RUN/checkpoints/STEP)."""
    path = as_path(source)
    return path.parents[1] if path.name.isdigit() and path.parent.name == FOLDER else path


def newest_params(run_dir: Location) -> tuple[epath.Path, int]:
    """Where the parameters of the newest sound checkpoint of a run are (an Orbax checkpoint), and its step; or those of the
    checkpoint that is given in place of a run.

    Changes nothing on disk; the optimiser's state is not verified. Every process calls it and verifies its share of the files.
    """
    path = newest(run_dir, ("params",))
    return path / "params", int(path.name)


def newest(run_dir: Location, items: Sequence[str] = _ITEMS) -> epath.Path:
    """The newest checkpoint of a run of which `items` are sound; the rest as for `newest_params`."""
    given, run = absolute(run_dir), absolute(run_of(run_dir))
    folder = checkpoint_path(run / FOLDER)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; is {run_dir} the folder of a run?")
    if given == run:
        return folder / str(_newest_sound(folder, items)[0])
    path, there = folder / given.name, list_steps(folder)
    if int(given.name) not in there:
        shown = ", ".join(map(str, sorted(there))) or "none"
        raise UserError(f"{path}: no such checkpoint; there are {shown}")
    try:
        verify(path, items)
    except DamagedError as error:
        raise UserError(f"{path}: damaged: {error}") from error
    return path


def read(path: epath.Path, abstract_state: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """The state and the loader state of a sound checkpoint; the rest as for `Checkpoints.restore`."""
    rest = _read(path / "rest", dataclasses.replace(abstract_state, params=None))
    state = dataclasses.replace(rest, params=_read(path / "params", abstract_state.params))
    loader_state = read_loader_state(path)
    if (path / AHEAD).exists():
        loader_state[AHEAD] = _read_arrays(path / AHEAD)
    return state, loader_state


def read_loader_state(path: epath.Path) -> dict[str, Any]:
    """The JSON of a checkpoint, which the loader's state and all that is kept with it are."""
    with contextlib.closing(ocp.JsonCheckpointHandler()) as handler:
        return dict(handler.restore(path / "loader"))


def shapes(path: epath.Path) -> dict[str, tuple[int, ...]]:
    """The shape of every array of a checkpoint by its dotted path, `params.` or `rest.` before it; nothing is read of them."""
    found = {}
    with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
        for item in ("params", "rest"):
            leaves = _named(handler.metadata(path / item).tree)
            found |= {f"{item}.{name}": tuple(leaf.shape) for name, leaf in leaves.items()}
    return found


def curriculum(path: epath.Path) -> dict[str, np.ndarray]:
    """The fields of the curriculum's state in a checkpoint, by name; those of the version that saved it."""
    names = [name.split(".")[-1] for name in shapes(path) if name.startswith("rest.curriculum.")]
    read = (store.open_array(path / "rest", ("curriculum", name)).read() for name in names)
    return {name: future.result() for name, future in zip(names, read, strict=True)}


def check_params(path: epath.Path, params: Params) -> None:
    """UserError unless the parameters of a checkpoint have the names, shapes and types of these."""
    with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
        _compare(path, _named(handler.metadata(path / "params").tree), _named(params))


def params_distance(path: epath.Path, params: Params) -> tuple[int, float]:
    """How many values of the parameters of a sound checkpoint are not those of `params`, and the distance of the two relative to
    the norm of `params`. Each process reads its shards. UserError as of `check_params`.
    """
    check_params(path, params)
    unequal, apart, size = 0, 0.0, 0.0
    arrays: dict[Any, Any] = dict(flatten_dict(params))
    for name, array in arrays.items():
        stored = store.open_array(path / "params", name)
        for shard in array.addressable_shards:
            if shard.replica_id == 0:
                here = np.asarray(shard.data)
                there = store.read(path / "params", name, stored, shard.index)
                size += float(np.linalg.norm(here)) ** 2
                if count := int(np.count_nonzero(there != here)):
                    unequal += count
                    apart += float(np.linalg.norm(there - here)) ** 2
    own = map(json.loads, exchange(json.dumps([unequal, apart, size])))
    unequal, apart, size = map(sum, zip(*own, strict=True))
    return int(unequal), math.sqrt(apart / size) if size else math.inf if unequal else 0.0


def manifest_digest(path: epath.Path) -> str:
    """The SHA-256 digest, in hex, of a checkpoint's manifest, which has the digest of every file."""
    return file_digest(path / MANIFEST)


def write_manifest(folder: epath.Path) -> None:
    """Writes the fingerprint of every file of the items in `folder`."""
    content = fingerprints(folder, sorted(name for name in list_files(folder) if "/" in name))
    (folder / MANIFEST).write_text(json.dumps(content, indent=1))
    if not is_url(folder):
        flush(folder / MANIFEST)


def verify(
    folder: epath.Path, items: Sequence[str] = (*_ITEMS, AHEAD), thorough: bool = False
) -> None:
    """DamagedError unless the files of `items` are those of the manifest (`files.find_damage`). Each process reads its share.

    UserError when a store cannot be read: that says nothing about the checkpoint.
    """
    failure: Exception | None = None
    try:
        _compare_files(folder, items, thorough)
    except DamagedError as error:
        failure = error
    except (FileNotFoundError, ValueError, TypeError, AttributeError, RecursionError) as error:
        failure = DamagedError(" ".join(str(error).split())[:200])
    except OSError as error:
        failure = DamagedError(" ".join(str(error).split())[:200])
        if is_url(folder):
            failure = UserError(f"{folder}: cannot be read: {failure}")
    if any_process(failure is not None):
        raise failure or DamagedError("another process found damage in its share of the files")


def _one_chunk_a_layer(params: Params) -> Any:
    """How Orbax cuts parameters: those stacked over layers by layer, so that one layer can be read without the others."""

    def cut(path: tuple[Any, ...], _: Any) -> ocp.SaveArgs:
        stacked = path[:1] == (jax.tree_util.DictKey("blocks"),)
        return ocp.SaveArgs(shard_axes=(0,) if stacked else ())

    return jax.tree_util.tree_map_with_path(cut, params)


def _compare_files(folder: epath.Path, items: Sequence[str], thorough: bool) -> None:
    """DamagedError when this process's share of the files is not what the manifest says."""
    content = read_manifest(folder)
    names = [name for name in content if name.split("/")[0] in items]
    own = names[jax.process_index() :: jax.process_count()]
    if name := find_damage(folder, {name: content[name] for name in own}, thorough):
        raise DamagedError(f"{name} is not what was saved")


def read_manifest(folder: epath.Path) -> dict[str, Any]:
    """The fingerprint of every file of the items in `folder`. DamagedError when it is not what was written."""
    try:
        content = json.loads((folder / MANIFEST).read_text())
        items = {name.split("/")[0] for name, (_, _, *_) in content.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise DamagedError(f"{MANIFEST}: {error}") from error
    if items - {AHEAD} != set(_ITEMS):
        raise DamagedError(f"{MANIFEST} does not describe the items {', '.join(_ITEMS)}")
    return content


def _newest_sound(folder: epath.Path, items: Sequence[str]) -> tuple[int, list[int]]:
    """(the newest sound step; the damaged ones passed over). UserError when there is none."""
    damaged = []
    with store_errors(folder):
        found = [path for path in folder.iterdir() if path.name.isdigit() and is_complete(path)]
    steps = [int(path.name) for path in found]
    for step in sorted(steps, reverse=True):
        path = folder / str(step)
        try:
            verify(path, items)
            return step, damaged
        except DamagedError as error:
            damaged.append(step)
            if is_first_process():
                warn(f"checkpoint {path} is damaged and not used: {error}")
    if not damaged:
        raise UserError(f"{folder}: there is no checkpoint")
    names = ", ".join(map(str, damaged))
    raise UserError(
        f"{folder}: no sound checkpoint is left (damaged: {names}); move the run folder away to start afresh"
    )


def _read(path: epath.Path, abstract: Any) -> Any:
    """One array item, each leaf in its sharding. UserError when it is the item of another model or optimiser."""
    with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
        stored = handler.metadata(path)
        _compare(path.parent, _named(stored.tree), _named(abstract))
        first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or first), abstract
        )
        return handler.restore(path, args=ocp.args.StandardRestore(like))


def _read_arrays(path: epath.Path) -> Any:
    """One array item as NumPy, whatever its shapes."""
    with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
        like = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), handler.metadata(path).tree)
        return handler.restore(path, args=ocp.args.StandardRestore(like))


def _compare(path: epath.Path, stored: dict[str, Any], abstract: dict[str, Any]) -> None:
    for name in sorted(stored.keys() ^ abstract.keys()):
        owner = "checkpoint" if name in stored else "configured run"
        raise UserError(f"checkpoint {path}: only the {owner} has {name}; {_origin(name)}")
    for name, like in abstract.items():
        if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
            # Orbax stores a typed key as its data.
            like = jax.eval_shape(jax.random.key_data, like)
        shape, dtype = tuple(stored[name].shape), str(stored[name].dtype)
        if (shape, dtype) != (tuple(like.shape), str(like.dtype)):
            raise UserError(
                f"checkpoint {path}: {name} is {dtype}{list(shape)}, the configured run has "
                f"{like.dtype}{list(like.shape)}; {_origin(name)}"
            )


def _origin(name: str) -> str:
    """What a checkpoint is of whose array `name` is not that of the configured run."""
    if name.startswith("curriculum."):
        # The fields are the same in every config.
        return (
            "it is of another version of rest_jax; model.source=RUN starts a run from its weights"
        )
    return "it is of another model or optimiser"


def _named(tree: Any) -> dict[str, Any]:
    """The leaves of a tree under their dotted paths."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in paths}
