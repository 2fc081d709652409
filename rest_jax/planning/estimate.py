"""How long a step takes: the programs of a plan, each so often as a step at given lengths calls it.

TPU: libtpu's estimated cycles over the clock, and of Pallas kernels a share of the peak (`measure.KERNEL_RATE`). GPU: the time
each instruction needs at the published peak rates (a lower bound).
Collectives: the bytes that a device sends over the speed of its link; those that overlap count as far as they outlast the rest.
Nothing else is in it: no host, no waiting for the longest response, no contention. These are estimates: read ratios.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from rest_jax.planning.collectives import Collective
from rest_jax.planning.measure import Measured, Work
from rest_jax.planning.topology import Chip


class Cost(NamedTuple):
    """Seconds of a program by part ("collectives" among them): of a call, and of each token that it draws besides."""

    call: dict[str, float]
    token: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Calls:
    """How often a step runs a program; a float where the last call is a smaller one."""

    calls: float
    tokens: int = 0  # trips of its token loop in all calls


def cost(measured: Measured, chip: Chip) -> Cost:
    """What a program costs on a chip; nothing where the rates of the chip are not known."""
    return Cost(
        *(
            _parts(
                work, [c for c in measured.collectives if (c.place == "token loop") == inner], chip
            )
            for work, inner in ((measured.once, False), (measured.each, True))
        )
    )


def _parts(
    work: Mapping[str, Work], collectives: Iterable[Collective], chip: Chip
) -> dict[str, float]:
    parts = {part: work_seconds(w, chip) for part, w in work.items()}
    computing = sum(parts.values())
    exposed, hidden = 0.0, 0.0
    for one in collectives:
        rate = chip.network if one.crosses and chip.network else chip.link
        seconds = one.nbytes / rate if rate else 0.0
        exposed += 0.0 if one.overlaps else seconds
        hidden += seconds if one.overlaps else 0.0
    parts["collectives"] = exposed + max(0.0, hidden - computing)
    return {part: seconds for part, seconds in parts.items() if seconds > 0}


def work_seconds(work: Work, chip: Chip) -> float:
    """Seconds of computation."""
    return work.cycles / chip.clock + work.kernels if chip.clock else work.limit


def step_seconds(
    costs: Mapping[str, Cost], calls: Mapping[str, Calls]
) -> dict[str, dict[str, float]]:
    """Seconds of a step by program and part."""
    found: dict[str, dict[str, float]] = {}
    for name, times in calls.items():
        call, token = costs[name]
        parts = {part: times.calls * seconds for part, seconds in call.items()}
        for part, seconds in token.items():
            parts[part] = parts.get(part, 0.0) + times.tokens * seconds
        found[name] = parts
    return found
