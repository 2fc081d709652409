"""What every figure has in common: one palette, figures drawn without a display, one look of axes, PNG files.

The colours are those of Okabe and Ito, which people with any kind of colour blindness can tell apart.
"""

import os
import re
import warnings
from typing import Any, TypeVar

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from rest_jax.files import atomic_write
from rest_jax.texts import printable

PathT = TypeVar("PathT", bound=os.PathLike[str])
DPI = 110
# a label of a logarithmic axis, by matplotlib
_POWER = re.compile(r"\$\\mathdefault\{[-\d.^{}\\times]*\}\$")
BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PINK, SKY, YELLOW, GREY, BLACK, LIGHT = (
    "#CC79A7",
    "#56B4E9",
    "#F0E442",
    "#7F7F7F",
    "#000000",
    "#D0D0D0",
)
PALETTE = (BLUE, ORANGE, GREEN, VERMILION, PINK, SKY, YELLOW)
LINE_STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
# Blue for structure, warm colours for what a call says, so that related regions look related.
REGION_COLOURS = {
    "tag": BLUE,
    "scaffold": SKY,
    "name": VERMILION,
    "param": ORANGE,
    "think": PINK,
    "response": GREEN,
    "other": BLACK,
}


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, whose parts do not overlap."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def label_steps(axes: Any, title: str, unit: str) -> None:
    """Titles axes whose x is the step, and styles them."""
    axes.set_title(title, fontsize="medium")
    axes.set_xlabel("step")
    axes.set_ylabel(unit)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    tidy(axes)


def tidy(axes: Any) -> None:
    """A faint grid behind the data, and no frame above and to the right."""
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def save(figure: Figure, path: PathT, dpi: int = DPI, **options: Any) -> PathT:
    """Writes the figure as PNG; returns the path. `options` are matplotlib's. Names in it (of folders, of methods) are no
    formulas, and may have letters that its font lacks.
    """
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        axis.get_ticklabels()  # makes them
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        text.set_text(printable(text.get_text()))
        if not _POWER.fullmatch(text.get_text()):
            text.set_parse_math(False)
    with atomic_write(path) as partial, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(partial, format="png", dpi=dpi, **options)
    return path
