"""Files of step records: reading them, whatever their layout, and writing them.

| content | what it is |
| --- | --- |
| objects of JSON | our own records (`records.to_json`), API-Bank (system, user, answer, other), or rlla for supervised runs |
| Parquet | our own records with nested fields as JSON strings, or an rlla Parquet file (prompt, reward_model, extra_info) |

The fields of an item (`data.items`) tell its layout; the name does not count. Memory does not grow with the file. Every fault
is a `RecordError` naming file, line (item, row) and field; an item that cannot be read is set aside.
"""

import functools
import itertools
import json
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from rest_jax.data import fields
from rest_jax.data.convert import SOURCES, rlla
from rest_jax.data.fields import RecordError
from rest_jax.data.items import NESTED, read_items
from rest_jax.data.records import StepRecord, from_json, not_offered, said_not_offered, to_json
from rest_jax.files import Location, as_path, store_errors
from rest_jax.texts import print_text

ROW_GROUP = 4096  # Parquet rows written, and held in memory, at once
MAX_SAID = 5  # records set aside of which each has a line of its own

# Fields by which data is known that holds several records an item, and so is not read as it is.
_TO_PREPARE = (
    ("openai", {"messages"}),
    ("openai", {"conversations", "tools"}),
    ("toolace", {"system", "conversations"}),
    ("openai", {"conversations"}),
    ("xlam", {"query", "tools", "answers"}),
)


class Aside:
    """Counts what cannot be used; `say` (by default: stderr) is told why, of the first ones, and in the end how many."""

    def __init__(self, say: Callable[[str], None] | None = None):
        self._say = say or functools.partial(print_text, file=sys.stderr)
        self.reasons: list[str] = []  # of the first ones
        self.count = 0

    def add(self, reason: str) -> None:
        """One more."""
        self.count += 1
        if len(self.reasons) < MAX_SAID:
            self.reasons.append(reason)
            self._say(f"set aside: {reason}")

    def check_left(self, name: str, left: int) -> None:
        """Says how many were set aside of all; RecordError, with the reason of the first, where none is left."""
        if not left:
            if not self.count:
                raise RecordError(f"{name}: no records")
            if self.count == 1:
                raise RecordError(self.reasons[0])
            raise RecordError(
                f"{name}: no records: all {self.count} were set aside, the first: {self.reasons[0]}"
            )
        if self.count:
            self._say(f"{name}: {self.count} of {self.count + left} set aside")


# --- reading records --------------------------------------------------------------------------------------------------


def read_records(path: Location, limit: int | None = None) -> list[StepRecord]:
    """The records of a file in their order, of the first `limit` items.

    RecordError for a missing file, an unknown layout, and when no item is a record. Items that cannot be read are set aside.
    """
    with store_errors(path):
        return list(iter_records(path, limit))


def iter_records(
    path: Location, limit: int | None = None, aside: Aside | None = None
) -> Iterator[StepRecord]:
    """`read_records` one by one; of the records gone by it holds only the ids. What cannot be read is said to `aside`."""
    path = as_path(path)
    seen: dict[str, int] = {}
    aside = aside or Aside()
    for i, item in enumerate(itertools.islice(read_items(path), limit)):
        try:
            if item.fault is not None:
                raise RecordError(f"{item.where}: {item.fault}")
            record = _record(item.raw, item.where, i, path)
            to_line(record)  # refuses what cannot be written again
        except (RecordError, RecursionError) as error:
            if isinstance(error, LayoutError) and not seen:
                raise
            reason = "nests too deeply" if isinstance(error, RecursionError) else str(error)
            aside.add(f"{item.where}: {reason.removeprefix(f'{item.where}: ')}")
            continue
        if (before := seen.setdefault(record.id, i)) != i:
            raise RecordError(
                f"data {path}: records {before} and {i} share the id {record.id!r}; ids must differ"
            )
        yield record
    aside.check_left(f"data {path}", len(seen))


class LayoutError(RecordError):
    """Data of a layout that is not read as it is: where a file begins so, all of it is of that kind."""


def _converted(source: str, raw: Any, name: str, where: str) -> StepRecord:
    """The one record of an item; RecordError where it is none."""
    (found,) = SOURCES[source](raw, name, where)
    if isinstance(found, RecordError):
        raise found
    return found


