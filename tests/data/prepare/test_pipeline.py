"""`rest-jax data prepare`: every option on small files, its refusals, and that it leaves all its files or none."""

import dataclasses
import errno
import gzip
import json
import pathlib
import re
import subprocess
import sys

import pytest

from rest_jax import cli
from rest_jax.data import files, tokenize
from rest_jax.data.convert.xlam import NO_CALL
from rest_jax.data.files import read_records
from rest_jax.data.prepare import pipeline, split, summary
from rest_jax.data.records import from_json, to_json
from rest_jax.data.synthetic import world as synthetic
from rest_jax.errors import RunStopped, UserError
from rest_jax.files import as_path
from rest_jax.models.tokenizer import Tokenizer
from rest_jax.templates import TEMPLATES
from tests.data.prepare.dialogues import REPOSITORY, dialogue, files_under, names, run, write
from tests.data.writing import write_records
from tools.tiny_tokenizer import train_tokenizer


@pytest.fixture
def source_file(tmp_path) -> str:
    return write(tmp_path / "in.jsonl", [dialogue(i) for i in range(40)])


@pytest.fixture
def out(tmp_path):
    return tmp_path / "made" / "out.jsonl"


def test_every_dialogue_becomes_its_steps(source_file, out):
    result = run(source_file, out)
    records = read_records(out)
    assert [r.id for r in records[:3]] == ["in-0/0", "in-0/1", "in-1/0"]
    assert len(records) == result.kept == result.converted == 80 and result.items == 40
    assert [r.target.response for r in records[1::2]] == [f"answer {i}" for i in range(40)]
    assert names(out.parent) == ["out.jsonl", "out.jsonl.summary.json"]
    told = json.loads((out.parent / "out.jsonl.summary.json").read_text())
    assert told["items"] == 40 and told["converted"] == 80 and told["rejected"] == {}
    assert told["train"]["kinds"] == {"calls": 40, "response": 40}
    assert told["train"]["calls_per_target"] == {"0": 40, "1": 40}
    assert told["settings"]["source"] == "openai"


def test_parquet_holds_the_same(source_file, out):
    run(source_file, out)
    run(source_file, out.with_suffix(".parquet"))
    assert read_records(out.with_suffix(".parquet")) == read_records(out)


def test_several_files_of_several_kinds(tmp_path, source_file, out):
    listed = tmp_path / "list.json"
    listed.write_text(json.dumps([dialogue(i) for i in range(100, 103)]))
    result = run((source_file, str(listed)), out)
    assert result.items == 43
    assert read_records(out)[-1].id == "list-2/1"


def test_prepared_files_are_a_source_too(tmp_path, out):
    worlds = [synthetic.world("train", 0, 20)] * 2
    files = [tmp_path / "a" / "x.parquet", tmp_path / "b" / "x.jsonl"]
    for path, world in zip(files, worlds, strict=True):
        path.parent.mkdir(exist_ok=True)
        write_records(path, world)
    result = run(map(str, files), out, source="records", keep_duplicates=True)
    records = read_records(out)  # which refuses an id that comes twice
    assert len(records) == 40 and records[:20] == worlds[0]
    assert result.changed["id given anew, it came twice"] == 20
    assert [r.target for r in records[20:]] == [r.target for r in worlds[1]]


def test_duplicates_are_dropped_whatever_their_id(source_file, out):
    result = run((source_file, source_file), out)
    assert result.dropped == {"duplicate": 80} and result.kept == 80
    assert run((source_file, source_file), out, keep_duplicates=True, overwrite=True).kept == 160


def test_what_makes_a_duplicate(tmp_path):
    record = synthetic.demonstrations("train", 0, 1)[0]
    raw = to_json(record)
    same = from_json({**raw, "id": "other", "source": "other", "extra": {"a": 1}})
    verbatim = from_json({**raw, "target": {**raw["target"], "text": "anything"}})
    assert pipeline.content_hash(record) == pipeline.content_hash(same)
    assert pipeline.content_hash(record) == pipeline.content_hash(verbatim)
    others = [
        {**raw, "tools": []},
        {**raw, "history": [{"role": "user", "content": "other"}]},
        {**raw, "history": []},
        {**raw, "history": [], "tools": []},
        {**raw, "target": {"response": "other"}},
        {**raw, "target": {**raw["target"], "think": "other"}},
    ]
    messages = [
        {
            "id": "a",
            "target": {"response": "x"},
            "messages": [{"role": "user", "content": c}],
            **more,
        }
        for c in "ab"
        for more in ({}, {"tools": raw["tools"]})
    ]
    hashes = {pipeline.content_hash(from_json(r)) for r in (raw, *others, *messages)}
    assert len(hashes) == 11


