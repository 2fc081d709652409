"""Files as items: lines, list items or rows, read piece by piece, whatever the file is.

| content | its items |
| --- | --- |
| lines of JSON | the lines |
| a JSON list, or an object that holds one: {"train": [...]} | the values of the list |
| JSON objects over several lines | the objects |
| Parquet | the rows |

The first bytes tell these apart, and whether they are compressed (gzip, bzip2, xz) or UTF-16; the name does not count. Memory
does not grow with the file, nor with a line or list item that is too long. What is wrong with one item is a fault of that item;
what is wrong with the file is a `RecordError` that names it.
"""

import bz2
import codecs
import contextlib
import dataclasses
import gzip
import io
import lzma
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any

from etils import epath

from rest_jax.data import fields
from rest_jax.data.fields import MAX_DEPTH, RecordError
from rest_jax.files import Location, as_path, is_url, nearest_path, open_bytes, store_errors

HEAD = 2**16  # bytes by which a file is known
CHUNK = 2**16  # bytes read at once of a JSON document, and of an overlong line
MAX_ITEM = 2**24  # bytes of one line or list item
BATCH = 512  # Parquet rows decoded at once
NESTED = ("tools", "history", "target", "messages", "extra")  # JSON strings in our Parquet files

# Under which name an object holds the list of items.
_LISTS = {"train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval"}
_LISTS |= {"data", "dataset", "records", "rows", "items", "examples", "samples", "instances"}
_LISTS |= {"dialogues", "dialogs"}
# The fields by which an object is an item itself, whatever lists it has beside them.
_ITEMS = ({"messages"}, {"conversations"}, {"conversation"}, {"input", "tools"}, {"id", "target"})
_ITEMS += ({"query", "answers"}, {"instruction", "input", "output"}, {"prompt", "reward_model"})
_ITEMS += ({"system", "user", "answer"},)
_COMPRESSED: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
}
_ENCODINGS = {  # by byte order mark; the longer ones first
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_OTHERS = {
    b"PK\x03\x04": "a ZIP archive; unpack it",
    b"\x28\xb5\x2f\xfd": "compressed by Zstandard; unpack it (zstd -d)",
    b"ARROW1": "an Arrow file; write it as Parquet or JSON lines",
    b"SQLite format 3": "an SQLite database; write its rows as JSON lines",
    b"Obj\x01": "an Avro file; write it as Parquet or JSON lines",
    b"\x89HDF": "an HDF5 file; write it as Parquet or JSON lines",
    **dict.fromkeys(
        (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"),
        "a pickle, which is not read since it may run code; write it as JSON lines",
    ),
    b"7z\xbc\xaf\x27\x1c": "a 7z archive; unpack it",
    b"Rar!\x1a\x07": "a RAR archive; unpack it",
    b"MSCF": "a CAB archive; unpack it",
    b"\x04\x22\x4d\x18": "compressed by LZ4; unpack it (lz4 -d)",
    b"\x1f\x9d": "compressed by compress; unpack it (uncompress)",
    b"\x5d\x00\x00": "compressed by LZMA without the header of xz; unpack it (unlzma)",
    b"\x93NUMPY": "an array of NumPy; write it as JSON lines",
    b"ORC": "an ORC file; write it as Parquet or JSON lines",
    b"FEA1": "a Feather file; write it as Parquet or JSON lines",
    b"GGUF": "a model in GGUF, no records",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
    b"%PDF": "a PDF",
    b"version https://git-lfs": "a pointer of Git LFS, not the file; fetch it (git lfs pull)",
    b"---": "YAML; write it as JSON lines",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Item:
    """One object of a file, or what is wrong with it."""

    where: str  # "data FILE: line 3"
    raw: Any  # with a fault: the text that was read, None where it was not kept
    fault: str | None
    position: int  # bytes of the file read by then, for progress


def read_items(path: Location) -> Iterator[Item]:
    """The items of a file: lines, list items or rows, in order. An item that cannot be read carries a fault and reading
    continues; RecordError where the rest cannot be told apart (a list that breaks off, a damaged Parquet file), and at once for a
    path that is no file, or a file that is something else.
    """
    path = as_path(path)
    with store_errors(path):
        if not path.is_file():
            if path.is_dir():
                raise RecordError(f"data {path}: is a folder, a file is needed")
            raise RecordError(f"data {path}: no such file{nearest_path(path, folders=False)}")
        if not is_url(path) and not stat.S_ISREG(os.stat(path).st_mode):
            raise RecordError(f"data {path}: a pipe or a device; write it to a file")
        with open_bytes(path) as file:
            start = file.read(64)
    if start.startswith(b"PAR1"):
        return _read(path, _parquet_rows(path))
    if path.suffix == ".parquet":
        raise RecordError(f"data {path}: not a Parquet file (its first bytes are not)")
    with store_errors(path), _decoded(path) as (file, _):
        start = file.read(HEAD)
    _check_text(start, path)
    return _read(path, _items(path, *_layout(start)))


def _read(path: epath.Path, items: Iterator[Item]) -> Iterator[Item]:
    """The items, with one line for what a store's package raises on the way."""
    with store_errors(path):
        yield from items


def _check_text(start: bytes, path: epath.Path) -> None:
    """RecordError, which says what it is, for a file that is not text."""
    if start.startswith(b"PAR1"):
        raise RecordError(f"data {path}: a compressed Parquet file; unpack it")
    if start.startswith(tuple(_COMPRESSED)):
        raise RecordError(f"data {path}: compressed twice; unpack it once")
    if start[257:262] == b"ustar" and b"\0" in start[:257]:
        raise RecordError(f"data {path}: a tar archive; unpack it")
    for magic, what in _OTHERS.items():
        if start.startswith(magic):
            raise RecordError(f"data {path}: {what}")
    if start.lstrip()[:9].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise RecordError(f"data {path}: a web page; fetch the file itself")
    needed = "JSON lines, a JSON list or Parquet are needed"
    if b"\0" in start[:512]:
        raise RecordError(f"data {path}: not UTF-8 text; {needed}")
    if start.strip() and (not _may_be_json(start) or _section(start)):
        raise RecordError(f"data {path}: not JSON: {fields.shown(_said(start))}; {needed}")


@contextlib.contextmanager
def _decoded(path: epath.Path) -> Iterator[tuple[IO[bytes], Callable[[], int]]]:
    """(the file's text as UTF-8 without byte order mark, how many bytes of the file are read). RecordError for a damaged file."""
    with contextlib.ExitStack() as stack:
        raw: IO[bytes] = stack.enter_context(open_bytes(path))
        file, start = raw, raw.read(8)
        raw.seek(0)
        try:
            for magic, unpack in _COMPRESSED.items():
                if start.startswith(magic):
                    file = stack.enter_context(unpack(raw, "rb"))
                    start = file.read(8)
                    file.seek(0)
            encoding = next((e for bom, e in _ENCODINGS.items() if start.startswith(bom)), None)
            if encoding is not None:
                file = io.BufferedReader(_Recoded(file, encoding), CHUNK)
            elif start.startswith(codecs.BOM_UTF8):
                file.read(len(codecs.BOM_UTF8))
            yield file, raw.tell
        except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            if getattr(error, "errno", None) is not None:  # not the content's fault
                raise
            raise RecordError(f"data {path}: damaged: {error}") from error
        except UnicodeDecodeError as error:
            raise RecordError(f"data {path}: not {error.encoding}: {error.reason}") from error


class _Recoded(io.RawIOBase):
    """A file of another encoding as UTF-8. Half a character stays what UTF-8 cannot hold, so that its item is at fault."""

    def __init__(self, file: IO[bytes], encoding: str):
        self._file, self._left = file, b""
        self._decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            read = self._file.read(CHUNK)
            self._left = self._decoder.decode(read, not read).encode("utf-8", "surrogatepass")
            if not read:
                break
        count = min(len(buffer), len(self._left))
        buffer[:count], self._left = self._left[:count], self._left[count:]
        return count


_may_be_json = re.compile(
    rb'^\s*+(?:["{\[]|(?:null|true|false|-?\d[-+.eE\d]*+)\s*+$)', re.MULTILINE
).search
# The header that TOML and INI begin with: a bare word in brackets, alone in its line.
_section = re.compile(
    rb"\s*+\[{1,2}[ \t]*+(?!(?:null|true|false)\b)[A-Za-z_][^\[\]{},\n]*+\]{1,2}[ \t]*+(?:[#;\r\n]|\Z)"
).match
_list_start = re.compile(rb"\s*\[").match
_member = re.compile(r'\s*+[{,]\s*+"((?:[^"\\]|\\.)*+)"\s*+:\s*+(\[?)').match


def _layout(start: bytes) -> tuple[int, int]:
    """(bytes before the first item, depth at which items stand) of a document; (0, -1) of lines.

    Items are the values of a list (1), those of a list that an object holds (2), or objects over several lines (0).
    """
    if (found := _list_start(start)) is not None:
        return found.end(), 1
    first, ended, others = start.lstrip().partition(b"\n")
    if not first.startswith(b"{") or _are_lines(first, others):
        return 0, -1
    if (end := _pass_members(start)[1]) is not None and not _is_item(start):
        return end, 2
    return 0, 0 if ended and _is_open(first) else -1


def _are_lines(first: bytes, others: bytes) -> bool:
    """Whether lines are items, as the first two of them say: two objects, or a second one that nothing of the first continues
    behind, so that the first was cut.
    """
    second, _, third = others.lstrip().partition(b"\n")
    if _is_object(first):
        return second.startswith(b"{")
    return _is_object(second) and not third.lstrip().startswith((b",", b"]", b"}"))


def _is_object(line: bytes) -> bool:
    """Whether a line of JSON is one object from its beginning to its end."""
    scanner = Scanner(0)
    found = list(scanner.feed(line.strip()))
    return line.startswith(b"{") and len(found) == 1 and not scanner.depth and not scanner.begun


def _is_item(text: bytes) -> bool:
    """Whether an object has the fields of an item, as far as the text goes."""
    said, at, keys = text.decode("latin-1"), 0, set()
    while (member := _member(said, at)) is not None:
        keys.add(member[1])
        try:
            at = fields.ITEM_DECODER.raw_decode(said, member.start(2))[1]
        except (ValueError, RecursionError):
            break
    return any(keys >= needed for needed in _ITEMS)


def _pass_members(text: bytes) -> tuple[int, int | None]:
    """(where the members of an object end that can be passed over, where behind that a list of items opens, if it does)."""
    said, at = text.decode("latin-1"), 0  # a letter a byte
    while (member := _member(said, at)) is not None:
        if member[2] and member[1].lower() in _LISTS:
            return at, member.end()
        if member[2]:  # of turns, or of tools: it is an item
            break
        try:
            at = fields.ITEM_DECODER.raw_decode(said, member.start(2))[1]
        except (ValueError, RecursionError):
            break
    return at, None


def _is_open(line: bytes) -> bool:
    """Whether a line of JSON ends within its object, so that the object continues in the next line."""
    scanner = Scanner(0)
    ended = list(scanner.feed(line))
    goes_on = line.rstrip()[-1:] in (b"{", b"[", b",", b":")
    return not ended and scanner.depth > 0 and not scanner.quoted and goes_on


def _items(path: epath.Path, skipped: int, depth: int) -> Iterator[Item]:
    with _decoded(path) as (file, position):
        if depth < 0:
            yield from _lines(path, file, position)
        else:
            file.read(skipped)
            yield from _document(path, file, position, depth)


def _lines(path: epath.Path, file: IO[bytes], position: Callable[[], int]) -> Iterator[Item]:
    number = 0
    while line := file.readline(MAX_ITEM + 1):
        number += 1
        where = f"data {path}: line {number}"
        if len(line) > MAX_ITEM:
            start = line[:1000].decode("utf-8", "backslashreplace")
            while line and not line.endswith(b"\n"):
                line = file.readline(CHUNK)
            yield Item(where, start, f"longer than {MAX_ITEM:,} bytes", position())
        elif line := line.strip():
            yield _item(where, line, position())


def _item(where: str, text: bytes, position: int) -> Item:
    try:
        return Item(where, fields.ITEM_DECODER.decode(text.decode("utf-8")), None, position)
    except UnicodeDecodeError as error:
        fault = f"byte {error.start} is not UTF-8"
    except (ValueError, RecursionError) as error:
        fault = f"not JSON: {error}: {fields.shown(_said(text))}"
    return Item(where, text.decode("utf-8", "backslashreplace"), fault, position)


def _document(
    path: epath.Path, file: IO[bytes], position: Callable[[], int], depth: int
) -> Iterator[Item]:
    """The items of a list, or the objects that follow each other (depth 0)."""
    scanner, number = Scanner(min(depth, 1)), 0
    while not scanner.ended and (chunk := file.read(CHUNK)):
        for text, fault in scanner.feed(chunk):
            where = f"data {path}: item {number}"
            number += 1
            if fault is None:
                yield _item(where, text, position())
            else:
                said = text[:1000].decode("utf-8", "backslashreplace")
                yield Item(where, said, fault, position())
    rest = scanner.rest + file.read(HEAD)
    held = depth == 2 and not rest.strip()  # without the bracket that closes the object
    if (not scanner.ended and (depth or scanner.begun)) or held:
        raise RecordError(f"data {path}: item {number}: not JSON: the file breaks off")
    if depth == 2 and rest[_pass_members(rest)[0] :].strip() != b"}":
        raise RecordError(
            f"data {path}: the object has more than one list: {fields.shown(_said(rest))}; "
            "make a file of each"
        )
    if depth < 2 and (rest.strip() or scanner.depth < 0):
        raise RecordError(f"data {path}: text behind the end: {fields.shown(_said(rest))}")


def _said(text: bytes) -> str:
    return text.strip()[:60].decode("utf-8", "backslashreplace")


_inside = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL).match
_string = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
# What stands between brackets, with the strings that end in it; at the level of the items a comma is a border too.
_outside = re.compile(rb'[^"{}\[\]]*+(?:' + _string + rb'[^"{}\[\]]*+)*+', re.DOTALL).match
_between = re.compile(rb'[^"{}\[\],]*+(?:' + _string + rb'[^"{}\[\],]*+)*+', re.DOTALL).match
_QUOTE, _COMMA, _OPENING, _CLOSING = b'"'[0], b","[0], b"{[", b"}]"


class Scanner:
    """Finds the items of a JSON document, fed to it in pieces: those between the commas of a list (`level` 1; fed from behind its
    opening bracket), or objects that follow each other (0). It looks at brackets, strings and commas only, and keeps no more
    than the item begun, of one that is too long or too deep its beginning.
    """

    def __init__(self, level: int):
        self.level = self.depth = level
        self.ended = False  # the list is
        self.rest = b""  # behind the list
        self.quoted = False
        self._carry = b""  # a backslash whose letter is in the next piece
        self._parts: list[bytes] = []  # of the item begun
        self._size, self._fault, self._commas = 0, None, 0

    @property
    def begun(self) -> bool:
        """Whether there is something of an item that has not ended."""
        return bool(self._carry or b"".join(self._parts).strip())

    def feed(self, piece: bytes) -> Iterator[tuple[bytes, str | None]]:
        """(text, fault) of every item that ends in the piece."""
        data, at, begun = self._carry + piece, 0, 0
        self._carry = b""
        while at < len(data):
            outside = _outside if self.depth > self.level else _between
            at = (_inside if self.quoted else outside)(data, at).end()  # pyright: ignore
            if at == len(data):
                break
            mark = data[at]
            if self.quoted and mark != _QUOTE:
                self._carry, data = data[at:], data[:at]
                break
            at += 1
            if mark == _QUOTE:
                self.quoted = not self.quoted
            elif mark in _OPENING:
                self.depth += 1
                if self.depth - self.level > MAX_DEPTH:
                    self._fault = f"nests deeper than {MAX_DEPTH}"
            elif mark in _CLOSING:
                self.depth -= 1
                if self.depth < self.level:
                    self.ended, self.rest = True, data[at:]
                    text, fault = self._take(data[begun : at - 1])
                    if self._commas or text.strip():
                        yield text, fault
                    return
                if self.depth == self.level == 0:
                    yield self._take(data[begun:at])
                    begun = at
            elif self.depth == self.level == 1:
                self._commas += 1
                yield self._take(data[begun : at - 1])
                begun = at
        self._keep(data[begun:])

    def _take(self, part: bytes) -> tuple[bytes, str | None]:
        """(text, fault) of the item that this part ends."""
        self._keep(part)
        taken = b"".join(self._parts), self._fault
        self._parts, self._size, self._fault = [], 0, None
        return taken

    def _keep(self, part: bytes) -> None:
        self._size += len(part)
        if self._size > MAX_ITEM:
            self._fault = f"longer than {MAX_ITEM:,} bytes"
        self._parts.append(part)
        if self._fault is not None:
            self._parts = [b"".join(self._parts)[:1000]]


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
    all, but for the `content` of a message; what is no JSON value (a time, a decimal, bytes) becomes text.
    """
    if isinstance(value, dict):
        members = ((key, _plain(inner)) for key, inner in value.items())
        kept = ("content",) if "role" in value else ()
        return {key: inner for key, inner in members if inner is not None or key in kept}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if value is None or isinstance(value, str | int | float):
        return value
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)


def _own_row(where: str, raw: dict[str, Any], position: int) -> Item:
    if isinstance(raw.get("target"), str):
        for field in NESTED:
            if isinstance(text := raw.get(field), str):
                try:
                    raw[field] = fields.ITEM_DECODER.decode(text)
                except (ValueError, RecursionError) as error:
                    return Item(where, text, f"{field}: not JSON: {error}", position)
    return Item(where, raw, None, position)
