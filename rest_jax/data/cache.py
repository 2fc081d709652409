"""Tokenised data kept in files: made once by all processes together, read by each as it needs them.

<output>/.tokenised/<digest>/
  tokens-I-of-N.bin     int32: the ids of the records that process I has tokenised, prompt before target
  records-I-of-N.jsonl  those records, a line each
  index-I-of-N.npz      of each: `number` in the data, `bytes` of its line, `tokens` of each column; and `set_aside`, the
                        reason and the id of each record whose gold answer or prompt a template cannot say
  complete.json         put last: how many parts and records there are, the fingerprint of every file (`files.fingerprints`)

Every process reads the data and tokenises its share of the chunks. The digest is of all that decides the result: the data's
content, the tokenizer, the template, and the code that reads and renders; a run that finds a complete folder reads from it,
so that neither memory nor the time to start grows with the data, but for the sums over the files (a run that begins or resumes
compares them once: one bit that is another would train another model). Such a folder may be removed at any time between runs.
"""

import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import pathlib
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import fsspec
import jax
import numpy as np
from etils import epath

from rest_jax.config import Config
from rest_jax.data.files import Aside, iter_records
from rest_jax.data.items import read_items
from rest_jax.data.ragged import FileArray, Ragged, StoredRecords, lengths_of, to_bytes
from rest_jax.data.records import StepRecord
from rest_jax.data.tokenize import (
    Encoder,
    Prepared,
    SetAside,
    check_demonstrations,
    encode,
    fitting,
    is_world,
    load_split,
    tokenise,
)
from rest_jax.distributed import any_process, exchange, is_first_process, say
from rest_jax.errors import UserError
from rest_jax.files import (
    as_path,
    atomic_write,
    fetch_folder,
    find_damage,
    fingerprints,
    folder_while_used,
    is_url,
    list_files,
    open_bytes,
    store_errors,
)
from rest_jax.models.tokenizer import Tokenizer
from rest_jax.templates import TEMPLATES

FOLDER = ".tokenised"
COMPLETE = "complete.json"
CHUNK = 256  # records tokenised at once, the unit that processes share out
# A process that is lost is known by its heartbeat; this is for one that is slow.
_TIMEOUT = 6 * 3600
_PATIENCE = 60.0  # seconds in which a shared file system shows what another host has written
_SECONDS = 10.0  # between lines on how far it is

T = TypeVar("T")


class Source(NamedTuple):
    """A file of records, and what becomes token ids of them."""

    spec: str
    limit: int | None  # records read
    encoder: Encoder


def load_prompts(
    config: Config, spec: str, limit: int | None, tokenizer: Tokenizer, keep: bool
) -> Prepared:
    """`prepare` of the records of a spec. With `keep` what is tokenised of a file is kept beside the run; what is there is found.

    Every process must call it. UserError for data that cannot be used, or that differs between processes.
    """
    data = config.data
    encoder = Encoder(tokenizer, TEMPLATES[data.template], data.brief_prompt)
    return _load(config, Source(spec, limit, encoder), keep, data.max_prompt_tokens)


def load_demonstrations(config: Config, tokenizer: Tokenizer, keep: bool) -> Prepared:
    """`prepare_supervised` of the records of `data.train`; the rest as for `load_prompts`."""
    data = config.data
    encoder = Encoder(tokenizer, TEMPLATES[data.template], data.brief_prompt, supervised=True)
    source = Source(data.train, data.train_limit, encoder)
    return _load(config, source, keep, config.sft.max_tokens)


def _load(config: Config, source: Source, keep: bool, max_tokens: int) -> Prepared:
    kept = None
    if not is_world(source.spec):
        kept = _kept(source, as_path(config.output) / FOLDER, keep)
    if kept is None:
        records = load_split(source.spec, config.data, source.limit)
        return tokenise(records, source.encoder, max_tokens)
    records, columns, aside = kept
    return fitting(records, columns, max_tokens, aside)


