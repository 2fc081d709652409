"""What there is on disk: the commands `rest-jax runs` and `rest-jax inspect`. Nothing is changed, and no model is loaded.

list_runs(folder)              the runs in a folder: state, step, headline figure, host
describe_checkpoint(path)      a checkpoint: step, curriculum, config, shapes, bytes, digest; `verify` reads all of it
"""

import contextlib
import json
import math
import socket
import time
from collections.abc import Mapping
from typing import Any

from etils import epath

from rest_jax import config as config_lib
from rest_jax.config import Config, ModelConfig
from rest_jax.errors import UserError
from rest_jax.files import Location, absolute, as_path, nearest_path, store_errors
from rest_jax.run.lock import FILE as LOCK
from rest_jax.run.lock import OWNER, begun, read_owner
from rest_jax.run.metrics import (
    CONFIG_FILE,
    METRICS_FILE,
    REGION_NAMES,
    STEPS_FILE,
    read_lines,
    shown_value,
    summary_table,
)
from rest_jax.texts import one_line

# of seconds in which a run on another host has written nothing: it is taken for stopped
QUIET = 600
# the metric that says most of a run, and its name in the table: the first that the run has
HEADLINES = {"eval/exact": "exact", "reward/mean": "reward", "update/loss": "loss"}


def list_runs(folder: Location) -> str:
    """A table of the runs in a folder, the one that moved last first. UserError when there is no folder, or no run in it."""
    place = as_path(folder)
    with store_errors(place):
        if not place.is_dir():
            raise UserError(
                f"{folder}: no such folder{nearest_path(folder, folders=True)}; name the folder of your runs, such as runs"
            )
        runs = [path for path in place.iterdir() if (path / CONFIG_FILE).is_file()]
    if not runs:
        raise UserError(f"{folder}: no runs in it (a run is a folder with {CONFIG_FILE})")
    found = sorted(map(_run, runs), key=lambda run: -run["moved"])
    faults = [f"{run['name']}: {run['fault']}" for run in found if "fault" in run]
    rows: list[list[Any]] = [["run", "state", "step", "of", "figure", "moved", "host"]]
    for run in found:
        ago = _ago(time.time() - run["moved"])
        rows.append(
            [run[key] for key in ("name", "state", "step", "of", "figure")] + [ago, run["host"]]
        )
    return "\n".join([summary_table(rows), *map(one_line, faults)])


def _run(path: epath.Path) -> dict[str, Any]:
    """One run, as the cells of its row; with a `fault` where it cannot be read."""
    run: dict[str, Any] = {"name": path.name, "step": 0, "of": "-", "figure": "-", "host": "-"}
    run["moved"] = (path / CONFIG_FILE).stat().mtime
    try:
        config = config_lib.read_recorded(path / CONFIG_FILE)
        metrics = path / METRICS_FILE
        lines = read_lines(metrics, missing_ok=True)
    except UserError as error:
        return run | {"state": "unreadable", "fault": str(error)}
    if lines:
        run["step"], run["moved"] = lines[-1]["step"], metrics.stat().mtime
    owner, written = _owner(path)
    alive = _alive(owner)
    run["host"] = owner.get("host", "-")
    length = _length(path)
    if length is None:  # by a run of before that file: the config, which may count in epochs
        told = dict(config_lib.leaves(config)).get("train.steps")
        length = told, isinstance(told, int) and 0 < told <= run["step"]
    steps, finished = length
    run["of"] = steps or "-"
    if alive:
        run["state"] = "training"
    elif finished:
        run["state"] = "finished"
    elif alive is None:
        moves = time.time() - max(run["moved"], written) < QUIET
        run["state"] = "training?" if moves else "stopped?"
    else:
        run["state"] = "stopped"
    for name, label in HEADLINES.items():
        values = [line[name] for line in lines if line.get(name) is not None]
        if values:
            run["figure"] = f"{label} {shown_value(name, values[-1])}"
            break
    return run


