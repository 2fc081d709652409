"""Files of records: pieces read as json and pyarrow read all at once, layouts told apart, writing, and the faults a file has."""

import bz2
import codecs
import dataclasses
import datetime
import decimal
import gzip
import json
import lzma
import math
import re
import tracemalloc

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rest_jax.data import files
from rest_jax.data.fields import RecordError
from rest_jax.data.files import read_records
from rest_jax.data.records import StepRecord, to_json
from rest_jax.data.synthetic import world as synthetic
from rest_jax.files import as_path
from rest_jax.templates import TEMPLATES
from rest_jax.tool_calls import Call, Target
from tests.data.writing import write_records

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(1 - 2**63, 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def read(path):
    items = list(files.read_items(path))
    positions = [item.position for item in items]
    assert positions == sorted(positions) and all(p <= path.stat().st_size for p in positions)
    return items


def values(path):
    items = read(path)
    assert all(item.fault is None for item in items)
    return [item.raw for item in items]


@example(items=[0.0, 1e300, -1e-7, 12], indent=None, chunk=1)
@example(items=[1e300], indent=None, chunk=2)
@given(items=st.lists(JSON, max_size=6), indent=st.sampled_from([None, 1]), chunk=st.integers(1, 9))
def test_a_list_is_what_json_reads(tmp_path_factory, items, indent, chunk):
    path = tmp_path_factory.mktemp("list") / "x.json"
    path.write_text(json.dumps(items, indent=indent, ensure_ascii=False), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "CHUNK", chunk)
        assert values(path) == items


@given(items=st.lists(JSON.filter(lambda x: not isinstance(x, list)), max_size=6))
def test_lines_are_what_json_reads(tmp_path_factory, items):
    path = tmp_path_factory.mktemp("lines") / "x.json"
    path.write_text("".join(f"{json.dumps(x)}\r\n\n" for x in items), encoding="utf-8")
    assert values(path) == items


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1}', "item 0: not JSON: the file breaks off"),
        ('[{"a": 1}, {"b": "x, ]', "item 1: not JSON: the file breaks off"),
        ('[{"a": 1}]]', r"text behind the end: '\]'"),
        ('[{"a": 1}]\n[{"b": 1}]', "text behind the end"),
        ("[[[[", "item 0: not JSON"),
        ("[" * 100_000, "item 0: not JSON"),
        ('{"train": [1], "test": [2]}', "the object has more than one list: ', .test.: "),
        ('{"train": [1]', "item 1: not JSON: the file breaks off"),
        ('{\n"a": 1}\n{"b":\n', "item 1: not JSON: the file breaks off"),
        ('{\n"a": 1}}', "text behind"),
    ],
)
@pytest.mark.parametrize("chunk", [1, 2**20])
def test_a_broken_document_is_refused(tmp_path, monkeypatch, text, message, chunk):
    monkeypatch.setattr(files, "CHUNK", chunk)
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(RecordError, match=message) as caught:
        list(files.read_items(path))
    assert str(caught.value).startswith(f"data {path}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ('{"a": 1} {"b": 2}', "not JSON: Extra data"),
        ("", "not JSON: Expecting value"),
        ('{"b": }', "not JSON: Expecting value"),
        ('{"b": [1}}', "not JSON"),
        ('{"b": 1, "c": 2, "b": 3}', "an object has the same key twice: 'b'"),
        ("9" * 5000, "not JSON: Exceeds the limit"),
    ],
)
@pytest.mark.parametrize("chunk", [1, 3, 2**20])
def test_a_broken_list_item_carries_a_fault_and_reading_goes_on(
    tmp_path, monkeypatch, broken, message, chunk
):
    monkeypatch.setattr(files, "CHUNK", chunk)
    path = tmp_path / "x.json"
    path.write_text(f'[{{"n": 0}}, {broken}, {{"n": "]\\\\\\"["}}]')
    items = read(path)
    assert [item.fault is None for item in items] == [True, False, True]
    assert message in items[1].fault and items[1].where == f"data {path}: item 1"
    assert items[2].raw == {"n": ']\\"['}


