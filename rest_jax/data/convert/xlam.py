"""xLAM function calling, {"query", "tools", "answers"}, one question and one action; and Hammer's irrelevance data.

The lists are strings of JSON, or lists. Tools come in the flat form that the rlla data has too: {parameter: {"description",
"type", "default"}}. Hammer has the same shape; where it removed the right tool from the list `answers` is empty, and the target
is a response that says so.
"""

from typing import Any

from rest_jax.data import fields
from rest_jax.data.fields import RecordError
from rest_jax.data.records import StepRecord, decompose

READ = ("query", "tools", "answers")
NO_CALL = "None of the given tools can do this."


def convert(raw: Any, name: str, where: str) -> list[StepRecord]:
    """The record of one item of xLAM; at least one call is needed."""
    query, tools, calls = _read(raw, where)
    if not calls:
        raise RecordError(f"{where}: answers: empty, at least one call is needed")
    return decompose(name, "xlam", tools, (query, _calls_turn(calls)))


def convert_hammer(raw: Any, name: str, where: str) -> list[StepRecord]:
    """The record of one item of Hammer; without calls its target is the response `NO_CALL`."""
    query, tools, calls = _read(raw, where)
    turn = _calls_turn(calls) if calls else {"role": "assistant", "content": NO_CALL}
    return decompose(name, "hammer", tools, (query, turn))


def _read(
    raw: Any, where: str
) -> tuple[dict[str, Any], tuple[dict[str, Any], ...], list[dict[str, Any]]]:
    """(user turn, tools, expected calls)."""
    item = fields.item(raw, where)
    query = {"role": "user", "content": fields.text(item.get("query"), f"{where}: query")}
    place = f"{where}: answers"
    answers = fields.sequence(fields.parsed(item.get("answers"), place), place)
    return (
        query,
        fields.tools(item.get("tools"), f"{where}: tools"),
        [fields.call(c, f"{place}[{i}]") for i, c in enumerate(answers)],
    )


def _calls_turn(calls: list[dict[str, Any]]) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "calls": calls}
