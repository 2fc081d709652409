"""Tokenised data kept in files is what it is in memory, is made once, and is made anew when anything about it changes."""

import contextlib
import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest

from rest_jax.config import Config
from rest_jax.data import cache
from rest_jax.data.cache import COMPLETE, FOLDER, load_demonstrations, load_prompts
from rest_jax.data.files import read_records
from rest_jax.data.ragged import FileArray
from rest_jax.data.synthetic import world as synthetic
from rest_jax.data.tokenize import Encoder, prepare, prepare_supervised
from rest_jax.errors import UserError
from rest_jax.files import as_path
from rest_jax.models.tokenizer import Tokenizer
from rest_jax.templates import TEMPLATES
from rest_jax.tool_calls import Target
from tests.data.writing import write_records
from tools.tiny_tokenizer import train_tokenizer

TEMPLATE = TEMPLATES["toolrl"]
RECORDS = synthetic.demonstrations("train", 0, 23, "reasoned")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = [m["content"] for r in RECORDS for m in r.prompt_messages(TEMPLATE, True)]
    train_tokenizer(texts, 600, folder)
    return Tokenizer.load(folder)


@pytest.fixture
def config(tmp_path, monkeypatch) -> Config:
    """23 records, of which some prompts are too long; tokenised in chunks of 4."""
    monkeypatch.setattr(cache, "CHUNK", 4)
    path = tmp_path / "data.jsonl"
    write_records(path, RECORDS)
    return _config(tmp_path, {"train": str(path), "brief_prompt": True})


def _config(folder: pathlib.Path, data: dict) -> Config:
    raw = {"name": "x", "model": {"source": "none"}, "output": str(folder / "runs"), "data": data}
    return Config.model_validate(raw)


def _load(config, tokenizer, keep=True):
    return load_prompts(config, config.data.train, config.data.train_limit, tokenizer, keep)


def _assert_same(found, expected):
    assert list(found.records) == list(expected.records)
    for rows, others in ((found.prompts, expected.prompts), (found.targets, expected.targets)):
        assert [row.tolist() for row in rows] == [row.tolist() for row in others]
        assert all(row.dtype == np.int32 for row in rows)
    assert (found.dropped, found.limit) == (expected.dropped, expected.limit)


@contextlib.contextmanager
def _no_encoding(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "__call__", lambda *_: pytest.fail("tokenised again"))
        yield


def _folders(config) -> set[str]:
    return {path.name for path in pathlib.Path(config.output, FOLDER).iterdir()}


def test_prompts_are_tokenised_once(config, tokenizer, monkeypatch):
    lengths = [len(ids) for ids in Encoder(tokenizer, TEMPLATE, brief=True)(RECORDS)[0]]
    limit = int(np.median(lengths))
    config = _config(
        pathlib.Path(config.output).parent,
        {**config.data.model_dump(), "max_prompt_tokens": limit},
    )
    expected = prepare(read_records(config.data.train), tokenizer, TEMPLATE, config.data)
    assert 0 < expected.dropped < 23
    _assert_same(_load(config, tokenizer), expected)
    with _no_encoding(monkeypatch):
        again = _load(config, Tokenizer.load(tokenizer.source))
        _assert_same(again, expected)
        # what is dropped is decided anew
        more = config.model_copy(
            update={"data": config.data.model_copy(update={"max_prompt_tokens": 9999})}
        )
        assert _load(more, tokenizer).size == 23
    assert isinstance(again.prompts.arrays[0], FileArray)
    assert isinstance(again.records.rows.arrays[0], FileArray)


def test_demonstrations_have_targets(config, tokenizer, monkeypatch):
    expected = prepare_supervised(RECORDS, tokenizer, TEMPLATE, config.data, config.sft.max_tokens)
    _assert_same(load_demonstrations(config, tokenizer, True), expected)
    with _no_encoding(monkeypatch):
        _assert_same(load_demonstrations(config, tokenizer, True), expected)
    # prompts alone are something else
    assert len(_load(config, tokenizer).targets) == 0
    assert len(_folders(config)) == 2


