"""Texts of strangers (completions, records, names in files), made harmless for where they are shown.

A terminal obeys control characters and marks of direction, a spreadsheet calculates what looks like a formula, and a lone
surrogate has no UTF-8.
"""

import sys
from typing import Any, TextIO

# Control characters but the tab and the line feed, marks of the direction of writing, separators of lines.
_OBEYED = dict.fromkeys(
    [
        *range(9), *range(11, 32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A),
        0x200E, 0x200F, 0x2028, 0x2029,
    ]
)  # fmt: skip
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def printable(text: str) -> str:
    """Without what a terminal would obey; lone surrogates as escapes."""
    return text.translate(_OBEYED).encode("utf-8", "backslashreplace").decode()


def print_text(text: str, file: TextIO | None = None) -> None:
    """Prints what is printable of a text, on stdout by default."""
    print(printable(text), file=sys.stdout if file is None else file, flush=True)


def csv_cell(value: Any) -> Any:
    """What a spreadsheet does not calculate: a text that would be a formula gets an apostrophe before it."""
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if text.startswith(_FORMULA) else text
