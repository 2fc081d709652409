"""Rows of different lengths over one array or several, and records kept as rows."""

import pathlib

import numpy as np
import pytest

from rest_jax.data.ragged import (
    FileArray,
    Ragged,
    StoredRecords,
    lengths_of,
    take_records,
    to_bytes,
)
from rest_jax.data.records import StepRecord
from rest_jax.data.synthetic import world as synthetic
from rest_jax.tool_calls import Target

ROWS = [np.arange(n, dtype=np.int32) + 10 * n for n in (3, 0, 5, 1, 0)]


def split() -> Ragged:
    """The rows in three arrays, the second of which is empty."""
    arrays = [np.concatenate(ROWS[:2]), np.zeros(0, np.int32), np.concatenate(ROWS[2:])]
    whole = Ragged.of(ROWS)
    return Ragged(arrays, whole.starts, whole.lengths)


def in_files(folder: pathlib.Path) -> Ragged:
    """The same, with arrays in files."""
    made = split()
    for i, array in enumerate(made.arrays):
        array.tofile(folder / str(i))
    arrays = [FileArray(folder / str(i), np.int32) for i in range(len(made.arrays))]
    return Ragged(arrays, made.starts, made.lengths)


@pytest.mark.parametrize("kind", ["one", "split", "files"])
def test_rows_are_those_given(kind, tmp_path):
    ragged = (
        in_files(tmp_path) if kind == "files" else {"one": Ragged.of(ROWS), "split": split()}[kind]
    )
    assert len(ragged) == 5 and ragged.lengths.tolist() == [3, 0, 5, 1, 0]
    assert [row.tolist() for row in ragged] == [row.tolist() for row in ROWS]
    assert ragged[-2].tolist() == [10] and ragged[2].dtype == np.int32
    taken = ragged.take(np.array([2, 0, 2]))
    assert [row.tolist() for row in taken] == [ROWS[i].tolist() for i in (2, 0, 2)]
    with pytest.raises(IndexError):
        ragged[5]


def test_no_rows():
    assert len(Ragged.of([])) == 0 and list(Ragged.of([])) == []
    assert lengths_of(Ragged.of(ROWS)).tolist() == lengths_of(ROWS).tolist()


def test_records_are_those_stored():
    half = StepRecord("\ud83d", "", (), (), Target(response="\N{LATIN SMALL LETTER E WITH ACUTE}"))
    records = [*synthetic.world("train", 0, 4, "reasoned"), half]
    stored = StoredRecords(
        Ragged.of([np.frombuffer(to_bytes(record), np.uint8) for record in records])
    )
    assert list(stored) == records
    for form in (records, stored):
        assert list(take_records(form, np.array([4, 1]))) == [half, records[1]]
