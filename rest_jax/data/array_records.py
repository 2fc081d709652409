"""ArrayRecord files of JSON objects: one record an object, readable at any place, in groups of compressed records.

The package array_record comes with Grain, except on Windows; without it a UserError says so.
"""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

from rest_jax.data.records import RecordError
from rest_jax.errors import UserError

ENDING = ".array_record"
SIGNATURE = bytes.fromhex("83af70d10d884a3f")  # the first bytes of every Riegeli file

_GROUP = 64  # records compressed together: a third of the size of single ones
_BATCH = 512  # records read at once
_READER = "readahead_buffer_size:1M,max_parallelism:1"


def module() -> Any:
    """The package's reader and writer. UserError where it is not installed."""
    try:
        from array_record.python import array_record_module  # type: ignore[attr-defined]
    except ImportError as error:
        raise UserError(
            f"{ENDING} files need the package array_record: pip install array-record (Linux and macOS), "
            "or use .jsonl or .parquet"
        ) from error
    return array_record_module


def read(path: pathlib.Path) -> Iterator[tuple[int, bytes]]:
    """(number of records in the file, one record) for each. RecordError for a damaged file."""
    reader = module().ArrayRecordReader(str(path), _READER)
    try:
        total = reader.num_records()
        if not reader.ok():
            raise RecordError(
                f"data {path}: not a readable ArrayRecord file (cut off or damaged); make it again"
            )
        for start in range(0, total, _BATCH):
            stop = min(start + _BATCH, total)
            try:
                records = reader.read(start, stop)
            except (RuntimeError, ValueError, IndexError) as error:
                reason = str(error).split(";")[0]
                raise RecordError(
                    f"data {path}: records {start} to {stop - 1}: {reason}"
                ) from error
            yield from ((total, record) for record in records)
    finally:
        with contextlib.suppress(RuntimeError):  # closing reports the damage once more
            reader.close()


def writer(path: pathlib.Path) -> Any:
    """An open writer: `write(bytes)`, `close()`."""
    return module().ArrayRecordWriter(str(path), f"group_size:{_GROUP}")
