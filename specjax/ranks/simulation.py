"""Simulation of decoding from a rank table: what any tree would commit, without decoding.

Greedy acceptance, exactly: a draft is accepted when it is the true next token, that is, when its rank path is the one
the table recorded. From a round's root the walk goes on by the committed tokens to the next root, as the decoder does,
up to the sequence's end. On the target's own greedy answers this is exact; on other text it says what the target would
confirm of that text. Typical acceptance is simulated too (`typical`), with an error.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from specjax.acceptance import Acceptance, Greedy, Typical
from specjax.errors import ConfigError, DataError, TreeError
from specjax.ranks.table import UNLABELLED, RankTable
from specjax.ranks.typical import typical_reach
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
      exact: whether every round is the decoder's, on the target's own answers.
      on_text: the share of rounds in which every judgement was made after tokens of the text, hence rightly.
    """

    tree: Tree
    rounds: int
    committed: int
    by_depth: Int[np.ndarray, "E1"]
    exact: bool = True
    on_text: float = 1.0

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


def simulate(table: RankTable, trees: Sequence[Tree], acceptance: Acceptance | None = None) -> list[Simulation]:
    """Simulates decoding with every tree; greedily (the default) all together, in one jitted walk.

    With `Typical`, the walk stays on the table's text, which typical decoding leaves: the result is not exact
    (`typical.typical_reach` says why, `Simulation.on_text` how often).

    Raises:
      TreeError: a tree deeper than the table has heads, or wider than its cap or its recorded candidates.
      DataError: typical acceptance, and a table without its columns or of another temperature.
      ConfigError: another rule than `Greedy` and `Typical`.
    """
    if isinstance(acceptance, Typical):
        return [_typical(table, tree, acceptance) for tree in trees]
    if acceptance is not None and not isinstance(acceptance, Greedy):
        raise ConfigError(f"{acceptance} cannot be simulated; take Greedy() or Typical(...).")
    found = []
    for tree, by_depth in zip(trees, _walk_all(table, trees)[1], strict=True):
        found.append(_simulation(tree, by_depth[: tree.max_depth + 1]))
    return found


def rounds_by_sequence(table: RankTable, trees: Sequence[Tree]) -> Int[np.ndarray, "trees c"]:
    """Rounds that greedy decoding of each sequence takes with every tree. Raises as `simulate`."""
    return _walk_all(table, trees)[0]


def _simulation(tree: Tree, by_depth: Int[np.ndarray, "E1"]) -> Simulation:
    committed = int((by_depth * np.arange(1, len(by_depth) + 1)).sum())
    return Simulation(tree, int(by_depth.sum()), committed, by_depth)


def _typical(table: RankTable, tree: Tree, rule: Typical) -> Simulation:
    depth, on_text = typical_reach(table, tree, rule)
    roots = roots_of(table, depth)
    by_depth = np.bincount(np.minimum(depth, _left(table) - 1)[roots], minlength=tree.max_depth + 1)
    one = _simulation(tree, by_depth)
    return Simulation(tree, one.rounds, one.committed, by_depth, exact=False, on_text=float(on_text[roots].mean()))


