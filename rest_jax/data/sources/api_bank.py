"""API-Bank in its processed form (system, user, answer, other): one expected call, or a list of them, a dialogue.

The prompts come rendered in the toolrl template; the answer is structured: {"name", "parameters"}.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rest_jax.answer import Target
from rest_jax.data.records import RecordError, StepRecord, call_from_json


def convert(raw: Any, name: str, where: str) -> list[StepRecord]:
    """The record of one item."""
    if not isinstance(raw, Mapping):
        raise RecordError(f"{where}: an object is needed, found {type(raw).__name__}")
    for field in ("system", "user", "answer"):
        if field not in raw:
            raise RecordError(f"{where}: {field}: missing (API-Bank: system, user, answer, other)")
    return [from_json(raw, name, where)]


def restore(records: Sequence[StepRecord]) -> dict[str, Any]:
    """The item that `convert` made a record of, without `other`."""
    (record,) = records
    system, user = record.messages or ()
    answer = [{"name": c.name, "parameters": c.arguments} for c in record.target.calls]
    return {"system": system["content"], "user": user["content"], "answer": answer}


def from_json(raw: Mapping[str, Any], name: str, where: str) -> StepRecord:
    """A record from one item; `answer` may be one call or a list of calls."""
    for field in ("system", "user"):
        if not isinstance(raw[field], str):
            raise RecordError(
                f"{where}: {field}: text is needed, found {type(raw[field]).__name__}"
            )
    answer = raw["answer"] if isinstance(raw["answer"], list) else [raw["answer"]]
    if not answer:
        raise RecordError(f"{where}: answer: empty, at least one call is needed")
    calls = tuple(call_from_json(c, f"{where}: answer[{i}]") for i, c in enumerate(answer))
    messages = (
        {"role": "system", "content": raw["system"]},
        {"role": "user", "content": raw["user"]},
    )
    return StepRecord(
        id=name,
        source="api_bank",
        tools=(),
        history=(),
        target=Target(calls=calls),
        messages=messages,
    )
