"""Reading step records from files, whatever their layout, and writing them.

| file | what it is |
| --- | --- |
| `*.jsonl` | our own records, one JSON object a line (`records.to_json`) |
| `*.array_record` | our own records, one JSON object a record |
| `*.parquet` | our own records with nested fields as JSON strings, or an rlla Parquet file (prompt, reward_model, extra_info) |
| `*.json` | rlla for supervised runs (instruction, input, output), API-Bank (system, user, answer, other), or our own as a list |

`read_records` decides by the content, not by the name. Any fault is a `RecordError` naming file, place and field.
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Iterator, Sequence, Set
from typing import Any

from rest_jax.data import files as stream
from rest_jax.data.convert import (
    api_bank,
    bfcl_multi_turn,
    hammer,
    openai,
    rlla,
    toolace,
    xlam,
)
from rest_jax.data.prepare import writers
from rest_jax.data.records import RecordError, StepRecord, from_json


@dataclasses.dataclass(frozen=True)
class Source:
    """One layout of other people's data.

    `convert(raw, name, where)`: the step records of one raw item, ids from `name`; RecordError opening with `where`.
    `restore(records)`: the raw item that these records, in their order, were converted from.
    """

    convert: Callable[[Any, str, str], list[StepRecord]]
    restore: Callable[[Sequence[StepRecord]], Any]
    trainable: bool = True  # False: a benchmark; training data must not be made of it


SOURCES: dict[str, Source] = {
    "openai": Source(openai.convert, openai.restore),
    "toolace": Source(toolace.convert, toolace.restore),
    "xlam": Source(xlam.convert, xlam.restore),
    "hammer": Source(hammer.convert, hammer.restore),
    "rlla": Source(rlla.convert, rlla.restore),
    "api_bank": Source(api_bank.convert, api_bank.restore),
    bfcl_multi_turn.NAME: Source(bfcl_multi_turn.convert, bfcl_multi_turn.restore, trainable=False),
}

# Fields by which data is known that holds several records an item, or none to learn from, and so is not read as it is.
_TO_PREPARE = {
    "openai": {"messages"},
    "toolace": {"system", "conversations"},
    "xlam": {"query", "tools", "answers"},
    bfcl_multi_turn.NAME: {"question", "initial_config"},
}


def trainable(record: StepRecord) -> bool:
    """Whether a record may be trained on: its source is no benchmark of `SOURCES`."""
    return record.source not in SOURCES or SOURCES[record.source].trainable


def refuse_benchmarks(records: Sequence[StepRecord], where: str) -> None:
    """RecordError when one of the records may not be trained on."""
    for record in records:
        if not trainable(record):
            raise RecordError(f"{where}: source {record.source}: a benchmark, not for training")


def read_records(path: str | pathlib.Path, limit: int | None = None) -> list[StepRecord]:
    """The records of a file in their order, at most `limit`.

    RecordError for a missing or empty file, an unknown layout or an unreadable record (file, line or row, and field).
    """
    records = list(iter_records(path, limit))
    if not records:
        raise RecordError(f"data {path}: no records")
    return records


def iter_records(path: str | pathlib.Path, limit: int | None = None) -> Iterator[StepRecord]:
    """`read_records` one by one; of the records gone by it holds only the ids. An empty file gives none."""
    path = pathlib.Path(path)
    seen: dict[str, int] = {}
    for i, item in enumerate(itertools.islice(stream.read_items(path), limit)):
        if item.fault is not None:
            raise RecordError(f"{item.where}: {item.fault}")
        record = _record(item.raw, item.where, i, path)
        if (first := seen.setdefault(record.id, i)) != i:
            raise RecordError(
                f"data {path}: records {first} and {i} share the id {record.id!r}; ids must differ"
            )
        yield record


def write_records(path: str | pathlib.Path, records: list[StepRecord]) -> None:
    """Writes .jsonl, .parquet or .array_record by the name's ending; whole or not at all. RecordError for another ending."""
    writers.write_records(pathlib.Path(path), records)


def _record(raw: Any, where: str, index: int, path: pathlib.Path) -> StepRecord:
    keys = raw.keys() if isinstance(raw, dict) else {}.keys()
    name = f"{path.stem}-{index}"
    for layout in (rlla.SUPERVISED, rlla.PARQUET):
        if keys >= set(layout):
            return rlla.convert(raw, name, where)[0]
    if keys >= {"system", "user", "answer"}:
        return api_bank.convert(raw, name, where)[0]
    if not keys & {"target", "history"}:
        _refuse_to_prepare(keys, f"{where}: looks like", path)
    if keys & {"target", "history", "tools", "messages"} or not isinstance(raw, dict):
        return from_json(raw, where)
    raise RecordError(
        f"{where}: unknown layout with fields {', '.join(map(str, list(keys)[:6])) or 'none'}; known: our own (id, target, ...), "
        "rlla (instruction, input, output or prompt, reward_model), API-Bank (system, user, answer)"
    )


def _refuse_to_prepare(keys: Set[str], start: str, path: pathlib.Path) -> None:
    """RecordError when an item with these fields has first to be converted."""
    for source, fields in _TO_PREPARE.items():
        if keys >= fields:
            raise RecordError(
                f"{start} {source} data; make records of it first: rest-jax data prepare {source} {path} OUT"
            )
