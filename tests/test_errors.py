"""A full disk is one line, whoever notices; other errors stay what they are."""

import errno
import os
import pathlib

import pytest

from rest_jax import cli
from rest_jax.errors import RunStopped, UserError, full_disk
from rest_jax.files import atomic_folder, atomic_write
from rest_jax.run.metrics import METRICS_FILE, MetricsWriter, read_lines


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        ValueError("RESOURCE_EXHAUSTED: 9 bytes: No space left on device [os_error_code='28']"),
        RuntimeError("(sqlite3.OperationalError) database or disk is full"),
    ],
    ids=["disk", "quota", "TensorStore", "SQLite"],
)
def test_errors_of_a_full_disk_become_one_line(error):
    with pytest.raises(RunStopped, match=r"^x: .*; make room") as stop, full_disk("x"):
        raise error
    assert "\n" not in str(stop.value)


@pytest.mark.parametrize("error", [UserError("No space left on device"), OSError(errno.EIO, "I/O")])
def test_other_errors_pass(error):
    with pytest.raises(type(error)) as stop, full_disk("x"):
        raise error
    assert stop.value is error


def test_a_file_that_does_not_fit_leaves_the_one_before(tmp_path, limit_files):
    path = tmp_path / "x"
    path.write_text("before")
    limit_files(1000)
    with pytest.raises(RunStopped, match="x: File too large"), atomic_write(path) as partial:
        partial.write_bytes(b"a" * 2000)
    assert [file.name for file in tmp_path.iterdir()] == ["x"] and path.read_text() == "before"


def test_a_folder_that_does_not_fit_is_not_there(tmp_path, limit_files):
    limit_files(1000)
    with (
        pytest.raises(RunStopped, match="x: File too large"),
        atomic_folder(tmp_path / "x") as partial,
    ):
        (partial / "y").write_bytes(b"a" * 2000)
    assert list(tmp_path.iterdir()) == []


def test_metrics_that_do_not_fit_are_one_line_and_what_was_written_stays(tmp_path, limit_files):
    writer = MetricsWriter(tmp_path)
    writer.write(1, {"reward/mean": 1.0})
    limit_files(50)
    with pytest.raises(RunStopped, match=rf"{METRICS_FILE}: File too large"):
        writer.write(2, {"reward/mean": 0.123456789012})
    with pytest.raises(RunStopped, match="File too large"):
        writer.close()
    assert [line["step"] for line in read_lines(tmp_path / METRICS_FILE)] == [1]


@pytest.mark.parametrize("command", ["convert", "export"])
def test_a_model_that_does_not_fit_is_one_line_and_no_folder(
    model, tmp_path, limit_files, capsys, command
):
    limit_files(20_000)
    assert cli.main([command, str(model), str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert f"error: {tmp_path / 'out'}: File too large" in said and "Traceback" not in said
    assert list(pathlib.Path(tmp_path).iterdir()) == []
