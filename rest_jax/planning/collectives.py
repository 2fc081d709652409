"""What the devices of a compiled program exchange: its collectives, with their groups and the bytes that a device sends."""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from rest_jax.planning.hlo import COLLECTIVES, FREE, Instruction, Use


class Collective(NamedTuple):
    """What one kind of collective moves in one place of the program, for one device."""

    kind: str
    place: str  # "once", "layer loop", "loop of 16"; in a loop of unknown trips "token loop"
    part: str
    group: int  # devices that take part together
    crosses: bool  # whether such a group has devices of several TPU slices, of several GPU nodes
    overlaps: bool  # whether the program computes meanwhile
    count: int  # executions; in a loop of unknown trips, those of one trip
    nbytes: int  # that a device sends in all of them


def collective_kind(instruction: Instruction) -> str:
    """The kind of collective that an instruction is, "" for none. What slices exchange passes through the host, as a `send`
    and a `recv` of libtpu's "megascale" runtime; the second counts, since it has the result.
    """
    if instruction.opcode == "recv":
        found = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.text)
        kind = found[1].lower().replace("_", "-") if found else ""
        return "collective-permute" if kind == "one-to-one" else kind
    kind = instruction.opcode.removesuffix("-start")
    return kind if kind in COLLECTIVES else ""


def _is_scattered(use: Use) -> bool:
    """Whether an all-reduce keeps this device's part alone: libtpu writes its reduce-scatter as a fusion of it with slices."""
    fused = use.fused and use.instruction.opcode == "all-reduce"
    return fused and any(i.opcode == "dynamic-slice" for i in use.computation.values())


def read_collective(use: Use, part: str, layers: int, hosts: np.ndarray | None) -> Collective:
    """Of an instruction that is one. A device sends (n - 1) / n of what an all-gather makes or a reduce-scatter takes, twice
    that of an all-reduce. `hosts`: as for `measure`.
    """
    instruction, kind = use.instruction, collective_kind(use.instruction)
    outputs, between_slices = instruction.outputs, instruction.opcode == "recv"
    if instruction.opcode == "collective-permute-start":  # (operand, result, two contexts)
        outputs = outputs[1:2]
    elif instruction.opcode.endswith("-start") and len(outputs) > 1 and kind != "all-reduce":
        outputs = outputs[len(outputs) // 2 :]  # (operands, results)
    elif between_slices:
        outputs = outputs[:1]  # (result, context, token)
    groups = replica_groups(instruction.text)
    size = groups.shape[1] if groups.size else 1
    share = (size - 1) / size
    scattered = _is_scattered(use)
    factor = {
        "all-reduce": 2 * share,
        "reduce-scatter": share * size,
        "collective-permute": 1.0,
    }.get(kind, share)
    if scattered:
        kind, factor = "reduce-scatter", share
    crosses = between_slices
    if hosts is not None and groups.size and groups.max() < len(hosts):
        crosses = bool(np.any(hosts[groups] != hosts[groups[:, :1]]))
    nbytes = use.trips * sum(a.nbytes for a in outputs) * factor
    place = place_of(use.loops, layers, part)
    overlaps = _overlaps(use) and not scattered
    return Collective(kind, place, part, size, crosses, overlaps, round(use.trips), int(nbytes))


def _overlaps(use: Use) -> bool:
    """Whether a collective that has been started lets the program compute before it waits for the result."""
    instruction = use.instruction
    if instruction.opcode == "recv":
        after = list(use.computation.values())
        after = after[after.index(instruction) + 1 :]
        until = next(i for i, x in enumerate(after) if instruction.name in x.operands)
        idle = FREE | {"send-done", "recv-done"}
        return any(x.called or x.opcode not in idle for x in after[:until])
    started = use.fused or use.asynchronous or instruction.opcode.endswith("-start")
    return started and '"is_sync":true' not in instruction.text


def place_of(loops: tuple[float | None, ...], layers: int, part: str) -> str:
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
    """int [groups, devices]: who takes part with whom, from any of XLA's three forms; empty: not said. Of what slices
    exchange one group, of slices or of one device of each. ValueError for another form.
    """
    if found := re.search(r'_xla_megascale_target="?\{+([\d,]+)\}', text):
        return np.array([[int(n) for n in found[1].split(",")]])
    if found := re.search(r"replica_groups=\{(\{[\d,{} ]*\})\}", text):
        rows = re.findall(r"\{([\d, ]+)\}", found[1])
        return np.array([[int(n) for n in row.split(",")] for row in rows])
    if found := re.search(rf"replica_groups=\[([\d,]+)\]<={_IDS}", text):
        return _ids(found[2], found[3]).reshape(_numbers(found[1]))
    mesh = rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({_IDS}\))? ?\{{([^}}]*)\}}"
    if found := re.search(mesh, text):
        axes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", found[1])}
        groups = _mesh_groups(axes, re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", found[4]))
        return _ids(found[2], found[3]).ravel()[groups] if found[2] else groups
    pairs = re.search(r"source_target_pairs=\{(\{[\d,{} ]*\})\}", text)
    if pairs:
        rows = re.findall(r"\{(\d+),\s*(\d+)\}", pairs[1])
        return np.array([[int(a), int(b)] for a, b in rows])
    if re.search(r"replica_groups=(?!\{\})", text):
        raise ValueError(f"replica_groups of a form that is not known: {text[:300]}")
    return np.zeros((0, 0), int)


_IDS = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"  # devices counted over an array, which may be transposed


def _ids(dims: str, order: str | None) -> np.ndarray:
    shape = _numbers(dims)
    ids = np.arange(math.prod(shape)).reshape(shape)
    return ids.transpose(_numbers(order)) if order else ids


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


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
