"""Items of files: pieces read as json and pyarrow read all at once, containers told apart, and the faults a file has."""

import bz2
import codecs
import datetime
import decimal
import gzip
import io
import json
import lzma
import math
import os
import tarfile
import tracemalloc

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rest_jax.data import items as reading
from rest_jax.data.fields import RecordError

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
    items = list(reading.read_items(path))
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
        patch.setattr(reading, "CHUNK", chunk)
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
    monkeypatch.setattr(reading, "CHUNK", chunk)
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(RecordError, match=message) as caught:
        list(reading.read_items(path))
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
    monkeypatch.setattr(reading, "CHUNK", chunk)
    path = tmp_path / "x.json"
    path.write_text(f'[{{"n": 0}}, {broken}, {{"n": "]\\\\\\"["}}]')
    items = read(path)
    assert [item.fault is None for item in items] == [True, False, True]
    assert message in items[1].fault and items[1].where == f"data {path}: item 1"
    assert items[2].raw == {"n": ']\\"['}


@pytest.mark.parametrize("chunk", [1, 3, 2**20])
def test_a_list_that_is_not_utf8_names_the_item(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(reading, "CHUNK", chunk)
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
        json.dumps(
            {"info": {"by": ["x]}"], "data": [1]}, "ü": None, "rows": ITEMS, "end": {"a": [1]}}
        ),
        "\n".join(json.dumps(item, indent=2, ensure_ascii=False) for item in ITEMS),
        json.dumps(ITEMS, indent=1),
    ],
)
def test_documents_are_read_as_lines_are(tmp_path, monkeypatch, text, chunk):
    monkeypatch.setattr(reading, "CHUNK", chunk)
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


def _gzip(content: bytes) -> bytes:
    """Without the time, which would be in the name of a test."""
    return gzip.compress(content, mtime=0)


