"""API-Bank in its processed form (system, user, answer, other): one expected call, or a list of them, a dialogue.

The prompts are rendered much as in the toolrl template, but with Python literals for JSON and other spaces, so they are kept
in `messages` beside the tools and history read from them. The answer is structured: {"name", "parameters"}.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rest_jax.data import toolrl_prompt
from rest_jax.data.convert import remainder
from rest_jax.data.records import RecordError, StepRecord, call_from_json, text
from rest_jax.templates import TEMPLATES
from rest_jax.tool_calls import Target


def convert(raw: Any, name: str, where: str) -> list[StepRecord]:
    """The record of one item; `answer` may be one call or a list of calls."""
    if not isinstance(raw, Mapping):
        raise RecordError(f"{where}: an object is needed, found {type(raw).__name__}")
    for field in ("system", "user"):
        text(raw.get(field), f"{where}: {field}")
    single = not isinstance(raw.get("answer"), list)
    answer = [raw.get("answer")] if single else raw["answer"]
    if not answer:
        raise RecordError(f"{where}: answer: empty, at least one call is needed")
    messages = (
        {"role": "system", "content": raw["system"]},
        {"role": "user", "content": raw["user"]},
    )
    record = StepRecord(
        id=name,
        source="api_bank",
        target=Target(
            tuple(call_from_json(c, f"{where}: answer[{i}]") for i, c in enumerate(answer))
        ),
        **toolrl_prompt.structure(messages),
    )
    extra = {"single": True} if single else {}  # the answer is one call, not a list
    return remainder.keep([record], raw, _rebuild, where, extra)


def restore(records: Sequence[StepRecord]) -> dict[str, Any]:
    """The item that `convert` made a record of."""
    return remainder.restored(records, _rebuild)


def _rebuild(records: Sequence[StepRecord]) -> dict[str, Any]:
    system, user = records[-1].prompt_messages(TEMPLATES["toolrl"])
    answer = [{"name": c.name, "parameters": c.arguments} for c in records[-1].target.calls]
    if records[-1].extra.get("single"):
        (answer,) = answer
    return {"system": system["content"], "user": user["content"], "answer": answer}
