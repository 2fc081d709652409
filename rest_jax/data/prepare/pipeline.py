"""From other people's data to files of step records: `rest-jax data prepare`.

In: files of one source. Out: OUT, with a part held out also OUT's `.eval` twin, `OUT.rejected.jsonl` ({"where", "reason",
"raw"} of every item that could not be used, and of every record whose gold answer the template cannot say, that calls a tool it
does not offer, or that the chat template refuses) and `OUT.summary.json`. Item by item: read, convert, check the gold answer,
drop duplicates, split by tool, take away or mask, count tokens, write. Memory grows by some 200 bytes a record: two hashes.
Everything random depends on the seed and the record's id, never on the order. All files appear at the end, or none; where no
record is left, the rejected ones alone.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import re
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any, TextIO

import tqdm

from rest_jax.data import files
from rest_jax.data.convert import Convert
from rest_jax.data.convert.xlam import NO_CALL
from rest_jax.data.fields import RecordError, shown
from rest_jax.data.prepare import split, summary, transforms
from rest_jax.data.prepare.settings import Settings, check
from rest_jax.data.records import StepRecord, not_offered, said_not_offered, to_json
from rest_jax.errors import UserError
from rest_jax.files import atomic_write
from rest_jax.rewards.gold import GoldError, reachable
from rest_jax.run.environment import handled
from rest_jax.templates import TEMPLATES, Template

MAX_REASONS = 100  # different reasons counted by their own name


@dataclasses.dataclass
class _Work:
    """One preparation while it runs."""

    settings: Settings
    convert: Convert
    count_tokens: summary.TokenCounter | None
    result: summary.Summary
    partial: contextlib.ExitStack  # partial files, which appear when it ends well
    opened: contextlib.ExitStack  # open ones
    template: Template
    rejected: TextIO | None = None  # made with the first item that is set aside
    ids: set[int] = dataclasses.field(default_factory=set)  # hashes
    contents: set[bytes] = dataclasses.field(default_factory=set)  # hashes
    described: split.Described = dataclasses.field(default_factory=dict)


def prepare(settings: Settings) -> summary.Summary:
    """Prepares the files. UserError for settings or files that cannot be used, and when no record is left; RunStopped when the
    disk is full. Then nothing is written. SIGTERM ends the process with code 143 and leaves no half-written file. Main thread
    only.
    """
    convert = check(settings)
    template, count_tokens = TEMPLATES[settings.template], None
    if settings.tokenizer is not None:
        encoder = summary.encoder(settings.tokenizer, settings.template, settings.brief)
        template, count_tokens = encoder.template, functools.partial(summary.count_tokens, encoder)
    paths = settings.paths
    parts = ("train", "eval") if settings.splits else ("train",)
    result = summary.Summary(settings, parts={name: summary.Tally() for name in parts})
    paths["train"].parent.mkdir(parents=True, exist_ok=True)
    # OUT is the first partial file, and so the last to appear: where it is, everything is
    with handled(_terminate, signal.SIGTERM), contextlib.ExitStack() as partial:
        with contextlib.ExitStack() as opened:
            work = _Work(settings, convert, count_tokens, result, partial, opened, template)
            writers = {name: _open_writer(paths[name], work) for name in parts}
            for record, part in _records(work):
                writers[part].write(record)
        try:
            _check_left(result)
        except UserError as error:
            if work.rejected is None:
                raise
            os.replace(work.rejected.name, paths["rejected"])
            raise UserError(f"{error}; see {paths['rejected']}") from error
        told = partial.enter_context(atomic_write(paths["summary"]))
        told.write_text(json.dumps(result.to_json(), indent=1) + "\n", encoding="ascii")
        if not settings.splits:
            paths["eval"].unlink(missing_ok=True)
        if work.rejected is None:
            paths["rejected"].unlink(missing_ok=True)
    return result


def _terminate(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_IGN)  # a second one does not cut the cleaning up short
    raise SystemExit(128 + number)


def _open_writer(path: pathlib.Path, work: _Work) -> Any:
    partial = work.partial.enter_context(atomic_write(path))
    return work.opened.enter_context(contextlib.closing(files.WRITERS[path.suffix](partial)))


def _records(work: _Work) -> Iterator[tuple[StepRecord, str]]:
    """(record, its part) of all that stays, counted in `work.result`."""
    dropped = work.result.dropped
    for where, name, raw in _items(work):
        try:
            records = work.convert(raw, name, where)
            for record in records:
                if isinstance(record, StepRecord):
                    files.to_line(record)  # refuses what cannot be written
        except (RecordError, RecursionError) as error:
            _reject(work, where, _reason(error, where), raw)
            continue
        for record in records:
            work.result.converted += 1
            if isinstance(record, RecordError):
                reason = _reason(record, where)
                _set_aside(work, where, reason, None)
                dropped[_kind(reason, dropped)] += 1
                continue
            record = _with_new_id(record, work)
            if (record := _reachable(record, where, work)) is None:
                continue
            if strange := not_offered(record):
                _set_aside(work, where, said_not_offered(strange), record)
                dropped["calls a tool that is not offered"] += 1
            elif not work.settings.keep_duplicates and _is_known(record, work.contents):
                dropped["duplicate"] += 1
            elif (placed := _place(record, work)) is not None:
                record, part = placed
                record = _transform(record, part, work)
                if (tokens := _tokens(record, where, work)) is not None:
                    work.result.parts[part].add(record, tokens or None)
                    yield record, part


def _reachable(record: StepRecord, where: str, work: _Work) -> StepRecord | None:
    """The record with a gold answer that the template can say; None, set aside, where there is none."""
    try:
        tools = {tool["name"] for tool in record.tools}
        return dataclasses.replace(record, target=reachable(record.target, work.template, tools))
    except GoldError as error:
        reason = str(error)
        _set_aside(work, where, reason, record)
        work.result.dropped[_kind(reason, work.result.dropped)] += 1
        return None


def _items(work: _Work) -> Iterator[tuple[str, str, Any]]:
    """(where, name, raw) of each readable item of all files, with a progress bar on stderr."""
    settings, result = work.settings, work.result
    paths = settings.places
    sizes = [path.stat().length for path in paths]
    seconds = 0.1 if sys.stderr.isatty() else 10  # between two lines of it
    with tqdm.tqdm(total=sum(sizes), unit="B", unit_scale=True, mininterval=seconds) as bar:
        for number, path in enumerate(paths):
            for index, item in enumerate(settings.read(path)):
                if settings.limit is not None and result.items >= settings.limit:
                    return
                result.items += 1
                if item.fault is not None:
                    _reject(work, item.where, item.fault, item.raw)
                else:
                    yield item.where, f"{path.stem}-{index}", item.raw
                if result.items % 256 == 0 or item.position == sizes[number]:
                    counts = f"{result.kept:,} records, {result.rejected.total():,} items rejected"
                    bar.set_postfix_str(counts, refresh=False)
                    bar.update(sum(sizes[:number]) + item.position - bar.n)


def _with_new_id(record: StepRecord, work: _Work) -> StepRecord:
    """The record, under a new id where its own is taken (two files may count from zero)."""
    key = transforms.digest(record.id)
    if key in work.ids:
        work.result.changed["id given anew, it came twice"] += 1
        record = dataclasses.replace(record, id=f"{record.id}#{work.result.converted}")
        key = transforms.digest(record.id)
    work.ids.add(key)
    return record


def _is_known(record: StepRecord, contents: set[bytes]) -> bool:
    before = len(contents)
    contents.add(content_hash(record))
    return len(contents) == before


def content_hash(record: StepRecord) -> bytes:
    """128 bits of tools, history (else the verbatim prompt) and target."""
    raw = to_json(record)
    target = {key: value for key, value in raw["target"].items() if key != "text"}
    prompt = raw["history"] or raw.get("messages")
    text = json.dumps([raw["tools"], prompt, target], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _place(record: StepRecord, work: _Work) -> tuple[StepRecord, str] | None:
    """(record, its part), None where it belongs to none."""
    settings = work.settings
    kept = transforms.draw(settings.seed, "responses", record.id) < settings.responses
    if not (record.target.calls or kept):
        work.result.dropped["calls nothing, and was not drawn (--responses)"] += 1
        return None
    if not settings.held_out:
        apart = split.in_held_out_dialogue(record.id, settings.held_out_dialogues, settings.seed)
        return record, "eval" if apart else "train"
    placed = split.place(record, settings.held_out, settings.seed, work.described)
    if placed.part is None:
        work.result.dropped[placed.reason] += 1
        return None
    if placed.removed:
        work.result.changed["held-out tools taken from the offer"] += 1
    return placed.record, placed.part


def _transform(record: StepRecord, part: str, work: _Work) -> StepRecord:
    """The record with the right tools taken away and names masked, where it was drawn for that and allows it.

    One for evaluation on held-out tools keeps one of them on offer: without any it would measure nothing that is held out.
    """
    settings, result = work.settings, work.result
    if transforms.draw(settings.seed, "irrelevance", record.id) < settings.irrelevance:
        response = settings.irrelevance_response
        without = transforms.remove_right_tools(record, NO_CALL if response is None else response)
        if without is None:
            result.unchanged[f"irrelevance: {transforms.unremovable(record)}"] += 1
        elif (
            part == "eval"
            and settings.held_out
            and not split.offers_held_out(without, settings.held_out, settings.seed, work.described)
        ):
            result.unchanged["irrelevance: no held-out tool would stay on offer"] += 1
        else:
            result.changed["right tools taken away"] += 1
            record = without
    if transforms.draw(settings.seed, "masking", record.id) < settings.mask_names:
        masked = transforms.mask_names(record, settings.seed)
        if masked is None:
            result.unchanged[f"masking: {transforms.unmaskable(record)}"] += 1
        else:
            result.changed["names masked"] += 1
            record = masked
    return record


def _tokens(record: StepRecord, where: str, work: _Work) -> tuple[int, int] | tuple[()] | None:
    """(prompt tokens, target tokens), () where they are not counted; None for a record that is too long or is refused."""
    if work.count_tokens is None:
        return ()
    dropped, most = work.result.dropped, work.settings.max_tokens
    try:
        tokens = work.count_tokens(record)
    except RecordError as error:
        reason = _reason(error, f"record {record.id!r}")
        _set_aside(work, where, reason, record)
        dropped[_kind(reason, dropped)] += 1
        return None
    if most and sum(tokens) > most:
        dropped[f"longer than {most} tokens"] += 1
        return None
    return tokens


def _reject(work: _Work, where: str, reason: str, raw: Any) -> None:
    """Counts an item and keeps it in the side file."""
    _set_aside(work, where, reason, raw)
    work.result.rejected[_kind(reason, work.result.rejected)] += 1


def _set_aside(work: _Work, where: str, reason: str, raw: Any) -> None:
    """Writes an item or a record to the side file; of an item that JSON cannot write, its beginning."""
    if work.rejected is None:
        partial = work.partial.enter_context(atomic_write(work.settings.paths["rejected"]))
        work.rejected = work.opened.enter_context(partial.open("w", encoding="ascii"))
    line = {"where": where, "reason": reason}
    try:
        if isinstance(raw, StepRecord):
            raw = to_json(raw)
        text = json.dumps({**line, "raw": raw}, default=str)
    except (ValueError, RecursionError):
        text = json.dumps({**line, "raw": shown(raw)})
    work.rejected.write(text + "\n")


def _kind(reason: str, counts: Counter[str]) -> str:
    """Under which name a reason is counted: without its numbers and quotations, and of at most MAX_REASONS kinds."""
    kind = re.sub(r"\d+", "N", re.sub(r"'[^']*'|\"[^\"]*\"", "'...'", reason))[:120]
    return kind if kind in counts or len(counts) < MAX_REASONS else "other reasons"


def _reason(error: Exception, where: str) -> str:
    if isinstance(error, RecursionError):
        return "nests too deeply"
    return str(error).removeprefix(f"{where}: ")


def _check_left(result: summary.Summary) -> None:
    s = result.settings
    if not result.items:
        raise UserError(f"data {', '.join(s.inputs)}: no records")
    # of few tools all may be on one side, however the fraction is
    other = ", or split by dialogues: --held-out-dialogues" if s.held_out else ""
    for name, tally in result.parts.items():
        if not tally.records:
            reasons = (result.rejected + result.dropped).most_common(1)
            why = f"; most often: {reasons[0][0]} ({reasons[0][1]})" if reasons else ""
            what = "none left"
            if name == "eval":
                what = f"none for evaluation (raise {s.splits}{other})"
            elif s.splits:
                what = f"none left for training (lower {s.splits}{other})"
            raise UserError(
                f"data {', '.join(s.inputs)}: of {result.items} items of source {s.source} {what}{why}"
            )