def _tar() -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        member = tarfile.TarInfo("x.jsonl")
        member.size = 8
        archive.addfile(member, io.BytesIO(b'{"a": 1}'))
    return made.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04....", "a ZIP archive; unpack it"),
        (b"\x28\xb5\x2f\xfd....", "compressed by Zstandard"),
        (b"ARROW1\0\0", "an Arrow file"),
        (b"SQLite format 3\0", "an SQLite database"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
        (b"<!DOCTYPE html>\n<html>", "a web page"),
        (b"\n<!doctype html>", "a web page"),
        (b"id,text\n1,hello\n", "not JSON: 'id,text"),
        (b"messages:\n- role: user\n", "not JSON: 'messages:"),
        (b"---\n- a: 1\n", "YAML"),
        *((b"\x80%c" % protocol, "a pickle") for protocol in (2, 3, 4, 5)),
        (_tar(), "a tar archive; unpack it"),
        (_gzip(_tar()), "a tar archive; unpack it"),
        (_gzip(_gzip(b'{"a": 1}\n')), "compressed twice; unpack it once"),
        (bz2.compress(_gzip(b'{"a": 1}\n')), "compressed twice"),
        (b"7z\xbc\xaf\x27\x1c\0\4", "a 7z archive"),
        (b"Rar!\x1a\x07\x00", "a RAR archive"),
        (b"\x04\x22\x4d\x18d", "compressed by LZ4"),
        (b"\x93NUMPY\x01\0v\0{'descr': '<f8'}", "an array of NumPy"),
        (lzma.compress(b'{"a": 1}\n', lzma.FORMAT_ALONE), "compressed by LZMA"),
        (b"ORC\x11", "an ORC file"),
        (b"FEA1\0", "a Feather file"),
        (b"\x89PNG\r\n\x1a\n", "an image"),
        (b"[data]\na = 1\n", r"not JSON: '\[data\]"),
        (b"\n[[data]]\na = 1\n", r"not JSON: '\[\[data\]\]"),
        (b"[a.'b c'] ; said\r\nx=1\r\n", "not JSON: "),
        ('{"a": 1}'.encode("utf-16-le"), "not UTF-8 text"),
        (_gzip(b"PAR1...."), "a compressed Parquet file"),
        (_gzip(b'{"a": 1}\n' * 9000)[:-40], "damaged: "),
        (_gzip(b'{"a": 1}\n')[:-8] + bytes(8), "damaged: "),
        (lzma.compress(b'{"a": 1}\n' * 9000)[:-40], "damaged: "),
        (bz2.compress(b'{"a": 1}\n' * 9000)[:20], "damaged: "),
        (codecs.BOM_UTF16_LE + b"{", "not utf-16"),
    ],
)
def test_a_file_of_another_kind_is_told_in_one_line(tmp_path, content, message):
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(RecordError, match=message) as caught:
        list(reading.read_items(path))
    assert str(caught.value).startswith(f"data {path}: ") and "\n" not in str(caught.value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs POSIX")
def test_a_pipe_is_refused_before_it_is_opened(tmp_path):
    os.mkfifo(tmp_path / "x.jsonl")
    with pytest.raises(RecordError, match="a pipe or a device; write it to a file"):
        reading.read_items(tmp_path / "x.jsonl")


@pytest.mark.parametrize("text", ["[null]\n", "[[true]]", '["data"]\n', "[ ]\n", "[1]"])
def test_a_list_of_one_value_is_no_header(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    assert values(tmp_path / "x.json") == json.loads(text)


def test_an_object_with_lists_of_its_own_is_an_item(tmp_path):
    item = {"messages": [{"role": "user"}], "data": [1]}
    (tmp_path / "x.jsonl").write_text(f"{json.dumps(item)}\n" * 2)
    assert values(tmp_path / "x.jsonl") == [item, item]


@pytest.mark.parametrize(
    "item",
    [
        {"items": ["a", "b"], "query": "q", "tools": "[]", "answers": "[]"},
        {"id": "1", "examples": [], "messages": [{"role": "user", "content": "x" * 2**17}]},
        {"id": "1", "data": [{"a": 1}], "target": {"calls": []}},
    ],
)
@pytest.mark.parametrize("indent", [None, 1])
def test_an_object_with_the_fields_of_an_item_is_one(tmp_path, item, indent):
    for count in (1, 2):
        (tmp_path / "x").write_text(f"{json.dumps(item, indent=indent)}\n" * count)
        assert values(tmp_path / "x") == [item] * count


def test_lines_that_each_have_a_list_are_lines(tmp_path):
    items = [{"data": [1, 2], "id": i} for i in range(3)]
    (tmp_path / "x").write_text("\r\n\n".join(map(json.dumps, items)))
    assert values(tmp_path / "x") == items


@pytest.mark.parametrize(
    "cut", ['{"messages": [{"role": "user",', '{"data": [', '{"target":', '{"a": {']
)
def test_a_first_line_that_was_cut_is_one_bad_line(tmp_path, cut):
    (tmp_path / "x").write_text(f'{cut}\n\n{{"a": 1}}\n{{"a": 2}}\n')
    first, *others = read(tmp_path / "x")
    assert first.fault.startswith("not JSON") and first.raw == cut
    assert [item.raw for item in others] == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("end", ["\n]}", "\n, 2\n]}", " ,\n2]}"])
def test_an_object_alone_in_a_line_may_be_part_of_another(tmp_path, end):
    for name in ("data", "a"):
        text = f'{{"{name}": [\n{{"a": 1}}{end}'
        (tmp_path / "x").write_text(text)
        whole = json.loads(text)
        assert values(tmp_path / "x") == whole.get("data", [whole])


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
    monkeypatch.setattr(reading, "MAX_ITEM", 100)
    monkeypatch.setattr(reading, "CHUNK", 16)
    lines, listed = tmp_path / "lines", tmp_path / "list"
    lines.write_text(json.dumps({"a": "x" * 300}) + '\n{"b": 1}\n')
    long, after = read(lines)
    assert long.fault == "longer than 100 bytes" and after.raw == {"b": 1}
    listed.write_text(json.dumps([{"a": "\\" * 300}, {"b": 1}]))
    long, after = read(listed)
    assert long.fault == "longer than 100 bytes" and after.raw == {"b": 1}


def test_a_long_line_is_never_held(tmp_path, monkeypatch):
    """Neither a line, nor a list item, nor one in a compressed file takes more memory than the longest that is read."""
    monkeypatch.setattr(reading, "MAX_ITEM", 2**16)
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
    for chunk in (7919, reading.CHUNK):
        monkeypatch.setattr(reading, "CHUNK", chunk)
        items = read(path)
        assert [item.fault is None for item in items] == [True, False, True, False]
        assert items[2].raw == {"n": 2} and items[1].raw == deep[:1000]
        assert items[1].fault == "nests deeper than 64" and items[1].where == f"data {path}: item 1"


def test_an_ending_that_the_content_denies(tmp_path):
    path = tmp_path / "x.parquet"
    path.write_text("{}")
    with pytest.raises(RecordError, match="not a Parquet file"):
        reading.read_items(path)


def test_no_file(tmp_path):
    with pytest.raises(RecordError, match="is a folder"):
        reading.read_items(tmp_path)
    with pytest.raises(RecordError, match=r"no such file$"):
        reading.read_items(tmp_path / "none")
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(RecordError, match=r"no such file \(nearest: .*/train\.jsonl\)$"):
        reading.read_items(tmp_path / "trian.jsonl")