@pytest.mark.parametrize("chunk", [1, 3, 2**20])
def test_a_list_that_is_not_utf8_names_the_item(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(files, "CHUNK", chunk)
    path = tmp_path / "x.json"
    path.write_bytes('["ä", "'.encode() + b'\xff"]')
    first, second = read(path)
    assert first.raw == "ä" and second.fault == "byte 2 is not UTF-8"


ITEMS = [{"a": 'x"]},\\'}, {"ü": ["😀", {"b": [1]}]}, {"n": None}]


@pytest.mark.parametrize("chunk", [1, 2, 7, 2**16])
@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"train": ITEMS}),
        json.dumps({"version": "1.0", "count": 3, "Data": ITEMS, "ok": True}, indent=2),
        "\n".join(json.dumps(item, indent=2, ensure_ascii=False) for item in ITEMS),
        json.dumps(ITEMS, indent=1),
    ],
)
def test_documents_are_read_as_lines_are(tmp_path, monkeypatch, text, chunk):
    monkeypatch.setattr(files, "CHUNK", chunk)
    path = tmp_path / "x.jsonl"
    path.write_text(text, encoding="utf-8")
    assert values(path) == ITEMS


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("compress", [bytes, gzip.compress, bz2.compress, lzma.compress])
@pytest.mark.parametrize("lines", [True, False])
def test_compressed_files_and_other_encodings(tmp_path, compress, encoding, lines):
    texts = [json.dumps(item, ensure_ascii=False) for item in ITEMS]
    text = "\n".join(texts) if lines else f"[{','.join(texts)}]"
    path = tmp_path / "x.jsonl"
    path.write_bytes(compress(text.encode(encoding)))
    assert values(path) == ITEMS


def test_utf16_with_half_a_character_has_one_bad_line(tmp_path):
    path = tmp_path / "x.jsonl"
    text = '{"a": 1}\n{"b": "\ud83d"}\n{"c": 3}'
    path.write_bytes(codecs.BOM_UTF16_LE + text.encode("utf-16-le", "surrogatepass"))
    assert [item.fault for item in read(path)] == [None, "byte 7 is not UTF-8", None]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04....", "a ZIP archive; unpack it"),
        (b"\x28\xb5\x2f\xfd....", "compressed by Zstandard"),
        (b"ARROW1\0\0", "an Arrow file"),
        (b"SQLite format 3\0", "an SQLite database"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
        (b"<!DOCTYPE html>\n<html>", "a web page"),
        (b"---\n- a: 1\n", "YAML"),
        (b"\x80\x04\x95", "a pickle"),
        ('{"a": 1}'.encode("utf-16-le"), "not UTF-8 text"),
        (gzip.compress(b"PAR1...."), "a compressed Parquet file"),
        (gzip.compress(b'{"a": 1}\n' * 9000)[:-40], "damaged: "),
        (gzip.compress(b'{"a": 1}\n')[:-8] + bytes(8), "damaged: "),
        (lzma.compress(b'{"a": 1}\n' * 9000)[:-40], "damaged: "),
        (bz2.compress(b'{"a": 1}\n' * 9000)[:20], "damaged: "),
        (codecs.BOM_UTF16_LE + b"{", "not utf-16"),
    ],
)
def test_a_file_of_another_kind_is_told_in_one_line(tmp_path, content, message):
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(RecordError, match=message) as caught:
        list(files.read_items(path))
    assert str(caught.value).startswith(f"data {path}: ") and "\n" not in str(caught.value)


def test_a_byte_order_mark_is_passed_over(tmp_path):
    for name, text in (("list", '[{"a": 1}]'), ("lines", '{"a": 1}\n')):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8-sig")
        assert values(path) == [{"a": 1}]


