"""Figures of a decode result, drawn without touching matplotlib's global state.

Methods stand below each other, so that their number and the length of their names make a figure longer, not wider;
every temperature has a panel of its own, and legends lie outside the axes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from specjax.report.style import DPI, INK, LINES, drafter_colour, drafter_style, plain, wrapped

_MARKERS = "os^DvPX<>*"
_WIDTH = 8.6  # inches
Methods = Sequence[dict[str, Any]]


def _panels(methods: Methods) -> list[tuple[float, Methods]]:
    temperatures = sorted({method.get("temperature", 0.0) for method in methods})
    return [(t, [m for m in methods if m.get("temperature", 0.0) == t]) for t in temperatures]


def _faceted(methods: Methods, title: str, xlabel: str) -> tuple[Figure, list[tuple[Axes, Methods]]]:
    """A panel for every temperature, below each other, a row for every method."""
    panels = _panels(methods)
    rows = [sum(0.17 + 0.19 * (1 + wrapped(m["name"]).count("\n")) for m in part) for _, part in panels]
    figure = Figure(figsize=(_WIDTH, 1.0 + sum(rows) + 0.35 * len(rows)), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True, height_ratios=rows)[:, 0]
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    for ax, (temperature, part) in zip(axes, panels, strict=True):
        plain(ax, "x")
        ax.set_yticks(range(len(part)), [wrapped(_plain_name(m)) for m in part], fontsize=8)
        ax.set_ylim(len(part) - 0.5, -0.5)
        if len(panels) > 1:
            ax.set_title("greedy" if temperature == 0 else f"T = {temperature:g}", loc="left", fontsize=9, color=INK)
    axes[-1].set_xlabel(xlabel)
    return figure, [(ax, part) for ax, (_, part) in zip(axes, panels, strict=True)]


def tokens_per_round(result: dict[str, Any]) -> Figure:
    """Tokens committed per target forward: a bar for all prompts, a mark for every category."""
    methods = [m for m in result["methods"] if "per_category" in m]
    figure, panels = _faceted(methods, "Tokens per target forward (1 = autoregressive)", "tokens per round")
    categories = list(dict.fromkeys(c for m in methods for c in m["per_category"]))
    for ax, part in panels:
        for row, method in enumerate(part):
            value = method["tokens_per_round"]
            ax.barh(row, value, 0.62, **drafter_style(method["name"], method["tree_nodes"], method["dtype"]))
            ax.text(
                0.04,
                row,
                f"{value:.2f}",
                va="center",
                fontsize=8,
                color=INK,
                bbox={"fc": "white", "ec": "none", "pad": 1},
            )
            for i, category in enumerate(categories):
                if category in method["per_category"]:
                    at = method["per_category"][category]["tokens_per_round"]
                    ax.plot(at, row, _MARKERS[i % len(_MARKERS)], ms=4.5, mfc="white", mec=INK, mew=0.9)
        ax.axvline(1.0, color=INK, linewidth=0.8)
        ax.set_xlim(left=0)
    if categories:
        marks = [
            Line2D([], [], ls="", marker=_MARKERS[i % len(_MARKERS)], mfc="white", mec=INK)
            for i in range(len(categories))
        ]
        figure.legend(
            marks, categories, loc="outside lower center", ncols=min(len(marks), 5), frameon=False, fontsize=8
        )
    return figure


def acceptance_by_depth(result: dict[str, Any]) -> Figure:
    """The share of rounds that accepted at least d drafts (cumulative)."""
    methods = [m for m in result["methods"] if m["acceptance_by_depth"]]
    panels = _panels(methods) or [(0.0, [])]
    figure = Figure(figsize=(_WIDTH, 3.4 + 0.16 * max(len(part) for _, part in panels)), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    figure.suptitle("Acceptance by depth, cumulative", x=0.01, ha="left", fontsize=11)
    seen: dict[str, Line2D] = {}
    for ax, (temperature, part) in zip(axes, panels, strict=True):
        plain(ax, "y")
        ax.set_title("greedy" if temperature == 0 else f"T = {temperature:g}", loc="left", fontsize=9, color=INK)
        for i, method in enumerate(part):
            shares = method["acceptance_by_depth"]
            (line,) = ax.plot(
                range(1, len(shares) + 1),
                shares,
                color=drafter_colour(method["name"], method["tree_nodes"]),
                ls=LINES.get(method["dtype"], ":"),
                marker=_MARKERS[i % len(_MARKERS)],
                ms=4.5,
            )
            seen.setdefault(_plain_name(method), line)
        ax.set_xticks(range(1, max((len(m["acceptance_by_depth"]) for m in part), default=1) + 1))
        ax.set_xlabel("d")
        ax.set_ylim(0, 1)
    axes[0].set_ylabel("share of rounds that accept\nat least d drafts")
    if seen:
        figure.legend(list(seen.values()), list(seen), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def _plain_name(method: dict[str, Any]) -> str:
    # One entry of the legend for a method at all temperatures.
    return str(method["name"]).removesuffix(f"_T{method.get('temperature', 0.0):g}")


def speed(result: dict[str, Any]) -> Figure:
    """Tokens per second of the decoding loop: the bar is the median, the line spans the prompts, then the speed-up."""
    figure, panels = _faceted(result["methods"], "Decoding speed: median and range over prompts", "tokens per second")
    for ax, part in panels:
        for row, method in enumerate(part):
            rate = method["tokens_per_second"]
            style = drafter_style(method["name"], method["tree_nodes"], method["dtype"])
            ax.barh(row, rate["median"], 0.62, **style)
            (line,) = ax.plot([rate["min"], rate["max"]], [row, row], color=INK, lw=1.1, marker="|", ms=7)
            line.set_path_effects([withStroke(linewidth=2.6, foreground="white")])
            if "speedup" in method:
                told = f"{method['speedup']['median']:.2f}x"
                ax.annotate(
                    told, (rate["max"], row), (6, 0), textcoords="offset points", va="center", fontsize=8, color=INK
                )
        ax.set_xlim(0, 1.1 * max(m["tokens_per_second"]["max"] for m in result["methods"]))
    return figure


def save_decode_figures(result: dict[str, Any], directory: Path) -> None:
    """Writes tokens_per_round.png, acceptance_by_depth.png and speed.png."""
    if any("per_category" in m for m in result["methods"]):
        tokens_per_round(result).savefig(directory / "tokens_per_round.png", dpi=DPI)
        acceptance_by_depth(result).savefig(directory / "acceptance_by_depth.png", dpi=DPI)
    speed(result).savefig(directory / "speed.png", dpi=DPI)