def _kept(
    source: Source, home: epath.Path, keep: bool
) -> tuple[StoredRecords, list[Ragged], SetAside] | None:
    """(records, a column of ids for each that the encoder makes, records set aside); None when nothing is kept nor shall be."""
    digest = _digest(source)
    for process, other in enumerate(exchange(digest)):
        if other != digest:
            raise UserError(
                f"data {source.spec}: process {jax.process_index()} reads something else than process {process}; "
                "give all hosts the same file, tokenizer and versions"
            )
    folder = home / digest[:16]
    with store_errors(folder):
        # The others do not look before the files are there: a network file system remembers that they were not.
        if not any_process(is_first_process() and _is_sound(folder, keep)):
            if not keep:
                return None
            with folder_while_used(folder):
                _write(source, folder)
        return *_open(folder), _set_aside(folder)


def _is_sound(folder: epath.Path, read: bool) -> bool:
    """Whether the folder is complete, and every file as long as it was written; `read`: and as it was. Says so of one that is
    damaged.
    """
    if not (folder / COMPLETE).exists():
        return False
    damage = _damage(folder, read)
    if damage is not None:
        say(f"{folder / damage}; the data is tokenised anew")
    return damage is None


def _damage(folder: epath.Path, read: bool) -> str | None:
    """The first file of a folder that is not what was written, and how."""
    try:
        written = json.loads((folder / COMPLETE).read_text())["files"]
        sizes = {name: size for name, (size, *_) in written.items()}
    except (ValueError, LookupError, TypeError, AttributeError):
        return f"{COMPLETE}: cannot be read"
    found = {name: info["size"] for name, info in list_files(folder).items()}
    for name, size in sizes.items():
        if found.get(name) != size:
            what = "is missing" if name not in found else f"has {found[name]} bytes, not {size}"
            return f"{name}: {what}"
    name = find_damage(fetch_folder(folder), written) if read else None
    return name and f"{name}: is not what was written"


def _digest(source: Source) -> str:
    """SHA-256, in hex, of all that decides what is kept."""
    encoder = source.encoder
    versions = [importlib.metadata.version(name) for name in ("tokenizers", "transformers")]
    content = [
        *(_content(source.spec), pathlib.PurePath(source.spec).stem, source.limit),
        *(encoder.tokenizer.digest(), encoder.template.name, encoder.brief, encoder.supervised),
        *(versions, _code()),
    ]
    return hashlib.sha256(repr(content).encode()).hexdigest()


def _content(spec: str) -> str:
    """A digest of a file's content; of one in a store, of what the store knows of it. RecordError when it is no file."""
    read_items(spec)
    if is_url(spec):
        fs, name = fsspec.url_to_fs(spec)
        with store_errors(spec):
            return str(fs.ukey(name))
    with open_bytes(spec) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _code() -> str:
    """A digest of the code that makes prompts of a file."""
    root = pathlib.Path(__file__).parents[1]
    files = [root / "tool_calls.py", root / "models" / "tokenizer.py", *root.glob("rewards/*.py")]
    files += [
        *root.glob("data/*.py"),
        *root.glob("data/convert/*.py"),
        *root.glob("templates/*.py"),
    ]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(files))).hexdigest()


# --- writing ----------------------------------------------------------------------------------------------------------


def _write(source: Source, folder: epath.Path) -> None:
    """Writes the part of this process, and the file that says that all parts are there."""
    total, files = _write_part(source, folder, jax.process_index(), jax.process_count())
    files = {
        name: fingerprint
        for said in exchange(json.dumps(files), _TIMEOUT)
        for name, fingerprint in json.loads(said).items()
    }
    if is_first_process():
        content = {"parts": jax.process_count(), "records": total, "files": files}
        with atomic_write(folder / COMPLETE) as partial:
            partial.write_text(json.dumps(content, indent=1))
    exchange("written", _TIMEOUT)
    _await(folder / COMPLETE)


