"""Rank tables and the simulator against what the decoder really does."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import noisy_heads, tiny_model
from rank_tables import table_of

import specjax as sj
from specjax.analysis.ranks import UNLABELLED, RankTable, Text, measure
from specjax.analysis.simulate import accepted_lengths, simulate, upper_bound
from specjax.fingerprint import fingerprint
from specjax.heads import init_heads, project
from specjax.model import forward, unembed

RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, 61, n) for n in (1, 5, 30, 64, 12, 3)]
CATEGORIES = ["one", "two"]


def random_tree(seed):
    """Up to 40 nodes, ranks below 8, depth up to 5."""
    rng, paths = np.random.default_rng(seed), set()
    for _ in range(int(rng.integers(1, 40))):
        above = [(), *paths][rng.integers(len(paths) + 1)]
        if len(above) < 5:
            paths.add((*above, int(rng.integers(8))))
    return sj.Tree.from_paths(paths)


TREES = [sj.Tree.preset(name) for name in sj.Tree.presets()] + [random_tree(seed) for seed in range(24)]


@pytest.fixture(scope="module")
def case():
    """A model, its heads, and its own greedy answers of several lengths, one ended by EOS."""
    model = tiny_model()
    told = sj.generate(model, PROMPTS[0], max_new_tokens=50).tokens
    eos = int(told[20])
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, eos_token_ids=(eos,)))
    heads = noisy_heads(model, 5)
    texts = []
    for i, prompt in enumerate(PROMPTS):
        answer = sj.generate(model, prompt, max_new_tokens=30 + 7 * i).tokens
        texts.append(Text(prompt, answer, CATEGORIES[i % 2]))
    return model, heads, texts, measure(model, heads, texts, cap=61)


def test_the_table_by_hand(case):
    model, heads, texts, table = case
    assert table.lengths.tolist() == [len(t.answer) for t in texts]
    for text, start in zip(texts, table.starts, strict=True):
        whole = np.concatenate([text.prompt, text.answer])
        features = forward(model.params, model.config, jnp.asarray(whole)).features
        law = jax.nn.log_softmax(unembed(model.params, features))
        drafts = np.asarray(project(heads, None, features))
        for j, token in enumerate(text.answer):
            at = len(text.prompt) - 1 + j
            assert table.tokens[start + j] == token
            assert table.log_p[start + j] == pytest.approx(float(law[at, token]), abs=1e-4)
            assert table.entropy[start + j] == pytest.approx(float(-(jnp.exp(law[at]) * law[at]).sum()), abs=1e-4)
            for i in range(5):
                rank = table.ranks[start + j, i]
                if j + 1 + i >= len(text.answer):
                    assert rank == UNLABELLED
                else:
                    order = np.argsort(-drafts[i, at], kind="stable").tolist()
                    assert rank == order.index(text.answer[j + 1 + i])
                    top = jax.nn.softmax(jnp.asarray(drafts[i, at])).max()
                    assert table.confidence[start + j, i] == pytest.approx(float(top), abs=1e-3)


@pytest.mark.parametrize("number", range(len(TREES)))
def test_simulation_equals_decoding(case, number):
    """33 trees, the nine published ones among them: every round of every sequence, exactly."""
    model, heads, texts, table = case
    tree = TREES[number]
    (simulated,) = simulate(table, [tree])
    decoded = []
    for i, text in enumerate(texts):
        out = sj.generate(
            model, text.prompt, drafter=sj.MedusaDrafter(heads, tree), max_new_tokens=len(text.answer), capacity=256
        )
        np.testing.assert_array_equal(out.tokens, text.answer)
        np.testing.assert_array_equal(accepted_lengths(table, tree, i), out.accepted_lengths)
        decoded.append(out.accepted_lengths)
    counts = np.bincount(np.concatenate(decoded), minlength=tree.max_depth + 1)
    assert simulated.by_depth.tolist() == counts.tolist()
    assert simulated.rounds == counts.sum()
    assert simulated.tokens_per_round == pytest.approx(np.concatenate(decoded).mean() + 1)
    assert simulated.acceptance_by_depth == pytest.approx(
        [(np.concatenate(decoded) >= d).mean() for d in range(1, tree.max_depth + 1)]
    )


def test_many_trees_at_once_are_each_as_alone():
    table = table_of(3, heads=5, cap=64, sequences=20)
    together = simulate(table, TREES)
    for tree, one in zip(TREES, together, strict=True):
        each = np.concatenate([accepted_lengths(table, tree, i) for i in range(20)])
        assert one.by_depth.tolist() == np.bincount(each, minlength=tree.max_depth + 1).tolist()
        assert one.committed == 20 * 39
    assert simulate(table, []) == []
    assert simulate(table, [sj.Tree.chain(0)])[0].tokens_per_round == 1.0


def test_the_upper_bound_is_that_of_the_widest_tree():
    table = table_of(4, heads=2, cap=5, sequences=9)
    for depth in (1, 2):
        widest = simulate(table, [sj.Tree.cartesian((5,) * depth)])[0]
        assert upper_bound(table, depth) == pytest.approx(widest.tokens_per_round)


def test_reduced_vocabularies_never_hit_what_they_lack(case):
    model, _, texts, _ = case
    keep = np.arange(0, 61, 3)
    heads = init_heads(
        sj.MedusaConfig(2, 16, 61, projection="shared", reduced_vocab_size=len(keep)), model.params, keep
    )
    table = measure(model, heads, texts, cap=61)
    for start, length in zip(table.starts, table.lengths, strict=True):
        future = table.tokens[start + 1 : start + length]
        ranks = table.ranks[start : start + length - 1, 0]
        assert (ranks[~np.isin(future, keep)] == 61).all()
        assert (ranks[np.isin(future, keep)] < len(keep)).all()


def test_marginals_conditionals_and_calibration():
    table = table_of(ranks=[(0, 1), (0, 0), (2, 0), (0, 1), (9, 9), (0, 0), (0, 0)])
    # The last row is unlabelled, and so is the second head of the one before.
    np.testing.assert_allclose(table.hits()[0, :3], [4 / 6, 0, 1 / 6])
    np.testing.assert_allclose(table.hits()[1, :2], [2 / 5, 2 / 5])
    np.testing.assert_allclose(table.accuracy(3), [5 / 6, 4 / 5])
    np.testing.assert_allclose(table.conditional((0,))[:2], [1 / 3, 2 / 3])
    assert table.conditional((5,)).sum() == 0
    mean, right, count = table.calibration(0, bins=4)
    assert count.tolist() == [0, 0, 6, 0]
    assert (mean[2], right[2]) == pytest.approx((0.5, 4 / 6))


def test_tables_survive_the_disk(case, tmp_path):
    model, heads, _, table = case
    table.save(tmp_path / "t.npz")
    again = RankTable.load(tmp_path / "t.npz").check(model, heads)
    for field in dataclasses.fields(table):
        mine, theirs = getattr(table, field.name), getattr(again, field.name)
        if field.name == "confidence":
            np.testing.assert_allclose(mine, theirs, atol=1e-3)
        elif isinstance(mine, np.ndarray):
            np.testing.assert_array_equal(mine, theirs)
        else:
            assert mine == theirs
    assert table.manifest["tokens_per_second"] > 0
    two = table.category("two")
    assert set(two.categories) == {"two"}
    np.testing.assert_array_equal(two.tokens[: two.lengths[0]], table.tokens[table.starts[1] :][: table.lengths[1]])


def test_refusals(case, tmp_path):
    model, heads, texts, table = case
    with pytest.raises(sj.DataError, match="no text"):
        measure(model, heads, [])
    with pytest.raises(sj.DataError, match="text 1 has a prompt"):
        measure(model, heads, [texts[0], Text([], [1, 2])])
    with pytest.raises(sj.DataError, match="text 0 has token ids from 1 to 99"):
        measure(model, heads, [Text([1], [99])])
    with pytest.raises(sj.DataError, match="no sequence has two tokens"):
        measure(model, heads, [Text([1, 2], [3])])
    with pytest.raises(sj.DataError, match="cap is 0"):
        measure(model, heads, texts, cap=0)
    with pytest.raises(sj.TreeError, match="6 deep, the table has 5"):
        simulate(table, [sj.Tree.chain(6)])
    with pytest.raises(sj.TreeError, match="rank 61, the table knows ranks below 61"):
        simulate(table, [sj.Tree.from_paths([(61,)])])
    with pytest.raises(sj.DataError, match="measured with heads"):
        table.check(model, noisy_heads(model, 5, seed=9))
    with pytest.raises(sj.DataError, match="measured with model"):
        table.check(tiny_model(5))
    with pytest.raises(sj.DataError, match="no category 'three'"):
        table.category("three")
    with pytest.raises(sj.DataError, match="k is 62"):
        table.accuracy(62)
    with pytest.raises(sj.DataError, match="uses all 5 heads"):
        table.conditional((0,) * 5)
    (tmp_path / "no.npz").write_bytes(b"nothing")
    with pytest.raises(sj.DataError, match="not a rank table"):
        RankTable.load(tmp_path / "no.npz")
    np.savez(tmp_path / "old.npz", header=np.array(json.dumps({"format": "specjax.ranks", "version": 0})))
    with pytest.raises(sj.DataError, match="version"):
        RankTable.load(tmp_path / "old.npz")
    assert fingerprint(model.params) != fingerprint(tiny_model(5).params)
