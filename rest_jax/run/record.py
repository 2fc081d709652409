"""What a run records so that its steps can be repeated and compared (`rest-jax audit`), and reading it back.

The lines of `<run>/digests.jsonl`:

{"step": N, "launch": {..}}                                how a process continues behind step N: `launch`
{"step": N, "of": "..", "prompts": "..", .., "params": ".."}    step N: the digest of its launch, and digests of arrays

Those of arrays are of the bits of all elements of the global batch and of the parameters behind the update, and are made on the
device: they depend neither on the mesh nor on the number of processes.
"""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from rest_jax.config import Config
from rest_jax.distributed import replicated
from rest_jax.errors import UserError
from rest_jax.files import store_errors
from rest_jax.models.tokenizer import DATE
from rest_jax.run.contents import MADE_OF, of_sums, sums_of_bits
from rest_jax.run.environment import cpu_model, versions
from rest_jax.run.fork import Origin, read_origin
from rest_jax.run.metrics import CONFIG_FILE, DIGESTS_FILE, FILES, METRICS_FILE, read_lines
from rest_jax.types import ScoredBatch, TrainBatch

CERTIFICATE_FILE = "audit.json"


def launch(config: Config, mesh: Mesh, made_of: Mapping[str, str], command: str) -> dict[str, Any]:
    """How this process trains: the command, the resolved config, digests of what the run is made of, the date that its chat
    template is told, versions, and the devices with all that its bits may depend on.
    """
    device = mesh.devices.flat[0]
    devices = {
        "platform": device.platform,
        "kind": cpu_model() if device.platform == "cpu" else device.device_kind,
        "mesh": dict(mesh.shape),
        "processes": jax.process_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }
    return {
        "command": command,
        "config": config.model_dump(mode="json"),
        MADE_OF: dict(made_of),
        "date": DATE.isoformat(),
        "versions": versions(),
        "devices": devices,
    }


def make_sums(mesh: Mesh) -> Callable[[Any], Any]:
    """`contents.sums_of_bits` compiled, for arrays on a mesh."""
    return jax.jit(sums_of_bits, out_shardings=replicated(mesh))


def recorded_arrays(scored: ScoredBatch, batch: TrainBatch) -> dict[str, Any]:
    """The arrays of a step whose digests are recorded, the parameters apart."""
    rollout = scored.rollout
    return {
        "prompts": (rollout.prompt, rollout.prompt_length),
        "ids": (rollout.responses, rollout.response_length),
        "sampled": (rollout.logp, rollout.entropy, rollout.gini, rollout.routes),
        "rewards": (scored.reward, scored.format_score),
        "regions": scored.region,
        "weights": batch.loss_weight,
        "advantages": batch.advantage,
    }


def step_line(sums: Mapping[str, Any], launch: Mapping[str, Any]) -> dict[str, str]:
    """The line of a step, from sums on the host."""
    return {"of": launch_digest(launch)} | {name: of_sums(tree) for name, tree in sums.items()}


def launch_digest(launch: Mapping[str, Any]) -> str:
    """The digest, in hex, of a launch."""
    return hashlib.sha256(json.dumps(launch, sort_keys=True).encode()).hexdigest()[:16]


# Of a run's files, by name and step, without times.
Lines = Mapping[str, Mapping[int, list[dict[str, Any]]]]
_MOST_SHOWN = 60  # characters of a value that differs


@dataclasses.dataclass(frozen=True)
class Recorded:
    """What a run has written."""

    folder: epath.Path
    lines: Lines
    launches: Sequence[tuple[int, dict[str, Any]]]  # the step that each began behind, `launch`
    origin: Origin | None  # of a fork

    @property
    def begin(self) -> int:
        """The step that the run began behind."""
        return 0 if self.origin is None else self.origin.step

    @property
    def last(self) -> int:
        """The last step."""
        return max(self.lines[DIGESTS_FILE])

    def launch_of(self, step: int) -> dict[str, Any]:
        """The launch that made a step."""
        return next(one for begin, one in reversed(self.launches) if begin < step)


def read_recorded(folder: epath.Path) -> Recorded:
    """What the run in a folder has written. UserError when it has recorded no step."""
    for name in (CONFIG_FILE, METRICS_FILE, DIGESTS_FILE):
        with store_errors(folder):
            if not (folder / name).is_file():
                raise UserError(
                    f"{folder}: it has no {name}; a run that recorded its digests is needed"
                )
    lines, launches = read_files(folder), []
    for step, found in lines[DIGESTS_FILE].items():
        launches += [(step, line["launch"]) for line in found if "launch" in line]
    steps = {
        step: kept
        for step, found in lines[DIGESTS_FILE].items()
        if (kept := [line for line in found if "launch" not in line])
    }
    if not steps or not launches or min(steps) <= launches[0][0]:
        raise UserError(f"{folder / DIGESTS_FILE}: no step is recorded, or no launch before it")
    return Recorded(folder, {**lines, DIGESTS_FILE: steps}, launches, read_origin(folder))


def read_files(folder: epath.Path) -> dict[str, dict[int, list[dict[str, Any]]]]:
    """The lines of a run's files by name and step, without times."""
    found: dict[str, dict[int, list[dict[str, Any]]]] = {name: {} for name in FILES}
    for name, steps in found.items():
        for line in read_lines(folder / name, missing_ok=True):
            kept = {key: value for key, value in line.items() if not key.startswith("time/")}
            steps.setdefault(kept["step"], []).append(kept)
    return found


def differences(
    there: Any, here: Any, tolerance: tuple[float, float] | None = None, path: str = ""
) -> list[str]:
    """What differs between two JSON values, a line each. `tolerance`: relative and absolute, of numbers; None: all digits."""
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        keys = dict.fromkeys([*there, *here])
        pairs = [(f"{path}.{key}".lstrip("."), there.get(key), here.get(key)) for key in keys]
    elif isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        pairs = [(f"{path}[{i}]", *pair) for i, pair in enumerate(zip(there, here, strict=True))]
    elif there == here and type(there) is type(here):
        return []
    else:
        if tolerance is not None and _close(there, here, *tolerance):
            return []
        return [f"{path}: {_short(there)} recorded, {_short(here)} here"]
    return [text for name, a, b in pairs for text in differences(a, b, tolerance, name)]


def _close(there: Any, here: Any, relative: float, absolute: float) -> bool:
    numbers = all(type(x) in (int, float) for x in (there, here))
    return numbers and math.isclose(there, here, rel_tol=relative, abs_tol=absolute)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}.."


def file_digest(path: epath.Path) -> str:
    """The SHA-256 digest, in hex, of a file."""
    with store_errors(path):
        return hashlib.sha256(path.read_bytes()).hexdigest()


def certificate_rows(certificate: Mapping[str, Any]) -> list[list[str]]:
    """The steps of a certificate of `rest-jax audit`: step, result, where it was repeated from, steps replayed."""
    names = ("step", "result", "from", "replayed")
    return [[str(one[name]) for name in names] for one in certificate["steps"]]
