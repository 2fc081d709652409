"""Reads the text of a compiled program: its computations, and every instruction that runs with the loops around it.

    module = parse(text)
    for use in uses(module): use.instruction, use.loops

XLA's own `cost_analysis` counts the body of a loop once. Here the trips of a loop are what its backend config or its condition
says; those of a loop that ends when values say so (decoding) are unknown. What the instructions do is read by `work` (FLOPs and
bytes) and `collectives`; `measure` sums it up.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_DEFINED = re.compile(r"\s*(ROOT )?%?([\w.\-]+) = ")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{\s*$")
_CALLED = re.compile(
    r"\b(?:calls|condition|body|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TYPE_BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}
# What devices exchange; a started one is called so, too: `all-gather-start`.
COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast",
    "ragged-all-to-all",
)  # fmt: skip
# They move nothing, or what they call is looked at instead.
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "opt-barrier", "async-start", "async-update", "domain", "send", "recv",
}  # fmt: skip


class ArrayType(NamedTuple):
    """Type of an array, with its memory space: 0 is the main memory (HBM), others are on the chip or on the host."""

    dtype: str
    shape: tuple[int, ...]
    space: int

    @property
    def nbytes(self) -> int:
        """Bytes without padding."""
        bits = _TYPE_BITS.get(self.dtype)
        if bits is None:
            digits = re.search(r"\d+", self.dtype)
            bits = int(digits[0]) if digits else 8
        return math.prod(self.shape) * bits // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    outputs: tuple[ArrayType, ...]
    operands: tuple[str, ...]
    text: str  # what follows the operands: attributes, metadata, backend config
    constant: str  # between the brackets of a constant or parameter

    @property
    def called(self) -> list[str]:
        """Computations that run when it does."""
        names = _CALLED.findall(self.text)
        for group in _BRANCHES.findall(self.text):
            names += re.findall(r"[\w.\-]+", group)
        return names

    @property
    def cycles(self) -> int:
        """What libtpu expects it to take; 0 where it says nothing."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.text)
        return int(found[1]) if found and len(found[1]) < 13 else 0

    @property
    def op_name(self) -> str:
        """Where it comes from in the traced program."""
        found = re.search(r'op_name="([^"]*)"', self.text)
        return found[1] if found else ""


Computation = dict[str, Instruction]  # by name; the last one is the root


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program."""

    computations: Mapping[str, Computation]
    entry: str


Trips = Callable[[Instruction], float | None]


class Use(NamedTuple):
    """An instruction that runs, and the trips of the loops around it, outermost first; None: unknown. Of loops whose trips
    values decide they may be a mean.
    """

    instruction: Instruction
    computation: Computation
    loops: tuple[float | None, ...]
    fused: bool
    asynchronous: bool  # started by an async-start, which others follow before it is done

    @property
    def trips(self) -> float:
        """How often it runs, an unknown loop taken as one trip."""
        return math.prod(n for n in self.loops if n is not None)


def parse(text: str) -> Module:
    """The module of XLA's text."""
    computations: dict[str, Computation] = {}
    current, entry = None, ""
    for line in text.splitlines():
        if current is None:
            if (found := _COMPUTATION.match(line)) and not line.startswith("HloModule"):
                current = computations.setdefault(found[2], {})
                entry = found[2] if found[1] else entry
        elif line.startswith("}"):
            current = None
        elif found := _DEFINED.match(line):
            current[found[2]] = _instruction(found[2], line[found.end() :])
    return Module(computations, entry)


def _instruction(name: str, rest: str) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opcode, _, _ = rest[end:].lstrip().partition("(")
    start = rest.index("(", end)
    stop = _closing(rest, start)
    inside = rest[start + 1 : stop]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(
        name, opcode, _arrays(rest[:end]), operands, rest[stop + 1 :], "" if operands else inside
    )


def _arrays(text: str) -> tuple[ArrayType, ...]:
    found = []
    for dtype, dims, layout in _ARRAY.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        shape = tuple(int(n) for n in dims.split(",") if n)
        found.append(ArrayType(dtype, shape, int(space[1]) if space else 0))
    return tuple(found)


def _closing(text: str, start: int) -> int:
    """Index of the bracket that closes the one at `start`."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, start):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    raise ValueError(f"no closing bracket: {text[:80]}")


def uses(module: Module, told: Trips = lambda loop: None) -> Iterator[Use]:
    """Every instruction that runs, each once for every way it is reached. `told`: the trips of a loop that values decide."""

    def trips(loop: Instruction) -> float | None:
        known = loop_trips(module, loop)
        return told(loop) if known is None else known

    yield from _uses(module, module.entry, ((), ()), trips)


def _uses(
    module: Module, name: str, path: tuple[tuple[float | None, ...], tuple[str, ...]], trips: Trips
) -> Iterator[Use]:
    computation, (loops, callers) = module.computations[name], path
    for instruction in computation.values():
        yield Use(instruction, computation, loops, "fusion" in callers, "async-start" in callers)
        inner = loops
        if instruction.opcode == "while":
            inner = (*loops, trips(instruction))
        if instruction.opcode in _APPLIES:
            continue  # what they apply to single elements is part of them
        for called in instruction.called:
            yield from _uses(module, called, (inner, (*callers, instruction.opcode)), trips)


_APPLIES = {"reduce", "reduce-window", "scatter", "select-and-scatter", "sort", "map", *COLLECTIVES}
_APPLIES |= {f"{kind}-start" for kind in COLLECTIVES}


def loop_trips(module: Module, loop: Instruction) -> int | None:
    """Trips of a `while`: known to XLA, or its counter is compared with a constant. None: values decide."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.text)
    if known:
        return int(known[1])
    found = re.search(r"\bcondition=%?([\w.\-]+)", loop.text)
    condition = module.computations[found[1]] if found else {}
    if len(condition) > 6:
        return None
    root = list(condition.values())[-1] if condition else None
    if root is None or root.opcode not in ("compare", "fusion"):
        return None
    limits = [
        int(i.constant)
        for i in condition.values()
        if i.opcode == "constant" and re.fullmatch(r"\d+", i.constant)
    ]
    compares = "direction=LT" in root.text or any(
        "direction=LT" in i.text for c in root.called for i in module.computations[c].values()
    )
    return limits[0] if len(limits) == 1 and compares else None
