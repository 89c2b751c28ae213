"""Draft trees: validation, everything derived against its definition, presets, JSON, drawings."""

import json
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import matplotlib.pyplot
import numpy as np
import pytest

from specjax.errors import TreeError
from specjax.tree import Tree

matplotlib.use("Agg")
PUBLISHED = Path(__file__).parents[2] / "shared" / "data" / "medusa_choices.json"


def random_paths(seed: int, count: int = 20) -> list[tuple[int, ...]]:
    """A random prefix-closed set of rank paths, shuffled, with gaps between sibling ranks."""
    rng = np.random.default_rng(seed)
    paths: list[tuple[int, ...]] = [()]
    while len(paths) <= count:
        path = (*paths[rng.integers(len(paths))], int(rng.integers(5)))
        if path not in paths:
            paths.append(path)
    return [paths[i] for i in 1 + rng.permutation(count)]


@pytest.mark.parametrize(
    ("parents", "ranks", "message"),
    [
        ((), (), "no nodes"),
        ((-1, 0), (0,), "2 parents and 1 ranks"),
        ((0,), (0,), "node 0 has parent 0"),
        ((-1,), (1,), "node 0 has parent -1 and rank 1"),
        ((-1, 1), (0, 0), "node 1 has parent 1"),
        ((-1, 2, 0), (0, 0, 0), "node 1 has parent 2"),
        ((-1, -1), (0, 0), "node 1 has parent -1"),
        ((-1, 0), (0, -1), "rank -1"),
        ((-1, 0, 0), (0, 1, 1), "both rank 1 below node 0"),
        ((-1, 0, 0), (0, 1, 0), "breadth-first"),
        ((-1, 0, 1, 0), (0, 0, 0, 1), "breadth-first"),
        ((-1, 0, 0, 2, 1), (0, 0, 1, 0, 0), "breadth-first"),
        ((-1, 0.0), (0, 0), "expected a sequence of integers"),
        (None, (0,), "expected a sequence of integers"),
    ],
)
def test_what_is_not_a_tree_is_refused(parents, ranks, message):
    with pytest.raises(TreeError, match=message):
        Tree(parents, ranks)


@pytest.mark.parametrize("seed", range(8))
def test_derived_arrays_equal_their_definitions(seed):
    paths = random_paths(seed)
    tree = Tree.from_paths(paths)
    nodes = [(), *sorted(paths, key=lambda path: (len(path), path))]
    number = {path: node for node, path in enumerate(nodes)}
    prefixes = [[number[path[:depth]] for depth in range(len(path) + 1)] for path in nodes]
    children = [[number[p] for p in nodes if p and p[:-1] == path] for path in nodes]
    leaves = [node for node, below in enumerate(children) if not below]
    deep = max(map(len, nodes))
    width = max(map(len, children))

    assert tree.size == len(nodes)
    assert tree.rank_paths == tuple(nodes[1:])
    assert tree.parents == (-1, *(number[path[:-1]] for path in nodes[1:]))
    assert tree.ranks == (0, *(path[-1] for path in nodes[1:]))
    assert tree.max_depth == deep
    np.testing.assert_array_equal(tree.depths, [len(path) for path in nodes])
    np.testing.assert_array_equal(tree.ancestors, [[a == b[: len(a)] for a in nodes] for b in nodes])
    assert tree.children == tuple(map(tuple, children))
    np.testing.assert_array_equal(tree.child_table, [c + [-1] * (width - len(c)) for c in children])
    assert tree.leaves == tuple(leaves)
    np.testing.assert_array_equal(tree.paths, [prefixes[n] + [-1] * (deep + 1 - len(prefixes[n])) for n in leaves])
    np.testing.assert_array_equal(tree.node_paths, [p + [p[-1]] * (deep + 1 - len(p)) for p in prefixes])
    assert tree.max_rank_by_depth == tuple(
        1 + max(p[-1] for p in nodes if len(p) == depth) for depth in range(1, deep + 1)
    )
    for array in (tree.depths, tree.child_table, tree.paths, tree.node_paths):
        assert array.dtype == np.int32
    for array in (tree.depths, tree.ancestors, tree.child_table, tree.paths, tree.node_paths):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    assert tree.ancestors is tree.ancestors
    assert Tree.from_parents(tree.parents, tree.ranks) == tree


def test_chain_and_cartesian():
    assert Tree.chain(3) == Tree((-1, 0, 1, 2), (0, 0, 0, 0))
    assert Tree.cartesian((1, 1, 1)) == Tree.chain(3)
    assert Tree.cartesian((2, 3)).parents == (-1, 0, 0, 1, 1, 1, 2, 2, 2)
    assert Tree.cartesian((2, 3)).ranks == (0, 0, 1, 0, 1, 2, 0, 1, 2)
    assert Tree.cartesian((3, 2, 4)).size == 1 + 3 + 3 * 2 + 3 * 2 * 4
    assert Tree.from_parents((-1, 0, 0, 1, 1, 1, 2, 2, 2)) == Tree.cartesian((2, 3))
    for bad in (-1, 1.5):
        with pytest.raises(TreeError, match="chain's length"):
            Tree.chain(bad)
    with pytest.raises(TreeError, match=r"\(2, 0\)"):
        Tree.cartesian((2, 0))


