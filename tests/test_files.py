"""A file is there whole, or as it was before."""

import os
import pathlib

import pytest

from rest_jax import files


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
