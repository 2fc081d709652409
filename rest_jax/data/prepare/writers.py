"""Writes step records one by one as JSONL, Parquet or ArrayRecord, by the name's ending; a file appears whole or not at all.

Parquet holds nested fields as JSON strings, so that one schema fits every record; ArrayRecord holds the lines of the JSONL.
"""

import contextlib
import errno
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rest_jax.data import array_records
from rest_jax.data.files import NESTED
from rest_jax.data.records import RecordError, StepRecord, to_json
from rest_jax.errors import UserError

ROW_GROUP = 4096  # Parquet rows written, and held in memory, at once

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Write = Callable[[StepRecord], object]  # adds a record


@contextlib.contextmanager
def complete(paths: Sequence[pathlib.Path]) -> Iterator[list[pathlib.Path]]:
    """Hidden paths beside `paths` to write to, renamed in this order when the block ends well, removed when it does not.

    A path that nothing was written for is absent afterwards, also if there was a file before. Missing folders are made, and
    removed again on failure. UserError when the disk is full.
    """
    parts = [path.with_name(f".{path.name}.{os.getpid()}.part") for path in paths]
    missing = {folder for path in paths for folder in path.parents if not folder.exists()}
    deepest_first = sorted(missing, key=lambda folder: len(folder.parts), reverse=True)
    done = False
    try:
        for part in parts:
            part.parent.mkdir(parents=True, exist_ok=True)
        yield parts
        for part, path in zip(parts, paths, strict=True):
            if part.exists():
                part.replace(path)
            else:
                path.unlink(missing_ok=True)
        done = True
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise UserError(f"data {paths[-1]}: {error.strerror}; make room and start again") from error
    finally:
        for part in parts:
            part.unlink(missing_ok=True)
        for folder in () if done else deepest_first:
            with contextlib.suppress(OSError):  # another process has put something there
                folder.rmdir()


def check_path(path: pathlib.Path) -> None:
    """RecordError for an ending that is not written, a folder, or an optional package that is missing."""
    if path.suffix not in _WRITERS:
        *others, last = _WRITERS
        raise RecordError(
            f"data {path}: records are written as {', '.join(others)} or {last}, not {path.suffix or 'without ending'}"
        )
    if path.is_dir():
        raise RecordError(f"data {path}: is a folder, the name of a file is needed")
    if path.suffix == array_records.ENDING:
        array_records.module()


def open_writer(part: pathlib.Path, ending: str) -> contextlib.AbstractContextManager[Write]:
    """A function that adds a record to the file `part`, in the form of `ending`; the file is whole when the block ends."""
    return _WRITERS[ending](part)


def write_records(path: pathlib.Path, records: Sequence[StepRecord]) -> None:
    """All records into one file, whole or not at all. RecordError as for `check_path` and `to_line`."""
    check_path(path)
    with complete([path]) as (part,), open_writer(part, path.suffix) as write:
        for record in records:
            write(record)


def to_line(record: StepRecord) -> bytes:
    """The record as one line of JSON. RecordError for what JSON or UTF-8 cannot say."""
    return _json(to_json(record), record)


def parquet_row(record: StepRecord) -> dict[str, Any]:
    """The columns of a record in Parquet: version (int), id and source (text), nested fields as JSON strings or None."""
    raw = to_json(record)
    nested = {field: _json(raw[field], record) if field in raw else None for field in NESTED}
    return {field: raw[field] for field in ("version", "id", "source")} | nested


def parquet_schema() -> Any:
    """The pyarrow schema of `parquet_row`s; it is the same for every source."""
    import pyarrow

    text = ("id", "source", *NESTED)
    return pyarrow.schema([("version", pyarrow.int32()), *((c, pyarrow.string()) for c in text)])


def _json(value: Any, record: StepRecord) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError as error:
        raise RecordError(
            f"record {record.id!r}: half a character ({error.object[error.start]!a}), which no UTF-8 text can hold"
        ) from error
    except (ValueError, TypeError, RecursionError) as error:
        raise RecordError(f"record {record.id!r}: not a JSON value: {error}") from error


@contextlib.contextmanager
def _jsonl(part: pathlib.Path) -> Iterator[Write]:
    with part.open("wb") as file:
        yield lambda record: file.write(to_line(record) + b"\n")


@contextlib.contextmanager
def _parquet(part: pathlib.Path) -> Iterator[Write]:
    import pyarrow
    import pyarrow.parquet

    schema, rows = parquet_schema(), []

    def flush() -> None:
        file.write_table(pyarrow.Table.from_pylist(rows, schema=schema))
        rows.clear()

    def write(record: StepRecord) -> None:
        rows.append(parquet_row(record))
        if len(rows) == ROW_GROUP:
            flush()

    with pyarrow.parquet.ParquetWriter(part, schema) as file:
        yield write
        if rows:
            flush()


@contextlib.contextmanager
def _array_record(part: pathlib.Path) -> Iterator[Write]:
    file = array_records.writer(part)

    def guarded(act: Callable[..., Any], *args: Any) -> None:
        try:
            act(*args)
        except RuntimeError as error:  # its one kind: no space, no permission
            reason = str(error).split(";")[0]
            raise UserError(f"data {part}: {reason}; mend that and start again") from error

    try:
        yield lambda record: guarded(file.write, to_line(record))
    finally:
        guarded(file.close)


_WRITERS = {".jsonl": _jsonl, ".parquet": _parquet, array_records.ENDING: _array_record}
