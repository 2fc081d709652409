"""From other people's data to files of step records: `rest-jax data prepare`.

In: files of one source. Out: OUT, with a part held out also OUT's `.eval` twin, `OUT.rejected.jsonl` ({"where", "reason",
"raw"} of every item that could not be used) and `OUT.summary.json`. Item by item: read, convert, drop duplicates, place by
tool, take away or mask, count tokens, write. Memory grows by some 200 bytes a record: a hash of its id and one of what it says.
Everything random depends on the seed and the record's id, never on the order. All files appear at the end, or none.
"""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from rest_jax import config
from rest_jax.data import files as stream
from rest_jax.data.convert import Source, refuse_benchmarks
from rest_jax.data.prepare import seeded, splits, summary, transforms, writers
from rest_jax.data.prepare.progress import ReadingProgress
from rest_jax.data.prepare.settings import Settings, check
from rest_jax.data.records import RecordError, StepRecord, to_json
from rest_jax.errors import UserError
from rest_jax.models.tokenizer import Tokenizer
from rest_jax.run.metrics import summary_table
from rest_jax.templates import TEMPLATES

MAX_REASONS = 100  # different reasons counted by their own name


@dataclasses.dataclass
class Summary:
    """What became of the items."""

    settings: Settings
    items: int = 0
    converted: int = 0  # step records
    rejected: Counter[str] = dataclasses.field(default_factory=Counter)  # items, by reason
    dropped: Counter[str] = dataclasses.field(default_factory=Counter)  # records, by reason
    changed: Counter[str] = dataclasses.field(default_factory=Counter)  # records, by what was done
    unchanged: Counter[str] = dataclasses.field(default_factory=Counter)  # drawn, but not possible
    parts: dict[str, summary.Tally] = dataclasses.field(default_factory=dict)  # train, eval

    @property
    def kept(self) -> int:
        """Records written."""
        return sum(tally.records for tally in self.parts.values())

    def to_json(self) -> dict[str, Any]:
        """The content of OUT.summary.json."""
        settings = dataclasses.asdict(self.settings)
        del settings["overwrite"]
        counts = {
            name: dict(getattr(self, name).most_common())
            for name in ("rejected", "dropped", "changed", "unchanged")
        }
        parts = {name: summary.to_json(tally) for name, tally in self.parts.items()}
        return {
            "settings": settings,
            "items": self.items,
            "converted": self.converted,
            **counts,
            **parts,
        }

    def to_text(self) -> str:
        """Tables for the terminal."""
        rows: list[list[Any]] = [["what", "count"], ["items read", self.items]]
        rows += _rows("rejected", self.rejected)
        rows += [["records made of them", self.converted]]
        rows += _rows("dropped", self.dropped) + _rows("changed", self.changed)
        rows += _rows("drawn for a change that was not possible", self.unchanged)
        texts = [summary_table(rows)]
        for name, tally in self.parts.items():
            path = self.settings.eval_path if name == "eval" else self.settings.out_path
            texts.append(f"{name}: {path}\n{summary.to_text(tally)}")
        return "\n\n".join(texts)


def run(settings: Settings) -> Summary:
    """Prepares the files. UserError for settings or files that cannot be used, and when no record is left: then nothing is
    written.
    """
    source = check(settings)
    counter = _token_counter(settings)
    out = settings.out_path
    names = ["train", *(["eval"] if settings.held_out else [])]
    result = Summary(settings, parts={name: summary.Tally() for name in names})
    with writers.complete(settings.files) as (rejected, told, evaluation, train):
        with contextlib.ExitStack() as open_files:
            parts = {"train": train, "eval": evaluation}
            write = {
                name: open_files.enter_context(writers.open_writer(parts[name], out.suffix))
                for name in names
            }
            reject = open_files.enter_context(_rejector(rejected, result))
            for record, part in _records(settings, source, counter, result, reject):
                write[part](record)
        _check_left(result)
        told.write_text(json.dumps(result.to_json(), indent=1) + "\n", encoding="ascii")
    return result


def _records(
    settings: Settings,
    source: Source,
    counter: summary.TokenCounter | None,
    result: Summary,
    reject: Callable[[str, str, Any], None],
) -> Iterator[tuple[StepRecord, str]]:
    """(record, its part) of all that stays, counted in `result`."""
    seen: set[int] = set()  # of ids
    contents: set[bytes] = set()
    described: splits.Described = {}
    for where, name, raw in _items(settings, result, reject):
        try:
            records = source.convert(raw, name, where)
            if not settings.not_for_training:
                refuse_benchmarks(records, where)
            for record in records:
                writers.to_line(record)  # refuses what cannot be written
        except (RecordError, RecursionError) as error:
            reject(where, _reason(error, where), raw)
            continue
        for record in records:
            result.converted += 1
            record = _unique(record, result, seen)
            if transforms.not_offered(record):
                result.dropped["calls a tool that is not offered"] += 1
                continue
            if not settings.keep_duplicates and _is_known(record, contents):
                result.dropped["duplicate"] += 1
                continue
            placed = _place(record, settings, described, result)
            if placed is None:
                continue
            record, part = placed
            record = _transform(record, part, settings, described, result)
            try:
                tokens = None if counter is None else counter(record)
            except RecordError as error:
                reason = _reason(error, f"record {record.id!r}")
                result.dropped[_kind(reason, result.dropped)] += 1
                continue
            if tokens and settings.max_tokens and sum(tokens) > settings.max_tokens:
                result.dropped[f"longer than {settings.max_tokens} tokens"] += 1
                continue
            result.parts[part].add(record, tokens)
            yield record, part


