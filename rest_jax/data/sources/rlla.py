"""The rlla records of ToolRL: prompts already rendered in the toolrl template, gold answers as text.

Two layouts: the JSON list for supervised runs (instruction, input, output) and the Parquet files for reinforcement (prompt,
reward_model.ground_truth, extra_info). The Parquet ground truth has a placeholder as its thought; only its calls and response
are rewarded.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rest_jax.data.records import RecordError, StepRecord, target_from_text


def convert(raw: Any, name: str, where: str) -> list[StepRecord]:
    """The record of one item, of either layout."""
    if not isinstance(raw, Mapping):
        raise RecordError(f"{where}: an object is needed, found {type(raw).__name__}")
    if {"prompt", "reward_model"} <= raw.keys():
        return [from_parquet(raw, name, where)]
    for field in ("instruction", "input", "output"):
        if field not in raw:
            raise RecordError(f"{where}: {field}: missing (rlla: instruction, input, output)")
    return [from_supervised(raw, name, where)]


def restore(records: Sequence[StepRecord]) -> dict[str, Any]:
    """The item of a supervised file that `convert` made a record of."""
    (record,) = records
    system, user = record.messages or ()
    return {
        "instruction": system["content"],
        "input": user["content"],
        "output": record.target.text,
    }


def from_supervised(raw: Mapping[str, Any], name: str, where: str) -> StepRecord:
    """A record from {"instruction", "input", "output"}: system message, user message, gold answer."""
    for field in ("instruction", "input", "output"):
        _check(raw[field], field, where)
    messages = (
        {"role": "system", "content": raw["instruction"]},
        {"role": "user", "content": raw["input"]},
    )
    return StepRecord(
        id=name,
        source="rlla",
        tools=(),
        history=(),
        target=target_from_text(raw["output"], f"{where}: output"),
        messages=messages,
    )


def from_parquet(raw: Mapping[str, Any], name: str, where: str) -> StepRecord:
    """A record from a Parquet row {"prompt": [{"role", "content"}], "reward_model": {"ground_truth"}, ...}."""
    prompt, reward = raw["prompt"], raw["reward_model"]
    if not isinstance(prompt, list) or not prompt:
        raise RecordError(
            f"{where}: prompt: a list of messages is needed, found {type(prompt).__name__}"
        )
    for i, message in enumerate(prompt):
        for field in ("role", "content"):
            _check(message.get(field), f"prompt[{i}].{field}", where)
    gold = reward.get("ground_truth") if isinstance(reward, Mapping) else None
    gold = _check(gold, "reward_model.ground_truth", where)
    return StepRecord(
        id=name,
        source=str(raw.get("data_source") or "rlla"),
        tools=(),
        history=(),
        target=target_from_text(gold, f"{where}: reward_model.ground_truth"),
        messages=tuple({"role": m["role"], "content": m["content"]} for m in prompt),
    )


def _check(value: Any, field: str, where: str) -> str:
    if not isinstance(value, str):
        raise RecordError(f"{where}: {field}: text is needed, found {type(value).__name__}")
    return value
