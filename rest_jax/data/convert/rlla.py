"""The rlla records of ToolRL: prompts rendered in the toolrl template, gold answers as text.

Two layouts: the JSON list for supervised runs (instruction, input, output) and the Parquet files for reinforcement (prompt,
reward_model.ground_truth, extra_info). The Parquet ground truth has a placeholder as its thought (one constant sentence or
another); only its calls and response are rewarded, so the target has them alone and the text is kept in `extra` for the way
back. The prompt is read into tools and history; on the way back it is rendered again.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rest_jax.data import toolrl_prompt
from rest_jax.data.convert import remainder
from rest_jax.data.records import RecordError, StepRecord, target_from_text, text
from rest_jax.templates import TEMPLATES
from rest_jax.tool_calls import Target

SUPERVISED = ("instruction", "input", "output")
PARQUET = ("prompt", "reward_model")


def convert(raw: Any, name: str, where: str) -> list[StepRecord]:
    """The record of one item of either layout."""
    if not isinstance(raw, Mapping):
        raise RecordError(f"{where}: an object is needed, found {type(raw).__name__}")
    if raw.keys() >= set(PARQUET):
        record = _from_parquet(raw, name, where)
        extra = {"layout": "parquet", "gold": raw["reward_model"]["ground_truth"]}
        return remainder.keep([record], raw, _to_parquet, where, extra)
    return remainder.keep([_from_supervised(raw, name, where)], raw, _to_supervised, where)


def restore(records: Sequence[StepRecord]) -> dict[str, Any]:
    """The item that `convert` made a record of."""
    layout = _to_parquet if is_reward_only(records[-1]) else _to_supervised
    return remainder.restored(records, layout)


def is_reward_only(record: StepRecord) -> bool:
    """Whether a record is a row of the Parquet files, as it was read: there is no thought to imitate in it."""
    return record.extra.get("layout") == "parquet"


def _from_supervised(raw: Mapping[str, Any], name: str, where: str) -> StepRecord:
    for field in SUPERVISED:
        text(raw.get(field), f"{where}: {field}")
    messages = (
        {"role": "system", "content": raw["instruction"]},
        {"role": "user", "content": raw["input"]},
    )
    return StepRecord(
        id=name,
        source="rlla",
        target=target_from_text(raw["output"], f"{where}: output"),
        **toolrl_prompt.structure(messages),
    )


def _from_parquet(raw: Mapping[str, Any], name: str, where: str) -> StepRecord:
    prompt, reward = raw["prompt"], raw["reward_model"]
    if not isinstance(prompt, list) or not prompt:
        raise RecordError(
            f"{where}: prompt: a list of messages is needed, found {type(prompt).__name__}"
        )
    for i, message in enumerate(prompt):
        for field in ("role", "content"):
            value = message.get(field) if isinstance(message, Mapping) else None
            text(value, f"{where}: prompt[{i}].{field}")
    gold = reward.get("ground_truth") if isinstance(reward, Mapping) else None
    gold = text(gold, f"{where}: reward_model.ground_truth")
    target = target_from_text(gold, f"{where}: reward_model.ground_truth")
    return StepRecord(
        id=name,
        source=str(raw.get("data_source") or "rlla"),
        target=Target(target.calls, target.response),
        **toolrl_prompt.structure(prompt),
    )


def _to_supervised(records: Sequence[StepRecord]) -> dict[str, Any]:
    system, user = _prompt(records[-1])
    return dict(zip(SUPERVISED, (system["content"], user["content"], _gold(records)), strict=True))


def _to_parquet(records: Sequence[StepRecord]) -> dict[str, Any]:
    prompt = _prompt(records[-1])
    raw = {
        "data_source": records[-1].source,
        "prompt": [{"content": m["content"], "role": m["role"]} for m in prompt],
        "ability": "math",
        "reward_model": {"ground_truth": _gold(records), "style": "rule"},
    }
    if len(prompt) == 2:
        supervised = _to_supervised(records)
        raw["extra_info"] = {
            "index": 0,
            "input": supervised["input"],
            "instruction": supervised["instruction"],
            "output": supervised["output"],
            "split": "train",
        }
    return raw


def _prompt(record: StepRecord) -> list[dict[str, str]]:
    return record.prompt_messages(TEMPLATES["toolrl"])


def _gold(records: Sequence[StepRecord]) -> str:
    kept = records[-1].extra.get("gold")
    return TEMPLATES["toolrl"].render_answer(records[-1].target) if kept is None else kept
