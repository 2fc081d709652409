"""What a prepared record may lose: the right tools are taken away; and what masking and splitting share.

In: a `StepRecord`. Out: the changed one, or None where the record does not allow the change, and then `unremovable` says why.
A changed record has no verbatim prompt, no verbatim target and no `extra` any more: they would contradict it. What is random
depends on a seed and the record's id, never on the order of the records.
"""

import dataclasses
import hashlib
import random
from typing import Any

from rest_jax.data.convert.xlam import NO_CALL
from rest_jax.data.records import StepRecord
from rest_jax.tool_calls import Target

TEXT_ONLY = "the prompt is there only as text"


def digest(*parts: object) -> int:
    """64 bits that depend on every part; the parts are told apart by their borders."""
    text = "".join(f"{len(part)}:{part}" for part in map(str, parts))
    raw = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "big")


def draw(seed: int, purpose: str, name: str) -> float:
    """A number in [0, 1), uniform over names."""
    return digest(seed, purpose, name) / 2**64


def generator(seed: int, purpose: str, name: str) -> random.Random:
    """A random generator for this name."""
    return random.Random(digest(seed, purpose, name))


def structured(record: StepRecord) -> bool:
    """Whether tools and history say the prompt, so that it can be written anew from them."""
    return record.messages is None or bool(record.tools and record.history)


def rewritten(record: StepRecord, **changes: Any) -> StepRecord:
    """The record with other tools, history or target, without its verbatim prompt and `extra`."""
    return dataclasses.replace(record, messages=None, extra={}, **changes)


def not_offered(record: StepRecord) -> set[str]:
    """Names that the record calls, in its history or its target, and does not offer; none where the tools are not known."""
    if not structured(record):
        return set()
    calls = {*called(record), *(call.name for call in record.target.calls)}
    return calls - {tool["name"] for tool in record.tools}


def called(record: StepRecord) -> list[str]:
    """Names of the tools called in the history."""
    return [call["name"] for turn in record.history for call in turn.get("calls") or ()]


def unremovable(record: StepRecord) -> str | None:
    """Why the right tools of this record cannot be taken away, None if they can."""
    if not structured(record):
        return TEXT_ONLY
    right = {call.name for call in record.target.calls}
    if not right:
        return "it calls no tool"
    if right & set(called(record)):
        return "the history calls the right tool too"
    if not right & {tool["name"] for tool in record.tools}:
        return "the right tool is not offered"
    if right >= {tool["name"] for tool in record.tools}:
        return "no other tool is offered"
    return None


def remove_right_tools(record: StepRecord, response: str = NO_CALL) -> StepRecord | None:
    """Without the tools that the target calls; the target is then `response` and no call."""
    if unremovable(record) is not None:
        return None
    right = {call.name for call in record.target.calls}
    tools = tuple(tool for tool in record.tools if tool["name"] not in right)
    return rewritten(record, tools=tools, target=Target(response=response))