@pytest.mark.parametrize("processes", [2, 3, 9])
def test_processes_share_the_chunks(config, tokenizer, processes):
    source = cache.Source(config.data.train, None, Encoder(tokenizer, TEMPLATE, True, True))
    folder = as_path(config.output) / "parts"
    folder.mkdir(parents=True)
    files = {}
    for process in range(processes):
        total, written = cache._write_part(source, folder, process, processes)
        assert total == 23
        files |= written
    content = {"parts": processes, "records": 23, "files": files}
    (folder / COMPLETE).write_text(json.dumps(content))
    records, columns = cache._open(folder)
    assert list(records) == RECORDS
    for rows, expected in zip(columns, source.encoder(RECORDS), strict=True):
        assert [row.tolist() for row in rows] == [row.tolist() for row in expected]


@pytest.mark.parametrize("processes", [1, 2, 9])
def test_what_a_chat_template_refuses_is_set_aside_alone(config, tokenizer, processes):
    strict = Tokenizer.load(tokenizer.source)
    refused = [RECORDS[i] for i in (0, 5, 6, 22)]
    said = json.dumps([r.prompt_messages(TEMPLATE, True)[-1]["content"] for r in refused])
    refusal = "{{ 'x' + 1 if messages[-1].content in " + said + " }}"
    strict.hf.chat_template = refusal + strict.hf.chat_template
    source = cache.Source(config.data.train, None, Encoder(strict, TEMPLATE, brief=True))
    folder = as_path(config.output) / "parts"
    folder.mkdir(parents=True)
    files = {}
    for process in range(processes):
        files |= cache._write_part(source, folder, process, processes)[1]
    content = {"parts": processes, "records": 23, "files": files}
    (folder / COMPLETE).write_text(json.dumps(content))
    left = [record for record in RECORDS if record not in refused]
    records, (prompts,) = cache._open(folder)
    assert list(records) == left
    expected = Encoder(tokenizer, TEMPLATE, brief=True)(left)[0]
    assert [row.tolist() for row in prompts] == [row.tolist() for row in expected]
    ((reason, names),) = cache._set_aside(folder).items()
    assert reason.startswith("the chat template of the tokenizer refuses it: ")
    assert sorted(names) == sorted(record.id for record in refused)


def test_what_decides_the_ids_decides_the_folder(config, tokenizer, tmp_path):
    """Another content, name, limit, template, form of prompt, tokenizer or chat template is another folder."""
    _load(config, tokenizer)
    seen = _folders(config)

    def is_new(data: dict, tokenizer: Tokenizer) -> bool:
        before = _folders(config)
        _load(_config(tmp_path, config.data.model_dump() | data), tokenizer)
        return len(_folders(config) - before) == 1

    assert not is_new({}, tokenizer) and not is_new({"shuffle": False}, tokenizer)
    assert is_new({"train_limit": 7}, tokenizer)
    assert is_new({"brief_prompt": False}, tokenizer)
    assert is_new({"template": "hermes"}, tokenizer)
    other = tmp_path / "other.jsonl"
    shutil.copy(config.data.train, other)
    assert is_new({"train": str(other)}, tokenizer)
    write_records(other, RECORDS[:-1])
    assert is_new({"train": str(other)}, tokenizer)
    folder = shutil.copytree(tokenizer.source, tmp_path / "tokenizer")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    )
    assert is_new({}, Tokenizer.load(folder))
    assert seen < _folders(config)


def test_without_keep_nothing_is_written(config, tokenizer, monkeypatch):
    expected = prepare(RECORDS, tokenizer, TEMPLATE, config.data)
    _assert_same(_load(config, tokenizer, keep=False), expected)
    assert not pathlib.Path(config.output).exists()
    _load(config, tokenizer)
    with _no_encoding(monkeypatch):
        _assert_same(_load(config, tokenizer, keep=False), expected)


def test_worlds_are_not_kept(config, tokenizer, tmp_path):
    config = _config(tmp_path, {"train": "synthetic:train", "synthetic_size": 5})
    assert _load(config, tokenizer).size == 5
    assert not pathlib.Path(config.output).exists()


def test_what_was_begun_is_made_anew(config, tokenizer, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Encoder, "__call__", killed)
        _load(config, tokenizer)
    assert not pathlib.Path(config.output).exists()  # nothing was written
    _assert_same(_load(config, tokenizer), prepare(RECORDS, tokenizer, TEMPLATE, config.data))