def test_bad_items_are_kept_aside_with_their_reasons(tmp_path, out):
    path = tmp_path / "in.jsonl"
    bad = [dialogue(7) | {"messages": [{"role": "robot"}]}, {"messages": {}}, {"messages": 3}]
    half = dialogue(8)
    half["messages"][0]["content"] = "\ud83d"
    lines = [dialogue(0), *bad, half, dialogue(1)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"cut": \n')
    result = run(str(path), out)
    assert result.kept == 4 and result.rejected.total() == 5 and result.items == 7
    kept = [json.loads(line) for line in (out.parent / "out.jsonl.rejected.jsonl").open()]
    assert [k["where"].rpartition(": ")[2] for k in kept] == [f"line {n}" for n in (2, 3, 4, 5, 7)]
    assert [k["raw"] for k in kept[:4]] == [*bad, half] and kept[4]["raw"] == '{"cut":'
    assert "role: 'robot'" in kept[0]["reason"] and "half a character" in kept[3]["reason"]
    assert result.to_json()["rejected"] == dict(result.rejected)
    assert sum("list is needed, found" in reason for reason in result.rejected) == 2
    again = run(source_file_of(tmp_path), out, overwrite=True)
    assert not again.rejected and names(out.parent) == ["out.jsonl", "out.jsonl.summary.json"]


def source_file_of(tmp_path) -> str:
    return write(tmp_path / "good.jsonl", [dialogue(i) for i in range(3)])


def test_reasons_are_counted_by_kind_and_never_without_bound(tmp_path, out, monkeypatch):
    monkeypatch.setattr(pipeline, "MAX_REASONS", 2)
    bad = [{"messages": [{"role": f"r{i}"}]} for i in range(5)]
    more = [{"messages": 1}, {"messages": [3]}, {}, {"messages": [], "tools": 3}]
    result = run(write(tmp_path / "in.jsonl", [dialogue(0), *bad, *more]), out)
    assert result.rejected.total() == 9 and len(result.rejected) <= 3
    assert result.rejected.most_common(1)[0][1] == 5 and result.rejected["other reasons"] > 0


def test_what_was_set_aside_is_written_where_nothing_is_left(tmp_path, out):
    bad = [{"messages": 3}, {"messages": [{"role": "user", "content": "x"}]}]
    message = r"of 2 items of source openai none left; .*; see .*out\.jsonl\.rejected\.jsonl"
    with pytest.raises(UserError, match=message):
        run(write(tmp_path / "in.jsonl", bad), out)
    assert names(out.parent) == ["out.jsonl.rejected.jsonl"]
    kept = [json.loads(line) for line in (out.parent / "out.jsonl.rejected.jsonl").open()]
    assert [line["raw"] for line in kept] == bad
    assert kept[0]["reason"] == "messages: a list is needed, found int 3"


def test_masking_is_drawn_by_id_and_seed(source_file, out, tmp_path):
    result = run(source_file, out, mask_names=0.5)
    records = read_records(out)
    masked = {r.id for r in records if r.tools[0]["name"] != "alpha"}
    assert len(masked) == result.changed["names masked"] and 20 < len(masked) < 60
    run(source_file, out, mask_names=0.5, overwrite=True)
    assert read_records(out) == records
    run(source_file, out, mask_names=0.5, overwrite=True, limit=10)  # the rest does not matter
    assert read_records(out) == records[:20]
    run(source_file, out, mask_names=0.5, overwrite=True, seed=1)
    assert {r.id for r in read_records(out) if r.tools[0]["name"] != "alpha"} != masked
    run(source_file, out, mask_names=1, overwrite=True)
    assert all(r.tools[0]["name"] != "alpha" for r in read_records(out))


def test_irrelevance(source_file, out):
    result = run(source_file, out, irrelevance=1, irrelevance_response="None fits.", mask_names=0)
    changed = [r for r in read_records(out) if r.target.response == "None fits."]
    assert len(changed) == result.changed["right tools taken away"] == 40
    assert all([t["name"] for t in r.tools] == ["beta"] for r in changed)
    assert result.unchanged == {"irrelevance: it calls no tool": 40}


@pytest.mark.parametrize("fraction", [0.0, 0.5])
def test_answers_in_words_are_thinned_out(source_file, out, fraction):
    """By the seed and the id alone; records that call stay."""
    result = run(source_file, out, responses=fraction)
    kept = read_records(out)
    assert sum(bool(record.target.calls) for record in kept) == 40
    words = sum(not record.target.calls for record in kept)
    assert words == 0 if fraction == 0 else 8 < words < 32
    assert result.dropped == {"calls nothing, and was not drawn (--responses)": 40 - words}
    run(source_file, out, responses=fraction, overwrite=True)
    assert read_records(out) == kept
    ids = {record.id for record in kept}
    run(source_file, out, responses=0.9, overwrite=True)
    assert ids <= {record.id for record in read_records(out)}  # more of the same draw


def test_a_prompt_that_is_only_text_is_counted_and_left(tmp_path, out):
    message = {"role": "user", "content": "x"}
    raw = {"id": "a", "target": {"response": "y"}, "messages": [message]}
    result = run(write(tmp_path / "in", [raw]), out, source="records", mask_names=1, irrelevance=1)
    assert [to_json(r)["messages"] for r in read_records(out)] == [[message]]
    assert result.unchanged.total() == 2 and not result.changed


def test_held_out_tools_never_occur_in_training(tmp_path, out):
    pool = [f"tool {chr(97 + i)}" for i in range(12)]
    items = [
        dialogue(i, tools=(pool[i % 12], pool[(i * 5 + 1) % 12]), call=pool[i % 12])
        for i in range(120)
    ]
    result = run(write(tmp_path / "in", items), out, held_out=0.4, irrelevance=0.3, mask_names=0.3)
    train, evaluation = read_records(out), read_records(out.with_name("out.eval.jsonl"))
    assert len(train) == result.parts["train"].records > 50
    assert len(evaluation) == result.parts["eval"].records > 20
    held = {n for n in pool if split.is_held_out(n, 0.4, 0)}
    # descriptions are the names here, and masking keeps them
    assert not held & {t["description"] for r in train for t in r.tools}
    assert not held & {c.name for r in train for c in r.target.calls}
    assert not held & {c["name"] for r in train for t in r.history for c in t.get("calls", ())}
    assert {t["description"] for r in train for t in r.tools} == set(pool) - held
    assert result.changed["held-out tools taken from the offer"] > 0


@pytest.mark.parametrize("fraction", [0.3, 0.6])
def test_records_for_evaluation_keep_a_held_out_tool_on_offer(tmp_path, out, fraction):
    pool = [f"tool {chr(97 + i)}" for i in range(12)]
    items = [
        dialogue(i, tools=(pool[i % 12], pool[(i * 5 + 1) % 12]), call=pool[i % 12])
        for i in range(120)
    ]
    result = run(write(tmp_path / "in", items), out, held_out=fraction, irrelevance=1)
    held = {n for n in pool if split.is_held_out(n, fraction, 0)}
    evaluation = read_records(out.with_name("out.eval.jsonl"))
    offered = [{t["name"] for t in r.tools} for r in evaluation]
    assert all(names & held for names in offered)
    without = [r for r in evaluation if r.target.response == NO_CALL]
    assert bool(without) == (fraction == 0.6)  # where the other tool is held out too
    assert result.unchanged["irrelevance: no held-out tool would stay on offer"] > 0


def test_dialogues_are_held_out_with_all_their_steps(source_file, out):
    """Of data whose tools are in every dialogue; the same again over what was made of it."""
    result = run(source_file, out, held_out_dialogues=0.25, irrelevance=0.5)
    train, held = read_records(out), read_records(out.with_name("out.eval.jsonl"))
    assert len(train) + len(held) == result.kept == 80 and 10 < len(held) < 30
    dialogues = [{record.id.partition("/")[0] for record in part} for part in (train, held)]
    assert not dialogues[0] & dialogues[1] and len(dialogues[1]) == len(held) / 2
    assert NO_CALL in {record.target.response for record in held}
    whole, again = out.with_name("whole.jsonl"), out.with_name("again.jsonl")
    run(source_file, whole)
    run(str(whole), again, source="records", held_out_dialogues=0.25)
    assert [record.id for record in read_records(again)] == [record.id for record in train]


def test_calls_of_tools_that_are_not_offered_are_dropped(tmp_path, out):
    stranger, nothing = dialogue(1, call="gamma"), dialogue(2)
    del nothing["tools"]
    result = run(write(tmp_path / "in", [dialogue(0), stranger, nothing]), out)
    assert result.dropped == {"calls a tool that is not offered": 4} and result.kept == 2
    kept = [json.loads(line) for line in (out.parent / "out.jsonl.rejected.jsonl").open()]
    reasons = [line["reason"] for line in kept]
    assert reasons[0] == "calls 'gamma', which is not among its tools" and len(reasons) == 4
    record = to_json(read_records(out)[0])
    messages = [{"role": "user", "content": "x"}]
    as_text = {**record, "id": "t", "tools": [], "history": [], "messages": messages}
    path = write(tmp_path / "own", [record, {**record, "id": "n", "tools": []}, as_text])
    result = run(path, out, source="records", overwrite=True)
    assert [r.id for r in read_records(out)] == [record["id"], "t"]
    assert result.dropped == {"calls a tool that is not offered": 1}


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_inputs_may_be_urls(tmp_path, out, memory_store, compress):
    path = pathlib.Path(write(tmp_path / "in.jsonl", [dialogue(0), dialogue(1)]))
    url = f"{memory_store}/people/in.jsonl"
    as_path(url).write_bytes(compress(path.read_bytes()))
    run(str(path), out)
    local = out.read_bytes()
    result = run(url, out, overwrite=True)
    assert out.read_bytes() == local and result.items == 2
    with pytest.raises(UserError, match=f"^data {memory_store}/none.jsonl: no such file"):
        run(f"{memory_store}/none.jsonl", out, overwrite=True)


@pytest.mark.parametrize(
    ("source", "url", "message"),
    [
        ("openai", "https://x/in.jsonl", "https://x/in.jsonl: no such store as https://; known: "),
        ("tau2", "s3://x/venv", "data s3://x/venv: a local path is needed here, not a URL"),
    ],
)
def test_a_url_that_cannot_be_an_input_is_named_as_it_was_given(
    out, memory_store, source, url, message
):
    with pytest.raises(UserError, match=f"^{message}"):
        run(url, out, source=source)


def test_parquet_as_people_have_it(tmp_path, out):
    """Lists as text or as structs that Arrow pads with nulls, beside a time, which is kept, and a NaN, which is not: the records
    are those of the JSONL.
    """
    import datetime

    import pyarrow.parquet

    items = [dialogue(0), dialogue(1, ("alpha",))]
    items[1]["messages"].insert(0, {"role": "system", "content": "Be kind."})
    run(write(tmp_path / "in.jsonl", items), out)
    extra = {"at": "2024-05-01 00:00:00"}
    expected = [dataclasses.replace(record, extra=extra) for record in read_records(out)]
    beside = {"at": datetime.datetime(2024, 5, 1), "score": float("nan")}
    texts = [{k: json.dumps(v) for k, v in item.items()} | beside for item in items]
    for rows in (texts, [item | beside for item in items]):
        path = tmp_path / "in.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        result = run(str(path), out, overwrite=True)
        assert read_records(out) == expected and not result.rejected


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["question answer alpha beta", json.dumps(dialogue(3))], 400, folder)
    return str(folder)


