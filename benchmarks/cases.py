"""The cases: what is measured, against whom, and what is expected of it. No jax in here.

A case is a kind of work and its sizes; from it come the arguments of our process (`python -m benchmarks`) and of the peer's
(peers/). `ratio` in a check is ours over the peer's tokens per second on the case's clock; `memory_ratio` is ours over the
peer's peak memory; any other metric is a field of our own record.
"""

import dataclasses
import math
import random
from typing import Literal

Peer = Literal["tunix", "torch", "trl"]


@dataclasses.dataclass(frozen=True)
class Check:
    """A bound on a metric: at least `bound`, or at most."""

    metric: str
    bound: float
    at_least: bool = True

    def holds(self, value: float | None) -> bool | None:
        """None where there is nothing to judge."""
        if value is None:
            return None
        return value >= self.bound if self.at_least else value <= self.bound

    def __str__(self) -> str:
        return f"{self.metric} {'>=' if self.at_least else '<='} {self.bound:g}"


@dataclasses.dataclass(frozen=True)
class Case:
    """`prompts` groups of `group` responses, each of `response` tokens after a prompt of `prompt` tokens."""

    name: str
    kind: Literal["rollout", "update", "step", "sft", "skipping", "host", "serve"]
    checks: tuple[Check, ...]
    prompts: int = 2
    group: int = 8
    prompt: int = 128
    response: int = 128
    vocab: int | None = None
    max_tokens_per_microbatch: int | None = None
    # response lengths from `lognormal_lengths`; both sides decode `ROWS` of them at once
    lognormal: bool = False
    peer: Peer | None = None
    folder: str | None = None  # weights both sides load: model-a or smollm2-135m
    cores: int = 1
    clock: Literal["cpu_seconds", "wall_seconds"] = "cpu_seconds"


ROWS = 16  # decoded at once in the log-normal case, and chats under way in that of serving


def _faster(factor: float, *more: Check) -> tuple[Check, ...]:
    return (Check("ratio", factor), *more)


def _memory(factor: float) -> Check:
    return Check("memory_ratio", factor, at_least=False)


_SLOTS = Check("decode_slot_utilisation", 0.9)
_SKIPPING = (
    Check("cost_ratio", 0.6, at_least=False),
    Check("gradient_difference", 1e-5, at_least=False),
)
_MODEL_B = {"prompts": 1, "prompt": 700, "response": 150, "peer": "torch"} | {
    "folder": "smollm2-135m", "cores": 2, "clock": "wall_seconds"
}  # fmt: skip
# (prompt, target) of the records of a supervised step: those of rlla_sft.json with at most 1,024 tokens of SmolLM2, ordered by
# their length, at 1/8, 3/8, 5/8 and 7/8.
SFT_RECORDS = ((536, 235), (500, 371), (523, 409), (516, 479))

CASES = {
    case.name: case
    for case in (
        Case("rollout-128", "rollout", _faster(2.5), peer="tunix"),
        Case("rollout-768", "rollout", _faster(7), prompt=768, peer="tunix"),
        Case(
            "rollout-lognormal", "rollout", _faster(4, _SLOTS),
            prompts=64, lognormal=True, peer="tunix",
        ),
        Case("update-128", "update", _faster(2.5), peer="tunix"),
        Case("update-768", "update", _faster(7, _memory(0.25)), prompt=768, peer="tunix"),
        Case("update-vocab", "update", _faster(2.5, _memory(0.4)), vocab=32_768, peer="tunix"),
        Case("step-768", "step", _faster(6), prompt=768, peer="tunix"),
        Case("update-half", "skipping", _SKIPPING, prompts=8, max_tokens_per_microbatch=2304),
        Case("host", "host", (Check("responses_per_second", 2000),)),
        Case("hf-rollout", "rollout", _faster(1.5), peer="torch", folder="model-a"),
        Case("smollm2-rollout", "rollout", _faster(1.5), **_MODEL_B),
        Case("smollm2-update", "update", _faster(2), **_MODEL_B),
        Case("trl-step-128", "step", _faster(4), peer="trl", folder="model-a"),
        Case("trl-step-768", "step", _faster(4), prompt=768, peer="trl", folder="model-a"),
        Case(
            "smollm2-trl-step", "step", _faster(4), prompts=1, prompt=700, response=150, peer="trl",
            folder="smollm2-135m", cores=2, clock="wall_seconds",
        ),
        Case("smollm2-sft", "sft", _faster(1.5), **_MODEL_B),
        Case(
            "smollm2-serve", "serve", _faster(3, Check("same_answers", 1)),
            **_MODEL_B | {"prompts": ROWS * 2, "group": 1, "prompt": 400, "response": 64},
        ),
    )
}  # fmt: skip


def our_arguments(case: Case, folder: str | None, file: str | None) -> list[str]:
    """Arguments of `python -m benchmarks`; `folder` and `file`, of lengths or requests, are what the case needs, if anything."""
    if case.kind == "host":
        return ["host"]
    if case.kind == "serve":
        given = {"model": folder, "requests": file, "count": case.prompts, "at-once": ROWS}
        given |= {"new-tokens": case.response, "decode-slots": ROWS}
        return ["serve", *_options(given)]
    if case.kind == "sft":
        # the peer keeps its activations
        given = {"model": folder, "records": _records(), "remat": "none"}
        return ["sft", *_options(given)]
    given = {
        "prompts": case.prompts,
        "group": case.group,
        "prompt-tokens": case.prompt,
        "new-tokens" if case.kind == "rollout" else "response-tokens": case.response,
        "vocab": case.vocab,
        "max-tokens-per-microbatch": case.max_tokens_per_microbatch,
        "model": folder,
        "lengths": file,
        "decode-slots": ROWS if case.lognormal else None,
        # as of the supervised step: TRL is told to keep its activations
        "remat": "none" if case.peer == "trl" else None,
    }
    return [case.kind, *_options(given)]


def peer_arguments(case: Case, folder: str | None, file: str | None) -> list[str]:
    """Arguments of the peer's script."""
    threads = None if case.peer == "tunix" else case.cores
    if case.kind == "sft":
        given = {"model": folder, "records": _records(), "threads": threads}
        return ["sft", *_options(given)]
    given = {
        "rows": ROWS if case.lognormal else case.prompts * case.group,
        "group": None if case.kind == "serve" else case.group,
        "prompt-tokens": case.prompt,
        "new-tokens": case.response,
        "vocab": case.vocab,
        "model": folder,
        "requests" if case.kind == "serve" else "lengths": file,
        "threads": threads,
    }
    return [case.kind, *_options(given)]


def lognormal_lengths(count: int, mean: float = 64, most: int = 512, sigma: float = 1) -> list[int]:
    """Integers in [1, most], log-normal around `mean` before they are cut; always the same."""
    rng = random.Random(0)
    mu = math.log(mean) - sigma**2 / 2
    return [min(max(round(rng.lognormvariate(mu, sigma)), 1), most) for _ in range(count)]


def _records() -> str:
    return ",".join(f"{prompt}+{target}" for prompt, target in SFT_RECORDS)


def _options(given: dict[str, object]) -> list[str]:
    return [
        part
        for name, value in given.items()
        if value is not None
        for part in (f"--{name}", str(value))
    ]
