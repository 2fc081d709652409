"""Lines of a label and a text, as a run says at its start and its end what it is and what came of it.

`fields(rows)` aligns labels; on a terminal they are bold and long texts are broken, elsewhere every field is one plain line.
"""

from collections.abc import Sequence

from rest_jax.texts import printable


def print_fields(rows: Sequence[tuple[str, str]]) -> None:
    """Prints `fields` on stdout."""
    print(fields(rows), flush=True)  # noqa: T201


def fields(rows: Sequence[tuple[str, str]]) -> str:
    """Lines of a label and a text, for stdout as it is; rich decides whether that is a terminal (and heeds NO_COLOR)."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows = [(label, printable(text)) for label, text in rows]
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
