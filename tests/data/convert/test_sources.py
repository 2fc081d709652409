"""Files of records: our own in both forms, rlla and API-Bank as they are, and the faults a file can have."""

import dataclasses
import json

import pyarrow
import pyarrow.parquet
import pytest

from rest_jax.data.convert import read_records, write_records
from rest_jax.data.records import RecordError
from rest_jax.data.synthetic import world as synthetic
from rest_jax.templates import TEMPLATES
from rest_jax.tool_calls import Call


@pytest.mark.parametrize("ending", ["jsonl", "parquet", "array_record"])
def test_write_and_read(tmp_path, ending):
    records = synthetic.world("train", 0, 50)
    path = tmp_path / "new" / f"records.{ending}"
    write_records(path, records)
    assert read_records(path) == records
    assert read_records(path, limit=7) == records[:7]
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_version_and_extra_are_in_the_file(tmp_path, ending):
    record = synthetic.world("train", 0, 1)[0]
    record = dataclasses.replace(record, extra={"raw": [[["id"], 3]]})
    path = tmp_path / f"r.{ending}"
    write_records(path, [record])
    assert read_records(path) == [record]
    if ending == "parquet":
        table = pyarrow.parquet.read_table(path)
        assert table["version"].to_pylist() == [1]
        place = table.schema.get_field_index("version")
        newer = pyarrow.array([2], pyarrow.int32())
        pyarrow.parquet.write_table(table.set_column(place, "version", newer), path)
    else:
        text = path.read_text()
        assert '"version": 1' in text
        path.write_text(text.replace('"version": 1', '"version": 2'))
    with pytest.raises(RecordError, match="version: 2 is not known here, 1 is the newest"):
        read_records(path)


def test_rlla_and_its_gold_answers_survive_our_own_files(tmp_path, data_dir):
    records = read_records(data_dir / "rlla" / "rlla_sft.json", limit=20)
    for ending in ("jsonl", "parquet"):
        write_records(tmp_path / f"r.{ending}", records)
        assert read_records(tmp_path / f"r.{ending}") == records


def test_rlla_supervised(data_dir):
    path = data_dir / "rlla" / "rlla_sft.json"
    records, raw = read_records(path), json.loads(path.read_text())
    assert len(records) == len(raw) == 400
    for record, item in zip(records, raw, strict=True):
        assert record.target.text == item["output"]
        prompt = record.prompt_messages(TEMPLATES["toolrl"])
        assert [m["content"] for m in prompt] == [item["instruction"], item["input"]]
        assert record.target.calls == tuple(_calls_by_line(item["output"]))
        assert (record.target.response is not None) == (
            "<response>" in item["output"].rpartition("</think>")[2]
        )


def test_rlla_parquet(data_dir):
    path = data_dir / "rlla" / "test.parquet"
    records, rows = read_records(path), pyarrow.parquet.read_table(path).to_pylist()
    assert len(records) == len(rows) == 80
    for record, row in zip(records, rows, strict=True):
        gold = row["reward_model"]["ground_truth"]
        assert record.target.calls == tuple(_calls_by_line(gold))
        # all 80 thoughts are one of two sentences: no text with them, and no thought, is to be imitated
        assert record.target.text is None and record.target.think is None
        assert (record.target.response is not None) == ("<response>" in gold)
        assert record.prompt_messages(TEMPLATES["toolrl"]) == [
            {k: m[k] for k in ("role", "content")} for m in row["prompt"]
        ]


def _calls_by_line(text):
    """The calls of a gold answer, read independently: the JSON lines between the tags."""
    text = text.rpartition("</think>")[2]  # thoughts may speak of the tags
    if "<tool_call>" not in text:
        return
    for line in text.split("<tool_call>")[1].split("</tool_call>")[0].strip().splitlines():
        raw = json.loads(line)
        yield Call(raw["name"], raw["parameters"])


@pytest.mark.parametrize(("level", "count"), [(1, 399), (2, 67), (3, 131)])
def test_api_bank(data_dir, level, count):
    path = data_dir / "api_bank" / f"level-{level}-api_processed.json"
    records, raw = read_records(path), json.loads(path.read_text())
    assert len(records) == len(raw) == count
    for record, item in zip(records, raw, strict=True):
        gold = item["answer"] if isinstance(item["answer"], list) else [item["answer"]]
        assert record.target.calls == tuple(Call(c["name"], c["parameters"]) for c in gold)
        prompt = record.prompt_messages(TEMPLATES["toolrl"])
        assert [m["content"] for m in prompt] == [item["system"], item["user"]]


def _line(**fields):
    return json.dumps({"id": "a", "target": {"response": "x"}, **fields})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.jsonl", "", "no records"),
        ("r.jsonl", f"{_line()}\n{{broken\n", "line 2: not JSON"),
        ("r.jsonl", f"\n{_line(id=3)}\n", "line 2: record 3: id: text is needed, found int"),
        ("r.jsonl", "[" * 100_000, "not JSON"),
        ("r.jsonl", f"{_line()}\n{_line()}\n", "records 0 and 1 share the id 'a'"),
        ("r.jsonl", '{"id": "a", "history": []}', "record 'a': target: an object"),
        (
            "r.json",
            '[{"question": "x", "reply": "y"}]',
            "item 0: unknown layout with fields question, reply",
        ),
        (
            "r.json",
            '[{"messages": [], "tools": []}]',
            "item 0: looks like openai data; make records of it first: rest-jax data prepare openai",
        ),
        ("r.jsonl", _line(version=2), "line 1: record 'a': version: 2 is not known here"),
        ("r.json", "[3]", "item 0: an object is needed, found int"),
        (
            "r.json",
            '[{"instruction": "x", "input": 2, "output": "z"}]',
            "item 0: input: text is needed, found int",
        ),
        (
            "r.json",
            '[{"instruction": "x", "input": "y", "output": "z"}]',
            "item 0: output: .* no call",
        ),
        ("r.json", '[{"system": "x", "user": "y", "answer": []}]', "item 0: answer: empty"),
        (
            "r.json",
            '[{"system": "x", "user": "y", "answer": {"name": "f"}}]',
            r"item 0: answer\[0\]: arguments",
        ),
        ("r.parquet", "text", "not a Parquet file"),
        ("r.parquet", "PAR1 text", "not a readable Parquet file"),
    ],
)
def test_faults_name_the_file_and_the_place(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(RecordError, match=message) as caught:
        read_records(path)
    assert str(caught.value).startswith(f"data {path}: ") and "\n" not in str(caught.value)


def test_bytes_that_are_not_text(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'{"id": "\xff"}')
    with pytest.raises(RecordError, match="byte 8 is not UTF-8"):
        read_records(path)


def test_missing_and_folder(tmp_path):
    with pytest.raises(RecordError, match="no such file"):
        read_records(tmp_path / "none.jsonl")
    with pytest.raises(RecordError, match="is a folder"):
        read_records(tmp_path)


def test_parquet_row_with_broken_nested_json(tmp_path):
    path = tmp_path / "r.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"id": ["a"], "target": ["{"]}), path)
    with pytest.raises(RecordError, match="row 0: target: not JSON"):
        read_records(path)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    records = synthetic.world("train", 0, 3)
    path = tmp_path / "r.jsonl"
    write_records(path, records)
    monkeypatch.setattr("rest_jax.data.prepare.writers.to_json", lambda record: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_records(path, records[:1])
    assert read_records(path) == records and len(list(tmp_path.iterdir())) == 1


def test_unknown_ending(tmp_path):
    with pytest.raises(RecordError, match=r"not \.csv"):
        write_records(tmp_path / "r.csv", [])
