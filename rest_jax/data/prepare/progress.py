"""How far a file has been read: a bar on a terminal, a plain line every ten seconds elsewhere, both on stderr."""

import sys
import time
from typing import TextIO


class ReadingProgress:
    """Shows bytes read of all that there are, and counts beside them."""

    def __init__(self, total: int, file: TextIO | None = None, seconds: float = 10.0):
        self.total, self.seconds = total, seconds
        self.file = sys.stderr if file is None else file
        self._shown = self._begun = time.monotonic()
        self._bar = None
        if self.file.isatty():
            import tqdm

            self._bar = tqdm.tqdm(
                total=total, file=self.file, unit="B", unit_scale=True, dynamic_ncols=True
            )

    def update(self, position: int, items: int, kept: int, rejected: int) -> None:
        """`position` bytes are read, with `items` in them, from which `kept` records came."""
        if items % 256 and position < self.total:
            return
        if self._bar is not None:
            self._bar.set_postfix_str(f"{_counts(items, kept, rejected)}", refresh=False)
            self._bar.update(position - self._bar.n)
            return
        now = time.monotonic()
        if now - self._shown >= self.seconds:
            self._shown = now
            share = position / max(self.total, 1)
            rate = items / (now - self._begun)
            counts = _counts(items, kept, rejected)
            print(f"{share:4.0%}: {counts}, {rate:,.0f} a second", file=self.file, flush=True)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.close()


def _counts(items: int, kept: int, rejected: int) -> str:
    return f"{items:,} read, {kept:,} records kept, {rejected:,} rejected"
