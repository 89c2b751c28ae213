"""Searching draft trees: by the heads' marginal accuracies, by the joint law of their ranks, by where rounds begin.

Every search maximises expected tokens per round, 1 + the sum of the probabilities that the nodes' rank paths are right;
they differ in the probabilities. `greedy_tree` (Medusa, section 2.3.3) and `sequoia_tree` (Chen et al. 2024, section
3.1) multiply the heads' marginals as if heads were independent; `joint_tree` takes the paths' own frequencies, shrunk
towards independence. `validated` chooses among such trees by cross-validation.
"""

import heapq
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from specjax.checks import is_whole
from specjax.errors import TreeError
from specjax.ranks.simulation import check_tree
from specjax.ranks.table import RankTable
from specjax.tree import MOST_NODES, Tree

Path = tuple[int, ...]


@dataclass(frozen=True)
class Limits:
    """What a search may build: `depth` and `branching` (children per node); None: as much as the data allows."""

    depth: int | None = None
    branching: int | None = None

    def __post_init__(self) -> None:
        for name in ("depth", "branching"):
            value = getattr(self, name)
            if value is not None and (not is_whole(value) or value < 1):
                raise TreeError(f"the {name} limit is {value}; expected a whole number of at least 1, or None.")

    def of(self, heads: int, ranks: int) -> tuple[int, int]:
        """The depth and branching that this many heads and ranks leave."""
        return min(heads, self.depth or heads), min(ranks, self.branching or ranks)

    def largest(self, heads: int, ranks: int) -> int:
        """The nodes of the largest tree, root included."""
        depth, branching = self.of(heads, ranks)
        return min(MOST_NODES, sum(branching**d for d in range(depth + 1)))

    def check(self, size: int, heads: int, ranks: int) -> None:
        """Raises a `TreeError` for a size that is no whole number from 1 to what heads, ranks and limits allow."""
        most = self.largest(heads, ranks)
        if not is_whole(size) or not 1 <= size <= most:
            depth, branching = self.of(heads, ranks)
            raise TreeError(f"size is {size}; depth {depth} with {branching} children a node allows 1 to {most}.")


UNLIMITED = Limits()


def expected_tokens(tree: Tree, hits: Float[np.ndarray, "C R"]) -> float:
    """Expected tokens per round, the bonus included, if the heads were right independently of each other.

    Args:
      hits: hits[i, r]: the probability that the true token has rank r for head i.

    Raises:
      TreeError: a tree that is deeper or wider than `hits`.
    """
    heads, ranks = hits.shape
    if tree.max_depth > heads or max(tree.ranks) >= ranks:
        raise TreeError(
            f"the tree is {tree.max_depth} deep with ranks up to {max(tree.ranks)}; the accuracies are of {heads} "
            f"heads and {ranks} ranks."
        )
    return 1.0 + sum(_path_probability(path, hits) for path in tree.rank_paths)


def joint_expected_tokens(tree: Tree, table: RankTable) -> float:
    """Expected tokens per round over all of the table's positions as roots, with no assumption about the heads.

    Raises:
      TreeError: a tree deeper than the table has heads, or wider than its cap.
    """
    check_tree(table, tree)
    ranks = table.ranks[table.rooted]
    right = [(ranks[:, : len(path)] == path).all(1).mean() for path in tree.rank_paths]
    return 1.0 + float(np.sum(right))


def _path_probability(path: Sequence[int], hits: Float[np.ndarray, "C R"]) -> float:
    return float(np.prod([hits[depth, rank] for depth, rank in enumerate(path)]))


def greedy_tree(hits: Float[np.ndarray, "C R"], size: int, limits: Limits = UNLIMITED) -> Tree:
    """The tree of `size` nodes with the most `expected_tokens`: Medusa's search.

    It adds the likeliest node whose parent stands until `size` nodes do. Optimal under independence, because a child is
    never likelier than its parent, and siblings have the same below them.

    Raises:
      TreeError: a size below 1 or beyond what heads, ranks and limits allow.
    """
    limits.check(size, *hits.shape)
    depth, branching = limits.of(*hits.shape)
    paths = PathLaw(np.zeros((0, len(hits)), np.int16), hits, math.inf).likeliest(depth, branching)
    provenance = {"search": "greedy, independent heads"}
    chosen = [path for path, _ in itertools.islice(paths, size - 1)]
    return Tree.from_paths(chosen, f"independent_{size}", provenance)


@dataclass(frozen=True)
class PathLaw:
    """The law of rank paths, from counts that fall back on the heads' marginals where they are few.

    P(rank | path) = (count of path and rank + shrinkage * hits[len(path), rank]) / (count of path + shrinkage), so that
    shrinkage 0 is the empirical law and infinity that of independent heads.

    Attributes:
      ranks: the roots' rank paths that are counted; ranks outside [0, R) never match.
      hits: the marginals.
      shrinkage: how many positions the marginals count for.
    """

    ranks: Int[np.ndarray, "roots C"]
    hits: Float[np.ndarray, "C R"]
    shrinkage: float

    def likeliest(self, depth: int, branching: int | None = None) -> Iterator[tuple[Path, float]]:
        """The paths up to `depth` with their probabilities, likeliest first, ties to the shorter, then better-ranked.

        A path is never likelier than its parent, which therefore comes before it.

        Args:
          branching: only the so many likeliest continuations of every path.
        """
        heap = [self._children((), 1.0, np.arange(len(self.ranks)))]
        while heap:
            minus, length, path, place, order, p, rows = heapq.heappop(heap)
            yield path, -minus
            if place + 1 < min(len(order), branching or len(order)):
                rank = int(order[place + 1])
                heapq.heappush(heap, (-p[rank], length, (*path[:-1], rank), place + 1, order, p, rows))
            if length < depth:
                inside = rows[self.ranks[rows, length - 1] == path[-1]]
                heapq.heappush(heap, self._children(path, -minus, inside))

    def _children(self, path: Path, probability: float, rows: np.ndarray) -> tuple[Any, ...]:
        # The best child's entry in the heap; the path itself makes entries of equal probability distinct.
        marginal, depth = self.hits[len(path)], len(path)
        if math.isinf(self.shrinkage) or len(rows) + self.shrinkage == 0:
            law = marginal
        else:
            column = self.ranks[rows, depth]
            counts = np.bincount(column[(column >= 0) & (column < len(marginal))], minlength=len(marginal))
            law = (counts + self.shrinkage * marginal) / (len(rows) + self.shrinkage)
        p = probability * law
        order = np.argsort(-p, kind="stable")
        return -p[order[0]], depth + 1, (*path, int(order[0])), 0, order, p, rows


