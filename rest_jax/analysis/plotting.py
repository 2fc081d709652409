"""What every picture has in common: drawn without a display, one look of axes, a file that is whole or not there."""

import pathlib
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rest_jax.files import atomic_write

DPI = 110


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, whose parts keep clear of each other."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def tidy(axes: Any) -> None:
    """A faint grid, and no frame above and to the right."""
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def save(figure: Figure, path: pathlib.Path, dpi: int = DPI) -> pathlib.Path:
    """Writes the figure as PNG; returns the path."""
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png", dpi=dpi)
    return path
