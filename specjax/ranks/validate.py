"""Choosing among tree searches by cross-validation, and what is known about the tree that comes of it.

A tree fitted to a text looks better on that text than it is. Here candidates are fitted to parts of the table and
judged on the rest, and a joint law has to beat independent heads there by more than chance does.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace

import numpy as np

from specjax.errors import ConfigError
from specjax.ranks.search import UNLIMITED, Limits, greedy_tree, joint_tree, sequoia_tree
from specjax.ranks.simulation import Simulation, rounds_by_sequence, simulate, visited
from specjax.ranks.table import RankTable
from specjax.tree import Tree

_FOLDS = 5
_SHRINKAGES = (16.0, 64.0, 256.0)
# Standard errors that a saving must exceed: with three the searches lost on held-out text now and then, with four
# nowhere that was counted (README). Six candidates at 63 sizes: at 3.65 any chance win at all would be 5% likely, were
# the errors normal and known.
_MARGIN = 4.0
_REPEATS = 3  # of the search at the roots that the tree before visits

Search = Callable[[RankTable, int, Limits], Tree]


def validated(table: RankTable, size: int, limits: Limits, *, walk: bool) -> Tree:
    """The joint search with the shrinkage that cross-validation prefers, or the independent tree.

    The sequences are dealt into folds. Every candidate is searched on the other folds and decodes each; the one that
    saves the most rounds over the independent tree, four standard errors over sequences deducted, is searched again on
    the whole table. If nothing is left after the deduction, the independent tree stays.

    Args:
      walk: also takes the law at the roots that decoding visits. What decoding weighs is not every position but those
        where a round begins, which depends on the tree: after a long path the next root stands where drafts have just
        failed. From the independent tree on, the search is repeated on the roots that the tree before visits.

    Raises:
      TreeError: a size below 1 or beyond what heads, ranks and limits allow.
    """
    limits.check(size, table.num_heads, table.cap)
    independent = greedy_tree(table.hits(), size, limits)
    pieces = _pieces(table)
    if size == 1 or len(pieces.lengths) < 2:
        return independent
    # Dealt category by category, so that every fold has some of each.
    fold = np.argsort(np.argsort(np.array(pieces.categories), kind="stable"), kind="stable") % _FOLDS
    candidates: dict[str, Search] = {"independent": lambda part, size, limits: greedy_tree(part.hits(), size, limits)}
    for shrinkage in _SHRINKAGES:
        candidates[f"joint law, shrinkage {shrinkage:g}"] = functools.partial(joint_tree, shrinkage=shrinkage)
        if walk:
            candidates[f"joint law where rounds begin, shrinkage {shrinkage:g}"] = functools.partial(
                _walk_tree, shrinkage=shrinkage
            )
    rounds = np.zeros((len(candidates), len(fold)))
    for number in sorted(set(fold.tolist())):
        rest = pieces.select(lambda i, number=number: fold[i] != number)  # type: ignore[misc]
        trees = [search(rest, size, limits) for search in candidates.values()]
        rounds[:, fold == number] = rounds_by_sequence(pieces, trees)[:, fold == number]
    saved = rounds[0] - rounds
    total, error = saved.sum(1), saved.std(1) * math.sqrt(len(fold))
    best = int(np.argmax(total - _MARGIN * error))
    name = list(candidates)[best if total[best] > _MARGIN * error[best] else 0]
    tree = candidates[name](table, size, limits)
    saving = {"cross_validated_saving": float(total[best] / rounds[0].sum())} if name != "independent" else {}
    return replace(tree, provenance={"search": name, "folds": int(fold.max()) + 1, **saving})


def _walk_tree(table: RankTable, size: int, limits: Limits, shrinkage: float) -> Tree:
    tree = greedy_tree(table.hits(), size, limits)
    for _ in range(_REPEATS):
        before, tree = tree, joint_tree(table, size, limits, roots=visited(table, tree), shrinkage=shrinkage)
        if tree == before:
            break
    return tree


def _pieces(table: RankTable) -> RankTable:
    """The table's sequences with a round in them, cut if there are too few of them for the folds."""
    if (table.lengths > 1).sum() >= _FOLDS:
        return table.select(lambda i: table.lengths[i] > 1)
    longest = max(2, len(table.ranks) // (2 * _FOLDS))
    cut = [
        (min(longest, int(length) - at), category)
        for length, category in zip(table.lengths, table.categories, strict=True)
        for at in range(0, int(length), longest)
    ]
    lengths, categories = zip(*cut, strict=True)
    cut_up = replace(table, lengths=np.array(lengths), categories=categories)
    return cut_up.select(lambda i: cut_up.lengths[i] > 1)


# By name: (table, size, limits) -> the best tree of that size.
SEARCHES: Mapping[str, Search] = {
    "walk": functools.partial(validated, walk=True),
    "joint": functools.partial(validated, walk=False),
    "independent": lambda table, size, limits: greedy_tree(table.hits(), size, limits),
    "sequoia": lambda table, size, limits: sequoia_tree(table.hits(), size, limits),
}


def search_trees(
    table: RankTable, sizes: Sequence[int], *, search: str = "walk", limits: Limits = UNLIMITED
) -> list[Simulation]:
    """The best trees of these sizes by one of `SEARCHES`, simulated on the table's text.

    Each tree's provenance says how it was found, within which limits, on which table, and the tokens per round there.

    Raises:
      TreeError: a size below 1 or beyond what heads, ranks and limits allow.
      ConfigError: an unknown search.
    """
    if search not in SEARCHES:
        raise ConfigError(f"no search is called {search!r}; there are {', '.join(SEARCHES)}.")
    found = simulate(table, [SEARCHES[search](table, size, limits) for size in sizes])
    known = {"limits": asdict(limits), "table": dict(table.manifest)}
    return [
        replace(
            one,
            tree=replace(
                one.tree,
                name=f"{search}_{one.tree.size}",
                provenance={**one.tree.provenance, **known, "tokens_per_round_on_the_table": one.tokens_per_round},
            ),
        )
        for one in found
    ]
