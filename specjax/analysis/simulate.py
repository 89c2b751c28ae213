"""Exact simulation of greedy decoding from a rank table: what any tree would commit, without decoding.

A draft is accepted when it is the true next token, that is, when its rank path is the one the table recorded. From a
round's root the walk goes on by the committed tokens to the next root, as the decoder does, up to the sequence's end.
On the target's own greedy answers this is exact; on other text it says what the target would confirm of that text.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from specjax.analysis.ranks import UNLABELLED, RankTable
from specjax.errors import TreeError
from specjax.tree import Tree

_TREES_AT_ONCE = 32


@dataclass(frozen=True)
class Simulation:
    """What a tree would do on a table's text.

    Attributes:
      tree: the tree.
      rounds: target forwards after the prefills.
      committed: tokens committed in them; each sequence's first token comes from its prefill.
      by_depth: by_depth[d]: rounds that committed exactly d drafts [E + 1].
    """

    tree: Tree
    rounds: int
    committed: int
    by_depth: Int[np.ndarray, "E1"]

    @property
    def tokens_per_round(self) -> float:
        """Mean tokens committed per target forward, the target's own included."""
        return self.committed / self.rounds

    @property
    def accepted_per_round(self) -> float:
        """Mean drafts committed per round: `tokens_per_round` - 1."""
        return self.tokens_per_round - 1.0

    @property
    def acceptance_by_depth(self) -> tuple[float, ...]:
        """For d = 1 to E, the share of rounds that committed at least d drafts."""
        beyond = np.cumsum(self.by_depth[::-1])[::-1] / self.rounds
        return tuple(float(share) for share in beyond[1:])


