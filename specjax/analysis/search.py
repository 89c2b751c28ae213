"""Searching draft trees: by the heads' marginal accuracies, by their joint law, and by what a round costs here.

Every search maximises expected tokens per round, 1 + the sum of the probabilities that the nodes' rank paths are right;
they differ in the probabilities. `joint_tree` takes a path's own frequency, `walk_tree` that
among the roots which decoding visits. `greedy_tree` (Medusa, section 2.3.3) and
`sequoia_tree` (Chen et al. 2024, section 3.1) multiply the heads' marginals as if heads were independent.
"""

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float

from specjax.analysis.ranks import RankTable
from specjax.analysis.simulate import simulate, visited
from specjax.errors import TreeError
from specjax.tree import Tree

Path = tuple[int, ...]


@dataclass(frozen=True)
class Limits:
    """What a search may build: `depth` and `branching` (children per node); None: as much as the data allows."""

    depth: int | None = None
    branching: int | None = None

    def __post_init__(self) -> None:
        for name in ("depth", "branching"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise TreeError(f"the {name} limit is {value}; expected at least 1, or None.")


def expected_tokens(tree: Tree, hits: Float[np.ndarray, "C R"]) -> float:
    """Expected tokens per round, the bonus included, if the heads were right independently of each other.

    Args:
      hits: hits[i, r]: the probability that the true token has rank r for head i.
    """
    return 1.0 + sum(_path_probability(path, hits) for path in tree.rank_paths)


def joint_expected_tokens(tree: Tree, table: RankTable) -> float:
    """Expected tokens per round over all of the table's positions as roots, with no assumption about the heads."""
    frequency = _path_frequencies(table, tree.max_depth)
    return 1.0 + sum(frequency.get(path, 0) for path in tree.rank_paths) / int(table.rooted.sum())


def _path_probability(path: Sequence[int], hits: Float[np.ndarray, "C R"]) -> float:
    return float(np.prod([hits[depth, rank] for depth, rank in enumerate(path)]))


def greedy_tree(hits: Float[np.ndarray, "C R"], size: int, limits: Limits = Limits()) -> Tree:
    """The tree of `size` nodes with the most `expected_tokens`: Medusa's search.

    It adds the likeliest node whose parent stands until `size` nodes do. Optimal under independence, because a child is
    never likelier than its parent.

    Raises:
      TreeError: a size below 1 or beyond what heads, ranks and limits allow.
    """
    heads, ranks = hits.shape
    depth = min(heads, limits.depth or heads)
    branching = min(ranks, limits.branching or ranks)
    most = sum(branching**d for d in range(depth + 1))
    if not 1 <= size <= most:
        raise TreeError(f"size is {size}; {depth} heads with {branching} ranks each allow 1 to {most}.")
    order = np.argsort(-hits, axis=1, kind="stable")  # a sampled table may be out of order by chance
    frontier: list[tuple[float, Path, Path]] = [(-hits[0, order[0, 0]], (0,), (int(order[0, 0]),))]
    chosen: list[Path] = []
    while len(chosen) < size - 1:
        _, places, path = heapq.heappop(frontier)
        chosen.append(path)
        near = [(*places[:-1], places[-1] + 1)] if places[-1] + 1 < branching else []
        near += [(*places, 0)] if len(places) < depth else []
        for other in near:
            ranked = tuple(int(order[d, place]) for d, place in enumerate(other))
            heapq.heappush(frontier, (-_path_probability(ranked, hits), other, ranked))
    return Tree.from_paths(chosen, name=f"independent_{size}", provenance={"search": "greedy, independent heads"})


def joint_tree(
    table: RankTable, size: int, limits: Limits = Limits(), *, roots: Bool[np.ndarray, "n"] | None = None
) -> Tree:
    """The tree of `size` nodes with the most `joint_expected_tokens`: the most frequent rank paths.

    A path is never more frequent than its parent's, so that the most frequent ones are a tree; ties go to the shorter
    path, then to better ranks. A limit on branching keeps each node's most frequent children.

    Args:
      roots: counts these positions alone; None: every one that can be a round's root.

    Raises:
      TreeError: a size below 1, or beyond the paths that occur in the table.
    """
    frequency = _path_frequencies(table, limits.depth or table.num_heads, roots)
    ordered = sorted(frequency, key=lambda path: (-frequency[path], len(path), path))
    if limits.branching is not None:
        children: dict[Path, int] = {(): 0}
        kept = []
        for path in ordered:
            siblings = children.get(path[:-1])
            if siblings is not None and siblings < limits.branching:
                children[path[:-1]] = siblings + 1
                children[path] = 0
                kept.append(path)
        ordered = kept
    if not 1 <= size <= len(ordered) + 1:
        raise TreeError(
            f"size is {size}; the table's text has {len(ordered)} rank paths, which allow 1 to {len(ordered) + 1}."
        )
    provenance = {"search": "joint law of the ranks", "table": dict(table.manifest)}
    return Tree.from_paths(ordered[: size - 1], name=f"joint_{size}", provenance=provenance)


def walk_tree(table: RankTable, size: int, limits: Limits = Limits(), *, iterations: int = 5) -> Tree:
    """The tree of `size` nodes with the most simulated tokens per round among those that the other searches lead to.

    What decoding weighs is not every position but those where a round begins, which depends on the tree: after a long
    path the next root stands where drafts have just failed. From the joint and the independent tree, the joint search
    is repeated on the roots that the tree before visits; the best of all these trees on this text is taken.

    Raises:
      TreeError: as `joint_tree`.
    """
    candidates = [joint_tree(table, size, limits), greedy_tree(table.hits(), size, limits)]
    for tree in tuple(candidates):
        for _ in range(iterations):
            tree = joint_tree(table, size, limits, roots=visited(table, tree))
            if tree in candidates:
                break
            candidates.append(tree)
    best = max(simulate(table, candidates), key=lambda one: one.tokens_per_round).tree
    provenance = {"search": "joint law of the ranks at the roots of the walk", "table": dict(table.manifest)}
    return replace(best, name=f"walk_{size}", provenance=provenance)


def _path_frequencies(table: RankTable, depth: int, roots: Bool[np.ndarray, "n"] | None = None) -> dict[Path, int]:
    """How many positions have each rank path, up to `depth` and below the cap, as their next tokens' ranks."""
    frequency: dict[Path, int] = {}
    ranks = table.ranks[table.rooted if roots is None else roots]
    for d in range(1, min(depth, table.num_heads) + 1):
        known = ((ranks[:, :d] >= 0) & (ranks[:, :d] < table.cap)).all(1)
        paths, counts = np.unique(ranks[known, :d], axis=0, return_counts=True)
        frequency |= {tuple(path): int(n) for path, n in zip(paths.tolist(), counts, strict=True)}
    return frequency


def sequoia_tree(hits: Float[np.ndarray, "C R"], size: int, limits: Limits = Limits()) -> Tree:
    """The tree of `size` nodes with the most `expected_tokens`, by Sequoia's dynamic programme.

    `best[m]` at a depth is the most that a subtree of m nodes brings below a node there; its children are filled rank
    by rank, T[y, b] = max over z of T[y - z, b - 1] + p[b] (1 + best[z]) as in the paper, but for acceptances p that
    may differ from depth to depth, as Medusa's heads do.

    Raises:
      TreeError: a size below 1 or beyond what heads, ranks and limits allow.
    """
    heads, ranks = hits.shape
    depth, branching = min(heads, limits.depth or heads), min(ranks, limits.branching or ranks)
    most = sum(branching**d for d in range(depth + 1))
    if not 1 <= size <= most:
        raise TreeError(f"size is {size}; {depth} heads with {branching} ranks each allow 1 to {most}.")
    drafts = size - 1
    order = np.argsort(-hits, axis=1, kind="stable")[:, :branching]
    nothing = np.full(drafts + 1, -np.inf)
    nothing[0] = 0.0
    below = nothing  # what m nodes bring below a node of the depth below
    splits: list[list[np.ndarray]] = []  # [depth][b][m]: nodes given to the b-th child's subtree, itself included
    for d in range(depth - 1, -1, -1):
        filled, chosen = nothing, []
        for rank in order[d]:
            # A child with z nodes, itself included, brings p (1 + below[z - 1]).
            possible = np.isfinite(below[:drafts])
            brings = np.where(possible, hits[d, rank] * (1.0 + np.where(possible, below[:drafts], 0.0)), -np.inf)
            worth = np.concatenate([[0.0], brings])
            options = np.full((drafts + 1, drafts + 1), -np.inf)
            for m in range(drafts + 1):
                options[m, : m + 1] = filled[m - np.arange(m + 1)] + worth[: m + 1]
            chosen.append(options.argmax(1))
            filled = options.max(1)
        splits.insert(0, chosen)
        below = filled

    def paths(d: int, nodes: int, prefix: Path) -> list[Path]:
        found: list[Path] = []
        for b in range(branching - 1, -1, -1):
            if not nodes:
                break
            given = int(splits[d][b][nodes])
            if given:
                child = (*prefix, int(order[d, b]))
                found += [child, *paths(d + 1, given - 1, child)]
            nodes -= given
        return found

    provenance = {"search": "Sequoia's dynamic programme, independent heads"}
    return Tree.from_paths(paths(0, drafts, ()), name=f"sequoia_{size}", provenance=provenance)


# By name: (table, size, limits) -> the best tree of that size.
SEARCHES: Mapping[str, Callable[[RankTable, int, Limits], Tree]] = {
    "walk": walk_tree,
    "joint": joint_tree,
    "independent": lambda table, size, limits: greedy_tree(table.hits(), size, limits),
    "sequoia": lambda table, size, limits: sequoia_tree(table.hits(), size, limits),
}
