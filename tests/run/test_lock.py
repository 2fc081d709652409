"""One run in a folder of a store at a time: a live owner is respected, a dead one replaced, a lost lock noticed."""

import errno
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time

import pytest

from rest_jax.errors import RunStopped, UserError
from rest_jax.files import as_path
from rest_jax.run import lock
from tests.runs import environment

SECOND_LAUNCH = """
import sys
from rest_jax import cli
code = cli.main(["train", "scale/tiny", "method/rest", "name=tiny", f"output={sys.argv[1]}"])
assert "jax" not in sys.modules
sys.exit(code)
"""


def test_a_file_system_without_locks_is_one_line(tmp_path, monkeypatch):
    def acquire(self, blocking):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("filelock.FileLock.acquire", acquire)
    with pytest.raises(UserError, match=r"cannot be locked: No locks available; .* lock daemon"):
        lock._acquire(as_path(tmp_path / ".lock"))


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_lock_that_may_not_be_written_keeps_nobody_from_reading(tmp_path, monkeypatch, code):
    def acquire(self, blocking):
        raise OSError(code, os.strerror(code))

    (tmp_path / ".lock").touch()
    monkeypatch.setattr("filelock.FileLock.acquire", acquire)
    lock.check_free(as_path(tmp_path))
    with (
        pytest.raises(UserError, match=f"cannot be written: {os.strerror(code)}$"),
        lock.locked(as_path(tmp_path)),
    ):
        pytest.fail("locked")


def test_a_second_launch_is_refused_before_jax_is_imported(tmp_path):
    folder = as_path(tmp_path / "tiny")
    folder.mkdir()
    with lock.locked(folder):
        words = [sys.executable, "-c", SECOND_LAUNCH, str(tmp_path)]
        done = subprocess.run(words, env=environment(), capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    said = rf"tiny: another process \({socket.gethostname()}, process {os.getpid()}, for \d+ s\)"
    assert re.search(said, done.stderr) and done.stderr.count("\n") == 1


def test_of_an_owner_on_another_host_it_is_said_how_to_remove_its_lock(tmp_path):
    folder = as_path(tmp_path)
    with lock.locked(folder):
        (folder / lock.OWNER).write_text(json.dumps({"host": "gone", "pid": 1, "since": 0}))
        with pytest.raises(UserError, match=rf"\(gone, process 1, .*remove {folder / lock.FILE}\)"):
            lock.check_free(folder)


@pytest.mark.parametrize("name", [lock.FILE, lock.OWNER])
def test_a_full_disk_is_named_with_its_file(name, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    where = "filelock.FileLock.acquire" if name == lock.FILE else "pathlib.Path.write_text"
    monkeypatch.setattr(where, full)
    with (
        pytest.raises(RunStopped, match=rf"{tmp_path}/{name}: No space left on device; make room"),
        lock.locked(as_path(tmp_path)),
    ):
        pytest.fail("locked")


@pytest.mark.parametrize("content", ["", "[]", "[1]", '"x"', "{"])
def test_an_owner_that_cannot_be_read_is_nobody(content, tmp_path):
    with lock.locked(as_path(tmp_path)):
        (tmp_path / lock.OWNER).write_text(content)
        with pytest.raises(UserError, match="another process trains this run"):
            lock.check_free(as_path(tmp_path))


@pytest.fixture
def folder(memory_store, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT", 0.05)
    monkeypatch.setattr(lock, "STALE", 0.4)
    monkeypatch.setattr(lock, "SETTLE", 0.05)
    return as_path(f"{memory_store}/run")


def test_a_live_owner_keeps_the_folder_and_leaves_nothing(folder):
    with lock.locked(folder) as check:
        check()
        with (
            pytest.raises(
                UserError, match=r"run: another process \(.*process \d+, for \d+ s\) trains"
            ) as caught,
            lock.locked(folder),
        ):
            pytest.fail("two owners")
        assert "\n" not in str(caught.value)
        check()
    assert not (folder / lock.FILE).exists()


def test_the_lock_of_a_killed_process_is_taken_over_when_it_has_not_changed_for_a_while(folder):
    (folder / lock.FILE).write_text(
        json.dumps({"id": "dead", "host": "h", "pid": 1, "heartbeat": 7})
    )
    begun = time.monotonic()
    with lock.locked(folder):
        assert lock.STALE <= time.monotonic() - begun < lock.STALE + 1
        assert json.loads((folder / lock.FILE).read_text())["id"] != "dead"


def test_of_two_that_take_over_at_once_one_wins(folder):
    (folder / lock.FILE).write_text(json.dumps({"id": "dead", "heartbeat": 7}))
    won, refused, release = [], [], threading.Event()

    def run(name: int) -> None:
        try:
            with lock.locked(folder):
                won.append(name)
                release.wait(5)
        except UserError:
            refused.append(name)

    threads = [threading.Thread(target=run, args=(name,)) for name in range(2)]
    for thread in threads:
        thread.start()
    while len(won) + len(refused) < 2:
        time.sleep(0.01)
    release.set()
    for thread in threads:
        thread.join()
    assert len(won) == len(refused) == 1


def test_an_owner_that_finds_another_in_its_place_stops_and_lets_it_be(folder):
    with lock.locked(folder) as check:
        other = json.dumps({"id": "other", "host": "elsewhere", "pid": 9, "heartbeat": 1})
        (folder / lock.FILE).write_text(other)
        time.sleep(0.3)
        with pytest.raises(RunStopped, match="elsewhere, process 9, took this run over"):
            check()
    assert (folder / lock.FILE).read_text() == other
