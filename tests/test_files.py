"""A file or a folder is there complete, or as it was before."""

import os
import pathlib
import sys
import time

import pytest
from fsspec.registry import _registry

from rest_jax import files
from rest_jax.errors import UserError


@pytest.mark.parametrize("kind", [str, pathlib.Path])
def test_the_name_appears_at_the_end(kind, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("old")
    with files.atomic_write(kind(path)) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
        assert partial.parent == tmp_path and str(os.getpid()) in partial.name
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.csv"]


def test_a_file_that_cannot_be_written_is_told_before_the_block(tmp_path):
    for path, error, named in (
        (tmp_path, IsADirectoryError, tmp_path),
        (tmp_path / "absent" / "x.json", FileNotFoundError, tmp_path / "absent"),
    ):
        with pytest.raises(error) as told, files.atomic_write(path):
            raise AssertionError("the block was entered")
        assert told.value.filename == str(named)


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_and_what_it_leads_to_is_written(there, tmp_path):
    real = tmp_path / "elsewhere" / "real"
    real.parent.mkdir()
    if there:
        real.write_text("old")
    (tmp_path / "link").symlink_to("elsewhere/real")
    with files.atomic_write(tmp_path / "link") as partial:
        partial.write_text("new")
        assert partial.parent == real.parent
    assert (tmp_path / "link").is_symlink() and real.read_text() == "new"
    assert os.listdir(real.parent) == ["real"]


def test_into_a_pipe_the_bytes_are_written(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for name in ("pipe", "link"):
        reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
        with files.atomic_write(tmp_path / name) as partial:
            partial.write_text("new")
        assert os.read(reader, 9) == b"new"
        os.close(reader)
        assert (tmp_path / "pipe").is_fifo() and (tmp_path / "link").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["link", "pipe"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("before", [None, "old"])
def test_a_failure_leaves_what_was_there(error, before, tmp_path):
    path = tmp_path / "a.csv"
    if before is not None:
        path.write_text(before)
    with pytest.raises(error), files.atomic_write(path) as partial:
        partial.write_text("half")
        raise error
    assert os.listdir(tmp_path) == ([] if before is None else ["a.csv"])
    assert before is None or path.read_text() == before


@pytest.mark.parametrize("before", ["absent", "empty"])
def test_a_folder_appears_at_the_end(before, tmp_path):
    path = tmp_path / "parent" / "out"
    if before == "empty":
        path.mkdir(parents=True)
    with files.atomic_folder(str(path)) as partial:
        (partial / "a").write_text("new")
        assert partial.parent == path.parent and str(os.getpid()) in partial.name
        assert not path.exists() or not os.listdir(path)
    assert os.listdir(path.parent) == ["out"] and (path / "a").read_text() == "new"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_no_folder(error, tmp_path):
    with pytest.raises(error), files.atomic_folder(tmp_path / "out") as partial:
        (partial / "a").write_text("half")
        raise error
    assert os.listdir(tmp_path) == []


def test_a_folder_that_holds_something_is_refused_before_anything_is_done(tmp_path):
    for path in (tmp_path / "full" / "a", tmp_path / "file"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("kept")
    for name in ("full", "file"):
        with (
            pytest.raises(UserError, match="exists and is not empty"),
            files.atomic_folder(tmp_path / name),
        ):
            pytest.fail("the block was entered")
    assert sorted(os.listdir(tmp_path)) == ["file", "full"]


def test_two_writers_of_one_number_do_not_meet(tmp_path):
    """As in two containers that share a disk: the last to end has the name."""
    path = tmp_path / "a.csv"
    with files.atomic_write(path) as first, files.atomic_write(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first" and os.listdir(tmp_path) == ["a.csv"]
    with files.atomic_folder(tmp_path / "out") as first:
        (first / "a").write_text("")
        with pytest.raises(ValueError), files.atomic_folder(tmp_path / "out"):
            raise ValueError
    assert os.listdir(tmp_path / "out") == ["a"]


def test_what_killed_writers_left_is_removed_a_day_later(tmp_path):
    """Of the same name alone, and by what was written last within a folder."""
    old, hour = time.time() - 25 * 3600, time.time() - 3600
    for name, written in (
        ("out.7.0123abcd.partial", old),
        ("out.8.partial", old),
        ("out.9.0123abcd.partial", hour),
        ("out.mine.partial", old),
        ("other.7.0123abcd.partial", old),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text("")
        os.utime(tmp_path / name / "weights", (written, written))
        os.utime(tmp_path / name, (old, old))
    (tmp_path / "out.6.0123abcd.partial").write_text("")
    os.utime(tmp_path / "out.6.0123abcd.partial", (old, old))
    with files.atomic_folder(tmp_path / "out"):
        pass
    left = ["other.7.0123abcd.partial", "out", "out.9.0123abcd.partial", "out.mine.partial"]
    assert sorted(os.listdir(tmp_path)) == left


@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_gets_a_name_is_on_the_disk(what, tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(os, "fsync", lambda number: done.append(os.fstat(number).st_ino))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *names: (done.append("named"), replace(*names)))
    if what == "file":
        with files.atomic_write(tmp_path / "a") as partial:
            partial.write_text("a")
        written = [tmp_path / "a"]
    else:
        with files.atomic_folder(tmp_path / "a") as partial:
            (partial / "sub").mkdir()
            (partial / "sub" / "b").write_text("b")
        written = [tmp_path / "a" / "sub" / "b", tmp_path / "a" / "sub", tmp_path / "a"]
    *before, named, after = done
    assert {path.stat().st_ino for path in written} == {*before} and named == "named"
    assert after == tmp_path.stat().st_ino


def test_a_folder_that_cannot_be_read_can_be_written_to(tmp_path, monkeypatch):
    def refuse(what, plain):
        def call(path, *rest):
            if pathlib.Path(path) == tmp_path:
                raise PermissionError(what)
            return plain(path, *rest)

        return call

    for name in ("open", "listdir", "scandir"):
        monkeypatch.setattr(os, name, refuse(name, getattr(os, name)))
    with files.atomic_write(tmp_path / "a") as partial:
        partial.write_text("a")
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["a"]
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("lost")))
    files.flush(tmp_path)
    with pytest.raises(OSError, match="lost"):
        files.flush(tmp_path / "a")


def test_a_location_is_a_path_or_a_known_url(tmp_path, memory_store):
    assert files.as_path(tmp_path) == tmp_path and files.as_path("a/b").parts == ("a", "b")
    url = files.as_path(f"{memory_store}/a") / "b"
    assert str(url) == "s3://bucket/a/b" and files.as_path(url) == url
    assert files.absolute(url) == url and files.absolute(tmp_path / "x" / ".." / "y").name == "y"
    with pytest.raises(UserError, match=r"ftp://x/y: no such store as ftp://; known: gs://, s3://"):
        files.as_path("ftp://x/y")
    with pytest.raises(UserError, match="output s3://bucket: a local path is needed"):
        files.local_path("output", memory_store)


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    monkeypatch.delitem(_registry, "gs", raising=False)
    with pytest.raises(UserError, match=r'gs://b/x: .* missing: pip install "rest-jax\[gcs\]"'):
        files.as_path("gs://b/x")


def test_a_file_of_a_store_is_put_at_the_end_or_not_at_all(memory_store):
    path = files.as_path(f"{memory_store}/a.csv")
    path.write_text("old")
    with files.atomic_write(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    with pytest.raises(ValueError), files.atomic_write(path) as partial:
        partial.write_text("half")
        raise ValueError
    assert path.read_text() == "new" and not partial.exists()


def test_the_last_file_of_a_folder_is_put_last(memory_store, monkeypatch):
    put = []
    monkeypatch.setattr(
        files,
        "upload",
        lambda file, url, plain=files.upload: (put.append(url.name), plain(file, url)),
    )
    with files.atomic_folder(f"{memory_store}/out") as partial:
        for name in ("config.json", "weights", "sub/vocab.txt"):
            (partial / name).parent.mkdir(exist_ok=True)
            (partial / name).write_text(name)
        assert not files.list_files(f"{memory_store}/out")
    assert put == ["vocab.txt", "weights", "config.json"]
    assert files.as_path(f"{memory_store}/out/sub/vocab.txt").read_text() == "sub/vocab.txt"
    with (
        pytest.raises(UserError, match="s3://bucket/out: exists and is not empty"),
        files.atomic_folder(f"{memory_store}/out"),
    ):
        pytest.fail("the block was entered")


@pytest.mark.parametrize("where", ["local", "store"])
def test_listing_reading_and_moving_a_folder(where, tmp_path, memory_store):
    root = files.as_path(tmp_path if where == "local" else memory_store)
    with files.written_locally(root / "a") as folder:
        (folder / "sub").mkdir(parents=True)
        (folder / "one").write_bytes(b"1\n" * 5)
        (folder / "sub" / "two").write_bytes(b"2")
    found = files.list_files(root / "a")
    assert {name: info["size"] for name, info in found.items()} == {"one": 10, "sub/two": 1}
    with files.open_bytes(root / "a" / "one") as file:
        assert file.readline(1) == b"1" and file.readline(9) == b"\n" and file.read() == b"1\n" * 4
        assert file.seek(0) == 0 and file.read(3) == b"1\n1"
    files.move_folder(root / "a", root / "b")
    assert files.list_files(root / "b").keys() == found.keys() and not (root / "a").exists()


def test_a_folder_is_fetched_once_and_again_when_it_has_changed(
    memory_store, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    url = files.as_path(f"{memory_store}/model")
    for name in ("config.json", "params/d/1", "params/2"):
        (url / name).write_text(name)
    first = files.fetch_folder(url, leave=("params",))
    assert first.is_relative_to(tmp_path) and (first / "config.json").read_text() == "config.json"
    assert not (first / "params").exists()
    assert files.follow(first / "params") == url / "params"
    assert (files.fetch_folder(url) / "params/d/1").read_text() == "params/d/1"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_download", lambda *_: pytest.fail("fetched twice"))
        assert files.fetch_folder(url, leave=("params",)) == first
    (url / "config.json").write_text("new")
    assert (files.fetch_folder(url, leave=("params",)) / "config.json").read_text() == "new"
    assert files.fetch_folder(tmp_path) == tmp_path
    assert files.follow(tmp_path / "params") == tmp_path / "params"
    with pytest.raises(UserError, match="s3://bucket/none: no such folder"):
        files.fetch_folder(f"{memory_store}/none")


def test_errors_of_a_store_are_one_line_with_a_remedy_and_local_ones_are_pythons():
    with (
        pytest.raises(UserError, match=r"s3://b/x: no credentials; .*AWS_ACCESS_KEY_ID") as caught,
        files.store_errors("s3://b/x"),
    ):
        raise RuntimeError("no\ncredentials")
    assert "\n" not in str(caught.value)
    with pytest.raises(RuntimeError), files.store_errors("/b/x"):
        raise RuntimeError
