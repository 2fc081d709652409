"""What people read in a terminal: lines of a label and a text, and texts of strangers made harmless.

`harmless(text)` takes out what may move a cursor, change colours or turn the direction of writing: a model may say it, the name
of a file or of a tool may hold it. `fields(rows)` aligns labels; on a terminal they are bold and long texts are broken, elsewhere
every field is one plain line.
"""

from collections.abc import Sequence

# Control characters of ASCII and of Latin-1 (but tab and line end), marks of the direction of writing, separators of lines.
_TAKEN_OUT = (
    *range(9), *range(11, 32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A),
    0x200E, 0x200F, 0x2028, 0x2029,
)  # fmt: skip
# No encoding can write half of a surrogate pair, which JSON may hold.
_HARMLESS = dict.fromkeys(_TAKEN_OUT) | dict.fromkeys(range(0xD800, 0xE000), "\ufffd")


def harmless(text: str) -> str:
    """The text without what a terminal would obey; tabs and line ends stay."""
    return text.translate(_HARMLESS)


def fields(rows: Sequence[tuple[str, str]]) -> str:
    """Lines of a label and a text, for stdout as it is; rich decides whether that is a terminal (and heeds NO_COLOR)."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows = [(label, harmless(text)) for label, text in rows]
    console = Console(highlight=False)
    if not console.is_terminal:
        width = max(len(label) for label, _ in rows)
        return "\n".join(f"{label:<{width}}  {text}" for label, text in rows)
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    for label, text in rows:
        grid.add_row(label, Text(text))
    with console.capture() as shown:
        console.print(grid)
    return shown.get().rstrip("\n")
