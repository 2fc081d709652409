"""What `rest-jax data prepare` is asked to do, and whether it can be: checked before anything is read or written."""

import dataclasses
import difflib
import pathlib
from collections.abc import Sequence
from typing import Any

from rest_jax.data import files as stream
from rest_jax.data.convert import SOURCES, Source
from rest_jax.data.prepare import writers
from rest_jax.data.records import StepRecord, from_json, to_json
from rest_jax.errors import UserError

SETTABLE = ("data.template", "data.brief_prompt")  # config values that preparing looks at


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to make of which files."""

    source: str
    inputs: tuple[str, ...]
    out: str
    seed: int = 0
    mask_names: float = 0.0  # share of records whose names are masked
    irrelevance: float = 0.0  # share of records whose right tools are taken away
    irrelevance_response: str | None = None  # None: `transforms.NO_TOOL`
    held_out: float = 0.0  # share of tools that are for evaluation alone
    keep_duplicates: bool = False
    tokenizer: str | None = None
    max_tokens: int | None = None  # prompt and answer together
    template: str = "toolrl"
    brief: bool = False
    limit: int | None = None  # items read
    overwrite: bool = False
    not_for_training: bool = False  # a benchmark may be prepared, for evaluation

    @property
    def out_path(self) -> pathlib.Path:
        """Where the records for training go."""
        return pathlib.Path(self.out)

    @property
    def eval_path(self) -> pathlib.Path:
        """Where the held-out records go."""
        return self.out_path.with_name(f"{self.out_path.stem}.eval{self.out_path.suffix}")

    @property
    def files(self) -> tuple[pathlib.Path, ...]:
        """All files that a run replaces or removes, in the order in which they appear: where OUT is, everything is."""
        side = self.beside("rejected.jsonl"), self.beside("summary.json")
        return (*side, self.eval_path, self.out_path)

    def beside(self, ending: str) -> pathlib.Path:
        """A side file, `OUT.<ending>`."""
        return self.out_path.with_name(f"{self.out_path.name}.{ending}")


def _from_own(raw: Any, name: str, where: str) -> list[StepRecord]:
    return [from_json(raw, where)]


# Our own records once more: to bring prepared files together, split or mask them.
OWN = Source(_from_own, lambda records: to_json(records[0]))
KNOWN: dict[str, Source] = {**SOURCES, "records": OWN}


def check(settings: Settings) -> Source:
    """The source, when everything that can be known before reading is in order; else UserError."""
    source = KNOWN.get(settings.source)
    if source is None:
        near = difflib.get_close_matches(settings.source, KNOWN, n=1)
        hint = f"; nearest: {near[0]}" if near else ""
        raise UserError(
            f"source {settings.source!r}: unknown{hint} (known: {', '.join(sorted(KNOWN))})"
        )
    if not source.trainable and not settings.not_for_training:
        raise UserError(
            f"source {settings.source}: a benchmark, no training data is made of it; "
            "--not-for-training prepares it for evaluation"
        )
    for option, value in (
        ("--mask-names", settings.mask_names),
        ("--irrelevance", settings.irrelevance),
        ("--held-out", settings.held_out),
    ):
        if not 0 <= value <= 1:
            raise UserError(f"{option} {value:g}: a fraction from 0 to 1 is needed")
    if settings.max_tokens is not None and settings.tokenizer is None:
        raise UserError(f"--max-tokens {settings.max_tokens}: needs --tokenizer to count with")
    _check_files(settings)
    return source


def check_settings(overrides: Sequence[str]) -> None:
    """UserError for a `key=value` that preparing does not look at: it would be believed to have done something."""
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key not in SETTABLE:
            raise UserError(f"{override}: {key} changes nothing here; known: {', '.join(SETTABLE)}")


def _check_files(settings: Settings) -> None:
    out = settings.out_path
    writers.check_path(out)
    inputs = list(map(pathlib.Path, settings.inputs))
    for path in inputs:
        stream.read_items(path)  # refuses what is no file; reads nothing yet
    for path in settings.files:
        if not path.exists():
            continue
        if path.is_dir():
            raise UserError(
                f"data {path}: is a folder, the name of a file is needed; choose another OUT"
            )
        if any(map(path.samefile, inputs)):
            raise UserError(f"data {path}: is an input too; choose another OUT")
        if not settings.overwrite:
            raise UserError(
                f"data {path}: exists; --overwrite replaces or removes all that OUT stands for: "
                f"{', '.join(file.name for file in settings.files)}"
            )
    for path in out.parents:
        if path.exists():
            if not path.is_dir():
                raise UserError(f"data {out}: {path} is a file, a folder is needed")
            break
