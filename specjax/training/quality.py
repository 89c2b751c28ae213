"""How good heads are on held-out text: the record of an evaluation, and which evaluation counts."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from specjax.errors import TreeError
from specjax.ranks.simulation import simulate
from specjax.ranks.table import RankTable
from specjax.tree import Tree

TOP = (1, 2, 3, 5, 10)
CAP = 32  # ranks below it are exact in an evaluation: the widest tree that can be simulated


class Quality(NamedTuple):
    """How good heads are on held-out text.

    Attributes:
      ranks: of the true tokens: a rank table without the target's side (zeros there).
      losses: mean cross-entropy of each head, in nats, over the labels it can say.
    """

    ranks: RankTable
    losses: Float[np.ndarray, "C"]


def held_out_ranks(ranks: Int[np.ndarray, "n C"], lengths: Int[np.ndarray, "c"]) -> RankTable:
    """The table of ranks alone, up to `CAP`."""
    blank, confidence = np.zeros(len(ranks), np.float32), np.zeros(ranks.shape, np.float32)
    names = ("held_out",) * len(lengths)
    return RankTable(ranks.astype(np.int16), confidence, blank, blank, blank, lengths, names, CAP)


def default_tree(heads: int) -> Tree:
    """The tree that training is judged by where none is named: three drafts, two after each, then one after each."""
    return Tree.cartesian((3, 2, 1, 1, 1, 1, 1, 1)[: min(heads, 8)])


def record(quality: Quality, tree: Tree) -> dict[str, Any]:
    """An evaluation as the log has it.

    `accuracy` by top-k and head, `losses`, `hits` (hits[i, r]: the share of positions where head i ranks the true token
    r-th), and `tokens_per_round`: what decoding with `tree` would commit, walked over the held-out text by its ranks.
    That is exact on the target's own greedy answers; on other text it is what the target would confirm of it.
    """
    hits, (walk,) = quality.ranks.hits(), simulate(quality.ranks, [tree])
    return {
        "accuracy": {f"top{k}": hits[:, :k].sum(1).round(4).tolist() for k in TOP},
        "losses": quality.losses.round(5).tolist(),
        "tokens_per_round": round(1 + (walk.committed - walk.rounds) / max(walk.rounds, 1), 5),
        "hits": hits[:, : max(TOP)].round(5).tolist(),
    }


def tree_for(tree: Tree | None, heads: int) -> Tree:
    """What `tokens_per_round` is of: `tree`, or where none is named the default one.

    Raises:
      TreeError: a tree deeper than there are heads, or too wide to simulate.
    """
    tree = default_tree(heads) if tree is None else tree
    if tree.max_depth > heads or max(tree.ranks) >= CAP:
        raise TreeError(
            f"the tree is {tree.max_depth} deep with ranks up to {max(tree.ranks)}; {heads} heads can fill a depth of "
            f"{heads}, and ranks below {CAP} are simulated. Name another tree."
        )
    return tree
