"""Figures of rank tables and tree searches, drawn without touching matplotlib's global state."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from specjax.ranks.simulation import check_tree
from specjax.ranks.table import RankTable
from specjax.report.style import BLUE, GREY, LIGHT_BLUE, legend_outside, new_axes, series
from specjax.tree import Tree

Curve = Sequence[tuple[int, float]]  # (nodes, value)


_NODES = "nodes (root included)"
_SHADE = (0.18, 0.55, 0.34)


def rank_heatmap(table: RankTable, ranks: int = 16) -> Figure:
    """Where the true token stands: the share of positions by head and rank, on a logarithmic scale."""
    hits = table.hits()[:, :ranks]
    figure, axes = new_axes("Rank of the true token", "rank", "head", (7.0, 0.9 + 0.5 * len(hits)))
    image = axes.imshow(np.maximum(hits, 1e-4), norm=LogNorm(1e-3, 1), aspect="auto", cmap="viridis")
    axes.set_yticks(range(len(hits)), [str(head + 1) for head in range(len(hits))])
    for head, row in enumerate(hits):
        axes.text(0, head, f"{row[0]:.2f}", ha="center", va="center", size=8, color="black")
    figure.colorbar(image, ax=axes, label="share of positions")
    return figure


def accuracy_by_head(table: RankTable, ks: Sequence[int] = (1, 2, 3, 5, 10)) -> Figure:
    """Top-k accuracy of every head."""
    figure, axes = new_axes("Accuracy by head", "head", "share of positions")
    heads = range(1, table.num_heads + 1)
    for number, k in enumerate(k for k in ks if k <= table.cap):
        axes.plot(heads, table.accuracy(k), label=f"top {k}", **series(number))
    axes.set_xticks(list(heads))
    axes.set_ylim(0, 1)
    axes.grid(axis="y", alpha=0.25)
    legend_outside(figure)
    return figure


def accuracy_by_category(table: RankTable) -> Figure:
    """Head 1's top-1 and top-3 accuracy, by category."""
    figure, axes = new_axes("Head 1 by category", "", "share of positions", grid="y")
    names = sorted(set(table.categories))
    parts = [table.category(name) for name in names]
    for k, shift, colour in ((1, -0.2, BLUE), (min(3, table.cap), 0.2, LIGHT_BLUE)):
        places = [place + shift for place in range(len(names))]
        axes.bar(places, [part.accuracy(k)[0] for part in parts], 0.4, color=colour, label=f"top {k}")
    axes.set_xticks(range(len(names)), names)
    legend_outside(figure)
    return figure


def accuracy_by_entropy(table: RankTable, bins: int = 8) -> Figure:
    """Each head's top-1 accuracy against the entropy of the law that judges its draft, in bins of as many drafts."""
    figure, axes = new_axes(
        "Accuracy by the target's entropy", "entropy of the judging law, nats (mean of the bin)", "top-1 accuracy"
    )
    _, index = table.entropy_bins(bins)
    for head in range(table.num_heads):
        inside = [index[:, head] == b for b in range(bins)]
        points = [
            (table.judged_entropy[where, head].mean(), table.accuracy(1, where)[head])
            for where in inside
            if where.any()
        ]
        axes.plot(*zip(*points, strict=True), label=f"head {head + 1}", **series(head))
    axes.set_ylim(0, 1)
    axes.grid(axis="y", alpha=0.25)
    legend_outside(figure)
    return figure


def calibration(table: RankTable, bins: int = 10) -> Figure:
    """How often each head's best token is right, against how sure the head is."""
    figure, axes = new_axes("Calibration of the heads", "confidence of the best token", "share right", (5.6, 4.2))
    axes.plot([0, 1], [0, 1], color=GREY, lw=1)
    for head in range(table.num_heads):
        confidence, right, count = table.calibration(head, bins)
        shown = count >= 20  # fewer say little
        axes.plot(confidence[shown], right[shown], label=f"head {head + 1}", **series(head))
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    legend_outside(figure)
    return figure


def edge_acceptance(table: RankTable, tree: Tree) -> Float[np.ndarray, "M"]:
    """For every node, how often it is right where its parent is, over all positions as roots; NaN if never reached.

    Raises:
      TreeError: a tree deeper than the table has heads, or wider than its cap.
    """
    check_tree(table, tree)
    ranks, rates = table.ranks[table.rooted], np.full(tree.size, np.nan)
    right = [np.ones(len(ranks), bool)]
    for node in range(1, tree.size):
        column = ranks[:, tree.depths[node] - 1]
        judged = right[tree.parents[node]] & (column >= 0)
        right.append(judged & (column == tree.ranks[node]))
        if judged.any():
            rates[node] = right[node].sum() / judged.sum()
    return rates