def test_broken_lines_carry_a_fault_and_reading_goes_on(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a"\n\n{"b": "\xff"}\n{"c": ' + b"9" * 5000 + b'}\n{"d": 2}')
    items = read(path)
    assert [(i.where.rpartition("line ")[2], i.fault is None) for i in items] == [
        ("1", True), ("2", False), ("4", False), ("5", False), ("6", True),
    ]  # fmt: skip
    assert items[1].raw == '{"a"' and items[1].fault.startswith("not JSON")
    assert items[2].raw == '{"b": "\\xff"}' and items[2].fault == "byte 7 is not UTF-8"
    assert items[3].fault.startswith("not JSON: Exceeds the limit")
    assert items[4].position == path.stat().st_size


def test_lines_and_items_have_a_longest_size(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_ITEM", 100)
    monkeypatch.setattr(files, "CHUNK", 16)
    lines, listed = tmp_path / "lines", tmp_path / "list"
    lines.write_text(json.dumps({"a": "x" * 300}) + '\n{"b": 1}\n')
    long, after = read(lines)
    assert long.fault == "longer than 100 bytes" and after.raw == {"b": 1}
    listed.write_text(json.dumps([{"a": "\\" * 300}, {"b": 1}]))
    long, after = read(listed)
    assert long.fault == "longer than 100 bytes" and after.raw == {"b": 1}


def test_a_long_line_is_never_held(tmp_path, monkeypatch):
    """Neither a line, nor a list item, nor one in a compressed file takes more memory than the longest that is read."""
    monkeypatch.setattr(files, "MAX_ITEM", 2**16)
    text = '{"a": "' + "x" * 2**23 + '"}'
    for name, content in (("lines", f'{text}\n{{"b": 1}}\n'), ("list", f'[{text}, {{"b": 1}}]')):
        for compress in (bytes, gzip.compress):
            path = tmp_path / name
            path.write_bytes(compress(content.encode()))
            tracemalloc.start()
            long, after = read(path)
            most = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert long.fault == "longer than 65,536 bytes" and after.raw == {"b": 1}
            assert len(long.raw) <= 1000 and most < 2**21


def test_parquet_rows(tmp_path):
    rows = [{"id": str(i), "target": None if i % 2 else json.dumps({"n": i})} for i in range(1300)]
    path = tmp_path / "x"  # its first bytes say what it is
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=400)
    expected = [
        {**r, "target": json.loads(r["target"])} if r["target"] else {"id": r["id"]} for r in rows
    ]
    assert values(path) == expected


def test_parquet_rows_become_plain_json(tmp_path):
    """Fields that Arrow fills with null are gone again; what JSON cannot hold is text."""
    rows = [
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "calls": ["f", None]}],
         "arguments": {"a": 1}, "score": float("nan")},
        {"messages": [{"role": "user", "content": "y", "name": "z"}], "arguments": {"b": [{"c": 2}, {"d": 3.5}]},
         "score": 1.5, "at": datetime.datetime(2024, 5, 1, 10), "price": decimal.Decimal("1.50"), "blob": b"\xffx"},
    ]  # fmt: skip
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    plain = {"at": "2024-05-01 10:00:00", "price": "1.50", "blob": "\\xffx"}
    # columns come from the first row
    table = pyarrow.Table.from_pylist([{**rows[1], **rows[0], **dict.fromkeys(plain)}, rows[1]])
    pyarrow.parquet.write_table(table, path)
    first, second = values(path)
    assert math.isnan(first.pop("score"))  # to be refused where it is used, not lost
    assert first == {key: value for key, value in rows[0].items() if key != "score"}
    assert second == {**rows[1], **plain}


def test_an_item_that_nests_too_deeply_is_passed_over(tmp_path, monkeypatch):
    deep = '{"a]": "}\\"", "b": ' + "[" * 100_000 + "]" * 100_000 + "}"
    path = tmp_path / "x.json"
    path.write_text(f'[{{"n": 0}},{deep}, {{"n": 2}},{deep}]')
    for chunk in (7919, files.CHUNK):
        monkeypatch.setattr(files, "CHUNK", chunk)
        items = read(path)
        assert [item.fault is None for item in items] == [True, False, True, False]
        assert items[2].raw == {"n": 2} and items[1].raw == deep[:1000]
        assert items[1].fault == "nests deeper than 64" and items[1].where == f"data {path}: item 1"


def test_an_ending_that_the_content_denies(tmp_path):
    path = tmp_path / "x.parquet"
    path.write_text("{}")
    with pytest.raises(RecordError, match="not a Parquet file"):
        files.read_items(path)


def test_no_file(tmp_path):
    with pytest.raises(RecordError, match="is a folder"):
        files.read_items(tmp_path)
    with pytest.raises(RecordError, match="no such file"):
        files.read_items(tmp_path / "none")


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
        assert line.startswith(f"set aside: data {path}: {place}: ") or "record" in line
        assert re.search(message, line)
    assert len(told) == files.MAX_SAID


def test_paths_that_cannot_be_written(tmp_path):
    with pytest.raises(RecordError, match=r"\.jsonl or \.parquet, not \.csv"):
        files.check_path(tmp_path / "x.csv")
    (tmp_path / "x.jsonl").mkdir()
    with pytest.raises(RecordError, match="is a folder"):
        files.check_path(tmp_path / "x.jsonl")


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
    assert [item.position for item in files.read_items(url)] == [i.position for i in read(local)]
    with pytest.raises(RecordError, match=f"data {memory_store}/none: no such file"):
        read_records(f"{memory_store}/none")
