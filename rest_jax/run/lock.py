"""One run in a folder at a time.

Locally it is a file lock, which the system releases however the process ends. A store has none, so there it is an object:
`.lock`, made only if absent, holds who owns it and is put again every HEARTBEAT seconds. It is the owner's as long as it
changes. One that has not changed for STALE seconds is that of a dead process and is taken over, so a run that was killed can be
started again at once and waits for at most that long. No clocks are compared. Two processes that take over a stale one at the
same moment are told apart SETTLE seconds later; a process that is held up (a suspended machine) and finds another's name in its
place stops.

`check_free` comes before anything else of a run, so that a second launch is refused at once; jax, which takes seconds to import
on a busy machine, is imported by `locked` alone.
"""

import contextlib
import json
import os
import pathlib
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import filelock
import fsspec
from etils import epath

from rest_jax.errors import RunStopped, UserError, full_disk
from rest_jax.files import READ_ONLY, atomic_write, is_url, store_errors

FILE = ".lock"
OWNER = ".owner"  # beside a file lock: whose it is, or, without a process, on which host it was
HEARTBEAT = 10.0  # seconds
STALE = 45.0
SETTLE = 2.0


@contextlib.contextmanager
def locked(folder: epath.Path) -> Iterator[Callable[[], None]]:
    """The first process holds the folder's lock, the others go by its word. UserError when another process trains in it,
    RunStopped when the disk is full.

    Yields what raises RunStopped, in all processes, once the lock is lost; all must call it.
    """
    from rest_jax.distributed import agree, exchange, is_first_process

    lock = fault = None
    if is_first_process():
        try:
            lock = _StoreLock(folder / FILE) if is_url(folder) else _file_lock(folder / FILE)
        except (UserError, RunStopped) as error:
            fault = error
    agree(fault)

    def check() -> None:
        # The system takes no file lock away.
        lost = lock.lost if isinstance(lock, _StoreLock) else ""
        if is_url(folder) and (said := exchange(lost)[0]):
            raise RunStopped(said)

    try:
        yield check
    finally:
        if isinstance(lock, filelock.BaseFileLock):
            _leave(folder / OWNER)
        if lock is not None:
            lock.release()


def check_free(folder: epath.Path) -> None:
    """UserError when a process trains in a local folder: `locked` would say so only when a model is loaded. A lock that cannot
    be written, as on a disk that is only read, keeps nobody from reading. For the first process: two that look at once would
    take each other for the owner.
    """
    if not is_url(folder) and (folder / FILE).exists():
        with contextlib.suppress(_ReadOnlyError):
            _acquire(folder / FILE).release()


def _file_lock(path: epath.Path) -> filelock.BaseFileLock:
    lock = _acquire(path)
    with atomic_write(path.parent / OWNER) as partial:
        partial.write_text(json.dumps(_this_process()))
    return lock


def _leave(path: epath.Path) -> None:
    """Says that this process, which may live on, is the owner no more; the host stays."""
    left = {name: value for name, value in _this_process().items() if name not in ("pid", "begun")}
    with contextlib.suppress(OSError, RunStopped), atomic_write(path) as partial:
        partial.write_text(json.dumps(left))


class _ReadOnlyError(UserError):
    """A lock that this process may not write."""


def _acquire(path: epath.Path) -> filelock.BaseFileLock:
    """UserError that names the owner of a lock that is another's."""
    lock = filelock.FileLock(path)
    try:
        with full_disk(path):
            lock.acquire(blocking=False)
    except filelock.Timeout:
        raise _taken(path.parent, read_owner(path.parent / OWNER)) from None
    except OSError as error:
        if error.errno in READ_ONLY:
            raise _ReadOnlyError(f"{path}: cannot be written: {error.strerror}") from error
        raise UserError(
            f"{path}: cannot be locked: {error.strerror or error}; a run needs a file system with locks (of NFS the lock daemon)"
        ) from error
    return lock


