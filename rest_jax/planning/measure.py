"""Sums over a compiled program by part of the model: FLOPs, bytes, libtpu's cycles, each times the trips of its loops, and its
collectives.

    measure(hlo.parse(text), Sizes(layers))  -> Measured

What is in a loop of unknown trips (decoding) is kept apart, for each trip.
"""

import dataclasses
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from rest_jax.planning.collectives import Collective, collective_kind, read_collective
from rest_jax.planning.hlo import FREE, Module, Use, uses
from rest_jax.planning.work import (
    grouped_product,
    instruction_bytes,
    instruction_flops,
    is_kernel,
    kernel_bytes,
)

# Parts of the model, found in the name of an operation; the first that occurs counts.
PARTS = (
    "vocabulary", "head", "draw", "insert", "start", "optimizer", "attention", "moe", "mlp", "norm", "trunk",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Work:
    """Of one part, all executions together; in a loop of unknown trips, those of one trip."""

    flops: float = 0.0  # of matrix products
    nbytes: float = 0.0  # read from and written to the main memory
    cycles: float = 0.0  # libtpu's estimate
    limit: float = 0.0  # seconds at the peak rates of the chip, instruction by instruction
    kernels: float = 0.0  # seconds of kernels, of which libtpu knows no cycles

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.flops + other.flops,
            self.nbytes + other.nbytes,
            self.cycles + other.cycles,
            self.limit + other.limit,
            self.kernels + other.kernels,
        )


@dataclasses.dataclass(frozen=True)
class Measured:
    """Sums over a program by part of the model: outside of loops of unknown trips, and for one trip of them."""

    once: Mapping[str, Work]
    each: Mapping[str, Work]
    collectives: tuple[Collective, ...]


class Rates(NamedTuple):
    """Of a device: FLOP/s of matrix products and bytes/s of its main memory; 0: unknown."""

    flops: float
    memory: float


UNKNOWN = Rates(0, 0)
# The share of the peak at which a kernel's FLOPs are taken to run, or else its bytes at the whole bandwidth.
KERNEL_RATE = 0.5


def part_of(op_name: str) -> str:
    """The part of the model that an operation belongs to."""
    words = re.findall(r"\w+", op_name)
    for part in PARTS:
        if any(part == word or word.endswith(f"_{part}") for word in words):
            return part
    return "other"


class Sizes(NamedTuple):
    """What the text of a program does not say."""

    layers: int  # trips of the loop over layers
    experts: int = 0  # of a layer, on all devices: rows are taken to be spread evenly over them
    # of loops that values decide, by the part that they are in, and visits of kernels, by the name of their scope; may be a mean.
    # Other loops are kept apart, for each trip
    trips: Mapping[str, float] = MappingProxyType({})


def measure(
    module: Module, sizes: Sizes, rates: Rates = UNKNOWN, hosts: np.ndarray | None = None
) -> Measured:
    """Sums over a program. `hosts` int [devices]: the host of each device, in the order of the mesh."""
    sums: tuple[dict[str, Work], dict[str, Work]] = ({}, {})
    moved: dict[tuple, Collective] = {}
    seen: set[tuple[str, str, tuple]] = set()
    for use in uses(module, lambda loop: sizes.trips.get(part_of(loop.op_name))):
        opcode, part = use.instruction.opcode, part_of(use.instruction.op_name)
        if collective_kind(use.instruction):
            channel = re.search(r"channel_id=(\d+)", use.instruction.text)
            # libtpu repeats one that it spreads over several fusions; those of a shard_map all have channel 1
            spread = channel is not None and (use.fused or use.asynchronous)
            key = opcode, channel[1] if channel and spread else use.instruction.name, use.loops
            if key not in seen:
                seen.add(key)
                one = read_collective(use, part, sizes.layers, hosts)
                same = moved.get(one[:6], one._replace(count=0, nbytes=0))
                moved[one[:6]] = one._replace(
                    count=same.count + one.count, nbytes=same.nbytes + one.nbytes
                )
            continue
        work = _work(module, use, rates, sizes)
        if work is not None:
            into = sums[None in use.loops]
            into[part] = into.get(part, Work()) + work
    return Measured(sums[0], sums[1], tuple(moved.values()))


def _work(module: Module, use: Use, rates: Rates, sizes: Sizes) -> Work | None:
    """Of an instruction outside of fusions, with what it fuses."""
    instruction = use.instruction
    if use.fused or instruction.opcode in FREE or instruction.opcode.endswith("-done"):
        return None
    flops = instruction_flops(module, instruction, use.computation)
    nbytes = instruction_bytes(module, instruction, use.computation)
    kernel = is_kernel(instruction)
    if kernel and (grouped := grouped_product(instruction, use.computation)):
        flops = grouped.flops * (grouped.groups / sizes.experts if sizes.experts else 1)
    for name, visits in sizes.trips.items():
        if kernel and name in re.findall(r"\w+", instruction.op_name):
            # what it says is that of one visit, and it does not read its operands whole
            flops, nbytes = visits * flops, visits * kernel_bytes(instruction)
    limit = seconds = 0.0
    if rates.flops and rates.memory:
        limit = max(flops / rates.flops, nbytes / rates.memory)
        if kernel:
            seconds = max(flops / (KERNEL_RATE * rates.flops), nbytes / rates.memory)
    n = use.trips
    return Work(n * flops, n * nbytes, float(n * instruction.cycles), n * limit, n * seconds)
