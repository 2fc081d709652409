"""The smallest change of a config that makes it fit, by trying: fewer decode slots, smaller micro-batches, more sharding.

`smallest_change(config, limit, compile)` follows the program that needs the most; `compile` gives the memory of every program of
a config (`planning.plan` compiles them), so that each step of the search is a fact and not a formula.
"""

import dataclasses
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rest_jax.config import Config, validate_as
from rest_jax.errors import UserError
from rest_jax.models.config import Remat

ROLLOUT = ("cast", "prefill", "decode", "evaluation")
_FEWEST_SLOTS = 8
_FEWEST_CACHED = 8192  # tokens of `rollout.cache_tokens`
_FEWEST_TOKENS = 1024
_TRIES = 12

Needs = Mapping[str, Mapping[str, int]]  # program -> bytes by name, "total" among them
Compile = Callable[[Config], Needs]


@dataclasses.dataclass(frozen=True)
class Fit:
    """A config that fits, what was changed for it ("key=value"), and what its programs need."""

    config: Config
    changes: tuple[str, ...]
    needs: Needs


def largest(needs: Needs) -> tuple[str, int]:
    """The program that needs the most, and how many bytes."""
    name = max(needs, key=lambda program: needs[program]["total"])
    return name, needs[name]["total"]


def smallest_change(config: Config, needs: Needs, limit: float, compile: Compile) -> Fit | None:
    """The first config that fits `limit` bytes, from one that needs `needs`; None when nothing that is tried does."""
    changes: dict[str, Any] = {}
    for _ in range(_TRIES):
        name, total = largest(needs)
        if total <= limit:
            return Fit(config, tuple(f"{key}={value}" for key, value in changes.items()), needs)
        for candidate in candidates(config, name, needs[name], limit):
            try:
                changed = with_values(config, candidate)
                lower = compile(changed)
            except UserError:  # a mesh that the model or the batch does not fit
                continue
            if lower[name]["total"] < total:
                config, changes, needs = changed, changes | candidate, lower
                break
        else:
            return None
    return None


def candidates(
    config: Config, program: str, parts: Mapping[str, int], limit: float
) -> Iterator[dict[str, Any]]:
    """Changes that lower what a program needs, the smallest first; a knob that cannot be enough is left out."""
    program = program.removeprefix("evaluation ")
    if program in ROLLOUT:
        moving = sum(parts.get(name, 0) for name in ("cache", "temporaries", "outputs"))
        fixed, tokens = parts["total"] - moving, config.rollout.cache_tokens
        if tokens is not None and parts.get("cache") and program != "cast":
            cached = parts["cache"]
            fewer = _share(tokens, cached, limit - parts["total"] + cached)
            if fewer >= _FEWEST_CACHED:
                yield {"rollout.cache_tokens": fewer}
        slots = config.rollout.decode_slots
        fewer = _share(slots, moving, limit - fixed)
        if program not in ("cast", "prefill") and fewer >= _FEWEST_SLOTS:
            entries = config.rollout.prompt_cache_entries
            kept = (
                {}
                if entries is None
                else {"rollout.prompt_cache_entries": max(1, entries * fewer // slots)}
            )
            yield {"rollout.decode_slots": fewer, **kept}
    elif program not in ("prepare", "apply"):
        kept = typing.get_args(Remat)
        for less in kept[kept.index(config.model.remat) + 1 :]:
            yield {"model.remat": less}
        tokens = config.train.max_tokens_per_microbatch
        moving = parts.get("temporaries", 0)
        fewer = _share(tokens, moving, limit - parts["total"] + moving) if tokens else 16_384
        if fewer >= _FEWEST_TOKENS:
            yield {"train.max_tokens_per_microbatch": fewer}
    mesh = config.mesh
    shared = config.rollout.tensor or mesh.tensor
    if program in ROLLOUT:
        if shared > 0:  # how many -1 is, the devices decide
            yield {"rollout.tensor": 2 * shared}
    elif mesh.data is None:  # one part a slice
        free = {} if -1 in (mesh.tensor, mesh.expert) else {"mesh.fsdp": -1}
        yield {"mesh.data": 1, **free}
    elif mesh.data > 1:
        yield {"mesh.data": mesh.data // 2, "mesh.fsdp": mesh.fsdp * 2 if mesh.fsdp > 0 else -1}
    if mesh.tensor > 0 and (mesh.fsdp == -1 or mesh.fsdp % 2 == 0):
        yield {
            "mesh.tensor": mesh.tensor * 2,
            "mesh.fsdp": -1 if mesh.fsdp == -1 else mesh.fsdp // 2,
        }


def _share(value: int, moving: float, left: float) -> int:
    """The value halved until what moves with it, `moving` bytes now, is at most `left`; at least once. 0: never."""
    if left <= 0 or moving <= 0:
        return 0
    halved = value // 2
    while halved and moving * halved / value > left:
        halved //= 2
    return halved


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """The config with other values at these dotted keys, which alone count as given besides those that were. Raises
    ConfigError.
    """
    tree = config.model_dump(mode="json", exclude_unset=True)
    for key, value in values.items():
        section, name = key.split(".")
        tree.setdefault(section, {})[name] = value
    return validate_as(Config, tree, f"config {config.name}")
