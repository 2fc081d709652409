"""Files by path or URL: one path type, writing all or nothing, folders of a store fetched once a host.

`as_path` makes an `epath.Path` of a local path, `gs://bucket/..` or `s3://bucket/..`; etils and fsspec (gcsfs, s3fs) do the work.
An object store has no folders and cannot append to or rename a file: what is written there is put whole, in one request. Errors
of a store are one line (`store_errors`); those of local files are Python's own.
"""

import concurrent.futures
import contextlib
import difflib
import errno
import hashlib
import io
import os
import pathlib
import re
import shutil
import tempfile
import time
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

# etils would take TensorFlow for URLs where that is installed, and behave otherwise than on a machine without it.
os.environ.setdefault("EPATH_USE_TF", "false")

import filelock
import fsspec
from etils import epath
from fsspec.config import conf as fsspec_config

from rest_jax.cache_folder import user_cache
from rest_jax.errors import UserError, full_disk

Location = str | os.PathLike[str]
_PART = 2**20  # bytes of a file that are read at once
# what the system says of a place that may only be read
READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
# what is behind the name of a file that is being written: the process, and what is random
PARTIAL = re.compile(r"\.\d+(\.[0-9a-f]+)?\.partial$")
_LEFT = 86_400.0  # seconds that nobody has written to what a writer has begun: it is dead

# scheme -> the extra of the package that brings its file system, and how to say who one is
STORES = {
    "gs": (
        "gcs",
        "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS",
    ),
    "s3": (
        "s3",
        "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (another server: AWS_ENDPOINT_URL)",
    ),
}
_READ_AHEAD = 2**22  # bytes asked of a store at once
_URL_FILE = ".url"  # of a folder that was left in the store: where it is

for _scheme in (*STORES, "gcs"):
    # A listing kept in memory would hide what other processes have written.
    fsspec_config.setdefault(_scheme, {}).setdefault("use_listings_cache", False)


def check_output(output: Location, inputs: Iterable[Location], option: str = "--output") -> None:
    """UserError for an output that would take the place of one of these inputs, or of a file in one that is a folder, under
    whatever name.
    """
    place = absolute(output)
    for one in inputs:
        if place == absolute(one) or absolute(one) in place.parents:
            where = "is" if place == absolute(one) else "lies in"
            raise UserError(f"{option} {output}: {where} what is read, {one}; name another file")


def nearest_path(path: Location, folders: bool) -> str:
    """What lies beside a path that is not there, folder or file, and is spelled most like it, in brackets; "" for none."""
    beside = pathlib.Path(path).parent
    try:
        found = [one.name for one in beside.iterdir() if one.is_dir() == folders]
    except OSError:
        return ""
    close = difflib.get_close_matches(pathlib.Path(path).name, found, n=1)
    return f" (nearest: {beside / close[0]})" if close else ""


def is_url(location: Location) -> bool:
    """Whether a location is in an object store, not on a file system."""
    return "://" in os.fspath(location)


def as_path(location: Location) -> epath.Path:
    """The path of a local file or folder, or of a URL. UserError for an unknown scheme or a package that is missing."""
    text = os.fspath(location)
    if not is_url(text):
        return epath.Path(text)
    scheme = text.partition("://")[0]
    if scheme not in STORES:
        known = ", ".join(f"{name}://" for name in STORES)
        raise UserError(f"{text}: no such store as {scheme}://; known: {known} and local paths")
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        extra, _ = STORES[scheme]
        raise UserError(
            f'{text}: the package for {scheme}:// is missing: pip install "rest-jax[{extra}]"'
        ) from error
    return epath.Path(text)


def absolute(location: Location) -> epath.Path:
    """The path from the root of the file system, links followed; a URL as it is."""
    path = as_path(location)
    return path if is_url(path) else epath.Path(os.path.realpath(path))


def local_path(name: str, location: Location) -> pathlib.Path:
    """A path that has to be local; UserError, which names the value `name`, for a URL."""
    if is_url(location):
        raise UserError(f"{name} {os.fspath(location)}: a local path is needed here, not a URL")
    return pathlib.Path(location)


