"""Writing record by record: read back equal, whole or not at all, refused before a byte where it cannot be said."""

import errno

import pyarrow.parquet
import pytest

from rest_jax.data.convert import read_records
from rest_jax.data.prepare import writers
from rest_jax.data.records import RecordError, StepRecord
from rest_jax.data.synthetic import world as synthetic
from rest_jax.errors import UserError
from rest_jax.tool_calls import Call, Target

ENDINGS = (".jsonl", ".parquet", ".array_record")


def record(**arguments) -> StepRecord:
    return StepRecord("a", "", (), (), Target((Call("f", arguments),)))


@pytest.mark.parametrize("ending", ENDINGS)
def test_more_than_one_row_group(tmp_path, monkeypatch, ending):
    monkeypatch.setattr(writers, "ROW_GROUP", 16)
    records = synthetic.world("train", 0, 40)
    path = tmp_path / f"r{ending}"
    writers.write_records(path, records)
    assert read_records(path) == records
    if ending == ".parquet":
        assert pyarrow.parquet.ParquetFile(path).num_row_groups == 3


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("inf"), "record 'a': not a JSON value"),
        ("\ud83d", r"record 'a': half a character \('\\ud83d'\)"),
        (b"x", "record 'a': not a JSON value"),
    ],
)
def test_what_json_cannot_say_is_refused(tmp_path, ending, value, message):
    with pytest.raises(RecordError, match=message):
        writers.write_records(tmp_path / "new" / f"r{ending}", [record(), record(x=value)])
    assert list(tmp_path.iterdir()) == []


def test_complete_renames_in_order_and_removes_what_was_not_written(tmp_path):
    new, old, other = tmp_path / "a" / "new", tmp_path / "old", tmp_path / "other"
    old.write_text("of another run")
    other.write_text("of another run")
    with writers.complete([new, old, other]) as (part, _, third):
        part.write_text("1")
        third.write_text("2")
        assert old.read_text() == other.read_text() == "of another run"
    assert new.read_text() == "1" and other.read_text() == "2" and not old.exists()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_complete_leaves_nothing_of_a_failure(tmp_path, error):
    old = tmp_path / "old"
    old.write_text("before")
    with pytest.raises(error), writers.complete([tmp_path / "a" / "b" / "new", old]) as parts:
        for part in parts:
            part.write_text("half")
        raise error
    assert [p.name for p in tmp_path.iterdir()] == ["old"] and old.read_text() == "before"


def test_a_full_disk_is_said_in_one_line(tmp_path):
    with (
        pytest.raises(UserError, match="x: No space left on device; make room"),
        writers.complete([tmp_path / "x"]) as (part,),
    ):
        part.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_paths_that_cannot_be_written(tmp_path):
    with pytest.raises(RecordError, match=r"\.jsonl, \.parquet or \.array_record, not \.csv"):
        writers.check_path(tmp_path / "x.csv")
    (tmp_path / "x.jsonl").mkdir()
    with pytest.raises(RecordError, match="is a folder"):
        writers.check_path(tmp_path / "x.jsonl")