def test_the_root_alone():
    tree = Tree.chain(0)
    assert tree == Tree.from_paths([]) == Tree.cartesian(())
    assert (tree.size, tree.max_depth, tree.max_rank_by_depth, tree.rank_paths, tree.leaves) == (1, 0, (), (), (0,))
    assert tree.child_table.shape == (1, 0)
    for table in (tree.paths, tree.node_paths):
        np.testing.assert_array_equal(table, [[0]])
    assert tree.ascii() == "(0)"


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([(0,), (1, 2)], r"rank path \(1, 2\) has no parent: \(1,\) is missing"),
        ([(0, 0, 0), (0,)], r"rank path \(0, 0, 0\) has no parent: \(0, 0\)"),
        ([(0,), (1,), (0,)], r"\(0,\) is given twice"),
        ([(), (0,)], "empty"),
        ([(-1,)], "rank -1"),
        ([("0",)], "integers"),
        ([0], "integers"),
    ],
)
def test_paths_that_are_no_tree_are_refused(paths, message):
    with pytest.raises(TreeError, match=message):
        Tree.from_paths(paths)


def test_presets_are_the_published_trees():
    published = json.loads(PUBLISHED.read_text())
    assert set(Tree.presets()) == set(published)
    assert len(published) == 9
    for name, choices in published.items():
        tree = Tree.preset(name)
        assert tree.size == 1 + 63
        assert list(tree.rank_paths) == sorted(map(tuple, choices), key=lambda path: (len(path), path))
        assert tree.name == name
        assert "Medusa" in tree.provenance["source"]
    with pytest.raises(TreeError, match="mc_sim_7b_63"):
        Tree.preset("mc_sim_7b_64")


@pytest.mark.parametrize("tree", [Tree.chain(0), Tree.cartesian((3, 2)), Tree.preset("zephyr_stage2")])
def test_json_round_trip(tree, tmp_path):
    tree.save(tmp_path / "tree.json")
    for back in (Tree.load(tmp_path / "tree.json"), Tree.parse(str(tmp_path / "tree.json"))):
        assert back == tree
        assert (back.name, back.provenance) == (tree.name, tree.provenance)
    data = json.loads(tree.to_json())
    assert data["paths"] == [list(path) for path in tree.rank_paths]
    assert (data["format"], data["version"]) == ("specjax.tree", 1)


def test_saved_trees_go_by_name(tmp_path, monkeypatch):
    tree = Tree.from_paths([(0,), (1,)], "found", {"search": "walk"})
    monkeypatch.chdir(tmp_path)
    assert tree.save("chat_3") == Path("trees/chat_3.json")
    for back in (Tree.load("chat_3"), Tree.parse("chat_3"), Tree.parse("trees/chat_3.json")):
        assert (back, back.name, back.provenance) == (tree, "chat_3", {"search": "walk"})
    monkeypatch.setenv("SPECJAX_TREES", str(tmp_path / "elsewhere"))
    with pytest.raises(TreeError, match="elsewhere"):
        Tree.parse("chat_3")
    assert tree.save("chat_3") == tmp_path / "elsewhere" / "chat_3.json"
    for taken in ("zephyr_stage2", "chain", "auto"):
        with pytest.raises(TreeError, match="something else"):
            tree.save(taken)
    for wrong in ("trees/chat_3", "chat.txt", "", "two words"):
        with pytest.raises(TreeError, match="a name"):
            tree.save(wrong)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "format and version"),
        ('{"format": "specjax.tree", "version": 2, "paths": []}', "format and version"),
        ('{"format": "specjax.tree", "version": 1}', "needs"),
        ('{"format": "specjax.tree", "version": 1, "paths": {}}', "needs"),
        ('{"format": "specjax.tree", "version": 1, "paths": [], "name": 3}', "needs"),
        ('{"format": "specjax.tree", "version": 1, "paths": ["ab"]}', "integers"),
        ('{"format": "specjax.tree", "version": 1, "paths": [[1.0]]}', "integers"),
        ('{"format": "specjax.tree", "version": 1, "paths": [[0, 0]]}', "no parent"),
    ],
)
def test_malformed_json_is_refused(text, message):
    with pytest.raises(TreeError, match=message):
        Tree.from_json(text)


