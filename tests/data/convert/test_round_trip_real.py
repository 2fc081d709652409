"""The real rlla and API-Bank records: to the common record, through our own file, and back to the byte."""

import json

import pyarrow.parquet
import pytest

from rest_jax.data.convert import SOURCES
from rest_jax.data.records import from_json, to_json


def _there_and_back(source, raw):
    records = SOURCES[source].convert(raw, "r", "here")
    stored = [from_json(json.loads(json.dumps(to_json(record)))) for record in records]
    assert stored == records
    return records, SOURCES[source].restore(stored)


def test_rlla_supervised_file_to_the_byte(data_dir):
    data = (data_dir / "rlla" / "rlla_sft.json").read_bytes()
    restored = []
    for raw in json.loads(data):
        (record,), back = _there_and_back("rlla", raw)
        assert record.tools and record.history
        assert record.messages is None and record.extra == {}  # nothing needs to be kept verbatim
        restored.append(back)
    assert len(restored) == 400
    assert json.dumps(restored, indent=4, ensure_ascii=False).encode() == data


def test_rlla_parquet_rows_to_the_byte(data_dir):
    table = pyarrow.parquet.read_table(data_dir / "rlla" / "test.parquet")
    rows = table.to_pylist()
    restored = []
    for raw in rows:
        (record,), back = _there_and_back("rlla", raw)
        assert record.tools and record.history and record.messages is None
        assert set(record.extra) == {"layout", "gold", "raw"}
        assert all(path[0] == "extra_info" for path, *_ in record.extra["raw"])
        restored.append(back)
    assert len(restored) == 80
    assert list(map(json.dumps, restored)) == list(map(json.dumps, rows))
    assert pyarrow.Table.from_pylist(restored, schema=table.schema).equals(table)


@pytest.mark.parametrize(("level", "count"), [(1, 399), (2, 67), (3, 131)])
def test_api_bank_to_the_byte(data_dir, level, count):
    rows = json.loads((data_dir / "api_bank" / f"level-{level}-api_processed.json").read_text())
    for raw in rows:
        (record,), back = _there_and_back("api_bank", raw)
        assert record.tools and record.history
        assert json.dumps(back) == json.dumps(raw)
        assert record.extra["raw"] == [[["other"], raw["other"]]]
    assert len(rows) == count
