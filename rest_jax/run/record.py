"""What a run records so that its steps can be repeated and compared (`rest-jax audit`), and reading it back.

The lines of `<run>/digests.jsonl`:

{"step": N, "launch": {..}}                                how a process continues behind step N: `launch`
{"step": N, "of": "..", "prompts": "..", .., "params": ".."}    step N: the digest of its launch, and digests of arrays

Those of arrays are of the bits of all elements of the global batch and of the parameters behind the update, and are made on the
device: they depend neither on the mesh nor on the number of processes.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import pydantic
from etils import epath
from jax.sharding import Mesh

from rest_jax import config as config_lib
from rest_jax.config import Config, ConfigError
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
_MOST_STEPS = 5  # that a line names


class _Rollout(pydantic.BaseModel):
    staleness: int


class _Recorded(pydantic.BaseModel):
    rollout: _Rollout


class _Devices(pydantic.BaseModel):
    kind: str
    mesh: dict[str, int]


class _Launch(pydantic.BaseModel):
    """What is read of a `launch`."""

    command: Literal["train", "sft"]
    config: _Recorded
    made_of: dict[str, str]
    versions: dict[str, str]
    devices: _Devices


@dataclasses.dataclass(frozen=True)
class Recorded:
    """What a run has written."""

    folder: epath.Path
    lines: Lines
    launches: Sequence[tuple[int, dict[str, Any]]]  # the step that each began behind, `launch`
    origin: Origin | None  # of a fork
    unordered: Sequence[str] = ()  # the files whose steps do not ascend

    @property
    def begin(self) -> int:
        """The step that the run began behind."""
        return 0 if self.origin is None else self.origin.step

    @property
    def steps(self) -> list[int]:
        """Those that have digests."""
        return sorted(step for step in self.lines[DIGESTS_FILE] if step > self.begin)

    @property
    def last(self) -> int:
        """The last step."""
        return max(self.lines[DIGESTS_FILE])

    def launch_of(self, step: int) -> dict[str, Any]:
        """The launch that made a step."""
        return next(one for begin, one in reversed(self.launches) if begin < step)


def read_recorded(folder: epath.Path) -> Recorded:
    """What the run in a folder has written. UserError when it has recorded no step, or what no run records."""
    for name in (CONFIG_FILE, METRICS_FILE, DIGESTS_FILE):
        with store_errors(folder):
            if not (folder / name).is_file():
                raise UserError(
                    f"{folder}: it has no {name}; a run that recorded its digests is needed"
                )
    files = _read(folder)
    for number, line in enumerate(files[DIGESTS_FILE], start=1):
        if fault := _fault(line):
            raise UserError(f"{folder / DIGESTS_FILE}, line {number}: no run writes that: {fault}")
    unordered = [
        name
        for name, found in files.items()
        if any(b["step"] < a["step"] for a, b in itertools.pairwise(found))
    ]
    launches = [(x["step"], x["launch"]) for x in files[DIGESTS_FILE] if "launch" in x]
    files[DIGESTS_FILE] = [line for line in files[DIGESTS_FILE] if "launch" not in line]
    lines, origin = _by_step(files), read_origin(folder)
    found = Recorded(folder, lines, launches, origin, unordered)
    if not found.steps or not launches or found.steps[0] <= launches[0][0]:
        raise UserError(f"{folder / DIGESTS_FILE}: no step is recorded, or no launch before it")
    return found


def _fault(line: Mapping[str, Any]) -> str:
    """What a line of the digests lacks; "" for a launch or the digests of a step."""
    if "launch" not in line:
        texts = {name for name, value in line.items() if isinstance(value, str)}
        complete = {"of", "params"} <= texts and texts | {"step"} == line.keys()
        return "" if complete else "neither a launch nor the digests of a step"
    try:
        _Launch.model_validate(line["launch"])
        config_lib.from_overrides(line["launch"]["config"])
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        return f"{'.'.join(map(str, ('launch', *first['loc'])))}: {first['msg']}"
    except ConfigError as error:
        return f"launch: {error}"
    return ""


def line_faults(recorded: Recorded) -> list[str]:
    """Why its lines cannot be all that a run has written, and no more: steps that do not ascend, steps that are missing, lines of
    others than those that have digests.
    """
    steps, begin, last = set(recorded.steps), recorded.begin, recorded.last
    found = [f"{name}: its steps do not ascend" for name in recorded.unordered]
    if missing := last - begin - len(steps):
        found.append(f"{DIGESTS_FILE}: {missing} of the steps {begin + 1} to {last} are missing")
    if unwritten := steps - recorded.lines[METRICS_FILE].keys():
        found.append(f"{METRICS_FILE}: no line of step {_some(unwritten)}")
    own = {name: set(lines) - {begin} for name, lines in recorded.lines.items()}
    own[DIGESTS_FILE] = set(recorded.lines[DIGESTS_FILE])
    own[DIGESTS_FILE] |= {behind for behind, _ in recorded.launches if behind != begin}
    for name, there in own.items():
        if extra := there - steps:
            # The metrics of a step are written before its digests.
            killed = name != DIGESTS_FILE and extra == {last + 1}
            remedy = "; was the run killed? resume it first" if killed else ""
            found.append(f"{name}: lines of step {_some(extra)}, which is no recorded step{remedy}")
    return found


def _some(steps: Iterable[int]) -> str:
    """The first of these steps."""
    shown = sorted(steps)
    return ", ".join(map(str, shown[:_MOST_STEPS])) + (", .." if shown[_MOST_STEPS:] else "")


def read_files(folder: epath.Path) -> dict[str, dict[int, list[dict[str, Any]]]]:
    """The lines of a run's files by name and step, without times."""
    return _by_step(_read(folder))


def _read(folder: epath.Path) -> dict[str, list[dict[str, Any]]]:
    """The lines of a run's files by name, without times."""
    return {
        name: [
            {key: value for key, value in line.items() if not key.startswith("time/")}
            for line in read_lines(folder / name, missing_ok=True)
        ]
        for name in FILES
    }


def _by_step(
    files: Mapping[str, Sequence[dict[str, Any]]],
) -> dict[str, dict[int, list[dict[str, Any]]]]:
    found: dict[str, dict[int, list[dict[str, Any]]]] = {name: {} for name in files}
    for name, lines in files.items():
        for line in lines:
            found[name].setdefault(line["step"], []).append(line)
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


class _Step(pydantic.BaseModel):
    step: int
    result: str
    base: str = pydantic.Field(alias="from")
    replayed: int
    checkpoint: str | None


class _Versions(pydantic.BaseModel):
    jaxlib: str


class _ComputedBy(pydantic.BaseModel):
    versions: _Versions
    devices: _Devices


class _Certificate(pydantic.BaseModel):
    """What is read of a certificate."""

    result: str
    comparison: str
    seed: int
    recorded: int
    metrics: str
    steps: list[_Step]
    repeated_by: _ComputedBy


def read_certificate(folder: epath.Path) -> dict[str, Any] | None:
    """The newest certificate of the run in a folder; None where there is none, or one that is cut or of another form."""
    with store_errors(folder):
        path = folder / CERTIFICATE_FILE
        text = path.read_bytes() if path.is_file() else b""
    try:
        _Certificate.model_validate_json(text)
    except pydantic.ValidationError:
        return None
    return json.loads(text)


def certificate_rows(certificate: Mapping[str, Any]) -> list[list[str]]:
    """The steps of a certificate of `rest-jax audit`: step, result, where it was repeated from, steps replayed."""
    names = ("step", "result", "from", "replayed")
    return [[str(one[name]) for name in names] for one in certificate["steps"]]
