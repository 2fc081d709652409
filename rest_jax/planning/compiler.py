"""The process that compiles for absent hardware: python -m rest_jax.planning.compiler REQUEST RESULT.

It reads a request (JSON: config, whether supervised, topology, lengths), lowers the programs of `planning.programs`, compiles
them or finds them in the cache, measures their texts and writes the Plan (JSON). It is a process of its own because jax reads
its platform and XLA's flags once. A compiled program's text and memory are kept in the user's cache folder, under a digest of
what XLA was given.
"""

import dataclasses
import gzip
import hashlib
import importlib.metadata
import json
import os
import pathlib
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rest_jax.errors import UserError
from rest_jax.planning import cache, estimate, fit, hlo, topology
from rest_jax.planning.estimate import Calls, Cost
from rest_jax.planning.measure import Measured, Rates, Sizes, Work, measure
from rest_jax.run.environment import LIBTPU_VARIABLE, end_when_closed
from rest_jax.texts import print_text

PACKAGES = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin")


def plan_config(request: Mapping[str, Any], dump: pathlib.Path) -> dict[str, Any]:
    """The plan of one config: JSON with memory, programs, and the seconds of a step. UserError for a bad config or mesh."""
    from rest_jax.planning import memory, programs
    from rest_jax.planning.setup import Lengths

    where = topology.parse(request["topology"])
    devices = topology.devices(where)
    setup, longest = make_setup(request, where, devices)
    wanted = programs.memory_programs(setup, longest)
    compiled = {
        name: compile_program(program, setup, where, dump) for name, program in wanted.items()
    }
    usages = [memory.usage(wanted[name], found.allocation) for name, found in compiled.items()]
    result = {
        "command": "sft" if request["supervised"] else "train",
        "topology": where.name,
        "devices": where.size,
        "device_kind": devices[0].device_kind,
        "mesh": {axis: int(n) for axis, n in setup.policy.mesh.shape.items()},
        "packages": versions(),
        "memory": {
            "limit": where.chip.memory,
            "programs": {u.name: dict(u.parts) | {"total": u.total} for u in usages},
        },
    }
    if not request["memory_only"]:
        lengths = Lengths(*(request["lengths"] or longest))
        called = programs.step_programs(setup, lengths)
        # Those of a step with the longest groups are compiled.
        timed = {
            name: compiled[name]
            if lengths == longest
            else compile_program(program, setup, where, dump)
            for name, program in called.items()
        }
        result |= describe_speed((setup, lengths), called, timed, where)
    return result


def make_setup(
    request: Mapping[str, Any], where: topology.Topology, devices: Sequence[Any]
) -> tuple[Any, Any]:
    """(setup, lengths of the longest groups) of a request. UserError for a config that its command refuses."""
    from rest_jax import train
    from rest_jax.config import Config, check_command
    from rest_jax.planning import setup
    from rest_jax.rl.balance import check_experts

    config, supervised = Config.model_validate(request["config"]), request["supervised"]
    if config.mesh.data is None and where.nodes > 1:
        # Those of a topology do not say, as a run's do, on which node they are.
        config = fit.with_values(config, {"mesh.data": where.nodes})
    check_command(config, supervised)
    made = setup.abstract_setup(config, devices, None if supervised else train.step_config)
    if not supervised:
        train.check_sizes(config, made.policy)
    check_experts(config, made.policy.config)
    return made, setup.longest(config, supervised)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What is kept of a compiled program; `allocation` an integer: XLA refused it, that is what it needs."""

    allocation: Any
    text: str
    seconds: float  # that compiling took


def compile_program(
    program: Any, setup: Any, where: topology.Topology, dump: pathlib.Path
) -> Compiled:
    """Compiles a program, or takes it from the cache."""
    from rest_jax.distributed import activate
    from rest_jax.planning.memory import Allocation, compile_or_measure

    with activate(setup.policy.mesh):
        lowered = program.lower()
    ids = [device.id for device in setup.policy.mesh.devices.flat]
    given = json.dumps([lowered.as_text(), where.name, ids, compiler_flags(where), versions()])
    name = f"{hashlib.sha256(given.encode()).hexdigest()}.json.gz"
    if (packed := cache.read(name)) is not None:
        kept = json.loads(gzip.decompress(packed))
        found = kept["allocation"]
        found = found if isinstance(found, int) else Allocation(**found)
        return Compiled(found, kept["text"], kept["seconds"])
    started = time.monotonic()
    compiled = compile_or_measure(lowered)
    seconds = time.monotonic() - started
    # on the stderr of the command
    print_text(f"plan: {program.name} compiled in {seconds:.0f} s")
    if isinstance(compiled, int):
        found, text = Compiled(compiled, "", seconds), ""
    else:
        text = _text(compiled, dump)
        found = Compiled(Allocation.of(compiled), text, seconds)
    for file in dump.rglob("*.txt"):
        file.unlink()
    cache.write(name, gzip.compress(json.dumps(dataclasses.asdict(found)).encode()))
    return found


def _text(compiled: Any, dump: pathlib.Path) -> str:
    """XLA's text of a program. Some that libtpu makes it can write to a file only."""
    try:
        return compiled.as_text()
    except Exception as error:
        written = sorted(dump.glob("*after_codegen.txt"), key=lambda f: f.stat().st_mtime)
        if not written:
            raise UserError(f"plan: XLA does not show a program: {error}") from error
        return written[-1].read_text()


