"""What lies on a device while a program runs, by name, and the check of it when a run starts.

Bytes are those of one device. A program needs its arguments, its outputs (less those that take the place of donated arguments),
its temporaries and its code; beside them lies what other programs have left.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from rest_jax.distributed import activate, platform
from rest_jax.errors import UserError
from rest_jax.planning.programs import Program, device_bytes

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# libtpu has two sentences for it.
_OUT_OF_MEMORY = re.compile(
    r"(?:[Uu]sed |HLO temporaries \()([\d.]+)([KMGT])\)?(?: of| exceeds available)"
)


@dataclasses.dataclass(frozen=True)
class Usage:
    """Memory of one device while a program runs: bytes by name."""

    name: str
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.parts.values())


@dataclasses.dataclass(frozen=True)
class Allocation:
    """What XLA says of a compiled program, in bytes of one device."""

    arguments: int
    outputs: int
    donated: int
    temporaries: int
    code: int

    @classmethod
    def of(cls, compiled: Any) -> "Allocation":
        """Of a `jax.stages.Compiled`."""
        found = compiled.memory_analysis()
        return cls(
            found.argument_size_in_bytes,
            found.output_size_in_bytes,
            found.alias_size_in_bytes,
            found.temp_size_in_bytes,
            found.generated_code_size_in_bytes,
        )


def compile_or_measure(lowered: jax.stages.Lowered) -> Any:
    """The compiled program, or the bytes that it would need where XLA refuses it for want of memory."""
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        found = _OUT_OF_MEMORY.search(str(error))
        if not found:
            raise
        return int(float(found[1]) * _UNITS[found[2]])


def usage(program: Program, allocation: Allocation | int) -> Usage:
    """Names for the memory of a program; `allocation` an integer: all that XLA would need, and has not got."""
    parts = {name: device_bytes(tree) for name, tree in program.arguments.items()}
    known = sum(parts.values())
    beside = {name: device_bytes(tree) for name, tree in program.resident.items()}
    if isinstance(allocation, int):
        parts["temporaries"] = max(0, allocation - known)
    else:
        parts["temporaries"] = allocation.temporaries + allocation.code
        parts["outputs"] = max(0, allocation.outputs - allocation.donated)
        parts["other arguments"] = max(0, allocation.arguments - known)
    return Usage(program.name, {k: v for k, v in (parts | beside).items() if v})


def check_memory(make_programs: Callable[[], Mapping[str, Program]], mesh: Mesh) -> None:
    """UserError with the numbers for a program that needs more memory than a device of the mesh has.

    What it compiles is in XLA's cache when the run asks for it. On CPU it does nothing.
    """
    limit = memory_limit(mesh)
    if limit is None:
        return
    for program in make_programs().values():
        with activate(mesh):
            compiled = compile_or_measure(program.lower())
        found = compiled if isinstance(compiled, int) else Allocation.of(compiled)
        refuse_if_over(usage(program, found), limit)


def memory_limit(mesh: Mesh) -> int | None:
    """Bytes that programs may use on a device of this process; None on CPU, and where the runtime does not say."""
    if platform(mesh) == "cpu":
        return None
    return (mesh.local_devices[0].memory_stats() or {}).get("bytes_limit")


def remedy(program: str) -> str:
    """What lowers the memory that a program needs."""
    if program in ("prepare", "apply"):
        return "raise mesh.fsdp or mesh.tensor"
    if program.endswith(("update", "logprobs")):
        return "lower train.max_tokens_per_microbatch or raise mesh.fsdp or mesh.tensor"
    return "lower rollout.decode_slots or rollout.cache_tokens, or raise mesh.tensor"


def refuse_if_over(needed: Usage, limit: int) -> None:
    """UserError with what needs how much and the key to change, where a program needs more than `limit` bytes."""
    if needed.total <= limit:
        return
    largest = sorted(needed.parts.items(), key=lambda item: -item[1])
    parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in largest)
    raise UserError(
        f"memory: {needed.name} needs {needed.total / 2**30:.2f} GiB on each device, which has {limit / 2**30:.2f} "
        f"({parts}); {remedy(needed.name)}; `rest-jax plan` finds the smallest change"
    )
