"""How far a command is, on stderr: a bar on a terminal, a plain line every ten seconds elsewhere."""

import sys
import time
from typing import TextIO


class Progress:
    """Shows how many of `total` steps are done, and a text beside it. A resource."""

    def __init__(self, total: int, start: int = 0, file: TextIO | None = None):
        self.total, self.start = total, start
        self.seconds = 10.0
        self.file = sys.stderr if file is None else file
        self._begun = self._shown = time.monotonic()
        self._first = True
        self._bar = None
        if self.file.isatty():
            import tqdm

            self._bar = tqdm.tqdm(
                total=total,
                initial=start,
                file=self.file,
                unit="step",
                dynamic_ncols=True,
            )

    def update(self, done: int, shown: str) -> None:
        """`done` steps are done. Of the plain lines, the first, the last and one every ten seconds are printed."""
        if self._bar is not None:
            self._bar.set_postfix_str(shown, refresh=False)
            self._bar.update(done - self._bar.n)
            return
        now = time.monotonic()
        if self._first or done >= self.total or now - self._shown >= self.seconds:
            self._first, self._shown = False, now
            left = (now - self._begun) / max(done - self.start, 1) * (self.total - done)
            self.message(f"step {done}/{self.total}: {shown}, ETA {_duration(left)}")

    def message(self, text: str) -> None:
        """One line that does not tear the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self.file)
        else:
            print(text, file=self.file, flush=True)

    def close(self) -> None:
        """Leaves the bar as it is."""
        if self._bar is not None:
            self._bar.close()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
