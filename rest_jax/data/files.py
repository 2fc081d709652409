"""Files of step records: reading them piece by piece, whatever their layout, and writing them.

| file | what it is |
| --- | --- |
| `*.jsonl` | our own records, one JSON object a line (`records.to_json`) |
| `*.parquet` | our own records with nested fields as JSON strings, or an rlla Parquet file (prompt, reward_model, extra_info) |
| `*.json` | rlla for supervised runs (instruction, input, output), API-Bank (system, user, answer, other), or our own as a list |

The first bytes tell JSONL, a JSON list and Parquet apart, the fields of an item tell its layout; the name does not count.
Memory does not grow with the file. Every fault is a `RecordError` naming file, line (item, row) and field.
"""

import codecs
import dataclasses
import io
import itertools
import json
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import ijson
from etils import epath
from ijson.common import ObjectBuilder

from rest_jax.data.convert import rlla
from rest_jax.data.fields import MAX_DEPTH, RecordError
from rest_jax.data.records import StepRecord, from_json, to_json
from rest_jax.files import Location, as_path, open_bytes, store_errors

CHUNK = 2**16  # bytes read at once of a JSON list, and of an overlong line
MAX_ITEM = 2**26  # bytes of one line or list item
BATCH = 512  # Parquet rows decoded at once
ROW_GROUP = 4096  # Parquet rows written, and held in memory, at once
_DEPTH = {"start_map": 1, "start_array": 1, "end_map": -1, "end_array": -1}
NESTED = ("tools", "history", "target", "messages", "extra")  # JSON strings in our Parquet files

# Fields by which data is known that holds several records an item, and so is not read as it is.
_TO_PREPARE = {
    "openai": {"messages"},
    "toolace": {"system", "conversations"},
    "xlam": {"query", "tools", "answers"},
}


@dataclasses.dataclass(frozen=True, slots=True)
class Item:
    """One object of a file, or what is wrong with it."""

    where: str  # "data FILE: line 3"
    raw: Any  # with a fault: the text that was read, None where it was not kept
    fault: str | None
    position: int  # bytes of the file read by then, for progress


# --- reading records --------------------------------------------------------------------------------------------------


def read_records(path: Location, limit: int | None = None) -> list[StepRecord]:
    """The records of a file in their order, at most `limit`.

    RecordError for a missing or empty file, an unknown layout or an unreadable record (file, line or row, and field).
    """
    with store_errors(path):
        records = list(iter_records(path, limit))
    if not records:
        raise RecordError(f"data {path}: no records")
    return records


def iter_records(path: Location, limit: int | None = None) -> Iterator[StepRecord]:
    """`read_records` one by one; of the records gone by it holds only the ids. An empty file gives none."""
    path = as_path(path)
    seen: dict[str, int] = {}
    for i, item in enumerate(itertools.islice(read_items(path), limit)):
        if item.fault is not None:
            raise RecordError(f"{item.where}: {item.fault}")
        record = _record(item.raw, item.where, i, path)
        if (first := seen.setdefault(record.id, i)) != i:
            raise RecordError(
                f"data {path}: records {first} and {i} share the id {record.id!r}; ids must differ"
            )
        yield record


def _record(raw: Any, where: str, index: int, path: epath.Path) -> StepRecord:
    keys = raw.keys() if isinstance(raw, dict) else {}.keys()
    name = f"{path.stem}-{index}"
    if keys >= set(rlla.SUPERVISED) or keys >= set(rlla.PARQUET):
        return rlla.convert(raw, name, where)[0]
    if keys >= {"system", "user", "answer"}:
        return rlla.convert_api_bank(raw, name, where)[0]
    if not keys & {"target", "history"}:
        for source, needed in _TO_PREPARE.items():
            if keys >= needed:
                raise RecordError(
                    f"{where}: looks like {source} data; make records of it first: "
                    f"rest-jax data prepare {source} {path} OUT"
                )
    if keys & {"target", "history", "tools", "messages"} or not isinstance(raw, dict):
        return from_json(raw, where)
    raise RecordError(
        f"{where}: unknown layout with fields {', '.join(map(str, list(keys)[:6])) or 'none'}; known: our own (id, target, ...), "
        "rlla (instruction, input, output or prompt, reward_model), API-Bank (system, user, answer)"
    )


# --- reading items ----------------------------------------------------------------------------------------------------


def read_items(path: Location) -> Iterator[Item]:
    """The items of a file: lines, list items or rows, in order. An item that cannot be read carries a fault and reading
    continues; RecordError where the rest cannot be told apart (a broken list, a damaged Parquet file), and at once for a path
    that is no file.
    """
    path = as_path(path)
    with store_errors(path):
        if not path.is_file():
            what = "is a folder, a file is needed" if path.is_dir() else "no such file"
            raise RecordError(f"data {path}: {what}")
        with open_bytes(path) as file:
            start = file.read(4096)
    if start.startswith(b"PAR1"):
        return _parquet_rows(path)
    if path.suffix == ".parquet":
        raise RecordError(f"data {path}: not a Parquet file (its first bytes are not)")
    if start.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        return _list_items(path)
    return _lines(path)