def _record(raw: Any, where: str, index: int, path: epath.Path) -> StepRecord:
    keys = raw.keys() if isinstance(raw, dict) else {}.keys()
    name = f"{path.stem}-{index}"
    if keys >= set(rlla.SUPERVISED) or keys >= set(rlla.PARQUET):
        return _converted("rlla", raw, name, where)
    if keys >= {"system", "user", "answer"}:
        return _converted("api_bank", raw, name, where)
    if not keys & {"target", "history"}:
        for source, needed in _TO_PREPARE:
            if keys >= needed:
                raise LayoutError(
                    f"{where}: looks like {source} data; make records of it first: "
                    f"rest-jax data prepare {source} {path} OUT"
                )
    if keys & {"target", "history", "tools", "messages"} or not isinstance(raw, dict):
        return _own(raw, where)
    raise LayoutError(
        f"{where}: unknown layout with fields {', '.join(map(str, list(keys)[:6])) or 'none'}; known: our own (id, target, ...), "
        "rlla (instruction, input, output or prompt, reward_model), API-Bank (system, user, answer)"
    )


def _own(raw: Any, where: str) -> StepRecord:
    """A record of our own form. RecordError for one that calls a tool which is not among those that it lists. Not asked of the
    published files of rlla and API-Bank, whose figures count such records, nor where none is listed: the prompt may name it.
    """
    record = from_json(raw, where)
    if record.tools and (strange := not_offered(record)):
        raise RecordError(f"{where}: record {record.id!r}: {said_not_offered(strange)}")
    return record


# --- writing records --------------------------------------------------------------------------------------------------


def check_path(path: pathlib.Path) -> None:
    """RecordError for an ending that is not written, or a folder."""
    if path.suffix not in WRITERS:
        known = " or ".join(WRITERS)
        raise RecordError(
            f"data {path}: records are written as {known}, not {path.suffix or 'without ending'}"
        )
    if path.is_dir():
        raise RecordError(f"data {path}: is a folder, the name of a file is needed")


def to_line(record: StepRecord) -> bytes:
    """The record as one line of JSON. RecordError for what JSON or UTF-8 cannot say."""
    return _json(to_json(record), record)


class JsonlWriter:
    """Writes records one a line. A resource: `close` at the end."""

    def __init__(self, path: pathlib.Path):
        self._file = path.open("wb")

    def write(self, record: StepRecord) -> None:
        """Appends a record; RecordError as for `to_line`."""
        self._file.write(to_line(record) + b"\n")

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class ParquetWriter:
    """Writes records as rows: version (int32), id and source (text), nested fields as JSON strings or null, so that one schema
    fits every source. A resource: the file is readable after `close`.
    """

    def __init__(self, path: pathlib.Path):
        import pyarrow
        import pyarrow.parquet

        texts = [(name, pyarrow.string()) for name in ("id", "source", *NESTED)]
        self._schema = pyarrow.schema([("version", pyarrow.int32()), *texts])
        self._file = pyarrow.parquet.ParquetWriter(path, self._schema)
        self._rows: list[dict[str, Any]] = []

    def write(self, record: StepRecord) -> None:
        """Appends a record; RecordError as for `to_line`."""
        raw = to_json(record)
        nested = {field: _json(raw[field], record) for field in NESTED if field in raw}
        self._rows.append({field: raw[field] for field in ("version", "id", "source")} | nested)
        if len(self._rows) == ROW_GROUP:
            self._flush()

    def close(self) -> None:
        """Writes the rows that are left and closes the file."""
        if self._rows:
            self._flush()
        self._file.close()

    def _flush(self) -> None:
        import pyarrow

        self._file.write_table(pyarrow.Table.from_pylist(self._rows, schema=self._schema))
        self._rows.clear()


WRITERS = {".jsonl": JsonlWriter, ".parquet": ParquetWriter}


def _json(value: Any, record: StepRecord) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, TypeError, RecursionError) as error:
        fields.check_storable(to_json(record), f"record {fields.shown(record.id)}")
        raise RecordError(f"record {record.id!r}: not a JSON value: {error}") from error