def test_a_prompt_that_the_chat_template_refuses_is_dropped(tmp_path, out, tokenizer):
    loaded = Tokenizer.load(tokenizer)
    folder = tmp_path / "strict"
    refusal = "{{ raise_exception('Roles must\n alternate, found \\'system\\'') }}"
    loaded.hf.chat_template = (
        "{% if 'kind' in messages[0].content %}" + refusal + "{% endif %}{{ messages[-1].content }}"
    )
    loaded.hf.save_pretrained(str(folder))
    kind = dialogue(1)
    kind["messages"].insert(0, {"role": "system", "content": "Be kind."})
    path = write(tmp_path / "in.jsonl", [dialogue(0), kind])
    result = run(path, out, tokenizer=str(folder))
    told = "the chat template of the tokenizer refuses it: Roles must alternate, found '...'"
    assert result.kept == 2 and result.dropped == {told: 2}
    kept = [json.loads(line) for line in (out.parent / "out.jsonl.rejected.jsonl").open()]
    assert [line["raw"]["id"] for line in kept] == ["in-1/0", "in-1/1"]
    assert all("found 'system'" in line["reason"] for line in kept)
    run(path, out, overwrite=True)
    strict, template = Tokenizer.load(str(folder)), TEMPLATES["toolrl"]
    refused = "the chat template of the tokenizer refuses it: Roles must alternate, found 'system'"
    prepared = tokenize.prepare(read_records(out), strict, template, tokenize.DataConfig(train="x"))
    assert [record.id for record in prepared.records] == ["in-0/0", "in-0/1"]
    said = f"2 set aside (2: {refused}, as in 'in-1/0')"
    assert said in prepared.summary()
    with pytest.raises(UserError, match=re.escape(f"data: no records; {said}")):
        tokenize.prepare(read_records(out)[2:], strict, template, tokenize.DataConfig(train="x"))