def joint_tree(
    table: RankTable,
    size: int,
    limits: Limits = UNLIMITED,
    *,
    roots: Bool[np.ndarray, "n"] | None = None,
    shrinkage: float = 0.0,
) -> Tree:
    """The tree of `size` nodes with the most expected tokens per round under the joint law of the ranks, `PathLaw`.

    Without a limit on branching these are the likeliest paths (ties go to the shorter one, then to better ranks). With
    one, a less likely child may have more below it: a knapsack over the likeliest paths, of which as many are taken as
    it needs to be optimal over all.

    Args:
      roots: counts these positions alone; None: every one that can be a round's root.
      shrinkage: of the counts towards independent heads, in positions; 0: the most `joint_expected_tokens`.

    Raises:
      TreeError: a size below 1 or beyond what heads, ranks and limits allow.
    """
    limits.check(size, table.num_heads, table.cap)
    depth, branching = limits.of(table.num_heads, table.cap)
    law = PathLaw(table.ranks[table.rooted if roots is None else roots], table.hits(), shrinkage)
    paths = law.likeliest(depth)
    taken = list(itertools.islice(paths, size - 1))
    chosen = [path for path, _ in taken]
    if limits.branching is not None:
        taken += itertools.islice(paths, 3 * size)
        while True:
            worth, chosen = _knapsack(taken, size - 1, branching)
            following = next(paths, None)
            # With k paths from beyond, each worth at most the next one, the others are worth at most worth[-1 - k].
            k = np.arange(size)
            if following is None or worth[-1] >= (worth[::-1] + k * following[1]).max() - 1e-12:
                break
            taken += [following, *itertools.islice(paths, len(taken))]
    provenance = {"search": "joint law of the ranks", "shrinkage": shrinkage}
    return Tree.from_paths(chosen, f"joint_{size}", provenance)


def _knapsack(
    paths: Sequence[tuple[Path, float]], drafts: int, branching: int
) -> tuple[Float[np.ndarray, "drafts+1"], list[Path]]:
    """The most that a tree of m of these paths is worth, for m to `drafts`, and the paths of the best of `drafts`.

    Every path's parent must come before it; at most `branching` children per node. -inf: there is no such tree.
    """
    children: dict[Path, list[Path]] = {(): []}
    worth = dict(paths)
    for path, _ in paths:
        children[path] = []
        children[path[:-1]].append(path)
    below: dict[Path, np.ndarray] = {}  # [m]: the most that m nodes below a path are worth
    given: dict[Path, list[np.ndarray]] = {}  # for every child [b, m]: nodes in its subtree, itself included
    for path in reversed(children):  # children before parents
        best = np.full((branching + 1, drafts + 1), -np.inf)
        best[0, 0] = 0.0
        given[path] = []
        for child in children[path]:
            mine = worth[child] + below.pop(child)
            better, took = best.copy(), np.zeros(best.shape, int)
            for nodes in range(1, drafts + 1):
                if mine[nodes - 1] == -np.inf:
                    break
                option = best[:-1, : drafts + 1 - nodes] + mine[nodes - 1]
                wins = option > better[1:, nodes:]
                better[1:, nodes:] = np.where(wins, option, better[1:, nodes:])
                took[1:, nodes:] = np.where(wins, nodes, took[1:, nodes:])
            best = better
            given[path].append(took)
        below[path] = best.max(0)
        given[path].append(best.argmax(0)[None])

    def pick(path: Path, nodes: int) -> list[Path]:
        *steps, number = given[path]
        b, found = int(number[0, nodes]), []
        for child, took in zip(reversed(children[path]), reversed(steps), strict=True):
            if there := int(took[b, nodes]):
                found += [child, *pick(child, there - 1)]
                b, nodes = b - 1, nodes - there
        return found

    return below[()], pick((), drafts) if np.isfinite(below[()][drafts]) else []


def sequoia_tree(hits: Float[np.ndarray, "C R"], size: int, limits: Limits = UNLIMITED) -> Tree:
    """The tree of `size` nodes with the most `expected_tokens`, by Sequoia's dynamic programme.

    `best[m]` at a depth is the most that a subtree of m nodes brings below a node there; its children are filled rank
    by rank, T[y, b] = max over z of T[y - z, b - 1] + p[b] (1 + best[z]) as in the paper, but for acceptances p that
    may differ from depth to depth, as Medusa's heads do.

    Raises:
      TreeError: a size below 1 or beyond what heads, ranks and limits allow.
    """
    limits.check(size, *hits.shape)
    depth, branching = limits.of(*hits.shape)
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
