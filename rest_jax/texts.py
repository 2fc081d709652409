"""Texts of strangers (completions, records, names in files), made harmless for where they are shown.

A terminal obeys control characters and marks of direction, a spreadsheet calculates what looks like a formula, and a lone
surrogate has no UTF-8. All that the package prints goes through `print_text`, and what it warns of through `warn` (ruff's T201
holds that): an error may quote whatever it is about, a URL with a password in it, too.
"""

import re
import sys
from typing import Any, TextIO

# Control characters but the tab and the line feed, marks of the direction of writing, separators of lines.
_OBEYED = dict.fromkeys(
    [
        *range(9), *range(11, 32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A),
        0x061C, 0x200E, 0x200F, 0x2028, 0x2029,
    ]
)  # fmt: skip
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
_MOST_SAID = 4000  # characters of a line
# Of a URL: user and password, or a token in their place; the values of its query.
_USER = re.compile(r"(?<=://)(?:([^:/@\s]*:)[^/\s]*|[^:/@\s]+)@")
_QUERY = re.compile(r"([?&][\w.-]+=)[^\s&'\"]+")


def printable(text: str) -> str:
    """Without what a terminal would obey; lone surrogates as escapes."""
    return text.translate(_OBEYED).encode("utf-8", "backslashreplace").decode()


def print_text(text: str, file: TextIO | None = None) -> None:
    """Prints what is printable of a text, on stdout by default."""
    print(printable(text), file=sys.stdout if file is None else file, flush=True)


def warn(text: str) -> None:
    """Prints a warning on stderr, as one line."""
    print_text(f"rest-jax: warning: {one_line(text)}", sys.stderr)


def one_line(text: str) -> str:
    """What errors and warnings say of a text: on one line, without secrets; of a very long one, which quotes something, its
    begin and its end.
    """
    line = without_secrets(" ".join(printable(text).split()))
    half = _MOST_SAID // 2
    return line if len(line) <= _MOST_SAID else f"{line[:half]} .. {line[-half:]}"


def without_secrets(text: str) -> str:
    """A text whose URLs have stars for their passwords and for the values of their queries."""
    return _QUERY.sub(r"\1***", _USER.sub(lambda found: f"{found[1] or ''}***@", text))


def csv_cell(value: Any) -> Any:
    """What a spreadsheet does not calculate: a text that would be a formula gets an apostrophe before it."""
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if text.startswith(_FORMULA) else text