@pytest.mark.parametrize("template", ["toolrl", "hermes"])
def test_long_records_are_dropped(tmp_path, source_file, out, tokenizer, template):
    counter = summary.token_counter(tokenizer, template, False)
    long = dialogue(90)
    long["messages"][0]["content"] = "question " * 500
    path = write(tmp_path / "long.jsonl", [long])
    run(source_file, out)
    tokens = [counter(r) for r in read_records(out)]
    most = max(map(sum, tokens))
    options = {"tokenizer": tokenizer, "template": template, "overwrite": True}
    result = run((source_file, path), out, max_tokens=most, **options)
    assert result.dropped == {f"longer than {most} tokens": 2}
    measures = result.to_json()["train"]["measures"]
    assert measures["prompt tokens"]["p100"] == max(prompt for prompt, _ in tokens)
    assert measures["target tokens"]["p0"] == min(target for _, target in tokens)
    assert run((source_file, path), out, max_tokens=most - 1, **options).kept < result.kept
    with pytest.raises(UserError, match="none left; most often: longer than 5 tokens"):
        run(source_file, out, max_tokens=5, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "opnai"}, r"source 'opnai': unknown \(nearest: openai\)$"),
        ({"source": "?"}, r"source '\?': unknown \(known"),
        ({"mask_names": 1.5}, "--mask-names 1.5: a fraction from 0 to 1"),
        ({"irrelevance": -0.1}, "--irrelevance -0.1: a fraction"),
        ({"responses": 2}, "--responses 2: a fraction"),
        ({"held_out": float("nan")}, "--held-out nan: a fraction"),
        ({"max_tokens": 5}, "--max-tokens 5: needs --tokenizer"),
        ({"tokenizer": "/no/such"}, "tokenizer /no/such: no such folder"),
        (
            {"held_out": 1e-9},
            r"none for evaluation \(raise --held-out, or .* --held-out-dialogues\)",
        ),
        ({"held_out": 1.0}, r"none left for training \(lower --held-out, or"),
        ({"held_out_dialogues": 2}, "--held-out-dialogues 2: a fraction"),
        ({"held_out_dialogues": 1e-9}, r"none for evaluation \(raise --held-out-dialogues\)"),
        ({"held_out_dialogues": 1.0}, r"none left for training \(lower --held-out-dialogues\)"),
        ({"held_out_dialogues": 0.5, "held_out": 0.5}, "--held-out 0.5 sets tools apart already"),
    ],
)
def test_refusals_leave_nothing(tmp_path, source_file, out, options, message):
    with pytest.raises(UserError, match=message) as caught:
        run(source_file, out, **options)
    assert "\n" not in str(caught.value)
    assert files_under(tmp_path) == ["in.jsonl"]


