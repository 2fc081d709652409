"""Reads the text of a compiled program: FLOPs, bytes, libtpu's cycles and collectives, each times the trips of its loops.

    module = parse(text)
    for use in uses(module): use.instruction, use.loops          every instruction that runs, with the loops around it
    measure(module, layers)                                      -> Measured, sums by part of the model

XLA's own `cost_analysis` counts the body of a loop once. Here the trips of a loop are what its backend config or its condition
says; those of a loop that ends when values say so (decoding) are unknown: what is in it is kept apart, for each trip.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_DEFINED = re.compile(r"\s*(ROOT )?%?([\w.\-]+) = ")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{\s*$")
_CALLED = re.compile(
    r"\b(?:calls|condition|body|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TYPE_BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}
COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast",
    "ragged-all-to-all",
)  # fmt: skip
# They move nothing, or what they call is looked at instead.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "opt-barrier", "async-start", "async-update", "domain",
}  # fmt: skip
# Custom calls by which libtpu notes something.
_MARKS = (
    "AllocateBuffer", "AssumeGatherIndicesInBound", "AsyncCollectiveStart", "AsyncCollectiveDone", "ConcatBitcast",
    "GatherScatterIndicesBitpacked",
)  # fmt: skip
# Parts of the model, found in the name of an operation; the first that occurs counts.
PARTS = (
    "vocabulary", "head", "draw", "insert", "resize", "optimizer", "attention", "moe", "mlp", "norm", "trunk",
)  # fmt: skip


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


class Use(NamedTuple):
    """An instruction that runs, and the trips of the loops around it, outermost first; None: unknown."""

    instruction: Instruction
    computation: Computation
    loops: tuple[int | None, ...]
    fused: bool
    asynchronous: bool  # started by an async-start, which others follow before it is done

    @property
    def trips(self) -> int:
        """How often it runs, an unknown loop taken as one trip."""
        return math.prod(n for n in self.loops if n is not None)


class Collective(NamedTuple):
    """What one kind of collective moves in one place of the program, for one device."""

    kind: str
    place: str  # "once", "layer loop", "loop of 16"; in a loop of unknown trips "token loop"
    part: str
    group: int  # devices that take part together
    crosses: bool  # whether such a group has devices of several hosts
    overlaps: bool  # whether the program computes meanwhile
    count: int  # executions; in a loop of unknown trips, those of one trip
    nbytes: int  # that a device sends in all of them


@dataclasses.dataclass(frozen=True)
class Work:
    """Of one part, all executions together; in a loop of unknown trips, those of one trip."""

    flops: float = 0.0  # of matrix products
    nbytes: float = 0.0  # read from and written to the main memory
    cycles: float = 0.0  # libtpu's estimate
    limit: float = 0.0  # seconds at the peak rates of the chip, instruction by instruction

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.flops + other.flops,
            self.nbytes + other.nbytes,
            self.cycles + other.cycles,
            self.limit + other.limit,
        )


@dataclasses.dataclass(frozen=True)
class Measured:
    """Sums over a program by part of the model: outside of loops of unknown trips, and for one trip of them."""

    once: Mapping[str, Work]
    each: Mapping[str, Work]
    collectives: tuple[Collective, ...]


class Rates(NamedTuple):
    """Of a device: FLOP/s of matrix products, bytes/s of its main memory, Hz of its clock; 0: unknown."""

    flops: float
    memory: float
    clock: float = 0.0


UNKNOWN = Rates(0, 0)


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


def uses(module: Module) -> Iterator[Use]:
    """Every instruction that runs, each once for every way it is reached."""
    yield from _uses(module, module.entry, (), ())


def _uses(
    module: Module, name: str, loops: tuple[int | None, ...], callers: tuple[str, ...]
) -> Iterator[Use]:
    computation = module.computations[name]
    for instruction in computation.values():
        yield Use(instruction, computation, loops, "fusion" in callers, "async-start" in callers)
        inner = loops
        if instruction.opcode == "while":
            inner = (*loops, loop_trips(module, instruction))
        if instruction.opcode in _APPLIES:
            continue  # what they apply to single elements is part of them
        for called in instruction.called:
            yield from _uses(module, called, inner, (*callers, instruction.opcode))


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


def part_of(op_name: str) -> str:
    """The part of the model that an operation belongs to."""
    words = re.findall(r"\w+", op_name)
    for part in PARTS:
        if any(part == word or word.endswith(f"_{part}") for word in words):
            return part
    return "other"


def measure(
    module: Module,
    layers: int,
    rates: Rates = UNKNOWN,
    hosts: np.ndarray | None = None,
    experts: int = 0,
) -> Measured:
    """Sums over a program. `layers`: trips of the loop over layers; `hosts` int [devices]: the host of each device, in the
    order of the mesh; `experts` of a layer, on all devices: rows are taken to be spread evenly over them.
    """
    sums: tuple[dict[str, Work], dict[str, Work]] = ({}, {})
    moved: dict[tuple, Collective] = {}
    seen: set[tuple[str, tuple]] = set()
    for use in uses(module):
        part, unknown = part_of(use.instruction.op_name), None in use.loops
        kind = use.instruction.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            channel = re.search(r"channel_id=(\d+)", use.instruction.text)
            # libtpu repeats one that it spreads over several fusions; those of a shard_map all have channel 1
            spread = channel is not None and (use.fused or use.asynchronous)
            key = channel[1] if channel and spread else use.instruction.name, use.loops
            if key not in seen:
                seen.add(key)
                one = _collective(use, kind, layers, hosts)
                same = moved.get(one[:6], one._replace(count=0, nbytes=0))
                moved[one[:6]] = one._replace(
                    count=same.count + one.count, nbytes=same.nbytes + one.nbytes
                )
            continue
        work = _work(module, use, rates, experts)
        if work is not None:
            into = sums[unknown]
            into[part] = into.get(part, Work()) + work
    return Measured(sums[0], sums[1], tuple(moved.values()))


def _work(module: Module, use: Use, rates: Rates, experts: int) -> Work | None:
    """Of an instruction outside of fusions, with what it fuses. libtpu gives no cycles for kernels: theirs are those that the
    peak rates allow.
    """
    instruction = use.instruction
    if use.fused or instruction.opcode in _FREE or instruction.opcode.endswith("-done"):
        return None
    flops = instruction_flops(module, instruction, use.computation)
    nbytes = instruction_bytes(module, instruction, use.computation)
    kernel = f'custom_call_target="{_KERNEL}"' in instruction.text
    if kernel and (grouped := _grouped_product(instruction, use.computation)):
        flops = grouped[0] * (grouped[1] / experts if experts else 1)
    limit = 0.0
    if rates.flops and rates.memory:
        limit = max(flops / rates.flops, nbytes / rates.memory)
    cycles = limit * rates.clock if kernel else float(instruction.cycles)
    n = use.trips
    return Work(n * flops, n * nbytes, n * cycles, n * limit)


_KERNEL = "tpu_custom_call"


def _grouped_product(instruction: Instruction, where: Computation) -> tuple[float, int] | None:
    """FLOPs of a kernel that multiplies rows by the matrix of their group (libtpu's `ragged-dot`), or sums their outer products
    by group (`tgmm`), if every row is in a group; and the number of groups. None: another kernel.
    """
    if len(instruction.operands) < 2:
        return None
    a, b = (where[name].outputs[0].shape for name in instruction.operands[-2:])
    out = instruction.outputs[0].shape
    if (len(a), len(b), len(out)) == (2, 3, 2):  # [r I] x [E I O] -> [r O]
        return 2.0 * math.prod(a) * out[1], b[0]
    if (len(a), len(b), len(out)) == (2, 2, 3):  # [r I], [r O] -> [E I O]
        return 2.0 * math.prod(a) * b[1], out[0]
    return None


def instruction_flops(module: Module, instruction: Instruction, where: Computation) -> float:
    """FLOPs of the matrix products of an instruction and of what it fuses; a multiply-add is 2."""
    total = 0.0
    if instruction.opcode == "fusion":
        for called in instruction.called:
            inner = module.computations[called]
            total += sum(instruction_flops(module, i, inner) for i in inner.values())
    elif instruction.opcode == "dot":
        lhs = where[instruction.operands[0]].outputs[0].shape
        found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.text)
        contracted = [int(n) for n in found[1].split(",") if n] if found else []
        total = (
            2.0 * math.prod(instruction.outputs[0].shape) * math.prod(lhs[d] for d in contracted)
        )
    elif instruction.opcode == "convolution":
        total = _convolution_flops(instruction, where)
    elif instruction.opcode == "custom-call":
        total = _library_flops(instruction, where)
    return total


def _library_flops(instruction: Instruction, where: Computation) -> float:
    """Of a matrix product that a library computes (cuBLAS, oneDNN): the contracted dimensions stand in its config."""
    found = re.search(r'"lhs_contracting_dimensions":\["?([\d",]*)\]', instruction.text)
    if not found or not instruction.operands or not instruction.outputs:
        return 0.0
    lhs = where[instruction.operands[0]].outputs[0].shape
    contracted = [int(n) for n in re.findall(r"\d+", found[1])]
    return 2.0 * math.prod(instruction.outputs[0].shape) * math.prod(lhs[d] for d in contracted)


def _convolution_flops(instruction: Instruction, where: Computation) -> float:
    """2 x outputs x input features x the kernel positions that meet the input: TPUs write every product so, and a batch of
    products as a window of which one position a batch meets it.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.text)
    if not labels:
        return 0.0
    lhs, kernel = (where[name].outputs[0].shape for name in instruction.operands[:2])
    output = instruction.outputs[0].shape
    sizes = [
        dict(zip(axes, shape, strict=True))
        for axes, shape in zip(labels.groups(), (lhs, kernel, output), strict=True)
    ]
    window = re.search(r"window=\{([^}]*)\}", instruction.text)
    fields = dict(f.split("=") for f in window[1].split()) if window else {}
    pairs = 1.0
    for axis, label in enumerate(sorted(c for c in labels[3] if c.isdigit())):
        pairs *= _window_pairs(sizes[0][label], sizes[1][label], sizes[2][label], fields, axis)
    return 2.0 * sizes[2]["b"] * sizes[2]["f"] * sizes[1]["i"] * pairs


