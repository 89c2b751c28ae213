"""Figures of rank tables and tree searches, drawn without touching matplotlib's global state."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from specjax.analysis.ranks import RankTable
from specjax.tree import Tree

Curve = Sequence[tuple[int, float]]  # (nodes, value)


def _axes(title: str, xlabel: str, ylabel: str, size: tuple[float, float] = (6.0, 3.6)) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def rank_heatmap(table: RankTable, ranks: int = 16) -> Figure:
    """Where the true token stands: the share of positions by head and rank, on a logarithmic scale."""
    hits = table.hits()[:, :ranks]
    figure, axes = _axes("Rank of the true token", "rank", "head", (7.0, 0.9 + 0.5 * len(hits)))
    image = axes.imshow(np.maximum(hits, 1e-4), norm=LogNorm(1e-3, 1), aspect="auto", cmap="viridis")
    axes.set_yticks(range(len(hits)), [str(head + 1) for head in range(len(hits))])
    for head, row in enumerate(hits):
        axes.text(0, head, f"{row[0]:.2f}", ha="center", va="center", size=8, color="black")
    figure.colorbar(image, ax=axes, label="share of positions")
    return figure


def accuracy_by_head(table: RankTable, ks: Sequence[int] = (1, 2, 3, 5, 10)) -> Figure:
    """Top-k accuracy of every head."""
    figure, axes = _axes("Accuracy by head", "head", "share of positions")
    heads = range(1, table.num_heads + 1)
    for k in [k for k in ks if k <= table.cap]:
        axes.plot(heads, table.accuracy(k), marker="o", label=f"top {k}")
    axes.set_xticks(list(heads))
    axes.set_ylim(0, 1)
    axes.grid(axis="y", alpha=0.25)
    axes.legend(frameon=False)
    return figure


def accuracy_by_category(table: RankTable) -> Figure:
    """Head 1's top-1 and top-3 accuracy, by category."""
    figure, axes = _axes("Head 1 by category", "", "share of positions")
    names = sorted(set(table.categories))
    parts = [table.category(name) for name in names]
    for k, colour in ((3, "#a9c6e8"), (1, "#2f6db3")):
        axes.bar(names, [part.accuracy(k)[0] for part in parts], color=colour, label=f"top {k}")
    axes.legend(frameon=False)
    return figure


def calibration(table: RankTable, bins: int = 10) -> Figure:
    """How often each head's best token is right, against how sure the head is."""
    figure, axes = _axes("Calibration of the heads", "confidence of the best token", "share right", (4.6, 4.2))
    axes.plot([0, 1], [0, 1], color="#9aa5b1", lw=1)
    for head in range(table.num_heads):
        confidence, right, count = table.calibration(head, bins)
        shown = count >= 20  # fewer say little
        axes.plot(confidence[shown], right[shown], marker="o", ms=4, label=f"head {head + 1}")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.legend(frameon=False)
    return figure


def edge_acceptance(table: RankTable, tree: Tree) -> Float[np.ndarray, "M"]:
    """For every node, how often it is right where its parent is, over all positions as roots; NaN if never reached."""
    ranks, rates = table.ranks[table.rooted], np.full(tree.size, np.nan)
    reached: dict[tuple[int, ...], np.ndarray] = {(): np.ones(len(ranks), bool)}
    for node, path in enumerate(tree.rank_paths, 1):
        above, depth = reached[path[:-1]], len(path) - 1
        labelled = above & (ranks[:, depth] >= 0)
        reached[path] = labelled & (ranks[:, depth] == path[-1])
        if labelled.any():
            rates[node] = reached[path].sum() / labelled.sum()
    return rates


def tokens_against_nodes(curves: Mapping[str, Curve], bounds: Mapping[str, float] | None = None) -> Figure:
    """Tokens per round against tree nodes, one line per search; dashed lines for upper bounds."""
    figure, axes = _axes("Tokens per round against tree size", "nodes", "tokens per round", (6.5, 4.0))
    _curves(axes, curves)
    for name, value in (bounds or {}).items():
        axes.axhline(value, ls="--", lw=0.9, color="#777777")
        label, place = f"{name}: {value:.2f}", ("axes fraction", "data")
        axes.annotate(label, (1, value), xycoords=place, ha="right", va="bottom", size=8)
    axes.legend(frameon=False)
    return figure


def speedup_against_nodes(curves: Mapping[str, Curve]) -> Figure:
    """Speed-up over autoregressive decoding against tree nodes."""
    figure, axes = _axes("Speed-up against tree size", "nodes", "speed-up", (6.5, 4.0))
    _curves(axes, curves)
    axes.axhline(1.0, color="black", lw=0.8)
    axes.legend(frameon=False)
    return figure


def _curves(axes: Axes, curves: Mapping[str, Curve]) -> None:
    for name, curve in curves.items():
        axes.plot(*zip(*curve, strict=True), marker="o", ms=3, label=name)
    axes.grid(alpha=0.25)


def predicted_against_measured(points: Mapping[str, Sequence[tuple[float, float]]], what: str) -> Figure:
    """(predicted, measured) pairs beside the diagonal."""
    figure, axes = _axes(f"{what}: predicted against measured", "predicted", "measured", (4.6, 4.2))
    everything = [value for pairs in points.values() for pair in pairs for value in pair]
    low, high = min(everything), max(everything)
    axes.plot([low, high], [low, high], color="#9aa5b1", lw=1)
    for name, pairs in points.items():
        axes.scatter([a for a, _ in pairs], [b for _, b in pairs], s=18, label=name)
    axes.legend(frameon=False)
    return figure


def text_acceptance(pieces: Sequence[str], accepted: Int[np.ndarray, "n"], width: int = 88) -> Figure:
    """A text, its tokens shaded by how many drafts the round that began there would accept.

    Args:
      pieces: the text of every token.
      accepted: drafts accepted with that token as the root; -1 where no round can begin.
      width: characters per line.
    """
    lines: list[list[tuple[int, str, int]]] = [[]]
    column = 0
    for piece, depth in zip(pieces, accepted, strict=True):
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
    axes.set_title("Drafts accepted from each token on (darker: more)", loc="left", fontsize=9)
    deepest = max(int(np.max(accepted)), 1)
    for row, line in enumerate(lines):
        for column, part, depth in line:
            if part and depth > 0:
                axes.add_patch(_box(column, row, len(part), depth / deepest))
            safe = part.replace("$", r"\$")
            axes.text(column, row + 0.72, safe, family="monospace", size=7.6)
    return figure


def _box(column: int, row: int, length: int, share: float):  # type: ignore[no-untyped-def]
    from matplotlib.patches import Rectangle

    return Rectangle((column, row + 0.05), length, 0.9, color=(0.18, 0.55, 0.34, 0.15 + 0.55 * share), lw=0)
