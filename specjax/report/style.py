"""What all figures share: colours, and axes drawn without touching matplotlib's global state."""

import textwrap
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

GREY, BLUE, LIGHT_BLUE = "#9aa5b1", "#2f6db3", "#a9c6e8"
INK, EDGE, ROOT = "#22313f", "#a9b4bf", "#e4572e"
DPI = 130

# By what drafts; from dark to light, so that they stay apart in grey. Dtypes differ by their hatching.
_COLOURS = {"hybrid": "#54278f", "medusa": "#2f6db3", "draft": "#1b9e77", "ngram": "#f0a030", "none": "#c9d1d9"}
_HATCHES = {"float32": "", "bfloat16": "///"}
LINES = {"float32": "-", "bfloat16": "--"}
# Of curves that are numbered (heads, searches): apart in grey, and by their marks.
_SERIES = (BLUE, "#f0a030", "#54278f", "#1b9e77", "#b8c0c8")
_MARKS = "os^Dv"


def drafter_kind(name: str, nodes: int) -> str:
    """What drafts in a method: of the colours' names, read off the method's own."""
    if nodes == 1:
        return "none"
    found = [kind for kind in ("medusa", "ngram", "draft") if kind in name.lower()]
    if "vanilla" in name.lower():
        found.append("draft")
    return found[0] if len(found) == 1 else "hybrid"


def drafter_style(name: str, nodes: int, dtype: str) -> dict[str, Any]:
    """The bar of a method: colour by drafter, hatching by dtype."""
    return {"color": _COLOURS[drafter_kind(name, nodes)], "hatch": _HATCHES.get(dtype, "..."), "edgecolor": "white"}


def drafter_colour(name: str, nodes: int) -> str:
    """The line of a method."""
    return _COLOURS[drafter_kind(name, nodes)]


def series(number: int) -> dict[str, Any]:
    """Colour and mark of the `number`-th of several curves."""
    return {"color": _SERIES[number % len(_SERIES)], "marker": _MARKS[number % len(_MARKS)], "ms": 4.5}


def legend_outside(figure: Figure, below: bool = False) -> None:
    """The legend beside the axes, or below them in two columns, where it covers nothing."""
    place: Any = "outside lower center" if below else "outside right upper"
    figure.legend(loc=place, frameon=False, ncols=1 + below, fontsize=9)


def wrapped(name: str, width: int = 24) -> str:
    """A long name in several lines, cut at words, underscores and pluses."""
    words = name.replace("_", "_ ").replace("+", "+ ")
    return "\n".join(line.replace("_ ", "_").replace("+ ", "+") for line in textwrap.wrap(words, width))


def new_axes(
    title: str, xlabel: str = "", ylabel: str = "", size: tuple[float, float] = (6.0, 3.6), grid: str | None = None
) -> tuple[Figure, Axes]:
    """A figure of `size` inches with one set of axes; `grid`: "x", "y" or "both"."""
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=11)
    plain(axes, grid)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    return figure, axes


def plain(axes: Axes, grid: str | None = None) -> None:
    """Without the frame's upper and right side, with a faint grid behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    if grid:
        axes.grid(axis=grid, alpha=0.25)  # type: ignore[arg-type]
        axes.set_axisbelow(True)
