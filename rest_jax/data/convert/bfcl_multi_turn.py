"""BFCL multi-turn: {"id", "question", "ground_truth", ...}, a benchmark: for tests of converters, never for training.

`question` is a list of user turns, each a list of messages; `ground_truth`, which BFCL keeps in a file of its own, has for each
of them the calls of that turn, each a text `name(key=value)`; `function` lists the tools. Results are not in the data, since BFCL
runs the calls. A turn without calls is answered with an empty text. Where `missed_function` brings tools late, the turn is empty
and stands here as the sentence that BFCL says in its place.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rest_jax.data.convert import call_syntax, fields, gorilla, remainder
from rest_jax.data.prepare.dialogue import Dialogue, compose, decompose
from rest_jax.data.records import RecordError, StepRecord

NAME = "bfcl_multi_turn"
MORE_TOOLS = "I have updated some more functions you can choose from. What about now?"


def convert(raw: Any, name: str, where: str) -> list[StepRecord]:
    """A record for each user turn. They are marked by their source, which is not trainable."""
    item = fields.mapping(raw, where)
    question = fields.sequence(item.get("question"), f"{where}: question")
    truth = fields.sequence(item.get("ground_truth"), f"{where}: ground_truth")
    if len(question) != len(truth) or not question:
        raise RecordError(
            f"{where}: question has {len(question)} turns, ground_truth {len(truth)}; equal and at least 1 is needed"
        )
    tools = tuple(
        gorilla.tool_from(t, f"{where}: function[{i}]")
        for i, t in enumerate(fields.sequence(item.get("function") or [], f"{where}: function"))
    )
    turns: list[dict[str, Any]] = []
    for i, (asked, expected) in enumerate(zip(question, truth, strict=True)):
        turns.extend(_asked(asked, f"{where}: question[{i}]"))
        turns.append(_answer(expected, f"{where}: ground_truth[{i}]"))
    records = decompose(Dialogue(name, NAME, tools, tuple(turns)))
    return remainder.keep(records, raw, _rebuild, where)


def restore(records: Sequence[StepRecord]) -> dict[str, Any]:
    """The item that `convert` made these records of."""
    return remainder.restored(records, _rebuild)


def _asked(value: Any, where: str) -> list[dict[str, Any]]:
    turns = []
    for i, message in enumerate(fields.sequence(value, where)):
        place = f"{where}[{i}]"
        role = fields.one_of(
            fields.mapping(message, place).get("role"), ("system", "user"), f"{place}: role"
        )
        turns.append(
            {"role": role, "content": fields.text(message.get("content"), f"{place}: content")}
        )
    return turns or [{"role": "user", "content": MORE_TOOLS}]


def _answer(value: Any, where: str) -> dict[str, Any]:
    calls = []
    for i, text in enumerate(fields.sequence(value, where)):
        place = f"{where}[{i}]"
        try:
            calls.append(call_syntax.parse_call(fields.text(text, place)))
        except call_syntax.SyntaxFault as error:
            raise RecordError(f"{place}: unreadable call: {error}") from error
    if not calls:
        return {"role": "assistant", "content": ""}
    return {"role": "assistant", "content": None, "calls": calls}


def _rebuild(records: Sequence[StepRecord]) -> dict[str, Any]:
    dialogue = compose(records)
    question: list[list[Mapping[str, Any]]] = [[]]
    truth: list[list[str]] = []
    for turn in dialogue.turns:
        if turn["role"] == "assistant":
            truth.append([call_syntax.render_call(call) for call in turn.get("calls", [])])
            question.append([])
        else:
            question[-1].append(turn)
    raw: dict[str, Any] = {"question": question[:-1], "ground_truth": truth}
    if dialogue.tools:
        raw["function"] = list(map(gorilla.tool_to, dialogue.tools))
    return raw