def test_refused_files(tmp_path, source_file, out):
    for inputs, where, message in (
        (str(tmp_path / "none"), out, "none: no such file"),
        (str(tmp_path), out, "is a folder, a file is needed"),
        (source_file, tmp_path, "without ending"),
        (source_file, tmp_path / "x.csv", r"not \.csv"),
        (source_file, source_file, "is an input too; choose another OUT"),
        (source_file, f"{source_file}/out.jsonl", "in.jsonl is a file, a folder is needed"),
    ):
        with pytest.raises(UserError, match=message):
            run(inputs, where)
    (tmp_path / "empty").touch()
    with pytest.raises(UserError, match="no records"):
        run(str(tmp_path / "empty"), out)
    folder = tmp_path / "folder.jsonl"
    folder.mkdir()
    with pytest.raises(UserError, match="is a folder, the name of a file"):
        run(source_file, folder)
    out.parent.mkdir(exist_ok=True)
    out.write_text("before")
    with pytest.raises(UserError, match="exists; --overwrite"):
        run(source_file, out)
    assert out.read_text() == "before" and names(out.parent) == ["out.jsonl"]


def test_wrong_source_says_why(tmp_path, source_file, out):
    with pytest.raises(UserError, match=r"of 40 items of source xlam none left; most often: query"):
        run(source_file, out, source="xlam")


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_failure_midway_leaves_what_was_there(tmp_path, out, monkeypatch, error, ending):
    out = out.with_suffix(f".{ending}")
    items = [*(dialogue(i, call="alpha") for i in range(9)), dialogue(9, ("beta",), "beta"), {}]
    path = write(tmp_path / "in", items)
    run(path, out, held_out=0.5, seed=_parting_seed())
    before = {p.name: p.read_bytes() for p in out.parent.iterdir()}
    assert len(before) == 4
    original, count = files.to_json, 0

    def fail(record):
        nonlocal count
        count += 1
        if count > 20:
            raise error
        return original(record)

    monkeypatch.setattr(files, "to_json", fail)
    with pytest.raises(error):
        run(path, out, held_out=0.5, seed=_parting_seed(), overwrite=True)
    assert {p.name: p.read_bytes() for p in out.parent.iterdir()} == before