def _walk_all(
    table: RankTable, trees: Sequence[Tree]
) -> tuple[Int[np.ndarray, "trees c"], Int[np.ndarray, "trees C1"]]:
    for tree in trees:
        check_tree(table, tree)
    depth, width = max((t.max_depth for t in trees), default=0), _width(trees)
    # Positions with the same ranks are accepted alike: each tree is looked up once per distinct pattern.
    clipped = np.full(table.ranks.shape, UNLABELLED, np.int32)
    clipped[:, :depth] = np.where(table.ranks[:, :depth] < width, table.ranks[:, :depth], UNLABELLED)
    patterns, pattern_of = np.unique(clipped, axis=0, return_inverse=True)
    lasts = table.starts + table.lengths - 1
    # Padded, so that few shapes compile; a padded sequence never begins.
    text = (
        _padded(patterns, UNLABELLED, _power(len(patterns))),
        _padded(pattern_of.reshape(-1), 0, _rounded(len(pattern_of))),
        _padded(table.starts, 0, _rounded(len(lasts))),
        _padded(lasts, 0, _rounded(len(lasts))),
    )
    size, width = max(64, _power(max((t.size for t in trees), default=1))), max(32, _power(width))
    rounds, by_depth = [np.zeros((0, len(lasts)), np.int64)], [np.zeros((0, table.num_heads + 1), np.int64)]
    for begin in range(0, len(trees), _TREES_AT_ONCE):
        part = trees[begin : begin + _TREES_AT_ONCE]
        moves = np.stack([_moves(tree, size, width) for tree in part])
        moves = _padded(moves, size, 4 if len(trees) <= 4 else _TREES_AT_ONCE)
        out = _walk(jnp.asarray(moves), *(jnp.asarray(column, jnp.int32) for column in text))
        rounds.append(np.asarray(out[0], np.int64)[: len(part), : len(lasts)])
        by_depth.append(np.asarray(out[1], np.int64)[: len(part)])
    return np.concatenate(rounds), np.concatenate(by_depth)


def reach(table: RankTable, tree: Tree) -> Int[np.ndarray, "n"]:
    """How many drafts a round that begins at each position would accept; 0 where none can begin.

    Drafts past the sequence's end are never accepted, but the last of those that are may be the last token, which is
    then committed as the target's own.

    Raises:
      TreeError: a tree deeper than the table has heads, or wider than its cap.
    """
    check_tree(table, tree)
    width = _width([tree])
    moves = _moves(tree, tree.size, width)
    node, depth = np.zeros(len(table.ranks), np.int32), np.zeros(len(table.ranks), np.int32)
    for ranks in table.ranks[:, : tree.max_depth].T:
        node = moves[node, np.where(ranks < width, ranks, UNLABELLED)]
        depth += node != tree.size
    return depth


def roots_of(table: RankTable, depth: Int[np.ndarray, "n"]) -> Bool[np.ndarray, "n"]:
    """Which positions are a round's root when a round that begins at j accepts `depth[j]` drafts."""
    roots, left = np.zeros(len(table.ranks), bool), _left(table)
    at = table.starts[table.lengths > 1]
    while at.size:
        roots[at] = True
        at = at + np.minimum(depth[at] + 1, left[at])
        at = at[left[at] > 0]
    return roots


def visited(table: RankTable, tree: Tree) -> Bool[np.ndarray, "n"]:
    """Which positions are a round's root when decoding greedily with `tree`. Raises as `reach`."""
    return roots_of(table, reach(table, tree))


def accepted_lengths(table: RankTable, tree: Tree, sequence: int) -> Int[np.ndarray, "rounds"]:
    """Drafts committed in each round of one sequence, as `Generation.accepted_lengths`.

    Raises:
      TreeError: as `reach`.
      DataError: a sequence that the table does not have.
    """
    if not 0 <= sequence < len(table.lengths):
        raise DataError(f"sequence is {sequence}; the table has {len(table.lengths)}, counted from 0.")
    depth = reach(table, tree)
    inside = slice(table.starts[sequence], table.starts[sequence] + table.lengths[sequence])
    return np.minimum(depth, _left(table) - 1)[inside][roots_of(table, depth)[inside]]


def drafted(table: RankTable, tree: Tree) -> Int[np.ndarray, "n"]:
    """For every token the depth of the node that drafted it when decoding greedily; 0: the target's own.

    Raises as `reach`.
    """
    depth, left = reach(table, tree), _left(table)
    roots = np.flatnonzero(roots_of(table, depth))
    here = np.zeros(len(table.ranks), np.int32)
    accepted = np.minimum(depth, left - 1)[roots]
    for d in range(1, tree.max_depth + 1):
        here[roots[accepted >= d] + d] = d
    return here


