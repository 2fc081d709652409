"""API-Bank in its processed form (system, user, answer, other): a dialogue, and one expected call or a list of them.

The prompts are rendered much as in the toolrl template, but with Python literals for JSON and other spaces, so they are kept
in `messages` beside the tools and history read from them. The expected call is structured: {"name", "parameters"}.
"""

from typing import Any

from rest_jax.data.convert import fields, rlla
from rest_jax.data.records import RecordError, StepRecord, call_from_json
from rest_jax.tool_calls import Target


def convert(raw: Any, name: str, where: str) -> list[StepRecord]:
    """The record of one item; `answer` may be one call or a list of calls."""
    item = fields.item(raw, where)
    system, user = (fields.text(item.get(f), f"{where}: {f}") for f in ("system", "user"))
    expected = item.get("answer")
    calls = expected if isinstance(expected, list) else [expected]
    if not calls:
        raise RecordError(f"{where}: answer: empty, at least one call is needed")
    messages = ({"role": "system", "content": system}, {"role": "user", "content": user})
    target = Target(tuple(call_from_json(c, f"{where}: answer[{i}]") for i, c in enumerate(calls)))
    prompt = rlla.structure(messages)
    return [StepRecord(id=name, source="api_bank", target=target, **prompt)]
