"""Texts of strangers (completions, records, names in files), made harmless for where they are shown.

A terminal obeys control characters, a spreadsheet calculates what looks like a formula, and a lone surrogate has no UTF-8.
"""

import sys
from typing import Any, TextIO

# All but the tab and the line feed.
_CONTROL = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)])
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def printable(text: str) -> str:
    """Without control characters; lone surrogates as escapes."""
    return text.translate(_CONTROL).encode("utf-8", "backslashreplace").decode()


def print_text(text: str, file: TextIO | None = None) -> None:
    """Prints what is printable of a text, on stdout by default."""
    print(printable(text), file=sys.stdout if file is None else file, flush=True)


def csv_cell(value: Any) -> Any:
    """What a spreadsheet does not calculate: a text that would be a formula gets an apostrophe before it."""
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if text.startswith(_FORMULA) else text