def upper_bound(table: RankTable, depth: int) -> float:
    """The most tokens_per_round of any tree of `depth` with ranks below the cap, on this text.

    The fewest rounds through each sequence, by dynamic programming, when every round may accept as many drafts as the
    heads were right one after the other, or fewer. The widest tree always takes the most it can, which may lead to a
    worse root: it is no bound.

    Raises:
      TreeError: more depth than the table has heads, or a negative one.
    """
    check_tree(table, Tree.chain(depth))
    right = np.cumprod((table.ranks[:, :depth] >= 0) & (table.ranks[:, :depth] < table.cap), axis=1).sum(1)
    longest = int(table.lengths.max())
    # steps[s, j]: rounds from token j of sequence s on; its last token needs none.
    steps = np.zeros((len(table.lengths), longest + depth + 1), np.int64)
    for j in range(longest - 2, -1, -1):
        here = np.flatnonzero(table.lengths > j + 1)
        most = right[table.starts[here] + j]
        options = steps[here[:, None], j + 1 + np.arange(depth + 1)]
        allowed = np.arange(depth + 1) <= most[:, None]
        steps[here, j] = 1 + np.where(allowed, options, np.iinfo(np.int64).max - 1).min(1)
    return float((table.lengths - 1).sum() / steps[:, 0].sum())


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


def _left(table: RankTable) -> Int[np.ndarray, "n"]:
    # Tokens that follow in the sequence.
    return np.repeat(table.starts + table.lengths - 1, table.lengths) - np.arange(len(table.ranks))


def _width(trees: Sequence[Tree]) -> int:
    return max((max(t.max_rank_by_depth, default=1) for t in trees), default=1)


def _power(least: int) -> int:
    return 1 << max(0, least - 1).bit_length()


def _rounded(least: int) -> int:
    # Up to the next eighth of a power of two: few sizes, little padding. Never none: an empty table has no rounds.
    step = max(1, _power(least) // 8)
    return max(1, -(-least // step)) * step


def _padded(column: np.ndarray, value: int, length: int) -> np.ndarray:
    more = np.full((length - len(column), *column.shape[1:]), value, column.dtype)
    return np.concatenate([column, more])


def _moves(tree: Tree, size: int, width: int) -> Int[np.ndarray, "M W"]:
    # moves[node, rank]: the child, or node `size`, where every path that has left the tree stays.
    moves = np.full((size + 1, width + 1), size, np.int32)  # the last column: any rank that no tree has
    for node in range(1, tree.size):
        moves[tree.parents[node], tree.ranks[node]] = node
    return moves


@jax.jit
def _walk(
    moves: Int[Array, "trees M W"],
    patterns: Int[Array, "U C"],
    pattern_of: Int[Array, "n"],
    starts: Int[Array, "c"],
    lasts: Int[Array, "c"],
) -> tuple[Int[Array, "trees c"], Int[Array, "trees C1"]]:
    # Rounds of every sequence, and rounds that committed exactly d drafts in all.
    outside, depth = moves.shape[1] - 1, patterns.shape[1]

    def reached(moves: Int[Array, "M W"]) -> Int[Array, "U"]:
        node, reached = jnp.zeros(len(patterns), jnp.int32), jnp.zeros(len(patterns), jnp.int32)
        for d in range(depth):
            node = moves[node, patterns[:, d]]  # UNLABELLED is the last column
            reached += (node != outside).astype(jnp.int32)
        return reached

    drafts_of = jax.vmap(reached)(moves)
    depths = jnp.arange(depth + 1, dtype=jnp.int32)[:, None]

    def one(drafts_of: Int[Array, "U"]) -> tuple[Int[Array, "c"], Int[Array, "C1"]]:
        def step(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            root, rounds, by_depth = carry
            left = lasts - root
            running = left > 0
            found = drafts_of.at[pattern_of.at[root].get(mode="promise_in_bounds")].get(mode="promise_in_bounds")
            drafts = jnp.where(running, jnp.minimum(found, left - 1), -1)
            return (
                root + drafts + 1,
                rounds + running.astype(jnp.int32),
                by_depth + jnp.sum(drafts == depths, 1, jnp.int32),
            )

        start = (starts, jnp.zeros_like(starts), jnp.zeros(depth + 1, jnp.int32))
        return jax.lax.while_loop(lambda carry: jnp.any(carry[0] < lasts), step, start)[1:]

    return jax.vmap(one)(drafts_of)
