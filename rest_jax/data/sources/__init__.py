"""Reading step records from files, whatever their layout, and writing them.

| file | what it is |
| --- | --- |
| `*.jsonl` | our own records, one JSON object a line (`records.to_json`) |
| `*.parquet` | our own records with nested fields as JSON strings, or an rlla Parquet file (prompt, reward_model, extra_info) |
| `*.json` | rlla for supervised runs (instruction, input, output), API-Bank (system, user, answer, other), or our own as a list |

`read_records` decides by the content, not by the name. Any fault is a `RecordError` naming file, place and field.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from rest_jax.data.records import RecordError, StepRecord, from_json
from rest_jax.data.sources import api_bank, rlla, tables


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
    "rlla": Source(rlla.convert, rlla.restore),
    "api_bank": Source(api_bank.convert, api_bank.restore),
}


def read_records(path: str | pathlib.Path, limit: int | None = None) -> list[StepRecord]:
    """The records of a file in their order, at most `limit`.

    RecordError for a missing or empty file, an unknown layout or an unreadable record (file, line or row, and field).
    """
    path = pathlib.Path(path)
    if not path.is_file():
        what = "is a folder, a file is needed" if path.is_dir() else "no such file"
        raise RecordError(f"data {path}: {what}")
    rows = _rows(path, limit)
    if not rows:
        raise RecordError(f"data {path}: no records")
    records = [_record(raw, where, i, path) for i, (where, raw) in enumerate(rows)]
    _check_ids(records, path)
    return records


def write_records(path: str | pathlib.Path, records: list[StepRecord]) -> None:
    """Writes records as JSONL or Parquet by the name's ending; whole or not at all. RecordError for another ending."""
    tables.write(pathlib.Path(path), records)


def _rows(path: pathlib.Path, limit: int | None) -> list[tuple[str, Any]]:
    """(where, raw object) of each record."""
    with path.open("rb") as file:
        start = file.read(4)
    if start == b"PAR1":
        return tables.read_parquet(path, limit)
    if path.suffix == ".parquet":
        raise RecordError(f"data {path}: not a Parquet file (it does not start with PAR1)")
    text = _text(path)
    if text.lstrip().startswith("["):
        return _json_list(path, text)[:limit]
    return tables.read_jsonl(path, text, limit)


def _text(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecordError(f"data {path}: byte {error.start} is not UTF-8") from error


def _json_list(path: pathlib.Path, text: str) -> list[tuple[str, Any]]:
    try:
        raw = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise RecordError(f"data {path}: not JSON: {error}") from error
    return [(f"data {path}: item {i}", item) for i, item in enumerate(raw)]


def _record(raw: Any, where: str, index: int, path: pathlib.Path) -> StepRecord:
    keys = raw.keys() if isinstance(raw, dict) else {}.keys()
    name = f"{path.stem}-{index}"
    for layout in (rlla.SUPERVISED, rlla.PARQUET):
        if keys >= set(layout):
            return rlla.convert(raw, name, where)[0]
    if keys >= {"system", "user", "answer"}:
        return api_bank.convert(raw, name, where)[0]
    if keys & {"target", "history", "tools", "messages"} or not isinstance(raw, dict):
        return from_json(raw, where)
    raise RecordError(
        f"{where}: unknown layout with fields {', '.join(map(str, list(keys)[:6])) or 'none'}; known: our own (id, target, ...), "
        "rlla (instruction, input, output or prompt, reward_model), API-Bank (system, user, answer)"
    )


def _check_ids(records: list[StepRecord], path: pathlib.Path) -> None:
    seen: dict[str, int] = {}
    for i, record in enumerate(records):
        if (first := seen.setdefault(record.id, i)) != i:
            raise RecordError(
                f"data {path}: records {first} and {i} share the id {record.id!r}; ids must differ"
            )
