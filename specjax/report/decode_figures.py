"""Figures of a decode result, drawn without touching matplotlib's global state."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from specjax.report.style import BLUE, GREY, new_axes


def _width(bars: float) -> float:
    return max(7.5, 0.62 * bars)


def tokens_per_round(result: dict[str, Any]) -> Figure:
    """Tokens committed per target forward, by category and in all, for every speculative method."""
    methods = [m for m in result["methods"] if "per_category" in m]
    categories = list(dict.fromkeys(c for m in methods for c in m["per_category"]))
    bars = len(methods) * (len(categories) + 1)
    figure, axes = new_axes(
        "Tokens per target forward (1 = autoregressive)", "", "tokens per round", (_width(bars / 2), 3.6), "y"
    )
    width = 0.8 / max(len(methods), 1)
    for i, method in enumerate(methods):
        values = [method["per_category"][c]["tokens_per_round"] for c in categories] + [method["tokens_per_round"]]
        drawn = axes.bar([x + i * width for x in range(len(values))], values, width * 0.92, label=method["name"])
        axes.bar_label(drawn, fmt="%.2f", fontsize=8, padding=2)
    axes.set_xticks([x + width * (len(methods) - 1) / 2 for x in range(len(categories) + 1)], [*categories, "all"])
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.margins(y=0.15)
    axes.legend(frameon=False, fontsize=8, loc="upper left", ncols=2)
    return figure


def acceptance_by_depth(result: dict[str, Any]) -> Figure:
    """The share of rounds that accepted at least d drafts."""
    figure, axes = new_axes("Acceptance by depth", "d", "share of rounds that accept at least d drafts", grid="y")
    deepest = 1
    for method in result["methods"]:
        shares = method["acceptance_by_depth"]
        if shares:
            axes.plot(range(1, len(shares) + 1), shares, marker="o", label=method["name"])
            deepest = max(deepest, len(shares))
    axes.set_xticks(range(1, deepest + 1))
    axes.set_ylim(0, 1)
    if axes.lines:
        axes.legend(frameon=False)
    return figure


def speed(result: dict[str, Any]) -> Figure:
    """Tokens per second of the decoding loop; the bar is the median, the line spans the prompts."""
    methods = result["methods"]
    figure, axes = new_axes(
        "Decoding speed: median and range over prompts", "", "tokens per second", (_width(len(methods)), 3.6), "y"
    )
    middle = [m["tokens_per_second"]["median"] for m in methods]
    low = [m["tokens_per_second"]["median"] - m["tokens_per_second"]["min"] for m in methods]
    high = [m["tokens_per_second"]["max"] - m["tokens_per_second"]["median"] for m in methods]
    colours = [BLUE if "speedup" in m else GREY for m in methods]
    names = [m["name"] + (f"\n{m['speedup']['median']:.2f}x" if "speedup" in m else "") for m in methods]
    axes.bar(names, middle, color=colours, width=0.6, yerr=[low, high], capsize=4, ecolor="#444444")
    if len(names) > 8:
        axes.tick_params(axis="x", rotation=40, labelsize=8)
    return figure


def save_decode_figures(result: dict[str, Any], directory: Path) -> None:
    """Writes tokens_per_round.png, acceptance_by_depth.png and speed.png."""
    if any("per_category" in m for m in result["methods"]):
        tokens_per_round(result).savefig(directory / "tokens_per_round.png", dpi=130)
        acceptance_by_depth(result).savefig(directory / "acceptance_by_depth.png", dpi=130)
    speed(result).savefig(directory / "speed.png", dpi=130)
