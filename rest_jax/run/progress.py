"""How far a command is, on stderr: a bar on a terminal, a plain line every ten seconds elsewhere.

`Progress` counts the steps of a run or the completions of a benchmark, `Transfer` the bytes of a model that is read or written.
"""

import sys
import time
from typing import TextIO

from rest_jax.texts import print_text, printable


class Progress:
    """Shows how many of `total` steps (or another `unit`) are done, and a text beside it. A resource.

    The time that is left is known from the second line on: the first step compiles. Where `at_once` of them are under way at a
    time, half of each of these counts as done.
    """

    def __init__(
        self,
        total: int,
        start: int = 0,
        file: TextIO | None = None,
        unit: str = "step",
        at_once: int = 1,
    ):
        self.total, self.start, self.unit, self.at_once = total, start, unit, at_once
        self.seconds = 10.0
        self.file = sys.stderr if file is None else file
        self._begun = self._shown = time.monotonic()
        self._first: tuple[float, int] | None = None  # when the first were done, and how many
        self._bar = None
        if self.file.isatty():
            import tqdm

            self._bar = tqdm.tqdm(
                total=total,
                initial=start,
                file=self.file,
                unit=unit,
                dynamic_ncols=True,
            )

    def update(self, done: int, shown: str) -> None:
        """`done` steps are done. Of the plain lines, the first, the last and one every ten seconds are printed."""
        if self._bar is not None:
            self._bar.set_postfix_str(printable(shown), refresh=False)
            self._bar.update(done - self._bar.n)
            return
        now = time.monotonic()
        if self._first is None or done >= self.total or now - self._shown >= self.seconds:
            left, self._shown = self._left(done, now), now
            eta = "" if left is None else f", ETA {duration(left)}"
            self.message(f"{self.unit} {done}/{self.total}: {shown}{eta}")
        self._first = self._first or (now, done)

    def _left(self, done: int, now: float) -> float | None:
        """Seconds; None where it is not known yet."""
        rest = self.total - done
        if not rest:
            return 0.0
        if self.at_once > 1:
            since, before, half = self._begun, self.start, min(self.at_once, rest) / 2
        elif self._first is not None:
            (since, before), half = self._first, 0.0
        else:
            return None
        made = done - before + half
        return (now - since) / made * (rest - half) if made else None

    def message(self, text: str) -> None:
        """One line that does not tear the bar."""
        if self._bar is not None:
            self._bar.write(printable(text), file=self.file)
        else:
            print_text(text, self.file)

    def close(self) -> None:
        """Leaves the bar as it is."""
        if self._bar is not None:
            self._bar.close()


class Transfer:
    """Shows how much of a model has been moved and how fast; called with (bytes just moved, bytes in all). A resource.

    What takes less than two seconds on a terminal, or ten elsewhere, shows nothing.
    """

    def __init__(self, label: str, file: TextIO | None = None):
        self.label = label
        self.seconds = 10.0
        self.file = sys.stderr if file is None else file
        self._begun = self._shown = time.monotonic()
        self._done = 0
        self._bar = None

    def __call__(self, moved: int, total: int) -> None:
        self._done += moved
        if self.file.isatty():
            self._advance_bar(moved, total)
            return
        now = time.monotonic()
        shown_before = self._shown > self._begun
        if now - self._shown >= self.seconds or (shown_before and self._done >= total):
            self._shown = now
            speed = self._done / (now - self._begun)
            left = duration((total - self._done) / speed)
            print_text(
                f"{self.label}: {self._done / 1e9:.1f}/{total / 1e9:.1f} GB, {speed / 1e6:,.0f} MB/s, ETA {left}",
                self.file,
            )

    def __enter__(self) -> "Transfer":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def _advance_bar(self, moved: int, total: int) -> None:
        if self._bar is None:
            import tqdm

            self._bar = tqdm.tqdm(
                desc=self.label,
                total=total,
                file=self.file,
                unit="B",
                unit_scale=True,
                delay=2.0,
                dynamic_ncols=True,
            )
        self._bar.update(moved)


def duration(seconds: float) -> str:
    """Minutes and seconds, hours where there are any."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
