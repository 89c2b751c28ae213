"""Tree searches against brute force over all trees, their limits, and round times."""

import itertools

import numpy as np
import pytest
from rank_tables import table_of

import specjax as sj
from specjax.analysis.round_time import RoundTimes
from specjax.analysis.search import (
    SEARCHES,
    Limits,
    expected_tokens,
    greedy_tree,
    joint_expected_tokens,
    joint_tree,
    sequoia_tree,
)
from specjax.analysis.simulate import simulate, visited

RANKS, DEPTH = 3, 3


def all_trees(size, depth=DEPTH, branching=RANKS):
    """Every tree of `size` nodes over ranks below RANKS."""
    grown = {frozenset()}
    everything = [p for d in range(1, depth + 1) for p in itertools.product(range(RANKS), repeat=d)]
    for _ in range(size - 1):
        grown = {
            tree | {path} for tree in grown for path in everything
            if path not in tree and (len(path) == 1 or path[:-1] in tree)
            and sum(len(p) == len(path) and p[:-1] == path[:-1] for p in tree) < branching
        }  # fmt: skip
    return [sj.Tree.from_paths(tree) for tree in grown]


def random_hits(seed):
    rng = np.random.default_rng(seed)
    return rng.dirichlet([2, 1, 1, 1], DEPTH)[:, :RANKS]  # not even sorted by rank


@pytest.mark.parametrize("limits", [Limits(), Limits(depth=2), Limits(branching=1), Limits(depth=2, branching=2)])
@pytest.mark.parametrize("size", range(1, 7))
def test_every_search_is_optimal(size, limits):
    trees = all_trees(size, limits.depth or DEPTH, limits.branching or RANKS)
    for seed in range(3):
        hits, table = random_hits(seed), table_of(seed, heads=DEPTH, cap=RANKS)
        if trees:
            best = max(expected_tokens(tree, hits) for tree in trees)
            for search in (greedy_tree, sequoia_tree):
                tree = search(hits, size, limits)
                assert tree.size == size
                assert expected_tokens(tree, hits) == pytest.approx(best)
            joint = joint_tree(table, size, limits)
            assert joint.size == size
            assert joint_expected_tokens(joint, table) == pytest.approx(
                max(joint_expected_tokens(tree, table) for tree in trees)
            )
        else:
            with pytest.raises(sj.TreeError, match=f"size is {size}"):
                greedy_tree(hits, size, limits)
            with pytest.raises(sj.TreeError, match=f"size is {size}"):
                sequoia_tree(hits, size, limits)


def test_sequoia_equals_greedy_for_large_trees():
    hits = -np.sort(-np.random.default_rng(0).dirichlet(np.ones(12), 4)[:, :10])
    for size in (1, 2, 17, 64):
        ours, theirs = sequoia_tree(hits, size), greedy_tree(hits, size)
        assert expected_tokens(ours, hits) == pytest.approx(expected_tokens(theirs, hits))


def test_ranks_that_are_never_right_do_no_harm():
    hits = np.array([[0.5, 0.0, 0.0], [0.0, 0.0, 0.0]])
    for size in (2, 6, 13):
        tree = sequoia_tree(hits, size)
        assert tree.size == size
        assert expected_tokens(tree, hits) == 1.5


def test_the_joint_search_sees_what_marginals_hide():
    # The second head is right exactly when the first one is wrong: no path of two ranks ever holds.
    ranks = [(0, 5), (5, 0)] * 500
    table = table_of(ranks=ranks)
    assert joint_tree(table, 5).rank_paths == ((0,), (5,), (0, 5), (5, 0))
    joint, independent = joint_tree(table, 5), greedy_tree(table.hits(), 5)
    assert joint_expected_tokens(joint, table) > joint_expected_tokens(independent, table) + 0.3


@pytest.mark.parametrize("size", [4, 8, 16, 32])
def test_joint_is_not_worse_than_independent_on_held_out_text(size):
    # The same law of dependent ranks, twice.
    train, held_out = (table_of(seed, heads=3, cap=8, sequences=60, length=120, dependent=True) for seed in (0, 1))
    names = ("walk", "joint", "independent")
    walk, joint, independent = simulate(held_out, [SEARCHES[name](train, size, Limits()) for name in names])
    assert joint.tokens_per_round >= independent.tokens_per_round
    assert walk.tokens_per_round >= independent.tokens_per_round


@pytest.mark.parametrize("size", [2, 5, 12, 30])
def test_the_walk_search_is_the_best_on_its_own_text(size):
    table = table_of(7, heads=3, cap=8, sequences=20, length=60, dependent=True)
    best, *others = simulate(
        table, [SEARCHES[name](table, size, Limits()) for name in ("walk", "joint", "independent")]
    )
    assert all(best.tokens_per_round >= other.tokens_per_round for other in others)


def test_visited_roots_are_where_rounds_begin():
    table = table_of(ranks=[(0, 0), (1, 0), (0, 5), (0, 0), (0, 0), (0, 0)])
    # 0 accepts two and goes on at 3, which accepts one: the last token is then committed.
    assert visited(table, sj.Tree.chain(2)).tolist() == [True, False, False, True, False, False]


def test_search_refusals():
    table = table_of(0)
    for name, search in SEARCHES.items():
        with pytest.raises(sj.TreeError, match="size is 0"):
            search(table, 0, Limits())
        with pytest.raises(sj.TreeError, match="size is 100000"):
            search(table, 100_000, Limits())
        assert search(table, 1, Limits()).size == 1, name
    with pytest.raises(sj.TreeError, match="branching limit is 0"):
        Limits(branching=0)


def test_round_times():
    times = RoundTimes((1, 4, 8), (10.0, 12.0, 20.0))
    assert times(6) == pytest.approx(16)
    assert times.speedup(4, 1.8) == pytest.approx(1.5)
    with pytest.raises(sj.DataError, match="9 nodes"):
        times(9)
    for nodes, ms in (((2, 4), (1.0, 2.0)), ((1, 1), (1.0, 2.0)), ((1, 2), (1.0, 0.0)), ((1, 2), (1.0,)), ((), ())):
        with pytest.raises(sj.DataError, match="round times"):
            RoundTimes(nodes, ms)
    row = {"nodes": 1, "milliseconds": {"median": 3.0}}
    assert RoundTimes.from_result({"rows": [row]})(1) == 3.0
    with pytest.raises(sj.DataError, match="specjax bench"):
        RoundTimes.from_result({"methods": []})
