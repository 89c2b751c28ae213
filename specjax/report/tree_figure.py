"""Drawing a draft tree with matplotlib."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure

from specjax.errors import TreeError
from specjax.report.style import EDGE, INK, ROOT
from specjax.tree import Tree

_SCALE = LinearSegmentedColormap.from_list("rates", ["#8fb4d9", "#2f6db3", "#54278f", "#1d0c33"])
_NUMBERED_EDGES = 24  # beyond this many edges only their colour speaks


def layout(tree: Tree) -> np.ndarray:
    """Node positions [M 2]: x the depth, y from 0 (top) down. Leaves are one apart, parents amid their children."""
    positions = np.zeros((tree.size, 2))
    positions[:, 0] = tree.depths
    by_rank_path = sorted(tree.leaves, key=lambda leaf: ((), *tree.rank_paths)[leaf])
    positions[by_rank_path, 1] = -np.arange(len(by_rank_path))
    for node in reversed(range(tree.size)):
        if below := tree.children[node]:
            positions[node, 1] = (positions[below[0], 1] + positions[below[-1], 1]) / 2
    return positions


def draw_tree(
    tree: Tree,
    ax: Axes | None = None,
    labels: Sequence[str] | None = None,
    edge_values: Sequence[float] | None = None,
) -> Axes:
    """Draws a tree in layers, root on the left, best ranks on top, every node with its rank.

    Args:
      tree: the topology.
      ax: where to draw; by default a new figure sized for the tree, `axes.figure`.
      labels: M texts to stand beside the nodes, e.g. their tokens.
      edge_values: M numbers in [0, 1] for the edges into the nodes, e.g. acceptance rates; NaN and the root's are not
        drawn.

    Raises:
      TreeError: labels or edge values that are not one per node, or a value outside [0, 1].
    """
    for what, given in (("labels", labels), ("edge values", edge_values)):
        if given is not None and len(given) != tree.size:
            raise TreeError(
                f"there are {len(given)} {what} for {tree.size} nodes; expected one per node, root included."
            )
    values = np.full(tree.size, np.nan) if edge_values is None else np.array(edge_values, float)
    if np.any((values[1:] < 0) | (values[1:] > 1)):
        raise TreeError(
            f"the edge values reach from {np.nanmin(values[1:])} to {np.nanmax(values[1:])}; expected rates in [0, 1]."
        )

    if ax is None:
        size = (2.2 + 1.7 * tree.max_depth, 1.2 + 0.27 * len(tree.leaves))
        ax = Figure(figsize=size, layout="constrained").add_subplot()
    positions = layout(tree)
    # Fitted to the data, and without the palest colours of the map: low rates would be yellow on white.
    highest = np.nanmax(values[1:], initial=0.0)
    colours = ScalarMappable(Normalize(0, highest or 1.0), _SCALE)
    for node in range(1, tree.size):
        _draw_edge(
            ax,
            positions[tree.parents[node]],
            positions[node],
            values[node],
            _SCALE(values[node] / (highest or 1.0)),
            tree.size,
        )

    x, y = positions.T
    fill, rim = [ROOT, *["white"] * (tree.size - 1)], [ROOT, *[INK] * (tree.size - 1)]
    ax.scatter(x, y, s=150, c=fill, edgecolors=rim, linewidths=1.1, zorder=3)
    for node in range(1, tree.size):
        ax.text(x[node], y[node], str(tree.ranks[node]), ha="center", va="center_baseline", size=7, color=INK, zorder=4)
    plate = {"boxstyle": "square,pad=0.12", "fc": "white", "ec": "none"}
    for node, label in enumerate(labels or ()):
        ax.annotate(
            label,
            (x[node], y[node]),
            (8, 0),
            textcoords="offset points",
            va="center_baseline",
            size=7,
            color=INK,
            zorder=5,
            bbox=plate,
        )

    ax.set_title(f"{tree.name or 'draft tree'}: {tree.size - 1} drafts, depth {tree.max_depth}", size=10, color=INK)
    ax.set_xticks(range(tree.max_depth + 1), ["root", *(f"depth {d}" for d in range(1, tree.max_depth + 1))])
    ax.set_xlim(-0.25, tree.max_depth + (0.7 if labels else 0.25))
    ax.set_ylim(y.min() - 0.8, 0.8)
    ax.set_yticks([])
    ax.tick_params(axis="x", length=0, labelsize=8, labelcolor=INK)
    ax.spines[:].set_visible(False)
    if edge_values is not None:
        bar = ax.figure.colorbar(colours, ax=ax, shrink=0.6, aspect=30, pad=0.02)
        bar.set_label("acceptance rate", size=8, color=INK)
        bar.ax.tick_params(labelsize=8, labelcolor=INK)
    return ax


def _draw_edge(ax: Axes, parent: np.ndarray, child: np.ndarray, value: float, scaled: Any, size: int) -> None:
    # An S-curve leaves and arrives horizontally, so that many siblings fan out without crossing each other's nodes.
    t = np.linspace(0, 1, 24)
    x = parent[0] + (child[0] - parent[0]) * t
    y = parent[1] + (child[1] - parent[1]) * t * t * (3 - 2 * t)
    known = not np.isnan(value)
    colour = scaled if known else EDGE
    ax.plot(
        x,
        y,
        color=colour,
        lw=0.8 + 2 * value if known else 1.0,
        zorder=1,
    )
    if known and size <= _NUMBERED_EDGES + 1:
        ax.text(
            x[15],
            y[15],
            f"{value:.2f}",
            size=6.5,
            ha="center",
            va="center",
            color=INK,
            zorder=2,
            bbox={"boxstyle": "square,pad=0.1", "fc": "white", "ec": "none"},
        )
