"""What `rest-jax data prepare` is asked to do, and whether it can be: `check` looks before anything is read or written."""

import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from etils import epath

from rest_jax.config import nearest
from rest_jax.data import files, items
from rest_jax.data.convert import OPENED, READERS, SOURCES, Convert
from rest_jax.data.records import StepRecord, from_json
from rest_jax.errors import UserError
from rest_jax.files import as_path, is_url, local_path

SETTABLE = ("data.template", "data.brief_prompt")  # config values that preparing looks at


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to make of which files."""

    source: str
    inputs: Sequence[str]
    out: str
    seed: int = 0
    mask_names: float = 0.0  # share of records whose names are masked
    irrelevance: float = 0.0  # share of records whose right tools are taken away
    irrelevance_response: str | None = None  # the target then; None: `xlam.NO_CALL`
    held_out: float = 0.0  # share of tools that are for evaluation alone
    held_out_dialogues: float = 0.0  # share of dialogues that are, whatever their tools
    responses: float = 1.0  # share of the records whose target calls nothing that is kept
    keep_duplicates: bool = False
    tokenizer: str | None = None
    max_tokens: int | None = None  # prompt and target together
    template: str = "toolrl"
    brief: bool = False
    limit: int | None = None  # items read
    overwrite: bool = False

    @property
    def places(self) -> list[epath.Path]:
        """Where the inputs are: local paths or URLs."""
        return list(map(as_path, self.inputs))

    @property
    def read(self) -> Callable[[epath.Path], Iterator[items.Item]]:
        """What gives the items of an input."""
        return READERS.get(self.source, items.read_items)

    @property
    def splits(self) -> str | None:
        """The option by which records are set apart for evaluation; None: by none."""
        if self.held_out:
            return "--held-out"
        return "--held-out-dialogues" if self.held_out_dialogues else None

    @property
    def paths(self) -> dict[str, pathlib.Path]:
        """All files that preparing replaces or removes: records to train on and held out, items rejected, the summary."""
        out = pathlib.Path(self.out)
        return {
            "train": out,
            "eval": out.with_name(f"{out.stem}.eval{out.suffix}"),
            "rejected": out.with_name(f"{out.name}.rejected.jsonl"),
            "summary": out.with_name(f"{out.name}.summary.json"),
        }


def _from_own(raw: Any, name: str, where: str) -> list[StepRecord]:
    return [from_json(raw, where)]


# Our own records once more: to bring prepared files together, split or mask them.
KNOWN: dict[str, Convert] = {**SOURCES, "records": _from_own}


def check(settings: Settings) -> Convert:
    """The source's converter, when everything that can be known before reading is in order; else UserError."""
    if not settings.out:
        raise UserError("data prepare: the output has no name")
    known = sorted([*KNOWN, *OPENED])
    if settings.source not in known:
        raise UserError(f"source {settings.source!r}: unknown{nearest(settings.source, known)}")
    for option in ("mask_names", "irrelevance", "held_out", "held_out_dialogues", "responses"):
        if not 0 <= (value := getattr(settings, option)) <= 1:
            name = option.replace("_", "-")
            raise UserError(f"--{name} {value:g}: a fraction from 0 to 1 is needed")
    if settings.held_out and settings.held_out_dialogues:
        raise UserError(
            f"--held-out-dialogues {settings.held_out_dialogues:g}: --held-out {settings.held_out:g} sets tools apart already; "
            "give one of them"
        )
    if settings.max_tokens is not None and settings.tokenizer is None:
        raise UserError(f"--max-tokens {settings.max_tokens}: needs --tokenizer to count with")
    if settings.irrelevance_response is not None and not settings.irrelevance:
        raise UserError("--irrelevance-response: needs --irrelevance, the share of such records")
    _check_files(settings)
    if settings.source in KNOWN:
        return KNOWN[settings.source]
    return OPENED[settings.source](settings.places)


def check_settings(overrides: Sequence[str], known: Sequence[str] = SETTABLE) -> None:
    """UserError for a `key=value` that the command does not look at: it would be believed to have done something."""
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key not in known:
            raise UserError(f"{override}: {key} changes nothing here; known: {', '.join(known)}")


def _check_files(settings: Settings) -> None:
    out, paths = local_path("data", settings.out), settings.paths.values()
    files.check_path(out)
    for path in settings.places:
        settings.read(path)  # refuses what is no file; reads nothing yet
    for path in filter(pathlib.Path.exists, paths):
        if path.is_dir():
            raise UserError(
                f"data {path}: is a folder, the name of a file is needed; choose another OUT"
            )
        if any(map(path.samefile, itertools.filterfalse(is_url, settings.inputs))):
            raise UserError(f"data {path}: is an input too; choose another OUT")
        if not settings.overwrite:
            raise UserError(
                f"data {path}: exists; --overwrite replaces or removes all that OUT stands for: "
                f"{', '.join(file.name for file in paths)}"
            )
    above = next(filter(pathlib.Path.exists, out.parents))
    if not above.is_dir():
        raise UserError(f"data {out}: {above} is a file, a folder is needed")