def _write_part(
    source: Source, folder: epath.Path, process: int, processes: int
) -> tuple[int, dict[str, list[Any]]]:
    """(records of all processes, file -> fingerprint of this one). RecordError as for `read_records`."""
    kinds = _part(process, processes)
    numbers, text_bytes, lengths, total = [], [], [], 0
    aside: list[tuple[str, str]] = []
    with contextlib.ExitStack() as stack:
        partial = {kind: stack.enter_context(atomic_write(folder / kinds[kind])) for kind in kinds}
        tokens, text, index = (stack.enter_context(path.open("wb")) for path in partial.values())
        for chunk, records in enumerate(_chunks(_shown(source))):
            first, total = total, total + len(records)
            if chunk % processes != process:
                continue
            if source.encoder.supervised:
                check_demonstrations(records)
            places = {record.id: first + i for i, record in enumerate(records)}
            records, unusable = source.encoder.usable(records)
            records, columns, refused = encode(records, source.encoder)
            for reason, names in (unusable | refused).items():
                aside += [(reason, name) for name in names]
            lines = [to_bytes(record) + b"\n" for record in records]
            tokens.writelines(ids for rows in zip(*columns, strict=True) for ids in rows)
            text.writelines(lines)
            numbers.append(np.array([places[record.id] for record in records], np.int64))
            text_bytes.append(np.fromiter(map(len, lines), np.int64, len(lines)))
            lengths.append(np.stack([lengths_of(column) for column in columns], axis=1))
        np.savez(
            index,
            number=_joined(numbers),
            bytes=_joined(text_bytes),
            tokens=_joined(lengths),
            set_aside=np.array(aside, np.str_).reshape(-1, 2),
        )
        for file in (tokens, text, index):
            file.close()
        return total, {
            kinds[kind]: fingerprints(path.parent, [path.name])[path.name]
            for kind, path in partial.items()
        }


def _part(process: int, processes: int) -> dict[str, str]:
    """The files of a process, by what is in them."""
    part = f"{process}-of-{processes}"
    return {
        "tokens": f"tokens-{part}.bin",
        "records": f"records-{part}.jsonl",
        "index": f"index-{part}.npz",
    }


def _joined(parts: Sequence) -> np.ndarray:
    """int64, flat; of a process without a chunk it is empty."""
    return np.concatenate([np.zeros(0, np.int64), *(np.ravel(part) for part in parts)])


def _chunks(items: Iterable[T]) -> Iterator[list[T]]:
    items = iter(items)
    while chunk := list(itertools.islice(items, CHUNK)):
        yield chunk


def _shown(source: Source) -> Iterator[StepRecord]:
    """The records; says on stdout how many have been read, when it takes long."""
    shown = time.monotonic()
    with store_errors(source.spec):
        for number, record in enumerate(iter_records(source.spec, source.limit, Aside(say))):
            if (now := time.monotonic()) - shown >= _SECONDS:
                shown = now
                say(f"data {source.spec}: {number:,} records tokenised")
            yield record


def _await(path: epath.Path) -> None:
    """Until a file that another process has written is seen here."""
    begun = time.monotonic()
    while not path.exists():
        if time.monotonic() - begun > _PATIENCE:
            raise UserError(
                f"{path}: not seen by process {jax.process_index()} {_PATIENCE:.0f} s after it was written; "
                "name an output folder that all hosts share"
            )
        time.sleep(0.25)


# --- reading ----------------------------------------------------------------------------------------------------------


def _open(folder: epath.Path) -> tuple[StoredRecords, list[Ragged]]:
    """The rows in the files of a complete folder; of one in a store, in a copy made once a host."""
    local = fetch_folder(folder)
    content = json.loads((local / COMPLETE).read_text())
    parts = [_part(process, content["parts"]) for process in range(content["parts"])]
    indices = [np.load(local / part["index"]) for part in parts]
    number, text_bytes, lengths = (
        np.concatenate([index[name] for index in indices]) for name in ("number", "bytes", "tokens")
    )
    order = np.argsort(number)
    texts = [FileArray(local / part["records"], np.uint8) for part in parts]
    tokens = [FileArray(local / part["tokens"], np.int32) for part in parts]
    records = Ragged(texts, np.cumsum(text_bytes) - text_bytes, text_bytes)
    lengths = lengths.reshape(len(number), -1 if len(number) else 1)
    ends = np.cumsum(lengths).reshape(lengths.shape)
    columns = [
        Ragged(tokens, end - size, size) for end, size in zip(ends.T, lengths.T, strict=True)
    ]
    columns = [column.take(order) for column in columns]
    return StoredRecords(records.take(order)), columns


def _set_aside(folder: epath.Path) -> SetAside:
    """The records of a complete folder's data that are not in it."""
    local = fetch_folder(folder)
    parts = json.loads((local / COMPLETE).read_text())["parts"]
    aside: dict[str, list[str]] = {}
    for process in range(parts):
        for reason, name in np.load(local / _part(process, parts)["index"])["set_aside"].tolist():
            aside.setdefault(reason, []).append(name)
    return aside