def _parting_seed() -> int:
    """A seed under which beta alone is held out."""
    sides = ((s, *(split.is_held_out(n, 0.5, s) for n in ("alpha", "beta"))) for s in range(99))
    return next(seed for seed, alpha, beta in sides if beta and not alpha)


def test_an_input_that_breaks_off_leaves_nothing(tmp_path, out):
    path = tmp_path / "in.json"
    path.write_text(json.dumps([dialogue(i) for i in range(3)])[:-20])
    with pytest.raises(UserError, match="item 2: not JSON"):
        run(str(path), out)
    assert files_under(tmp_path) == ["in.json"]


def test_a_full_disk_is_said_in_one_line(source_file, out, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.JsonlWriter, "write", fail)
    with pytest.raises(RunStopped, match="No space left on device; make room"):
        run(source_file, out)
    assert names(out.parent) == []


def test_what_runs_with_held_out_tools_replaces_the_old_twin(source_file, out):
    run(source_file, out)
    old = out.with_name("out.eval.jsonl")
    old.write_text("of tools that this run trains on")
    run(source_file, out, overwrite=True)
    assert not old.exists()


def test_real_rlla(data_dir, out):
    path = data_dir / "rlla" / "rlla_sft.json"
    result = run(str(path), out, source="rlla", mask_names=0.5, irrelevance=0.2, held_out=0.1)
    assert result.items == 400 and not result.rejected
    texts = [t["description"] for r in read_records(out) for t in r.tools]
    held = [
        t["description"] for r in read_records(out.with_name("out.eval.jsonl")) for t in r.tools
    ]
    assert texts and held and result.changed["names masked"] > 100