def tokens_against_nodes(curves: Mapping[str, Curve], bounds: Mapping[str, float] | None = None) -> Figure:
    """Tokens per round against tree nodes, one line per search; dashed lines for upper bounds."""
    figure, axes = new_axes("Tokens per round against tree size", _NODES, "tokens per round", (7.5, 4.0))
    _curves(axes, curves)
    for name, value in (bounds or {}).items():
        axes.axhline(value, ls="--", lw=0.9, color="#777777")
        label, place = f"{name}: {value:.2f}", ("axes fraction", "data")
        axes.annotate(label, (1, value), xycoords=place, ha="right", va="bottom", size=8)
    legend_outside(figure)
    return figure


def speedup_against_nodes(curves: Mapping[str, Curve]) -> Figure:
    """Speed-up over autoregressive decoding against tree nodes."""
    figure, axes = new_axes("Speed-up against tree size", _NODES, "speed-up", (7.5, 4.0))
    _curves(axes, curves)
    axes.axhline(1.0, color="black", lw=0.8)
    legend_outside(figure)
    return figure


def speed_against_nodes(curves: Mapping[str, Curve], autoregressive: float) -> Figure:
    """Tokens per second against tree nodes; the line is autoregressive decoding."""
    figure, axes = new_axes("Speed against tree size", _NODES, "tokens per second", (7.5, 4.0))
    _curves(axes, curves)
    axes.axhline(autoregressive, color="black", lw=0.8, label="autoregressive")
    legend_outside(figure)
    return figure


def _curves(axes: Axes, curves: Mapping[str, Curve]) -> None:
    # The later, the thinner and the more broken: curves that coincide are all seen.
    for number, (name, curve) in enumerate(curves.items()):
        width, dashes = max(1.2, 4.5 - 1.1 * number), ("-", "-", "--", ":")[number % 4]
        look = {**series(number), "ms": width + 2.5}
        axes.plot(*zip(*curve, strict=True), ls=dashes, lw=width, label=name, **look)
    axes.grid(alpha=0.25)


def predicted_against_measured(points: Mapping[str, Sequence[tuple[float, float]]], what: str) -> Figure:
    """(predicted, measured) pairs beside the diagonal."""
    figure, axes = new_axes(f"{what}: predicted against measured", "predicted", "measured", (4.6, 4.2))
    everything = [value for pairs in points.values() for pair in pairs for value in pair]
    low, high = min(everything), max(everything)
    axes.plot([low, high], [low, high], color=GREY, lw=1)
    for number, (name, pairs) in enumerate(points.items()):
        axes.plot([a for a, _ in pairs], [b for _, b in pairs], ls="", label=name, **series(number))
    legend_outside(figure, below=True)
    return figure


def text_acceptance(pieces: Sequence[str], depths: Int[np.ndarray, "n"], width: int = 88) -> Figure:
    """A text, the tokens that were accepted drafts shaded: which words the heads can predict.

    Args:
      pieces: the text of every token.
      depths: `simulate.drafted`: how many tokens ahead of its root each was drafted; 0 for the target's own.
      width: characters per line.
    """
    lines: list[list[tuple[int, str, int]]] = [[]]
    column = 0
    for piece, depth in zip(pieces, depths, strict=True):
        for i, part in enumerate(piece.split("\n")):
            if i or column + len(part) > width:
                lines.append([])
                column = 0
            shown = part if column or i else part.lstrip(" ") or part
            lines[-1].append((column, shown, int(depth)))
            column += len(shown)
    figure = Figure(figsize=(0.078 * width + 0.4, 0.24 * len(lines) + 0.7))
    axes = figure.add_axes((0.02, 0.02, 0.96, 0.96 - 0.3 / (0.24 * len(lines) + 0.7)))
    axes.set_xlim(0, width)
    axes.set_ylim(len(lines), 0)
    axes.axis("off")
    axes.set_title(
        "Shaded: accepted drafts (darker: drafted further ahead); plain: the target's own tokens",
        loc="left",
        fontsize=9,
    )
    deepest = max(int(np.max(depths)), 1)
    for row, line in enumerate(lines):
        for column, part, depth in line:
            if part and depth > 0:
                axes.add_patch(
                    Rectangle(
                        (column, row + 0.05), len(part), 0.9, color=(*_SHADE, 0.15 + 0.55 * depth / deepest), lw=0
                    )
                )
            safe = part.replace("$", r"\$")
            axes.text(column, row + 0.72, safe, family="monospace", size=7.6)
    return figure
