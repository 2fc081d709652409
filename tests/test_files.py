"""A file or a folder is there complete, or as it was before."""

import os
import pathlib

import pytest

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


def test_an_error_before_anything_is_written(tmp_path):
    with pytest.raises(FileNotFoundError), files.atomic_write(tmp_path / "absent" / "a") as partial:
        partial.write_text("")


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


def test_what_a_killed_process_of_this_number_left_is_removed(tmp_path):
    leftover = tmp_path / f"out.{os.getpid()}.partial"
    leftover.mkdir()
    (leftover / "old").write_text("")
    with files.atomic_folder(tmp_path / "out") as partial:
        (partial / "a").write_text("")
    assert os.listdir(tmp_path / "out") == ["a"]