def test_parse():
    assert Tree.parse("chain:4") == Tree.chain(4)
    assert Tree.parse("cartesian:3,2,1") == Tree.cartesian((3, 2, 1))
    assert Tree.parse("vicuna_7b_stage1") == Tree.preset("vicuna_7b_stage1")
    for tree in (Tree.chain(2), Tree.cartesian((2, 2)), Tree.preset("vicuna_7b_stage1")):
        assert Tree.parse(tree.name) == tree
    for text in ("chain", "chain:", "chain:x", "chain:1,2", "cartesian:", "cartesian:2,,2", "vicuna", "no/such.json"):
        with pytest.raises(TreeError, match=text):
            Tree.parse(text)


def test_equal_trees_share_one_trace():
    tree = Tree.from_paths([(1,), (0,), (0, 2)], "one name", {"why": ["unhashable"]})
    same = Tree((-1, 0, 0, 1), (0, 0, 1, 2), "another")
    assert tree == same
    assert hash(tree) == hash(same)
    assert tree != Tree((-1, 0, 0, 1), (0, 0, 1, 1), "one name")

    chex.clear_trace_counter()

    @chex.assert_max_traces(n=2)
    def visible(tree, x):
        return jnp.asarray(tree.ancestors) @ x

    jitted = jax.jit(visible, static_argnums=0)
    for t in (tree, same, Tree.chain(2), tree):
        np.testing.assert_allclose(jitted(t, jnp.ones(t.size)), t.depths + 1)


def test_lists_become_tuples():
    assert hash(Tree([-1, 0], [0, np.int64(3)])) == hash(Tree((-1, 0), (0, 3)))


def test_ascii():
    tree = Tree.from_paths([(0,), (0, 0), (0, 0, 0), (0, 2), (1,), (10,), (10, 1)], "small")
    assert tree.ascii() == "\n".join(
        [
            "(0)",
            "├──0─(1)",
            "│    ├──0─(4)",
            "│    │    └──0─(7)",
            "│    └──2─(5)",
            "├──1─(2)",
            "└─10─(3)",
            "     └──1─(6)",
        ]
    )


def test_plot(tmp_path):
    from specjax.report.tree_figure import draw_tree, layout

    for tree in (Tree.chain(0), Tree.chain(3), Tree.cartesian((3, 2)), Tree.preset("mc_sim_7b_63")):
        positions = layout(tree)
        np.testing.assert_array_equal(positions[:, 0], tree.depths)
        for depth in range(tree.max_depth + 1):  # better rank paths above, a clear distance between nodes
            assert np.all(np.diff(positions[tree.depths == depth, 1]) <= -1 + 1e-9)
        ax = draw_tree(tree, labels=[f"t{node}" for node in range(tree.size)], edge_values=np.linspace(0, 1, tree.size))
        texts = {text.get_text() for text in ax.texts}
        assert {f"t{node}" for node in range(tree.size)} <= texts
        assert len(ax.lines) == tree.size - 1
        ax.figure.savefig(tmp_path / "tree.png")
        assert (tmp_path / "tree.png").read_bytes().startswith(b"\x89PNG")
        matplotlib.pyplot.close(ax.figure)
    figure, given = matplotlib.pyplot.subplots()
    assert draw_tree(tree, given) is given
    matplotlib.pyplot.close(figure)
    with pytest.raises(TreeError, match="2 labels for 1 nodes"):
        draw_tree(Tree.chain(0), labels=["a", "b"])
    with pytest.raises(TreeError, match=r"\[0, 1\]"):
        draw_tree(Tree.chain(1), edge_values=[0, 1.5])


def test_subtrees():
    tree = Tree.from_paths([(0,), (1,), (0, 0), (0, 2), (1, 0)])
    assert tree.subtree((0,)) == Tree.chain(0)
    assert tree.subtree(np.array([0, 2, 5])) == Tree.from_paths([(1,), (1, 0)])
    assert tree.subtree(range(6)) == tree


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ((), "no subtree"),
        ((1, 2), "no subtree"),
        ((0, 2, 1), "no subtree"),
        ((0, 1, 1), "no subtree"),
        ((0, 1, 6), "to 5 at most"),
        ((-1, 0), "no subtree"),
        ((0, 1.5), "nodes"),
        ((0, 1, 5), "node 5 is there without its parent, node 2"),
    ],
)
def test_what_is_no_subtree_is_refused(nodes, message):
    tree = Tree.from_paths([(0,), (1,), (0, 0), (0, 2), (1, 0)])
    with pytest.raises(TreeError, match=message):
        tree.subtree(nodes)


def test_rank_paths_in_a_word():
    assert Tree.parse("paths:0,1,0.0,1.2") == Tree.from_paths([(0,), (1,), (0, 0), (1, 2)])
    with pytest.raises(TreeError, match="paths:0,x"):
        Tree.parse("paths:0,x")
    with pytest.raises(TreeError, match="missing"):
        Tree.parse("paths:0.0")


@pytest.mark.parametrize("text", ["cartesian:64,64,64", "chain:1000000000", "cartesian:1000000000"])
def test_trees_that_no_target_reads_at_once(text):
    with pytest.raises(TreeError, match="a round reads at most 4096 at once"):
        Tree.parse(text)
