"""Our own records as JSONL and as Parquet (nested fields as JSON strings, so that one schema fits every record)."""

import json
import os
import pathlib
from typing import Any

from rest_jax.data.records import RecordError, StepRecord, to_json

_NESTED = ("tools", "history", "target", "messages", "extra")


def read_jsonl(path: pathlib.Path, text: str, limit: int | None) -> list[tuple[str, Any]]:
    """(where, object) of each line that is not blank; RecordError names the line."""
    rows: list[tuple[str, Any]] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if limit is not None and len(rows) >= limit:
            break
        if line.strip():
            where = f"data {path}: line {number}"
            rows.append((where, _loads(line, where)))
    return rows


def read_parquet(path: pathlib.Path, limit: int | None) -> list[tuple[str, Any]]:
    """(where, object) of each row; the JSON strings of our own nested fields are decoded."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise RecordError(
            f"data {path}: not a readable Parquet file: {str(error).splitlines()[0]}"
        ) from error
    rows: list[tuple[str, Any]] = []
    for number, raw in enumerate(table.slice(0, limit).to_pylist()):
        where = f"data {path}: row {number}"
        if isinstance(raw.get("target"), str):
            for field in _NESTED:
                if raw.get(field) is not None:
                    raw[field] = _loads(raw[field], f"{where}: {field}")
        rows.append((where, raw))
    return rows


def write(path: pathlib.Path, records: list[StepRecord]) -> None:
    """Writes beside the file first and renames, so a reader sees the old file or the whole new one."""
    if path.suffix not in (".jsonl", ".parquet"):
        raise RecordError(
            f"data {path}: records are written as .jsonl or .parquet, not {path.suffix or 'without ending'}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        if path.suffix == ".jsonl":
            lines = (json.dumps(to_json(r), ensure_ascii=False) for r in records)
            beside.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        else:
            _write_parquet(beside, records)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def parquet_row(record: StepRecord) -> dict[str, Any]:
    """The columns of a record in Parquet: version (int), id and source (text), nested fields as JSON strings or None."""
    raw = to_json(record)
    nested = {
        field: json.dumps(raw[field], ensure_ascii=False) if field in raw else None
        for field in _NESTED
    }
    return {field: raw[field] for field in ("version", "id", "source")} | nested


def parquet_schema() -> Any:
    """The pyarrow schema of `parquet_row`s; it is the same for every source."""
    import pyarrow

    text = ("id", "source", *_NESTED)
    return pyarrow.schema([("version", pyarrow.int32()), *((c, pyarrow.string()) for c in text)])


def _write_parquet(path: pathlib.Path, records: list[StepRecord]) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [parquet_row(record) for record in records]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=parquet_schema()), path)


def _loads(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise RecordError(f"{where}: not JSON: {error}") from error
