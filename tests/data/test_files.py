"""Reading piece by piece: what json and pyarrow read whole, for every size of piece; faults with their places."""

import datetime
import decimal
import json

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rest_jax.data import array_records
from rest_jax.data import files as stream
from rest_jax.data.records import RecordError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def read(path):
    items = list(stream.read_items(path))
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
        patch.setattr(stream, "CHUNK", chunk)
        assert values(path) == items


@given(items=st.lists(JSON.filter(lambda x: not isinstance(x, list)), max_size=6))
def test_lines_are_what_json_reads(tmp_path_factory, items):
    path = tmp_path_factory.mktemp("lines") / "x.json"
    path.write_text("".join(f"{json.dumps(x)}\r\n\n" for x in items), encoding="utf-8")
    assert values(path) == items


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1}', "',' is needed, found the end of the file"),
        ('[{"a": 1} {"b": 2}]', "',' is needed, found '{'"),
        ('[{"a": 1},]', "item 1: not JSON: Expecting value"),
        ('[{"a": 1}, {"b": }]', "item 1: not JSON: Expecting value"),
        ('[{"a": 1}]]', "not JSON: ']' behind the end of the list"),
        ("[[[[", "item 0: not JSON"),
        ("[" * 100_000, "item 0: not JSON"),
        ("[,", "item 0: not JSON"),
    ],
)
@pytest.mark.parametrize("chunk", [1, 2**20])
def test_a_broken_list_is_refused(tmp_path, monkeypatch, text, message, chunk):
    monkeypatch.setattr(stream, "CHUNK", chunk)
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(RecordError, match=message) as caught:
        list(stream.read_items(path))
    assert str(caught.value).startswith(f"data {path}: ")


@pytest.mark.parametrize("chunk", [1, 3, 2**20])
def test_a_list_that_is_not_utf8_names_the_byte(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(stream, "CHUNK", chunk)
    path = tmp_path / "x.json"
    path.write_bytes('["ä", "'.encode() + b'\xff"]')
    with pytest.raises(RecordError, match="byte 8 is not UTF-8"):
        list(stream.read_items(path))


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
    monkeypatch.setattr(stream, "MAX_ITEM", 100)
    monkeypatch.setattr(stream, "CHUNK", 16)
    lines, listed = tmp_path / "lines", tmp_path / "list"
    lines.write_text(json.dumps({"a": "x" * 300}) + '\n{"b": 1}\n')
    long, after = read(lines)
    assert long.fault == "longer than 100 bytes" and after.raw == {"b": 1}
    listed.write_text(json.dumps([{"a": "x" * 300}]))
    with pytest.raises(RecordError, match="item 0"):
        list(stream.read_items(listed))


def test_parquet_rows(tmp_path):
    rows = [{"id": str(i), "target": None if i % 2 else json.dumps({"n": i})} for i in range(1300)]
    path = tmp_path / "x"  # its first bytes say what it is
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=400)
    expected = [
        {**r, "target": json.loads(r["target"])} if r["target"] else {"id": r["id"]} for r in rows
    ]
    assert values(path) == expected


def test_parquet_rows_become_plain_json(tmp_path):
    """Fields that Arrow fills with null are gone again; what JSON cannot hold is text or null."""
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
    first = {key: value for key, value in rows[0].items() if key != "score"}
    second = {**rows[1], **plain}
    assert values(path) == [first, second]


def test_an_item_that_nests_too_deeply_is_passed_over(tmp_path, monkeypatch):
    deep = '{"a]": "}\\"", "b": ' + "[" * 100_000 + "]" * 100_000 + "}"
    path = tmp_path / "x.json"
    path.write_text(f'[{{"n": 0}}, {deep}, {{"n": 2}}, {deep}]')
    for chunk in (7919, stream.CHUNK):
        monkeypatch.setattr(stream, "CHUNK", chunk)
        items = read(path)
        assert [item.fault is None for item in items] == [True, False, True, False]
        assert items[2].raw == {"n": 2} and items[1].raw == items[3].raw == deep
        assert "recursion" in items[1].fault and items[1].where == f"data {path}: item 1"


def test_array_records(tmp_path):
    path = tmp_path / "x"
    writer = array_records.writer(path)
    for i in range(1300):
        writer.write(json.dumps({"n": i}).encode() if i != 7 else b"{")
    writer.close()
    items = read(path)
    assert [i for i, item in enumerate(items) if item.fault] == [7]
    assert [item.raw for item in items[8:]] == [{"n": i} for i in range(8, 1300)]
    assert items[7].where == f"data {path}: record 7"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RecordError, match="cut off or damaged"):
        list(stream.read_items(path))


@pytest.mark.parametrize(
    ("name", "kind"), [("x.parquet", "Parquet"), ("x.array_record", "ArrayRecord")]
)
def test_an_ending_that_the_content_denies(tmp_path, name, kind):
    path = tmp_path / name
    path.write_text("{}")
    with pytest.raises(RecordError, match=f"not a {kind} file"):
        stream.read_items(path)


def test_no_array_record_package(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "array_record.python", None)
    path = tmp_path / "x"
    path.write_bytes(array_records.SIGNATURE)
    with pytest.raises(ValueError, match="pip install array-record"):
        list(stream.read_items(path))


def test_no_file(tmp_path):
    with pytest.raises(RecordError, match="is a folder"):
        stream.read_items(tmp_path)
    with pytest.raises(RecordError, match="no such file"):
        stream.read_items(tmp_path / "none")