def _this_process() -> dict[str, object]:
    """This process, as the owner of a lock."""
    pid = os.getpid()
    return {"host": socket.gethostname(), "pid": pid, "begun": begun(pid), "since": time.time()}


def begun(pid: int) -> str | None:
    """When a process of this host began, in ticks of a boot: no other of its number has that. None for none, or without /proc."""
    with contextlib.suppress(OSError):
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # Behind the name, which may hold anything, the 22nd field is the 20th.
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return f"{boot}/{fields[19]}"


def read_owner(path: epath.Path) -> dict[str, Any]:
    """What a file says of the process that wrote it last; nothing where it is about to be written."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return dict(json.loads(path.read_text()))
    return {}


def _taken(folder: epath.Path, owner: dict[str, Any]) -> UserError:
    if "pid" not in owner:
        owner = {}  # of the run before: this one's is about to be written
    age = max(0, round(time.time() - owner.get("since", time.time())))
    said = f" ({owner.get('host')}, process {owner.get('pid')}, for {age} s)" if owner else ""
    elsewhere = owner.get("host", socket.gethostname()) != socket.gethostname()
    # A file server keeps the lock of a host that died until the lease ends, if it knows of leases at all.
    dead = f" (is that host dead and the lock left? remove {folder / FILE})" if elsewhere else ""
    return UserError(
        f"{folder}: another process{said} trains this run; wait for it{dead}, or choose another name"
    )


class _StoreLock:
    """The object that says who trains in a folder of a store. A resource: `release` at the end."""

    def __init__(self, path: epath.Path):
        """Takes it. UserError when its owner is alive."""
        self.path = path
        self._fs, self._name = fsspec.url_to_fs(os.fspath(path))
        self._id, self._beats, self._self = uuid.uuid4().hex, 0, _this_process()
        self.lost = ""  # why it is no longer ours
        self._closing = threading.Event()
        with store_errors(path):
            self._take()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="lock")
        self._thread.start()

    def release(self) -> None:
        """Removes the object, if it is still ours."""
        self._closing.set()
        self._thread.join()
        with store_errors(self.path):
            if self._owner().get("id") == self._id:
                self.path.unlink(missing_ok=True)

    def _take(self) -> None:
        found, begun = self._read(), time.monotonic()
        while found and time.monotonic() - begun < STALE:
            time.sleep(min(HEARTBEAT, STALE) / 4)
            now = self._read()
            if now and now != found:
                raise self._refusal()
            found = now
        if found:
            self._put()
        else:
            self._create()
        # Two may have taken over a stale one at once, and not every server minds "only if absent".
        time.sleep(SETTLE)
        if self._owner().get("id") != self._id:
            raise self._refusal()

    def _create(self) -> None:
        try:
            self._fs.pipe_file(self._name, self._token(), mode="create")
        except FileExistsError:
            pass  # another's, as will be seen
        except OSError:
            self._put()  # a server that does not know "only if absent"; other faults return

    def _refusal(self) -> UserError:
        return _taken(self.path.parent, self._owner())

    def _beat(self) -> None:
        """Puts the object again and again, unless it is another's."""
        while not self._closing.wait(HEARTBEAT):
            with contextlib.suppress(Exception):  # a store that fails for a while; STALE bounds it
                owner = self._owner()
                if owner.get("id", self._id) != self._id:
                    other = f"{owner.get('host')}, process {owner.get('pid')},"
                    self.lost = (
                        f"{self.path.parent}: {other} took this run over; it ends here unsaved"
                    )
                    return
                self._put()

    def _put(self) -> None:
        self._fs.pipe_file(self._name, self._token())

    def _token(self) -> bytes:
        self._beats += 1
        return json.dumps(self._self | {"id": self._id, "heartbeat": self._beats}).encode()

    def _read(self) -> bytes:
        """What the object holds; nothing when there is none."""
        try:
            return self._fs.cat_file(self._name)
        except FileNotFoundError:
            return b""

    def _owner(self) -> dict[str, Any]:
        content = self._read()
        return json.loads(content) if content else {}
