"""The store is tried before anything else: what is wrong with it is one line, soon, and nothing is left behind."""

import errno
import os
import pathlib
import time

import pytest

from rest_jax import config as config_lib
from rest_jax import distributed
from rest_jax.config import Config
from rest_jax.errors import RunStopped, UserError
from rest_jax.files import list_files
from rest_jax.run import preflight


def make_config(output: object, *overrides: str) -> Config:
    raw = {"name": "tiny", "output": str(output), "model": {"source": "hf"}}
    return config_lib.from_overrides(raw, overrides)


def refusal(config: Config) -> str:
    with pytest.raises(UserError) as caught:
        preflight.check_store(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_good_store_is_left_as_it_was(tmp_path, memory_store):
    preflight.check_store(make_config(tmp_path / "runs"))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    preflight.check_store(make_config(tmp_path / "runs"))
    assert list((tmp_path / "runs").rglob("*")) == [tmp_path / "runs" / "tiny"]
    preflight.check_store(make_config(memory_store))
    assert list_files(memory_store) == {}


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    said = refusal(make_config(tmp_path / "file"))
    assert f"output {tmp_path}/file/tiny: cannot be written (Not a directory)" in said


@pytest.mark.parametrize("call", ["write_text", "mkdir"])
def test_a_full_disk_is_no_wrong_folder(call, tmp_path, monkeypatch):
    """Making room helps, and a launcher may try again: exit code 1, not 2."""

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(type(preflight.as_path(tmp_path)), call, full)
    with pytest.raises(RunStopped, match="runs/tiny: No space left on device; make room"):
        preflight.check_store(make_config(tmp_path / "runs"))


@pytest.mark.parametrize("value", ["output", "model.source", "data.train"])
def test_a_store_that_refuses(value, memory_store, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError("Access Denied")

    store = type(preflight.as_path(memory_store)._backend.fs("s3://x"))
    monkeypatch.setattr(store, "open" if value == "output" else "exists", refuse)
    said = refusal(make_config(tmp_path, f"{value}=s3://bucket/x"))
    assert said.startswith("s3://bucket/x") and "Access Denied; check the name" in said


def test_a_store_that_does_not_answer_is_given_up(memory_store, monkeypatch):
    store = type(preflight.as_path(memory_store)._backend.fs("s3://x"))
    monkeypatch.setattr(store, "open", lambda *_, **__: time.sleep(60))
    monkeypatch.setattr(preflight, "DEADLINE", 0.2)
    begun = time.monotonic()
    assert "no answer within 0.2 s" in refusal(make_config(memory_store))
    assert time.monotonic() - begun < 5


def test_a_token_that_others_do_not_see_is_a_folder_that_is_not_shared(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "_PATIENCE", 0.1)
    # what the second of two processes wrote elsewhere
    monkeypatch.setattr(preflight.jax, "process_count", lambda: 2)
    for module in (preflight, distributed):
        monkeypatch.setattr(module, "exchange", lambda text, *_: [text, text])
    said = refusal(make_config(tmp_path))
    assert "not shared by all processes: process 0" in said and "process 1 wrote" in said
    assert "gs://" in said and not list(pathlib.Path(tmp_path).iterdir())