def simulate(table: RankTable, trees: Sequence[Tree]) -> list[Simulation]:
    """Simulates greedy decoding with every tree, vectorised over trees and sequences in one jitted walk.

    Raises:
      TreeError: a tree deeper than the table has heads, or wider than its cap.
    """
    if not trees:
        return []
    for tree in trees:
        check_tree(table, tree)
    depth, size = max(t.max_depth for t in trees), max(t.size for t in trees)
    width = max((max(t.max_rank_by_depth, default=1) for t in trees), default=1)
    # Positions with the same ranks are accepted alike: each tree is looked up once per distinct pattern.
    clipped = np.where(table.ranks[:, :depth] < width, table.ranks[:, :depth], UNLABELLED)
    patterns, pattern_of = np.unique(clipped, axis=0, return_inverse=True)
    moves = np.stack([_moves(tree, size, width) for tree in trees])
    padded = -(-len(trees) // _TREES_AT_ONCE) * _TREES_AT_ONCE
    moves = np.concatenate([moves, np.repeat(moves[:1], padded - len(trees), axis=0)])
    counts = _walk(
        jnp.asarray(moves),
        jnp.asarray(patterns, jnp.int32),
        jnp.asarray(pattern_of.reshape(-1), jnp.int32),
        jnp.asarray(table.starts, jnp.int32),
        jnp.asarray(table.starts + table.lengths - 1, jnp.int32),
        depth,
    )
    found = []
    for tree, row in zip(trees, np.asarray(counts, np.int64)[: len(trees)], strict=True):
        by_depth = row[: tree.max_depth + 1]
        committed = int((by_depth * np.arange(1, len(by_depth) + 1)).sum())
        found.append(Simulation(tree, int(by_depth.sum()), committed, by_depth))
    return found


def accepted_lengths(table: RankTable, tree: Tree, sequence: int) -> Int[np.ndarray, "rounds"]:
    """Drafts committed in each round of one sequence, as `Generation.accepted_lengths`: the walk in plain Python.

    Raises:
      TreeError: a tree deeper than the table has heads, or wider than its cap.
    """
    check_tree(table, tree)
    nodes, ranks = set(tree.rank_paths), table.ranks[table.starts[sequence] :][: table.lengths[sequence]]
    root, last, drafts = 0, len(ranks) - 1, []
    while root < last:
        path: tuple[int, ...] = ()
        while len(path) < tree.max_depth and (*path, int(ranks[root, len(path)])) in nodes:
            path = (*path, int(ranks[root, len(path)]))
        committed = min(len(path) + 1, last - root)
        drafts.append(committed - 1)
        root += committed
    return np.array(drafts, np.int32)


def visited(table: RankTable, tree: Tree) -> np.ndarray:
    """Which positions are a round's root when decoding with `tree`, bool [n].

    Raises:
      TreeError: a tree deeper than the table has heads, or wider than its cap.
    """
    roots = np.zeros(len(table.ranks), bool)
    for sequence, start in enumerate(table.starts):
        steps = accepted_lengths(table, tree, sequence) + 1
        roots[start + np.cumsum(steps) - steps] = True
    return roots


def upper_bound(table: RankTable, depth: int) -> float:
    """tokens_per_round of the infinite tree of `depth`, all ranks below the cap at every depth.

    Raises:
      TreeError: more depth than the table has heads.
    """
    check_tree(table, Tree.chain(depth))
    right = np.cumprod((table.ranks[:, :depth] >= 0) & (table.ranks[:, :depth] < table.cap), axis=1).sum(1)
    rounds = committed = 0
    for start, length in zip(table.starts, table.lengths, strict=True):
        root, last = start, start + length - 1
        while root < last:
            step = min(int(right[root]) + 1, last - root)
            rounds, committed, root = rounds + 1, committed + step, root + step
    return committed / rounds if rounds else math.nan


def check_tree(table: RankTable, tree: Tree) -> None:
    """Raises a `TreeError` for a tree that the table knows too little about."""
    if tree.max_depth > table.num_heads:
        raise TreeError(
            f"the tree is {tree.max_depth} deep, the table has {table.num_heads} heads; take a shallower tree."
        )
    if max(tree.ranks) >= table.cap:
        raise TreeError(
            f"the tree has a node of rank {max(tree.ranks)}, the table knows ranks below {table.cap}; measure with a "
            "larger cap."
        )


def _moves(tree: Tree, size: int, width: int) -> Int[np.ndarray, "M W"]:
    # moves[node, rank]: the child, or node `size`, where every path that has left the tree stays.
    moves = np.full((size + 1, width + 1), size, np.int32)  # the last column: any rank that no tree has
    for node in range(1, tree.size):
        moves[tree.parents[node], tree.ranks[node]] = node
    return moves


@functools.partial(jax.jit, static_argnames="depth")
def _walk(
    moves: Int[Array, "trees M W"],
    patterns: Int[Array, "U E"],
    pattern_of: Int[Array, "n"],
    starts: Int[Array, "c"],
    lasts: Int[Array, "c"],
    depth: int,
) -> Int[Array, "trees E1"]:
    outside = moves.shape[1] - 1

    def one(moves: Int[Array, "M W"]) -> Int[Array, "E1"]:
        node, reached = jnp.zeros(len(patterns), jnp.int32), jnp.zeros(len(patterns), jnp.int32)
        for d in range(depth):
            node = moves[node, patterns[:, d]]  # UNLABELLED is the last column
            reached += node != outside

        def step(carry: tuple[Array, Array]) -> tuple[Array, Array]:
            root, counts = carry
            left = lasts - root
            drafts = jnp.minimum(reached[pattern_of[root]], left - 1)
            running = left > 0
            counts += jnp.sum((drafts[:, None] == jnp.arange(depth + 1)) & running[:, None], axis=0)
            return jnp.where(running, root + drafts + 1, root), counts

        start = (starts, jnp.zeros(depth + 1, jnp.int32))
        return jax.lax.while_loop(lambda carry: jnp.any(carry[0] < lasts), step, start)[1]

    return jax.lax.map(one, moves, batch_size=_TREES_AT_ONCE)