def _items(
    settings: Settings, result: Summary, reject: Callable[[str, str, Any], None]
) -> Iterator[tuple[str, str, Any]]:
    """(where, name, raw) of each readable item of all files, with a progress bar."""
    paths = list(map(pathlib.Path, settings.inputs))
    sizes = [path.stat().st_size for path in paths]
    with contextlib.closing(ReadingProgress(sum(sizes))) as progress:
        for number, path in enumerate(paths):
            before = sum(sizes[:number])
            for index, item in enumerate(stream.read_items(path)):
                if settings.limit is not None and result.items >= settings.limit:
                    return
                result.items += 1
                if item.fault is not None:
                    reject(item.where, item.fault, item.raw)
                else:
                    yield item.where, f"{path.stem}-{index}", item.raw
                counts = result.items, result.kept, result.rejected.total()
                progress.update(before + item.position, *counts)


def _unique(record: StepRecord, result: Summary, seen: set[int]) -> StepRecord:
    """The record, under a new id where its own has come before (two files may count from zero)."""
    key = seeded.digest(record.id)
    if key in seen:
        result.changed["id given anew, it came twice"] += 1
        record = dataclasses.replace(record, id=f"{record.id}#{result.converted}")
        key = seeded.digest(record.id)
    seen.add(key)
    return record


def content_hash(record: StepRecord) -> bytes:
    """128 bits of what is asked and answered: tools, history (else the verbatim prompt) and target."""
    raw = to_json(record)
    target = {key: value for key, value in raw["target"].items() if key != "text"}
    prompt = raw["history"] or raw.get("messages")
    text = json.dumps([raw["tools"], prompt, target], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _is_known(record: StepRecord, contents: set[bytes]) -> bool:
    before = len(contents)
    contents.add(content_hash(record))
    return len(contents) == before


def _place(
    record: StepRecord, settings: Settings, described: splits.Described, result: Summary
) -> tuple[StepRecord, str] | None:
    if not settings.held_out:
        return record, "train"
    placed = splits.place(record, settings.held_out, settings.seed, described)
    if placed.side is None:
        result.dropped[placed.reason] += 1
        return None
    if placed.removed:
        result.changed["held-out tools taken from the offer"] += 1
    return placed.record, placed.side


def _transform(
    record: StepRecord,
    part: str,
    settings: Settings,
    described: splits.Described,
    result: Summary,
) -> StepRecord:
    """The record with the right tools taken away and names masked, where it was drawn for that and allows it.

    One for evaluation keeps a held-out tool on offer: without any it would measure nothing that is held out.
    """
    if seeded.draw(settings.seed, "irrelevance", record.id) < settings.irrelevance:
        response = settings.irrelevance_response
        without = transforms.remove_right_tools(
            record, transforms.NO_TOOL if response is None else response
        )
        if without is None:
            result.unchanged[f"irrelevance: {transforms.unremovable(record)}"] += 1
        elif part == "eval" and not splits.offers_held_out(
            without, settings.held_out, settings.seed, described
        ):
            result.unchanged["irrelevance: no held-out tool would stay on offer"] += 1
        else:
            result.changed["right tools taken away"] += 1
            record = without
    if seeded.draw(settings.seed, "masking", record.id) < settings.mask_names:
        masked = transforms.mask_names(record, settings.seed)
        if masked is None:
            result.unchanged[f"masking: {transforms.unmaskable(record)}"] += 1
        else:
            result.changed["names masked"] += 1
            record = masked
    return record


@contextlib.contextmanager
def _rejector(path: pathlib.Path, result: Summary) -> Iterator[Callable[[str, str, Any], None]]:
    """A function (where, reason, raw) that counts an item and keeps it in the side file, which is made with the first."""
    with contextlib.ExitStack() as stack:
        files: list[Any] = []

        def reject(where: str, reason: str, raw: Any) -> None:
            if not files:
                files.append(stack.enter_context(path.open("w", encoding="ascii")))
            line = {"where": where, "reason": reason, "raw": raw}
            files[0].write(json.dumps(line, default=str) + "\n")
            result.rejected[_kind(reason, result.rejected)] += 1

        yield reject


def _kind(reason: str, counts: Counter[str]) -> str:
    """Under which name a reason is counted: without its numbers and quotations, and of at most MAX_REASONS kinds."""
    kind = re.sub(r"\d+", "N", re.sub(r"'[^']*'|\"[^\"]*\"", "'...'", reason))[:120]
    return kind if kind in counts or len(counts) < MAX_REASONS else "other reasons"


def _reason(error: Exception, where: str) -> str:
    if isinstance(error, RecursionError):
        return "nests too deeply"
    return str(error).removeprefix(f"{where}: ")


def _check_left(result: Summary) -> None:
    s = result.settings
    if not result.items:
        raise UserError(f"data {', '.join(s.inputs)}: no records")
    for name, tally in result.parts.items():
        if not tally.records:
            reasons = (result.rejected + result.dropped).most_common(1)
            why = f"; most often: {reasons[0][0]} ({reasons[0][1]})" if reasons else ""
            what = "none for evaluation (raise --held-out)" if name == "eval" else "none left"
            if name == "train" and s.held_out:
                what = "none left for training (lower --held-out)"
            raise UserError(
                f"data {', '.join(s.inputs)}: of {result.items} items of source {s.source} {what}{why}"
            )


def _token_counter(settings: Settings) -> summary.TokenCounter | None:
    if settings.tokenizer is None:
        return None
    tokenizer = Tokenizer.load(config.locate(settings.tokenizer))
    return summary.TokenCounter(tokenizer, TEMPLATES[settings.template], settings.brief)


def _rows(title: str, counts: Counter[str]) -> list[list[Any]]:
    if not counts:
        return []
    return [[title, counts.total()], *([f"  {name}", n] for name, n in counts.most_common())]
