"""Reads files of JSON objects piece by piece, so that memory does not grow with the file.

In: a path of JSONL, a JSON list, Parquet or ArrayRecord; which of them is decided by the first bytes, not by the name. Out: one
`Item` for each line, list item, row or record, in order. An item that cannot be read carries a fault and reading goes on;
where the rest of the file cannot be told apart any more (a broken list, a damaged Parquet file), RecordError is raised.
"""

import codecs
import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from rest_jax.data import array_records
from rest_jax.data.records import RecordError

CHUNK = 2**20  # bytes read at once of a JSON list
MAX_ITEM = 2**26  # bytes of one line or list item
BATCH = 512  # Parquet rows decoded at once
NESTED = (
    "tools",
    "history",
    "target",
    "messages",
    "extra",
)  # JSON strings in our own Parquet files

_SPACE = re.compile(r"[ \t\n\r]*").match
_MARK = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"|["\[\]{}]', re.DOTALL).finditer
_decode = json.JSONDecoder().raw_decode


@dataclasses.dataclass(frozen=True, slots=True)
class Item:
    """One object of a file, or what is wrong with it."""

    where: str  # "data FILE: line 3"
    raw: Any  # with a fault: what was found, as text
    fault: str | None
    position: int  # bytes of the file read by then, for progress


def read_items(path: str | pathlib.Path) -> Iterator[Item]:
    """The items of a file. RecordError, before the first item, for a path that is no file."""
    path = pathlib.Path(path)
    if not path.is_file():
        what = "is a folder, a file is needed" if path.is_dir() else "no such file"
        raise RecordError(f"data {path}: {what}")
    with path.open("rb") as file:
        start = file.read(4096)
    if start.startswith(b"PAR1"):
        return _parquet(path)
    if start.startswith(array_records.SIGNATURE):
        return _array_record(path)
    for ending, kind in ((".parquet", "Parquet"), (array_records.ENDING, "ArrayRecord")):
        if path.suffix == ending:
            raise RecordError(f"data {path}: not a {kind} file (its first bytes are not)")
    if start.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        return _json_list(path)
    return _jsonl(path)


def _jsonl(path: pathlib.Path) -> Iterator[Item]:
    with path.open("rb") as file:
        number, position = 0, 0
        while line := file.readline(MAX_ITEM + 1):
            number, position = number + 1, position + len(line)
            where = f"data {path}: line {number}"
            if len(line) > MAX_ITEM:
                position += _skip_line(file, line)
                start = line[:1000].decode("utf-8", "backslashreplace")
                yield Item(where, start, f"longer than {MAX_ITEM:,} bytes", position)
            elif line := (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).strip():
                yield _item(where, line, position)


def _skip_line(file: BinaryIO, line: bytes) -> int:
    """Reads on to the end of a line; the number of bytes read."""
    skipped = 0
    while line and not line.endswith(b"\n"):
        line = file.readline(CHUNK)
        skipped += len(line)
    return skipped


def _item(where: str, text: bytes, position: int) -> Item:
    try:
        return Item(where, json.loads(text.decode("utf-8")), None, position)
    except UnicodeDecodeError as error:
        fault = f"byte {error.start} is not UTF-8"
    except (ValueError, RecursionError) as error:
        fault = f"not JSON: {error}"
    return Item(where, text.decode("utf-8", "backslashreplace"), fault, position)


def _json_list(path: pathlib.Path) -> Iterator[Item]:
    """The items of a list, decoded one by one from a window on the text that moves along."""
    with path.open("rb") as file:
        window = _Window(path, file)
        window.take("[")
        number = 0
        while window.peek() != "]":
            where = f"data {path}: item {number}"
            if number:
                window.take(",")
                window.peek()
            raw, window.at, fault = _next_value(window, where)
            yield Item(where, raw, fault, window.position)
            number += 1
        window.take("]")
        if after := window.peek():
            raise RecordError(f"data {path}: not JSON: {after!r} behind the end of the list")


def _next_value(window: "_Window", where: str) -> tuple[Any, int, str | None]:
    """(value, its end in the window, None); of one that nests too deeply for the decoder (its text, its end, the fault).

    RecordError where the end of the value cannot be told.
    """
    while True:
        raw, end, fault = None, None, None
        try:
            raw, end = _decode(window.text, window.at)
        except (ValueError, RecursionError) as error:
            fault = f"not JSON: {error}"
            if isinstance(error, RecursionError):
                end = _closing(window.text, window.at)
                raw = window.text[window.at : end]
        # a number near the end of the window may go on behind it: of "1e+5" the "1" can be read alone
        if end is not None and end + 2 < len(window.text):
            return raw, end, fault
        if not window.more():
            break
        if len(window.text) > MAX_ITEM:
            raise RecordError(f"{where}: {fault or f'longer than {MAX_ITEM:,} characters'}")
    if end is None:
        raise RecordError(f"{where}: {fault}")
    return raw, end, fault


def _closing(text: str, at: int) -> int | None:
    """Where the list or object that opens at `at` ends, None if not in this text."""
    depth = 0
    for mark in _MARK(text, at):
        if mark[0] == '"':  # a string that goes on behind the text
            return None
        depth += (mark[0] in "[{") - (mark[0] in "]}")
        if not depth:
            return mark.end()
    return None


class _Window:
    """A piece of a text file: `text[at:]` has not been used yet."""

    def __init__(self, path: pathlib.Path, file: BinaryIO):
        self.path, self.file = path, file
        self.text, self.at, self.position = "", 0, 0
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._ended = False

    def more(self) -> bool:
        """Reads on, at least doubling what is not used, so that one long value costs linear time; False at the end."""
        if self._ended:
            return False
        chunk = self.file.read(max(CHUNK, len(self.text) - self.at))
        self._ended = not chunk
        pending = len(self._decoder.getstate()[0])
        try:
            new = self._decoder.decode(chunk, final=self._ended)
        except UnicodeDecodeError as error:
            byte = self.position - pending + error.start
            raise RecordError(f"data {self.path}: byte {byte} is not UTF-8") from error
        self.text, self.at = self.text[self.at :] + new, 0
        self.position += len(chunk)
        return True

    def peek(self) -> str:
        """The next character that is not white space, where `at` then stands; "" at the end."""
        while True:
            self.at = _SPACE(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""

    def take(self, wanted: str) -> None:
        """Passes the next character, which has to be `wanted`."""
        if (found := self.peek()) != wanted:
            what = repr(found) if found else "the end of the file"
            raise RecordError(f"data {self.path}: not JSON: {wanted!r} is needed, found {what}")
        self.at += 1


def _parquet(path: pathlib.Path) -> Iterator[Item]:
    """Rows, a few hundred decoded at once, as plain JSON; the JSON strings of our own nested fields are decoded too."""
    import pyarrow
    import pyarrow.parquet

    size = path.stat().st_size
    try:
        # a buffer and no pre-buffering: pages are read one by one, not a whole row group
        with pyarrow.parquet.ParquetFile(path, buffer_size=CHUNK, pre_buffer=False) as file:
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


def _array_record(path: pathlib.Path) -> Iterator[Item]:
    size = path.stat().st_size
    for number, (total, line) in enumerate(array_records.read(path)):
        yield _item(f"data {path}: record {number}", line, size * (number + 1) // total)