def describe_speed(
    made: tuple[Any, Any],
    called: Mapping[str, Any],
    timed: Mapping[str, Compiled],
    where: topology.Topology,
) -> dict[str, Any]:
    """What the programs of a step do and how long it takes, as JSON."""
    from rest_jax.planning import programs
    from rest_jax.run import throughput

    setup, lengths = made
    mesh, model = setup.policy.mesh, setup.policy.config
    peak = throughput.mesh_peak_flops(mesh.devices.flat, model.dtype)
    rates = Rates((peak or 0) / where.size, where.chip.memory_bandwidth or 0)
    # The chips of a TPU slice are neighbours whatever their host; what slices send to one another is marked as such.
    hosts = programs.hosts(mesh) if where.chip.platform == "gpu" else None
    measured = {
        name: measure(
            hlo.parse(c.text),
            Sizes(model.n_layers, model.n_experts, called[name].trips),
            rates,
            hosts,
        )
        for name, c in timed.items()
        if c.text
    }
    calls = count_calls(setup, lengths, timed)
    described = {
        "lengths": dict(lengths._asdict()),
        "programs": {
            name: _describe_program(m) | {"compile_seconds": round(timed[name].seconds, 1)}
            for name, m in measured.items()
        },
        "calls": {name: dataclasses.asdict(c) for name, c in calls.items()},
    }
    if len(measured) < len(timed) or where.chip.memory_bandwidth is None:
        return described | {"step": None}
    costs = {name: estimate.cost(m, where.chip) for name, m in measured.items()}
    return described | {"step": _describe_step(setup, lengths, costs, calls)}


# Programs of a step that sample; the others are the update's.
_SAMPLING = ("cast", "prefill", "decode")


def _describe_step(
    setup: Any, lengths: Any, costs: Mapping[str, Cost], calls: Mapping[str, Calls]
) -> dict[str, Any]:
    """Seconds, tokens a second and utilisation of a step, as JSON."""
    import numpy as np

    from rest_jax.run import throughput

    mesh, model = setup.policy.mesh, setup.policy.config
    parts = estimate.step_seconds(costs, calls)
    seconds = {name: sum(inner.values()) for name, inner in parts.items()}
    rollout = sum(seconds.get(name, 0.0) for name in _SAMPLING)
    total = sum(seconds.values())
    prompts = np.full(setup.groups, lengths.prompt)
    responses = np.full((setup.groups, setup.group_size), lengths.response)
    rate = float(responses.sum()) / total
    step = {
        "seconds": total,
        "update_seconds": total - rollout,
        "rollout_seconds": rollout,
        "tokens_per_second": rate,
        "tokens_per_second_per_device": rate / mesh.size,
        "parts": parts,
        "costs": {
            name: {"call": sum(c.call.values()), "token": sum(c.token.values())}
            for name, c in costs.items()
        },
    }
    if peak := throughput.mesh_peak_flops(mesh.devices.flat, model.dtype):
        work = throughput.update_flops(model, prompts, responses)
        step["update_mfu"] = work / (total - rollout) / peak
        if rollout:
            work = throughput.rollout_flops(model, prompts, responses)
            step["rollout_mfu"] = work / rollout / peak
    return step


def count_calls(setup: Any, lengths: Any, names: Iterable[str]) -> dict[str, Calls]:
    """How often a step calls the programs of these names when all groups are active and as long as `lengths`."""
    from rest_jax.planning import programs
    from rest_jax.planning.setup import all_groups, micro_batches

    update, forward = (
        len(micro) for micro in (micro_batches(setup, lengths), all_groups(setup, lengths))
    )
    calls = {
        "logprobs": Calls(forward),
        "reference logprobs": Calls(forward),
        "prepare": Calls(1),
        "update": Calls(setup.updates * update),
        "apply": Calls(setup.updates),
    }
    if setup.step is not None:
        rollout = programs.training_rollout(setup, lengths)
        rounds = -(-rollout.groups * setup.group_size // rollout.sizes.slots)
        page = rollout.settings.page
        prompts = rollout.prefill_width // (page * -(-lengths.prompt // page))  # of a row
        tokens = rounds * lengths.response
        calls |= {
            "cast": Calls(1),
            "prefill": Calls(-(-rollout.groups // prompts)),
            "decode": Calls(-(-tokens // page), tokens),
        }
    return {name: calls[name] for name in names}


def _describe_program(measured: Measured) -> dict[str, Any]:
    """Totals, and every kind of collective, as JSON."""
    sums = (sum(parts.values(), Work()) for parts in (measured.once, measured.each))
    call, token = ({"flops": work.flops, "bytes": work.nbytes} for work in sums)
    collectives = [c._asdict() for c in measured.collectives]
    return {"call": call, "token": token, "collectives": collectives}


def compiler_flags(where: topology.Topology) -> dict[str, str]:
    """Flags of the platform's compiler in this process: XLA_FLAGS has those of GPUs (`xla_gpu_...`)."""
    variable = {"tpu": LIBTPU_VARIABLE, "gpu": "XLA_FLAGS"}.get(where.chip.platform, "")
    words = (word.lstrip("-").partition("=") for word in os.environ.get(variable, "").split())
    return {name: value for name, _, value in words if variable != "XLA_FLAGS" or "gpu" in name}


def versions() -> dict[str, str]:
    """Of the packages that decide what a program is compiled to."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def main() -> int:
    """Reads the request, writes the result or the one line that says why there is none."""
    request, result = (pathlib.Path(word) for word in sys.argv[1:3])
    dump = pathlib.Path(os.environ["REST_JAX_PLAN_DUMP"])
    try:
        found = plan_config(json.loads(request.read_text()), dump)
    except UserError as error:
        found = {"error": str(error)}
    result.write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    end_when_closed(0)
    sys.exit(main())