@contextlib.contextmanager
def store_errors(location: Location) -> Iterator[None]:
    """Makes one UserError of whatever a store's package raises about a URL, with the remedy. Local errors pass."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # gcsfs, s3fs and botocore have no common kind
        if not is_url(location):
            raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        _, remedy = STORES[os.fspath(location).partition("://")[0]]
        raise UserError(
            f"{os.fspath(location)}: {reason}; check the name and the rights, or {remedy}"
        ) from error


def open_bytes(location: Location) -> io.BufferedReader:
    """A file, opened to read bytes; of a store in pieces of 4 MiB, so that any size can be read."""
    path = as_path(location)
    if not is_url(path):
        return open(path, "rb")
    fs, name = fsspec.url_to_fs(os.fspath(path))
    file: Any = fs.open(name, "rb", block_size=_READ_AHEAD)
    return io.BufferedReader(file, _READ_AHEAD)


def list_files(folder: Location) -> dict[str, dict[str, Any]]:
    """Every file below a folder: its name relative to the folder -> what the file system knows of it, "size" among it."""
    fs, root = fsspec.url_to_fs(os.fspath(folder))
    found: Any = fs.find(root, detail=True)
    return {name.removeprefix(root).lstrip("/"): info for name, info in found.items()}


def make_folder(path: epath.Path) -> None:
    """Makes a local folder and its parents; in a store a folder is but the beginning of names."""
    if not is_url(path):
        with full_disk(path):
            path.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def folder_while_used(path: epath.Path) -> Iterator[None]:
    """The folder is there within the block; it and the parents made for it are removed again, unless something is in them."""
    made = [] if is_url(path) else [p for p in (path, *path.parents) if not p.exists()]
    try:
        make_folder(path)
        yield
    finally:
        with contextlib.suppress(OSError):
            for folder in made:
                os.rmdir(folder)


def move_folder(path: epath.Path, target: epath.Path) -> None:
    """Renames a folder; in a store every file is copied there and then removed."""
    if not is_url(path):
        path.rename(target)
        return
    fs, root = fsspec.url_to_fs(os.fspath(path))
    _, other = fsspec.url_to_fs(os.fspath(target))
    for name in list_files(path):
        fs.cp_file(f"{root}/{name}", f"{other}/{name}")
    fs.rm(root, recursive=True)


def upload(file: pathlib.Path, url: epath.Path) -> None:
    """Puts a local file whole."""
    fs, name = fsspec.url_to_fs(os.fspath(url))
    fs.put_file(str(file), name)


def download(url: epath.Path, file: pathlib.Path) -> None:
    """Copies a file of a store to a local one."""
    fs, name = fsspec.url_to_fs(os.fspath(url))
    fs.get_file(name, str(file))


@contextlib.contextmanager
def written_locally(location: Location, last: str = "") -> Iterator[pathlib.Path]:
    """A local folder to write files to: the one at `location`; for a URL one whose files are put there when the block ends
    well, the one called `last` behind all others.
    """
    if not is_url(location):
        yield pathlib.Path(location)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield pathlib.Path(folder)
        with store_errors(location):
            for name in sorted(list_files(folder), key=lambda name: (name == last, name)):
                upload(pathlib.Path(folder, name), as_path(location) / name)


@contextlib.contextmanager
def atomic_write(location: Location) -> Iterator[pathlib.Path]:
    """A local path to write a file to; it becomes the file at `location` when the block ends well.

    When it does not, the path is removed, and what was there before is untouched. A local file is written beside its
    place, under a name of its own, so that two writers do not meet, and is on the disk before it gets its name: a power cut
    leaves the old one or the new one. A link stays, and what it leads to is that file; into a pipe or a device the bytes are
    written. The file of a URL is put in one request. RunStopped when the disk is full.
    """
    if is_url(location):
        with tempfile.TemporaryDirectory() as folder:
            partial = pathlib.Path(folder) / as_path(location).name
            yield partial
            with store_errors(location):
                upload(partial, as_path(location))
        return
    path = pathlib.Path(location)
    # At once, not when all is written; of a folder that is missing, its name and not that of the file beside.
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file():
        with tempfile.TemporaryDirectory() as folder:
            partial = pathlib.Path(folder) / path.name
            yield partial
            with full_disk(path), partial.open("rb") as made, path.open("wb") as out:
                shutil.copyfileobj(made, out)
        return
    if path.is_symlink():
        path = pathlib.Path(os.path.realpath(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path.parent))
    partial = _beside(path)
    try:
        with full_disk(path):
            yield partial
            flush(partial)
        os.replace(partial, path)
        flush(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(location: Location, last: str = "config.json") -> Iterator[pathlib.Path]:
    """An empty local folder that becomes the one at `location` when the block ends well, and is removed when it does not.

    Missing parents are made. UserError when there is something at `location` that is not an empty folder. In a store the files
    are put one by one, and the file called `last` behind all others: a folder without it is not complete.
    """
    if is_url(location):
        with store_errors(location):
            if list_files(as_path(location)):
                raise UserError(
                    f"output {os.fspath(location)}: exists and is not empty; name a new folder"
                )
        with written_locally(location, last) as partial:
            yield partial
        return
    path = pathlib.Path(os.path.abspath(location))
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"output {path}: exists and is not empty; name a new folder or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _beside(path)
    partial.mkdir()
    try:
        with full_disk(path):
            yield partial
            for one in (*partial.rglob("*"), partial):
                flush(one)
        # An empty folder at `path` is replaced, too.
        os.replace(partial, path)
        flush(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def file_digest(path: epath.Path) -> str:
    """The SHA-256 digest, in hex, of a file."""
    with store_errors(path):
        return hashlib.sha256(path.read_bytes()).hexdigest()


def fetch_folder(location: Location, leave: Sequence[str] = ()) -> pathlib.Path:
    """A local copy of a folder of a store; a local folder as it is. UserError for a URL with no files.

    The copy is made once a host: in the cache ($XDG_CACHE_HOME or ~/.cache, rest_jax/fetched), under a name with a digest of the
    folder's listing in it, so that a folder which has changed is fetched anew. Of the subfolders called in `leave` nothing is
    copied: a file beside says where they are, which `follow` reads.
    """
    if not is_url(location):
        return pathlib.Path(location)
    url = as_path(location)
    with store_errors(location):
        found = list_files(url)
        if not found:
            raise UserError(f"{url}: no such folder, or it has no files")
        listing = repr((os.fspath(url), sorted(leave), sorted(found.items())))
        digest = hashlib.sha256(listing.encode()).hexdigest()[:16]
        copy = user_cache() / "fetched" / f"{url.name}-{digest}"
        copy.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{copy}.lock"):
            if not copy.is_dir():
                with atomic_folder(copy) as partial:
                    _download(url, sorted(found), partial, leave)
    return copy


def _download(
    url: epath.Path, names: Sequence[str], folder: pathlib.Path, leave: Sequence[str]
) -> None:
    """Copies the files of a folder of a store, but for the subfolders `leave`, of which the URL is written down."""
    fs, root = fsspec.url_to_fs(os.fspath(url))
    wanted = [name for name in names if name.partition("/")[0] not in leave]
    for name in wanted:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    if wanted:
        sources = [f"{root}/{name}" for name in wanted]
        fs.get(sources, [str(folder / name) for name in wanted])
    for name in leave:
        if any(other.startswith(f"{name}/") for other in names):
            (folder / f"{name}{_URL_FILE}").write_text(os.fspath(url / name))


def check_links(folder: pathlib.Path) -> None:
    """UserError for a link in a model folder that leads out of it: what is copied or read may be anything of this machine.

    The snapshots of the Hugging Face cache are made of links to `blobs/` beside them, which are followed.
    """
    home = pathlib.Path(os.path.realpath(folder))
    homes = [home]
    if home.parent.name == "snapshots" and home.parents[1].name.startswith("models--"):
        homes.append(home.parents[1] / "blobs")
    for pattern in ("*", "additional_chat_templates/*", "params/**/*"):
        for path in folder.glob(pattern):
            target = pathlib.Path(os.path.realpath(path))  # of a link to itself: the link
            if path.is_symlink() and not any(map(target.is_relative_to, homes)):
                raise UserError(
                    f"model folder {folder}: {path.relative_to(folder)} is a link that leads out of the folder "
                    f"({os.readlink(path)}); put a copy in its place"
                )


def fingerprints(folder: Location, names: Iterable[str]) -> dict[str, list[Any]]:
    """[size in bytes, SHA-256 digest in hex, CRC-32 of the bytes and then of that digest] of each of these files of a folder, by
    name; several are read at once.
    """

    def fingerprint(name: str) -> tuple[str, list[Any]]:
        digest = hashlib.sha256()
        size, crc = _read_through(as_path(folder) / name, digest.update)
        return name, [size, digest.hexdigest(), _with_digest(crc, digest.hexdigest())]

    with concurrent.futures.ThreadPoolExecutor() as pool:
        return dict(pool.map(fingerprint, names))


def find_damage(folder: Location, written: Mapping[str, Any], thorough: bool = False) -> str | None:
    """The first of these files of a folder that is not what its fingerprint says, None when all are. The CRC-32 finds what disks
    and networks do, at a third of the cost of SHA-256, which `thorough` compares; so is a fingerprint without a CRC.
    """

    def is_damaged(name: str) -> bool:
        known = written[name]
        if not isinstance(known, list):
            return True
        if thorough or len(known) < 3:
            return fingerprints(folder, [name])[name][:2] != known[:2]
        size, crc = _read_through(as_path(folder) / name)
        return [size, _with_digest(crc, str(known[1]))] != [known[0], known[2]]

    with concurrent.futures.ThreadPoolExecutor() as pool:
        damaged = dict(zip(written, pool.map(is_damaged, written), strict=True))
    return next((name for name, is_so in damaged.items() if is_so), None)


def _with_digest(crc: int, digest: str) -> int:
    """So that a fingerprint is damaged where its digest is."""
    return zlib.crc32(digest.encode(), crc)


def _read_through(
    path: epath.Path, use: Callable[[bytes], object] = lambda _: None
) -> tuple[int, int]:
    """Size in bytes and CRC-32 of a file, all of whose parts `use` gets."""
    size = crc = 0
    with open_bytes(path) as file:
        while part := file.read(_PART):
            size, crc = size + len(part), zlib.crc32(part, crc)
            use(part)
    return size, crc


def follow(folder: pathlib.Path) -> epath.Path:
    """A folder that `fetch_folder` may have left in the store: where it is. Other folders lead nowhere else."""
    url = folder.with_name(f"{folder.name}{_URL_FILE}")
    left = url.is_file() and folder.parent.parent.resolve() == (user_cache() / "fetched").resolve()
    return as_path(url.read_text()) if left else absolute(folder)


def flush(path: Location) -> None:
    """Forces a local file to the disk, or the names in a folder, where the file system and its rights have a way to."""
    with contextlib.suppress(*([OSError] if os.path.isdir(path) else [])):
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def _beside(path: pathlib.Path) -> pathlib.Path:
    """A new name beside a path to write under; what writers that were killed have left there is removed, a day later.

    The process in it says to people whose it is; containers that share a disk have the same numbers.
    """
    begun = []
    with contextlib.suppress(OSError):  # a folder may be written to and not be listed
        begun = [one for one in path.parent.iterdir() if PARTIAL.search(one.name)]
    for left in (one for one in begun if PARTIAL.sub("", one.name) == path.name):
        with contextlib.suppress(OSError):  # another process removes it, too
            written = max(one.stat().st_mtime for one in (left, *left.rglob("*")))
            if time.time() - written > _LEFT:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
    return path.with_name(f"{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.partial")