def _length(path: epath.Path) -> tuple[int, bool] | None:
    """The steps of a run in all, and whether they are done; None where it has not written that."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        found = json.loads((path / STEPS_FILE).read_text())
        return int(found["steps"]), bool(found["complete"])
    return None


def _owner(path: epath.Path) -> tuple[dict[str, Any], float]:
    """The process that trained in the folder last, and when it wrote that last: at its start, in a store with every heartbeat."""
    for name in (OWNER, LOCK):  # of a local folder, of one in a store
        with contextlib.suppress(OSError):
            if owner := read_owner(path / name):
                return owner, (path / name).stat().mtime
    return {}, 0.0


def _alive(owner: Mapping[str, Any]) -> bool | None:
    """Whether that process is; None where only another host knows, or nothing was written of when it began."""
    if not isinstance(owner.get("pid"), int):
        return False
    if owner.get("host") != socket.gethostname() or not owner.get("begun"):
        return None
    return begun(owner["pid"]) == owner["begun"]


def _ago(seconds: float) -> str:
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(seconds, 0):.0f} s ago"


def describe_checkpoint(source: Location, verify: bool = False) -> str:
    """What a checkpoint holds: `source` is its folder, or that of a run, for the newest. UserError when there is none, and with
    `verify` when a file is not what was saved.
    """
    # jax takes seconds to import
    from rest_jax.models.hf.remote import checkpoint_path
    from rest_jax.run import checkpoint
    from rest_jax.run.contents import MADE_OF

    place = checkpoint_path(absolute(source))
    if not (place / checkpoint.MANIFEST).is_file():
        steps = checkpoint.list_steps(place / checkpoint.FOLDER)
        if not steps:
            raise UserError(f"{source}: neither a checkpoint nor a run with one")
        place = place / checkpoint.FOLDER / str(max(steps))
    try:
        files = checkpoint.read_manifest(place)
        if verify:
            checkpoint.verify(place, thorough=True)
        with store_errors(place):
            shapes, loader = checkpoint.shapes(place), checkpoint.read_loader_state(place)
            state = checkpoint.curriculum(place)
    except (UserError, PermissionError):
        raise  # which say nothing about the checkpoint
    # What Orbax and TensorStore raise over files that are cut has no kind in common.
    except (checkpoint.DamagedError, ValueError, OSError, KeyError, TypeError) as error:
        raise UserError(f"{place}: damaged: {one_line(str(error))[:200]}") from error
    curriculum = {name: value.tolist() for name, value in state.items()}
    made_of = ", ".join(f"{name} {digest}" for name, digest in loader.get(MADE_OF, {}).items())
    size = sum(length for length, *_ in files.values())
    values = sum(math.prod(shape) for name, shape in shapes.items() if name.startswith("params."))
    lines = [
        f"checkpoint {place}" + (": every file is what was saved" if verify else ""),
        f"{_step(place)}, {values / 1e6:,.1f} M parameters",
        f"{len(shapes)} arrays in {len(files)} files, {size / 1e6:,.1f} MB",
        f"digest {checkpoint.manifest_digest(place)}",
        f"made of {made_of or 'nothing on record'}",
        f"curriculum: update {curriculum['step']}, nu {curriculum['nu']:.4g}, format score {curriculum['format_score']:.4g}",
    ]
    regions: list[list[Any]] = [
        ["region", "base weight", "entropy in force", "gini in force", "tokens a batch"]
    ]
    for region, name in enumerate(REGION_NAMES, start=1):
        if curriculum["seen"][region]:
            cells = (curriculum[key][region] for key in ("weight", "entropy", "gini", "count"))
            regions.append([name, *cells])
    arrays = [["array", "shape"]]
    for name, shape in shapes.items():
        if name.startswith("params."):
            arrays.append([name, "x".join(map(str, shape)) or "scalar"])
    tables = (summary_table(rows) for rows in (regions, _set(place), arrays) if len(rows) > 1)
    return "\n\n".join(["\n".join(lines), *tables])


def _step(place: epath.Path) -> str:
    """What the name of a checkpoint's folder says; that of a copy may be another one."""
    return f"step {int(place.name)}" if place.name.isdigit() else place.name


def _set(place: epath.Path) -> list[list[Any]]:
    """The values of the config of a checkpoint's run that are not the defaults; none where that file is not beside it."""
    file = place.parent.parent / CONFIG_FILE
    rows: list[list[Any]] = [["config", "value", "default"]]
    if file.is_file():
        told = dict(config_lib.leaves(config_lib.read_recorded(file)))
        source = told.get("model.source")
        plain = Config(name=str(told.get("name")), model=ModelConfig(source=str(source)))
        rows.append(["model.source", source, "-"])
        for path, default in config_lib.leaves(plain.model_dump(mode="json")):
            if (value := told.pop(path, default)) != default:
                rows.append([path, json.dumps(value), json.dumps(default)])
        rows += [[path, json.dumps(value), "-"] for path, value in told.items()]
    return rows
