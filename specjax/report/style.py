"""What all figures share: colours, and axes drawn without touching matplotlib's global state."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

GREY, BLUE, LIGHT_BLUE = "#9aa5b1", "#2f6db3", "#a9c6e8"
INK, EDGE, ROOT = "#22313f", "#a9b4bf", "#e4572e"


def new_axes(
    title: str, xlabel: str = "", ylabel: str = "", size: tuple[float, float] = (6.0, 3.6), grid: str | None = None
) -> tuple[Figure, Axes]:
    """A figure of `size` inches with one set of axes; `grid`: "x", "y" or "both"."""
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    if grid:
        axes.grid(axis=grid, alpha=0.25)  # type: ignore[arg-type]
        axes.set_axisbelow(True)
    return figure, axes