def _lines(path: epath.Path) -> Iterator[Item]:
    with open_bytes(path) as file:
        number, position = 0, 0
        while line := file.readline(MAX_ITEM + 1):
            number, position = number + 1, position + len(line)
            where = f"data {path}: line {number}"
            if len(line) > MAX_ITEM:
                start = line[:1000].decode("utf-8", "backslashreplace")
                while line and not line.endswith(b"\n"):
                    position += len(line := file.readline(CHUNK))
                yield Item(where, start, f"longer than {MAX_ITEM:,} bytes", position)
            elif line := (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).strip():
                yield _line_item(where, line, position)


def _line_item(where: str, text: bytes, position: int) -> Item:
    try:
        return Item(where, json.loads(text.decode("utf-8")), None, position)
    except UnicodeDecodeError as error:
        fault = f"byte {error.start} is not UTF-8"
    except (ValueError, RecursionError) as error:
        fault = f"not JSON: {error}"
    return Item(where, text.decode("utf-8", "backslashreplace"), fault, position)


def _list_items(path: epath.Path) -> Iterator[Item]:
    """The items of a JSON list. Nothing is built of an item that nests deeper than 64."""
    number, depth, fault, item_start = 0, 0, None, 0
    builder = ObjectBuilder()
    for events, error, position in _list_events(path):
        for event, value in events:
            depth += _DEPTH.get(event, 0)
            if depth == 0 or (depth == 1 and event == "start_array"):
                continue  # the brackets of the list itself
            if depth > MAX_DEPTH:
                fault = f"nests deeper than {MAX_DEPTH}"
            if fault is None:
                builder.event(event, value)
            if depth == 1:
                raw = None if fault else builder.value
                yield Item(f"data {path}: item {number}", raw, fault, position)
                number, fault, item_start, builder = number + 1, None, position, ObjectBuilder()
        if position - item_start > MAX_ITEM:
            error = f"longer than {MAX_ITEM:,} bytes"
        if error is not None:
            raise RecordError(f"data {path}: item {number}: {error}")


def _list_events(path: epath.Path) -> Iterator[tuple[list[Any], str | None, int]]:
    """(the parser's events, what is wrong behind them, bytes read by then) for each piece of a JSON file."""
    events = ijson.sendable_list()
    parser = ijson.basic_parse_coro(events, use_float=True)
    with open_bytes(path) as file:
        if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
            file.seek(0)
        ended = False
        while not ended:
            chunk, error = file.read(CHUNK), None
            ended = not chunk
            try:
                parser.close() if ended else parser.send(chunk)
            except ijson.JSONError as caught:
                # yajl shows the text on further lines, and says what is not UTF-8 as the text of bytes
                reason = str(caught).removeprefix("b'").replace("\\n", "\n").partition("\n")[0]
                error = f"not JSON: {reason:.100}"
            yield events, error, file.tell()
            events.clear()


def _parquet_rows(path: epath.Path) -> Iterator[Item]:
    """Rows, a few hundred decoded at once, as plain JSON; the JSON strings of our own nested fields are decoded too."""
    import pyarrow
    import pyarrow.parquet

    try:
        # pages are read one by one, not a whole row group: a small buffer, no pre-buffering
        with (
            open_bytes(path) as opened,
            pyarrow.parquet.ParquetFile(opened, buffer_size=2**20, pre_buffer=False) as file,
        ):
            size = opened.seek(0, io.SEEK_END)
            total, number = file.metadata.num_rows, 0
            for batch in file.iter_batches(BATCH, use_threads=False):
                for raw in batch.to_pylist():
                    number += 1
                    where = f"data {path}: row {number - 1}"
                    yield _own_row(where, _plain(raw), size * number // total)
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise RecordError(f"data {path}: not a readable Parquet file: {reason}") from error


def _plain(value: Any) -> Any:
    """What JSON can hold of a row. Fields that are null are left out, since Arrow gives every object of a column the fields of
    all, but for the `content` of a message; what is no JSON value (a time, a decimal, bytes) becomes text, NaN and infinity null.
    """
    if isinstance(value, dict):
        members = ((key, _plain(inner)) for key, inner in value.items())
        kept = ("content",) if "role" in value else ()
        return {key: inner for key, inner in members if inner is not None or key in kept}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)


def _own_row(where: str, raw: dict[str, Any], position: int) -> Item:
    if isinstance(raw.get("target"), str):
        for field in NESTED:
            if isinstance(text := raw.get(field), str):
                try:
                    raw[field] = json.loads(text)
                except (ValueError, RecursionError) as error:
                    return Item(where, text, f"{field}: not JSON: {error}", position)
    return Item(where, raw, None, position)


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
    except UnicodeEncodeError as error:
        raise RecordError(
            f"record {record.id!r}: half a character ({error.object[error.start]!a}), which no UTF-8 text can hold"
        ) from error
    except (ValueError, TypeError, RecursionError) as error:
        raise RecordError(f"record {record.id!r}: not a JSON value: {error}") from error
