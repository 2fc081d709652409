"""Files of records: layouts told apart, writing, and the faults a file has."""

import dataclasses
import json
import re

import pyarrow
import pyarrow.parquet
import pytest

from rest_jax.data import files
from rest_jax.data.fields import RecordError
from rest_jax.data.files import read_records
from rest_jax.data.items import read_items
from rest_jax.data.records import StepRecord, to_json
from rest_jax.data.synthetic import world as synthetic
from rest_jax.files import as_path
from rest_jax.templates import TEMPLATES
from rest_jax.tool_calls import Call, Target
from tests.data.writing import write_records


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_write_and_read(tmp_path, ending):
    records = synthetic.world("train", 0, 50)
    path = tmp_path / f"records.{ending}"
    write_records(path, records)
    assert read_records(path) == records
    assert read_records(path, limit=7) == records[:7]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_version_and_extra_are_in_the_file(tmp_path, ending):
    record = synthetic.world("train", 0, 1)[0]
    record = dataclasses.replace(record, extra={"page": 3})
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


def test_a_record_that_calls_a_tool_it_does_not_offer_is_set_aside(tmp_path, capsys):
    call, user = {"name": "zzz", "arguments": {}}, {"role": "user", "content": "go"}
    history = [user, {"role": "assistant", "calls": [call]}, {"role": "tool", "content": "1"}]
    tools, messages = [{"name": "f"}], [user]
    kept = {
        "good": {"tools": [*tools, {"name": "zzz"}], "history": [user]},
        "none listed": {"history": history},
        "as text": {"tools": tools, "history": [], "messages": messages},
    }
    aside = {
        "target": {"tools": tools, "history": [user]},
        "history": {"tools": tools, "history": history, "target": {"response": "hi"}},
    }
    path = tmp_path / "x.jsonl"
    lines = [{"id": n, "target": {"calls": [call]}, **raw} for n, raw in (kept | aside).items()]
    path.write_text("\n".join(map(json.dumps, lines)))
    assert [record.id for record in read_records(path)] == list(kept)
    said = capsys.readouterr().err.splitlines()
    assert said[0].endswith(": line 4: record 'target': calls 'zzz', which is not among its tools")
    assert said[-1] == f"data {path}: 2 of 5 set aside"


def test_published_records_are_kept_whatever_they_call(data_dir):
    paths = [data_dir / "rlla" / name for name in ("rlla_sft.json", "test.parquet")]
    paths += sorted((data_dir / "api_bank").glob("*.json"))
    assert [len(read_records(path)) for path in paths] == [400, 80, 399, 67, 131]


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
        (
            "r.jsonl",
            "a,b\n{broken\n",
            "no records: all 2 were set aside, the first: .*line 1: not JSON.*'a,b'",
        ),
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
            '[{"system": "x", "user": "y", "answer": {"name": "f", "parameters": 3}}]',
            r"item 0: answer\[0\]: parameters: an object is needed, found int 3",
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


ENDINGS = (".jsonl", ".parquet")


def record(**arguments) -> StepRecord:
    return StepRecord("a", "", (), (), Target((Call("f", arguments),)))


@pytest.mark.parametrize("ending", ENDINGS)
def test_more_than_one_row_group(tmp_path, monkeypatch, ending):
    monkeypatch.setattr(files, "ROW_GROUP", 16)
    records = synthetic.world("train", 0, 40)
    path = tmp_path / f"r{ending}"
    write_records(path, records)
    assert read_records(path) == records
    if ending == ".parquet":
        assert pyarrow.parquet.ParquetFile(path).num_row_groups == 3


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("inf"), "x: inf is not a JSON number"),
        ([{"y": float("nan")}], r"x\[0\]: y: nan is not a JSON number"),
        ("\ud83d", r"x: half a character \('\\ud83d'\)"),
        ({"\udc00": 1}, r"x: half a character \('\\udc00'\)"),
        (b"x", "x: not a JSON value: bytes b'x'"),
    ],
)
def test_what_json_cannot_say_is_refused(tmp_path, ending, value, message):
    message = rf"record 'a': target: calls\[0\]: arguments: {message}"
    with pytest.raises(RecordError, match=message):
        write_records(tmp_path / f"r{ending}", [record(), record(x=value)])


GOLD = '{{"id": "{}", "target": {{"calls": [{{"name": "f", "arguments": {{"x": {}}}}}]}}}}'
UNSTORABLE = {
    "NaN": r"x: nan is not a JSON number",
    "[1e999]": r"x\[0\]: inf is not a JSON number",
    '{"y": -Infinity}': "x: y: -inf is not a JSON number",
    '"\\ud83d"': "x: half a character",
    '"\\udc00 b"': "x: half a character",
    '1, "x": 2': "an object has the same key twice: 'x'",
}


@pytest.mark.parametrize("listed", [False, True])
def test_what_cannot_be_stored_is_set_aside_by_name_when_it_is_read(tmp_path, capsys, listed):
    texts = [
        GOLD.format(i, value) for i, value in enumerate(["1", *UNSTORABLE, '"\\ud83d\\ude00"'])
    ]
    path = tmp_path / "x.json"
    path.write_text(f"[{','.join(texts)}]" if listed else "\n".join(texts))
    first, last = read_records(path)
    assert (first.id, last.id) == ("0", str(len(texts) - 1))
    assert last.target.calls[0].arguments == {"x": "😀"}
    *told, summary = capsys.readouterr().err.splitlines()
    assert summary == f"data {path}: {len(UNSTORABLE)} of {len(texts)} set aside"
    for i, (line, message) in enumerate(zip(told, UNSTORABLE.values(), strict=False)):
        place = f"item {i + 1}" if listed else f"line {i + 2}"
        assert line.startswith(f"set aside: data {path}: {place}: ")
        assert re.search(message, line)
    assert len(told) == files.MAX_SAID


def test_paths_that_cannot_be_written(tmp_path):
    with pytest.raises(RecordError, match=r"\.jsonl or \.parquet, not \.csv"):
        files.check_path(tmp_path / "x.csv")
    (tmp_path / "x.jsonl").mkdir()
    with pytest.raises(RecordError, match="is a folder"):
        files.check_path(tmp_path / "x.jsonl")


def test_a_line_of_another_layout_among_records_is_set_aside(tmp_path, capsys):
    path = tmp_path / "r.jsonl"
    path.write_text(f'{_line()}\n{{"note": 1}}\n{_line(id="b")}\n')
    assert [record.id for record in read_records(path)] == ["a", "b"]
    told = capsys.readouterr().err
    assert f"set aside: data {path}: line 2: unknown layout with fields note" in told


@pytest.mark.parametrize("ending", [".jsonl", ".parquet", ".json"])
def test_records_of_a_store_are_those_of_the_local_file(ending, tmp_path, memory_store):
    records = synthetic.world("train", 0, 20, "mixed")
    local, url = tmp_path / f"x{ending}", as_path(memory_store) / f"x{ending}"
    if ending == ".json":
        local.write_text(json.dumps([to_json(record) for record in records]))
    else:
        write_records(local, records)
    url.write_bytes(local.read_bytes())
    assert read_records(str(url)) == records == read_records(local)
    positions = [[item.position for item in read_items(path)] for path in (url, local)]
    assert positions[0] == positions[1]
    with pytest.raises(RecordError, match=f"data {memory_store}/none: no such file"):
        read_records(f"{memory_store}/none")
