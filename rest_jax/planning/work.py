"""FLOPs and bytes of an instruction of a compiled program, with what it fuses.

FLOPs are those of matrix products (dots, the convolutions of TPUs, the calls of GPU libraries, what a Pallas kernel says of
itself), a multiply-add is 2. Bytes are those read from and written to the main memory: of an array of which a part is taken or
changed, those of the part.
"""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from rest_jax.planning.hlo import Computation, Instruction, Module

_KERNELS = "tpu_custom_call", "__gpu$xla.gpu.triton"
# Custom calls by which libtpu notes something.
_MARKS = (
    "AllocateBuffer", "AssumeGatherIndicesInBound", "AsyncCollectiveStart", "AsyncCollectiveDone", "ConcatBitcast",
    "GatherScatterIndicesBitpacked",
)  # fmt: skip


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
        total = kernel_flops(instruction) or _library_flops(instruction, where)
    return total


def kernel_flops(instruction: Instruction) -> float:
    """What a Pallas kernel says of itself, in its cost estimate or, on GPUs, in its name; 0 for other instructions."""
    found = re.search(r'"cost_estimate":\{"flops":"(\d+)"', instruction.text)
    found = found or re.search(r"_(\d+)_flops/pallas_call$", instruction.op_name)
    return float(found[1]) if found else 0.0


def kernel_bytes(instruction: Instruction) -> float:
    """Bytes that the cost estimate of a Pallas kernel says it reads and writes."""
    found = re.search(r'"cost_estimate":\{[^}]*"bytes_accessed":"(\d+)"', instruction.text)
    return float(found[1]) if found else 0.0


def _library_flops(instruction: Instruction, where: Computation) -> float:
    """Of a matrix product that a library computes (cuBLAS, oneDNN): the contracted dimensions stand in its config."""
    found = re.search(r'"lhs_contracting_dimensions":\["?([\d",]*)\]', instruction.text)
    if not found or not instruction.operands or not instruction.outputs:
        return 0.0
    lhs = where[instruction.operands[0]].outputs[0].shape
    contracted = [int(n) for n in re.findall(r"\d+", found[1])]
    return 2.0 * math.prod(instruction.outputs[0].shape) * math.prod(lhs[d] for d in contracted)


def is_kernel(instruction: Instruction) -> bool:
    """Whether it is a Pallas kernel, or one of libtpu's own."""
    return any(f'custom_call_target="{name}"' in instruction.text for name in _KERNELS)


class GroupedProduct(NamedTuple):
    """Of rows with the matrix of their group."""

    flops: float  # if every row is in a group
    groups: int


def grouped_product(instruction: Instruction, where: Computation) -> GroupedProduct | None:
    """A kernel that multiplies rows by the matrix of their group (libtpu's `ragged-dot`), or sums their outer products by group
    (`tgmm`). None: another kernel.
    """
    if len(instruction.operands) < 2:
        return None
    a, b = (where[name].outputs[0].shape for name in instruction.operands[-2:])
    out = instruction.outputs[0].shape
    if (len(a), len(b), len(out)) == (2, 3, 2):  # [r I] x [E I O] -> [r O]
        return GroupedProduct(2.0 * math.prod(a) * out[1], b[0])
    if (len(a), len(b), len(out)) == (2, 2, 3):  # [r I], [r O] -> [E I O]
        return GroupedProduct(2.0 * math.prod(a) * b[1], out[0])
    return None


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