def _window_pairs(size: int, kernel: int, output: int, fields: Mapping[str, str], axis: int) -> int:
    """Along one axis of a convolution, the pairs of output and kernel position that meet an element of the input."""

    def field(name: str, otherwise: str) -> str:
        return fields[name].split("x")[axis] if name in fields else otherwise

    low = int(field("pad", "0_0").split("_")[0])
    stride, dilate = int(field("stride", "1")), int(field("lhs_dilate", "1"))
    spread = int(field("rhs_dilate", "1"))
    at = np.arange(output)[:, None] * stride + np.arange(kernel)[None] * spread - low
    return int(np.sum((at >= 0) & (at % dilate == 0) & (at // dilate < size)))


def instruction_bytes(module: Module, instruction: Instruction, where: Computation) -> float:
    """Bytes that an instruction reads from and writes to the main memory; of an array of which it takes or changes a part,
    those of the part.
    """
    opcode, outputs = instruction.opcode, instruction.outputs
    if any(f'custom_call_target="{name}"' in instruction.text for name in _MARKS):
        return 0.0
    if opcode == "copy-start":  # (destination, source, context)
        outputs = outputs[:1]
    elif opcode == "slice-start":  # (source, destination, context)
        outputs = outputs[1:2]
    written = sum(a.nbytes for a in outputs if a.space == 0)
    read = [_in_main_memory(where, name) for name in instruction.operands]
    if opcode == "fusion":
        inner = module.computations[instruction.called[0]]
        for i, name in enumerate(_parameters(inner)):
            part = _part_read(module, inner, name)
            read[i] = read[i] if part is None else min(read[i], part)
        written = sum(_written(module, inner, name) for name in _results(inner))
    elif opcode in _TAKES:
        read[0] = min(read[0], sum(a.nbytes for a in outputs))
    elif opcode in _CHANGES:
        written, read[0] = _in_main_memory(where, instruction.operands[_CHANGES[opcode]]), 0
    return float(written + sum(read))


_TAKES = ("dynamic-slice", "slice", "gather", "slice-start")
# They change a part of their first operand, in place; the number of the operand that is put there.
_CHANGES = {"dynamic-update-slice": 1, "scatter": 2}


def _in_main_memory(where: Computation, name: str) -> int:
    found = where.get(name)
    return sum(a.nbytes for a in found.outputs if a.space == 0) if found else 0


def _parameters(inner: Computation) -> list[str]:
    """Names of the parameters of a computation, in their order."""
    found = [i for i in inner.values() if i.opcode == "parameter"]
    return [i.name for i in sorted(found, key=lambda i: int(i.constant))]


def _part_read(module: Module, inner: Computation, name: str) -> int | None:
    """Bytes read of a value in a fused computation where all that use it take or change a part; None: all of it is read."""
    total = 0
    for user in inner.values():
        for i, operand in enumerate(user.operands):
            if operand != name:
                continue
            part: int | None = None
            if user.opcode in _TAKES and i == 0:
                part = user.outputs[0].nbytes
            elif user.opcode in _CHANGES and i == 0:
                part = 0
            elif user.opcode == "bitcast":
                part = _part_read(module, inner, user.name)
            elif user.opcode == "fusion":
                called = module.computations[user.called[0]]
                part = _part_read(module, called, _parameters(called)[i])
            if part is None:
                return None
            total += part
    return total


def _results(inner: Computation) -> tuple[str, ...]:
    """Names of what a fused computation makes."""
    root = list(inner.values())[-1]
    return root.operands if root.opcode == "tuple" else (root.name,)


def _written(module: Module, inner: Computation, name: str) -> int:
    """Bytes of a result in the main memory; of an array of which a part is changed, those of the part."""
    made = inner[name]
    while made.opcode == "bitcast":
        made = inner[made.operands[0]]
    if made.opcode == "parameter":
        return 0
    if made.opcode == "fusion":
        called = module.computations[made.called[0]]
        return sum(_written(module, called, result) for result in _results(called))
    if made.opcode in _CHANGES:
        return inner[made.operands[_CHANGES[made.opcode]]].outputs[0].nbytes
    return sum(a.nbytes for a in inner[name].outputs if a.space == 0)


def _collective(use: Use, kind: str, layers: int, hosts: np.ndarray | None) -> Collective:
    """A device sends (n - 1) / n of what an all-gather makes or a reduce-scatter takes, twice that of an all-reduce."""
    instruction, part = use.instruction, part_of(use.instruction.op_name)
    outputs = instruction.outputs
    if instruction.opcode == "collective-permute-start":  # (operand, result, two contexts)
        outputs = outputs[1:2]
    elif instruction.opcode.endswith("-start") and len(outputs) > 1 and kind != "all-reduce":
        outputs = outputs[len(outputs) // 2 :]  # (operands, results)
    produced = sum(a.nbytes for a in outputs)
    groups = replica_groups(instruction.text)
    size = groups.shape[1] if groups.size else 1
    share = (size - 1) / size if size else 0.0
    factor = {
        "all-reduce": 2 * share,
        "reduce-scatter": share * size,
        "collective-permute": 1.0,
    }.get(kind, share)
    started = use.fused or use.asynchronous or instruction.opcode.endswith("-start")
    crosses = False
    if hosts is not None and groups.size and groups.max() < len(hosts):
        crosses = bool(np.any(hosts[groups] != hosts[groups[:, :1]]))
    return Collective(
        kind,
        place_of(use.loops, layers, part),
        part,
        size,
        crosses,
        started and '"is_sync":true' not in instruction.text,
        use.trips,
        int(use.trips * produced * factor),
    )


def place_of(loops: tuple[int | None, ...], layers: int, part: str) -> str:
    """In words, where in the program that is. XLA may take the first or the last trip of a loop out of it; the vocabulary
    is in chunks of time, which may be as many as layers.
    """
    inside = [n for n in loops if n is not None]
    if part != "vocabulary" and any(layers - 2 <= n <= layers for n in inside if n > 1):
        return "layer loop"
    if None in loops:
        return "token loop"
    return f"loop of {math.prod(inside)}" if inside else "once"


def replica_groups(text: str) -> np.ndarray:
    """int [groups, devices]: who takes part with whom, from any of XLA's three forms; empty: not said."""
    if found := re.search(r"replica_groups=\{(\{[\d,{} ]*\})\}", text):
        rows = re.findall(r"\{([\d, ]+)\}", found[1])
        return np.array([[int(n) for n in row.split(",")] for row in rows])
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, dims = (tuple(int(n) for n in found[i].split(",")) for i in (1, 2))
        ids = np.arange(math.prod(dims)).reshape(dims)
        if found[3]:
            ids = ids.transpose([int(n) for n in found[3].split(",")])
        return ids.reshape(shape)
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] ?(?:T\([\d,]+\) ?)?\{([^}]*)\}", text):
        axes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", found[1])}
        return _mesh_groups(axes, re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", found[2]))
    pairs = re.search(r"source_target_pairs=\{(\{[\d,{} ]*\})\}", text)
    if pairs:
        rows = re.findall(r"\{(\d+),\s*(\d+)\}", pairs[1])
        return np.array([[int(a), int(b)] for a, b in rows])
    return np.zeros((0, 0), int)


def _mesh_groups(axes: Mapping[str, int], chosen: list[tuple[str, str, str]]) -> np.ndarray:
    """Groups over some axes of a mesh; an axis may be cut: `'axis':(before)size`."""
    sizes: list[int] = []
    inside: list[bool] = []
    for name, size in axes.items():
        parts = [(int(before), int(n)) for axis, before, n in chosen if axis == name and n]
        if parts:
            before, n = parts[0]
            sizes += [before, n, size // (before * n)]
            inside += [False, True, False]
        else:
            sizes.append(size)
            inside.append(any(axis == name for axis, _, _ in chosen))
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    order = [i for i, within in enumerate(inside) if not within]
    order += [i for i, within in enumerate(inside) if within]
    size = math.prod(n for n, within in zip(sizes, inside, strict=True) if within)
    return ids.transpose(order).reshape(-1, size)