@pytest.mark.parametrize("damage", ["cut", "gone", "flipped"])
def test_what_is_damaged_is_made_anew(config, tokenizer, damage, capsys):
    expected = prepare(RECORDS, tokenizer, TEMPLATE, config.data)
    _load(config, tokenizer)
    (folder,) = pathlib.Path(config.output, FOLDER).iterdir()
    path = folder / "tokens-0-of-1.bin"
    size = path.stat().st_size
    if damage == "cut":
        with path.open("r+b") as file:
            file.truncate(size - 4)
        said = f"has {size - 4} bytes, not {size}; the data is tokenised anew"
    elif damage == "flipped":
        content = bytearray(path.read_bytes())
        content[size // 2] ^= 1
        path.write_bytes(content)
        said = "tokens-0-of-1.bin: is not what was written; the data is tokenised anew"
    else:
        path.unlink()
        said = "tokens-0-of-1.bin: is missing; the data is tokenised anew"
    _assert_same(_load(config, tokenizer), expected)
    assert said in capsys.readouterr().out
    _load(config, tokenizer)
    assert said not in capsys.readouterr().out


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"files": {"index-0-of-1.npz": 7}}'])
def test_data_whose_last_file_cannot_be_read_is_made_anew(config, tokenizer, content, capsys):
    expected = prepare(RECORDS, tokenizer, TEMPLATE, config.data)
    _load(config, tokenizer)
    (path,) = pathlib.Path(config.output, FOLDER).glob(f"*/{COMPLETE}")
    written = path.read_text()
    path.write_text(content)
    _assert_same(_load(config, tokenizer), expected)
    assert f"{path}: cannot be read; the data is tokenised anew\n" in capsys.readouterr().out
    assert path.read_text() == written


@pytest.mark.parametrize("content", [None, ""])
def test_no_records(content, tokenizer, tmp_path):
    path = tmp_path / "data.jsonl"
    if content is not None:
        path.write_text(content)
    said = "no records" if content == "" else "no such file"
    with pytest.raises(UserError, match=f"data {path}: {said}"):
        _load(_config(tmp_path, {"train": str(path)}), tokenizer)


def test_placeholders_are_no_demonstrations(config, tokenizer, monkeypatch):
    monkeypatch.setattr("rest_jax.data.convert.rlla.is_reward_only", lambda record: True)
    with pytest.raises(UserError, match="no supervised data"):
        load_demonstrations(config, tokenizer, True)


def test_in_a_store(config, tokenizer, memory_store, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (as_path(memory_store) / "data.jsonl").write_bytes(pathlib.Path(config.data.train).read_bytes())
    data = config.data.model_copy(update={"train": f"{memory_store}/data.jsonl"})
    config = config.model_copy(update={"output": f"{memory_store}/runs", "data": data})
    expected = prepare(RECORDS, tokenizer, TEMPLATE, data)
    _assert_same(_load(config, tokenizer), expected)
    with _no_encoding(monkeypatch):
        _assert_same(_load(config, tokenizer), expected)


@pytest.mark.parametrize("keep", [False, True])
def test_gold_answers_that_cannot_be_said_are_not_kept_and_told_each_time(
    tmp_path, tokenizer, keep, monkeypatch
):
    monkeypatch.setattr(cache, "CHUNK", 4)
    empty = [dataclasses.replace(RECORDS[i], target=Target()) for i in (1, 8, 9, 10, 11)]
    records = [*RECORDS]
    for record in empty:
        records[RECORDS.index(next(r for r in RECORDS if r.id == record.id))] = record
    path = tmp_path / "data.jsonl"
    write_records(path, records)
    config = _config(tmp_path, {"train": str(path), "brief_prompt": True})
    for _ in range(2):
        found = _load(config, tokenizer, keep)
        assert [r.id for r in found.records] == [r.id for r in records if r not in empty]
        assert dict(found.set_aside) == {"the gold answer is empty": [r.id for r in empty]}
        assert "5 set aside (5: the gold answer is empty" in found.summary()
    write_records(path, empty)
    with pytest.raises(UserError, match=r"no records; 5 set aside \(5: the gold answer is empty"):
        _load(config, tokenizer, keep)
