"""Metrics of a run: one JSON line a step, a progress bar, a text table.

A metric is written under a name that `metric_table.METRICS` has; any other name is an error. Lines go
to `<run>/metrics.jsonl` always, to TensorBoard and Weights & Biases on request; sampled answers go to
`<run>/samples.jsonl`. Wall-clock values live under `time/` alone, so that all other values of a run that was
broken off and resumed can be compared bit for bit with those of an unbroken one.
"""

import difflib
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TextIO

from rest_jax.errors import UserError
from rest_jax.files import atomic_write
from rest_jax.run.metric_table import METRICS

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"


_ORDER = {name: place for place, name in enumerate(METRICS)}


class MetricsWriter:
    """Appends to the files of one run. A resource: one process writes it, `close` at the end."""

    def __init__(
        self,
        run_dir: str | pathlib.Path,
        tensorboard: bool = False,
        wandb_project: str | None = None,
    ):
        self.run_dir = pathlib.Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        # Optional packages first: a missing one must stop the run before any file is opened.
        self._board = _tensorboard_writer(self.run_dir) if tensorboard else None
        self._wandb = _wandb_run(self.run_dir, wandb_project) if wandb_project else None
        self._metrics = _open_append(self.run_dir / METRICS_FILE)
        self._samples = _open_append(self.run_dir / SAMPLES_FILE)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends {"step": step, ...} as one line, keys in the order of METRICS, and flushes it.

        Values are numbers (Python, NumPy or JAX scalars), floats written with all their digits. NaN and infinities
        are written as null: JSON has no word for them. ValueError for a name that METRICS does not have.
        """
        line: dict[str, Any] = {"step": int(step)}
        for name in sorted(values, key=_place):
            line[name] = _number(values[name])
        _append(self._metrics, line)
        for name, value in line.items():
            if self._board is not None and name != "step" and value is not None:
                self._board.add_scalar(name, value, step=int(step))
        if self._wandb is not None:
            self._wandb.log({k: v for k, v in line.items() if k != "step"}, step=int(step))

    def write_samples(self, step: int, samples: Iterable[Mapping[str, Any]]) -> None:
        """Appends one line a sample: {"step": step, ...the sample...}; any JSON values."""
        for sample in samples:
            _append(self._samples, {"step": int(step), **sample})

    def truncate_after(self, step: int) -> None:
        """Drops the lines of later steps and a half-written last line, in both files: what a resumed run will redo."""
        for name in ("_metrics", "_samples"):
            path = pathlib.Path(getattr(self, name).name)
            getattr(self, name).close()
            _truncate(path, step)
            setattr(self, name, _open_append(path))

    def sync(self) -> None:
        """Forces the lines written so far to the disk; call it before a checkpoint of the same step."""
        for file in (self._metrics, self._samples):
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        """Closes the files and what was opened on request."""
        self.sync()
        self._metrics.close()
        self._samples.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_lines(path: str | pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file written by `MetricsWriter`; a half-written last line is left out.

    UserError when the file is missing or another line is not a JSON object.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; is {path.parent} the folder of a run?")
    lines = path.read_bytes().split(b"\n")
    found = []
    for number, line in enumerate(lines[:-1], start=1):
        record = _parse(line)
        if record is None:
            raise UserError(f"{path}, line {number}: not a JSON object with a step")
        found.append(record)
    return found


class Progress:
    """Shows how a run goes: a bar on a terminal, a plain line every `seconds` (and for the last step) elsewhere."""

    def __init__(
        self, total: int, start: int = 0, file: TextIO | None = None, seconds: float = 10.0
    ):
        self.total, self.start, self.seconds = total, start, seconds
        self.file = sys.stderr if file is None else file
        self._begun = self._shown = time.monotonic()
        self._bar = None
        if self.file.isatty():
            import tqdm

            self._bar = tqdm.tqdm(
                total=total, initial=start, file=self.file, unit="step", dynamic_ncols=True
            )

    def update(self, step: int, reward: float, tokens_per_second: float, label: str = "reward"):
        """Step `step` (counted from 1) is done. `label` names the value shown (supervised runs: "loss")."""
        shown = f"{label} {reward:.3f}, {tokens_per_second:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.set_postfix_str(shown, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now = time.monotonic()
        first = step == self.start + 1
        if first or step >= self.total or now - self._shown >= self.seconds:
            self._shown = now
            left = (now - self._begun) / max(step - self.start, 1) * (self.total - step)
            print(
                f"step {step}/{self.total}: {shown}, ETA {_duration(left)}",
                file=self.file,
                flush=True,
            )

    def message(self, text: str) -> None:
        """One line that does not tear the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self.file)
        else:
            print(text, file=self.file, flush=True)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.close()


def summary_table(rows: Sequence[Sequence[Any]]) -> str:
    """Text table; the first row is the header. Numbers are right-aligned with 4 digits, None is shown as "-"."""
    cells = [[_cell(value) for value in row] for row in rows]
    if len({len(row) for row in cells}) != 1:
        raise ValueError(f"summary_table: rows of lengths {sorted({len(r) for r in cells})}")
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    left = [all(isinstance(v, str) for v in column) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if is_left else cell.rjust(width)
            for cell, width, is_left in zip(row, widths, left, strict=True)
        ).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _place(name: str) -> int:
    if name not in _ORDER:
        near = difflib.get_close_matches(name, _ORDER, n=1)
        hint = f" (nearest: {near[0]})" if near else ""
        raise ValueError(f"metric {name!r} is not in metric_table.METRICS{hint}; add it there")
    return _ORDER[name]


def _number(value: Any) -> int | float | None:
    if isinstance(value, int):
        return int(value)
    value = float(value)
    return value if math.isfinite(value) else None


def _open_append(path: pathlib.Path) -> TextIO:
    return path.open("a", encoding="utf-8")


def _append(file: TextIO, line: Mapping[str, Any]) -> None:
    # Answers of a model may hold lone surrogates: as \u escapes they are ASCII and always writable.
    file.write(json.dumps(line, allow_nan=False) + "\n")
    file.flush()


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _truncate(path: pathlib.Path, step: int) -> None:
    found = path.read_bytes()
    kept = []
    for line in found.split(b"\n")[:-1]:  # what follows the last line end is a half-written line
        record = _parse(line)
        if record is not None and record["step"] <= step:
            kept.append(line + b"\n")
    if b"".join(kept) == found:
        return
    with atomic_write(path) as partial, partial.open("wb") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())


def _tensorboard_writer(run_dir: pathlib.Path) -> Any:
    try:
        from tensorboard.summary import Writer
    except ImportError as error:
        raise UserError(
            "train.tensorboard is on, but the package is missing: pip install tensorboard"
        ) from error
    return Writer(str(run_dir / "tensorboard"))


def _wandb_run(run_dir: pathlib.Path, project: str) -> Any:
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            f"train.wandb_project is {project!r}, but the package is missing: pip install wandb"
        ) from error
    # The same id on every start: a resumed run goes on with the same curves.
    name = run_dir.resolve().name
    return wandb.init(project=project, id=name, name=name, dir=str(run_dir), resume="allow")


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