def test_command(source_file, out, capsys, tokenizer):
    argv = ["data", "prepare", "openai", source_file, source_file, str(out), "--limit", "50"]
    assert cli.main([*argv, "--mask-names", "1", "--tokenizer", tokenizer]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["items", "read", "50"] in rows and ["duplicate", "20"] in rows
    assert ["names", "masked", "80"] in rows and ["train:", str(out)] in rows
    assert any(row[:2] == ["prompt", "tokens"] for row in rows)
    assert cli.main(["data", "inspect", str(out)]) == 0
    assert ["records", "80"] in [line.split() for line in capsys.readouterr().out.splitlines()]
    assert cli.main([*argv, "--held-out", "2"]) == 2
    assert capsys.readouterr().err == (
        "rest-jax: error: --held-out 2: a fraction from 0 to 1 is needed\n"
    )


def test_templates_come_from_the_config_models(source_file, out, capsys, tokenizer):
    counts = []
    for settings in ([], ["data.brief_prompt=true"], ["data.template=hermes"]):
        argv = ["data", "prepare", "openai", source_file, str(out), "--overwrite"]
        assert cli.main([*argv, "--tokenizer", tokenizer, *settings]) == 0
        told = json.loads(out.with_name("out.jsonl.summary.json").read_text())
        counts.append(told["train"]["measures"]["prompt tokens"]["mean"])
    assert len(set(counts)) == 3


def test_preparing_needs_no_jax():
    script = "import sys; from rest_jax.data.prepare import pipeline; print('jax' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert done.stdout == "False\n"


def test_progress(source_file, out, capsys):
    run(source_file, out)
    shown = capsys.readouterr().err
    assert "100%" in shown and "records, 0 items rejected" in shown


@pytest.mark.slow
@pytest.mark.parametrize(("form", "ending"), [("list", "jsonl"), ("parquet", "parquet")])
def test_memory_does_not_grow_with_the_file(form, ending):
    """200,000 records of 600 MB (as Parquet, one row group of 500 MB) in less than 300 MB."""
    command = [sys.executable, "-m", "benchmarks.preparing", "--records", "200000"]
    done = subprocess.run(
        [*command, "--form", form, "--ending", ending],
        capture_output=True, text=True, cwd=REPOSITORY,
    )  # fmt: skip
    told = json.loads(done.stdout)
    assert told["records"] == 200_000 and told["kept"] > 180_000
    assert told["peak_bytes"] < 300e6


AS_TEXT = '<tool_call>\n{"name": "alpha", "arguments": {"n": 1}}\n</tool_call>'


@pytest.mark.parametrize(
    ("message", "target"),
    [
        ({"content": AS_TEXT}, {"calls": 1, "response": None, "think": None}),
        ({"content": "\n\n", "tool_calls": 1}, {"calls": 1, "response": None, "think": None}),
        (
            {"content": "<think>\nhmm\n</think>\n\nHello"},
            {"calls": 0, "response": "Hello", "think": "hmm"},
        ),
        (
            {"content": f"<think>\nhmm\n</think>\n\n{AS_TEXT}"},
            {"calls": 1, "response": None, "think": "hmm"},
        ),
        *(
            ({"content": "Hi", key: "because"}, {"calls": 0, "response": "Hi", "think": "because"})
            for key in ("reasoning", "reasoning_content", "thinking")
        ),
    ],
)
def test_what_servers_write_as_text_is_read(tmp_path, out, message, target):
    item = dialogue(1)
    if "tool_calls" in message:
        message = message | {"tool_calls": item["messages"][1]["tool_calls"]}
    item["messages"] = [item["messages"][0], {"role": "assistant", **message}]
    assert run(write(tmp_path / "in.jsonl", [item]), out).kept == 1
    (record,) = read_records(out)
    gold = record.target
    assert [(c.name, c.arguments) for c in gold.calls] == [("alpha", {"n": 1})] * target["calls"]
    assert (gold.response, gold.think) == (target["response"], target["think"])


def test_gold_answers_that_cannot_be_said_are_set_aside_with_their_reasons(tmp_path, out):
    items = [dialogue(0), dialogue(1), dialogue(2)]
    items[1]["messages"][-1]["content"] = "Close it with </response>."
    items[2]["messages"][-1]["content"] = AS_TEXT.replace("}}", "}")
    source = write(tmp_path / "in.jsonl", items)
    result = run(source, out)
    assert (result.kept, result.dropped.total(), result.rejected.total()) == (4, 2, 0)
    lines = [json.loads(line) for line in (out.parent / "out.jsonl.rejected.jsonl").open()]
    assert [line["raw"]["id"] for line in lines] == ["in-1/1", "in-2/1"]
    assert "template toolrl cannot say" in lines[0]["reason"]
    assert "cannot be read" in lines[1]["reason"]
    assert lines[0]["raw"]["target"]["response"] == "Close it with </response>."
    assert run(source, out, template="hermes", overwrite=True).kept == 5
