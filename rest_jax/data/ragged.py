"""Rows of different lengths in flat arrays, which may lie in files, and step records kept as such rows."""

import json
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from rest_jax.data.records import StepRecord, restored, to_json


class FileArray:
    """A flat array in a file, of which a slice is read when it is asked for. The pages of a mapped file would count as memory of
    the process, in the end all of them.
    """

    def __init__(self, path: pathlib.Path, dtype: type):
        self.dtype = np.dtype(dtype)
        self._file = path.open("rb")
        self._size = os.fstat(self._file.fileno()).st_size // self.dtype.itemsize

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(self._size)
        width = self.dtype.itemsize
        read = os.pread(self._file.fileno(), max(stop - start, 0) * width, start * width)
        return np.frombuffer(read, self.dtype)


class Ragged(Sequence[np.ndarray]):
    """Read-only rows: row i is the part `starts[i] : starts[i] + lengths[i]` of the arrays, thought joined end to end.

    `arrays` are flat and of one dtype, `starts` and `lengths` int64 [N]; no row may cross from one array to the next.
    """

    def __init__(
        self, arrays: Sequence[np.ndarray | FileArray], starts: np.ndarray, lengths: np.ndarray
    ):
        self.arrays, self.starts, self.lengths = arrays, starts, lengths
        self._ends = np.cumsum([len(array) for array in arrays])

    @classmethod
    def of(cls, rows: Sequence[np.ndarray]) -> "Ragged":
        """The rows, which have one dtype, copied into one array."""
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        joined = np.concatenate(rows) if len(rows) else np.zeros(0, np.int32)
        return cls([joined], np.cumsum(lengths) - lengths, lengths)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> np.ndarray:
        start, length = int(self.starts[index]), int(self.lengths[index])
        # An empty row at the very end begins behind all arrays.
        which = min(int(np.searchsorted(self._ends, start, "right")), len(self.arrays) - 1)
        begin = start - (int(self._ends[which]) - len(self.arrays[which]))
        return self.arrays[which][begin : begin + length]

    def take(self, index: np.ndarray) -> "Ragged":
        """The rows `index`, int [M], of the same arrays."""
        return Ragged(self.arrays, self.starts[index], self.lengths[index])


class StoredRecords(Sequence[StepRecord]):
    """Records as rows of JSON (uint8), each parsed when it is asked for."""

    def __init__(self, rows: Ragged):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> StepRecord:
        return restored(json.loads(self.rows[index].tobytes()))

    def take(self, index: np.ndarray) -> "StoredRecords":
        """The records `index`, int [M]."""
        return StoredRecords(self.rows.take(index))


def to_bytes(record: StepRecord) -> bytes:
    """The record as a row of `StoredRecords`. ASCII, so that it can hold half a character, which UTF-8 cannot."""
    return json.dumps(to_json(record)).encode()


def lengths_of(rows: Sequence[np.ndarray]) -> np.ndarray:
    """int64 [N]: the lengths of the rows."""
    if isinstance(rows, Ragged):
        return rows.lengths
    return np.fromiter(map(len, rows), np.int64, len(rows))


def take_records(records: Sequence[StepRecord], index: np.ndarray) -> Sequence[StepRecord]:
    """The records `index`, int [M]."""
    return (
        records.take(index) if isinstance(records, StoredRecords) else [records[i] for i in index]
    )
