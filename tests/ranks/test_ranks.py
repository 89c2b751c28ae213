"""Rank tables and the simulator against what the decoder really does."""

import contextlib
import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import noisy_heads, tiered, tiny_model
from rank_tables import table_of

import specjax as sj
from specjax.acceptance import NO_DRAFT, Proposal
from specjax.fingerprint import fingerprint
from specjax.heads import init_heads, project
from specjax.loading.head_files import packaged_ranks
from specjax.ranks.measuring import Text, measure
from specjax.ranks.simulation import accepted_lengths, drafted, reach, simulate, upper_bound
from specjax.ranks.table import UNLABELLED, RankTable
from specjax.ranks.typical import typical_reach
from specjax.target.model import forward, unembed

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
    told = sj.generate(model, PROMPTS[0], max_new_tokens=50, capacity=256).tokens
    eos = int(told[20])
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, eos_token_ids=(eos,)))
    heads = noisy_heads(model, 5)
    texts = []
    for i, prompt in enumerate(PROMPTS):
        answer = sj.generate(model, prompt, max_new_tokens=30 + 7 * i, capacity=256).tokens
        texts.append(Text(prompt, answer, CATEGORIES[i % 2]))
    return model, heads, texts, measure(model, heads, texts, cap=61)


def test_the_table_by_hand(case):
    model, heads, texts, table = case
    assert table.lengths.tolist() == [len(t.answer) for t in texts]
    for text, start in zip(texts, table.starts, strict=True):
        whole = np.zeros(256, np.int32)  # one length for all texts; what follows a text does not change it
        whole[: len(text.prompt) + len(text.answer)] = np.concatenate([text.prompt, text.answer])
        features = forward(model.params, model.config, jnp.asarray(whole)).features
        law = np.asarray(jax.nn.log_softmax(unembed(model.params, features)))
        drafts = np.asarray(project(heads, None, features))
        surest = np.asarray(jax.nn.softmax(drafts).max(-1))
        for j, token in enumerate(text.answer):
            at = len(text.prompt) - 1 + j
            assert table.tokens[start + j] == token
            assert table.log_p[start + j] == pytest.approx(law[at, token], abs=1e-4)
            assert table.entropy[start + j] == pytest.approx(-(np.exp(law[at]) * law[at]).sum(), abs=1e-4)
            for i in range(5):
                rank = table.ranks[start + j, i]
                if j + 1 + i >= len(text.answer):
                    assert rank == UNLABELLED
                else:
                    order = np.argsort(-drafts[i, at], kind="stable").tolist()
                    assert rank == order.index(text.answer[j + 1 + i])
                    assert table.confidence[start + j, i] == pytest.approx(surest[i, at], abs=1e-3)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PartOfTree(sj.MedusaDrafter):
    """Medusa heads on some of a tree's nodes, the others without a draft: many trees share one compilation."""

    inside: jax.Array = dataclasses.field(kw_only=True)  # bool [M]

    def propose(self, target, state, context, key):
        """No draft on the nodes outside."""
        full = super().propose(target, state, context, key)
        return Proposal(jnp.where(self.inside, full.tokens, NO_DRAFT))


def decoded(case, tree, drafter):
    """Every round of every text, which must come out as it is."""
    model, _, texts, _ = case
    rounds = []
    for text in texts:
        out = sj.generate(model, text.prompt, drafter=drafter, max_new_tokens=len(text.answer), capacity=256)
        np.testing.assert_array_equal(out.tokens, text.answer)
        rounds.append(out.accepted_lengths.tolist())
    return rounds


@pytest.mark.parametrize("group", tiered(lambda group: group < 2, range(4)))
def test_simulation_equals_decoding(case, group):
    """33 trees, the nine published ones among them: every round of every sequence, exactly."""
    _, heads, texts, table = case
    trees = [TREES[:9], TREES[9:17], TREES[17:25], TREES[25:]][group]
    union = sj.Tree.from_paths({path for tree in trees for path in tree.rank_paths})
    for number, (tree, simulated) in enumerate(zip(trees, simulate(table, trees), strict=True)):
        inside = jnp.array([True, *(path in tree.rank_paths for path in union.rank_paths)])
        rounds = decoded(case, tree, PartOfTree(heads, union, inside=inside))
        if number == 0:
            assert rounds == decoded(case, tree, sj.MedusaDrafter(heads, tree))
        assert rounds == [accepted_lengths(table, tree, i).tolist() for i in range(len(texts))]
        flat = np.concatenate(rounds)
        assert simulated.exact
        assert simulated.by_depth.tolist() == np.bincount(flat.astype(int), minlength=tree.max_depth + 1).tolist()
        assert simulated.rounds == len(flat)
        assert simulated.tokens_per_round == pytest.approx(flat.mean() + 1)
        assert simulated.acceptance_by_depth == pytest.approx(
            [(flat >= d).mean() for d in range(1, tree.max_depth + 1)]
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


def test_the_upper_bound_holds_where_taking_the_most_does_not():
    # Taking the draft at token 0 leads to token 2, where heads are wrong; from token 1 three drafts are right.
    table = table_of(ranks=[(0, 1, 1), (0, 0, 0), *[(1, 1, 1)] * 5], cap=1)
    widest = simulate(table, [sj.Tree.chain(3)])[0].tokens_per_round
    assert widest < upper_bound(table, 3) == 6 / 3
    for seed in range(3):
        table = table_of(seed, heads=2, cap=3, sequences=9, length=12)
        every = [p for d in (1, 2) for p in itertools.product(range(3), repeat=d)]
        trees = [
            sj.Tree.from_paths([p for p in some if len(p) == 1 or p[:-1] in some])
            for k in range(13) for some in itertools.islice(itertools.combinations(every, k), 60)
        ]  # fmt: skip
        for depth in (1, 2):
            best = max(s.tokens_per_round for s in simulate(table, trees) if s.tree.max_depth <= depth)
            assert best <= upper_bound(table, depth)
    assert upper_bound(table, 0) == 1.0


def test_reach_and_the_drafted_tokens_by_hand():
    table = table_of(ranks=[(0, 0), (1, 0), (0, 5), (0, 0), (0, 0), (0, 0)])
    assert reach(table, sj.Tree.chain(2)).tolist() == [2, 0, 1, 2, 1, 0]
    # Round one commits drafts 1 and 2 and the target's 3; round two draft 4 and the last token.
    assert drafted(table, sj.Tree.chain(2)).tolist() == [0, 1, 2, 0, 1, 0]


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
    first = np.arange(7) < 3
    np.testing.assert_allclose(table.hits(first)[0, :3], [2 / 3, 0, 1 / 3])
    np.testing.assert_allclose(table.conditional((0,), first)[:2], [1 / 2, 1 / 2])
    assert table.calibration(0, 4, first)[2].tolist() == [0, 0, 3, 0]
    mean, right, count = table.calibration(0, bins=4)
    assert count.tolist() == [0, 0, 6, 0]
    assert (mean[2], right[2]) == pytest.approx((0.5, 4 / 6))


def test_statistics_by_entropy():
    table = table_of(1, heads=2, sequences=3, length=20)
    table = dataclasses.replace(table, entropy=np.random.default_rng(0).random(60))
    # Head i's draft at row j is judged by the law of row j + 1 + i.
    assert table.judged_entropy[4, 1] == table.entropy[6]
    assert np.isnan(table.judged_entropy[19]).all()
    edges, index = table.entropy_bins(4)
    labelled = table.ranks != UNLABELLED
    assert ((index == -1) == ~labelled).all()
    sizes = np.bincount(index[labelled])
    assert sizes.max() - sizes.min() <= 1
    inside = index == 2
    assert (table.judged_entropy[inside] >= edges[2]).all()
    assert (table.judged_entropy[inside] <= edges[3]).all()
    for head in range(2):
        assert table.accuracy(1, inside)[head] == pytest.approx((table.ranks[inside[:, head], head] == 0).mean())
    with pytest.raises(sj.DataError, match="k is 0"):
        table.entropy_bins(0)
    with pytest.raises(sj.DataError, match=r"where is bool of shape \(3,\)"):
        table.hits(np.ones(3, bool))


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
    assert two.manifest["tokens"] == len(two.tokens)
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
    with pytest.raises(sj.DataError, match="holds float64; expected token ids"):
        measure(model, heads, [Text([1.7, 2], [3, 4])])
    with pytest.raises(sj.DataError, match=r"cap is 8\.5"):
        measure(model, heads, [Text([1, 2], [3, 4])], cap=8.5)
    with pytest.raises(sj.DataError, match="cap is 0"):
        measure(model, heads, texts, cap=0)
    with pytest.raises(sj.ConfigError, match="heads are for hidden size 8 and vocabulary 61, the target has 16"):
        measure(model, noisy_heads(tiny_model(hidden_size=8), 2), texts)
    with pytest.raises(sj.TreeError, match="6 deep, the table has 5"):
        simulate(table, [sj.Tree.chain(6)])
    with pytest.raises(sj.TreeError, match="rank 61, the table knows ranks below 61"):
        simulate(table, [sj.Tree.from_paths([(61,)])])
    with pytest.raises(sj.DataError, match="measured with heads"):
        table.check(model, noisy_heads(model, 5, seed=9))
    with pytest.raises(sj.DataError, match="measured with model"):
        table.check(tiny_model(5))
    half = sj.Model(jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params), model.config, None)
    with pytest.raises(sj.DataError, match="model in float32, these are in bfloat16; load them with dtype='float32'"):
        table.check(half)
    assert table.check(half, any_dtype=True) is table
    assert fingerprint(model.params) != fingerprint(tiny_model(5).params)
    assert fingerprint((heads.params, np.arange(3))) != fingerprint((heads.params, np.array([0, 1, 3])))
    with pytest.raises(sj.DataError, match="no category 'three'"):
        table.category("three")
    with pytest.raises(sj.DataError, match="k is 62"):
        table.accuracy(62)
    for wrong in ((5, 10), (-1, 10), (0, 0)):
        with pytest.raises(sj.DataError, match=rf"head is {wrong[0]}, bins {wrong[1]}; expected 0 to 4"):
            table.calibration(*wrong)
    for sequence in (-1, 6):
        with pytest.raises(sj.DataError, match=f"sequence is {sequence}; the table has 6"):
            accepted_lengths(table, TREES[0], sequence)
    with pytest.raises(sj.DataError, match=r"ranks from -1 to \d+; its cap is 30"):
        dataclasses.replace(table, cap=30).check()
    with pytest.raises(sj.DataError, match="one column per head"):
        dataclasses.replace(table, ranks=table.ranks[:, 0]).check()
    with pytest.raises(sj.DataError, match=r"rank tables are \.npz files, not 'table'"):
        table.save(tmp_path / "table")
    with pytest.raises(sj.DataError, match="uses all 5 heads"):
        table.conditional((0,) * 5)
    with pytest.raises(sj.DataError, match=r"path is \(61,\); this table knows ranks from 0 to 60"):
        table.conditional((61,))
    whole = tmp_path / "whole.npz"
    table.save(whole)
    np.savez(tmp_path / "other.npz", header=np.array(json.dumps({"format": "specjax.ranks", "version": 0})))
    np.save(tmp_path / "array.npy", np.zeros(3))
    damaged = {"nothing": b"nothing", "empty": b"", "cut": whole.read_bytes()[:-40], "array": None, "other": None}
    for name, content in damaged.items():
        file = tmp_path / {"array": "array.npy", "other": "other.npz"}.get(name, f"{name}.npz")
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(sj.DataError, match="is not a rank table"):
            RankTable.load(file)
    content, rng = whole.read_bytes(), np.random.default_rng(0)
    for _ in range(200):  # damage anywhere
        broken = bytearray(content)
        for at in rng.integers(0, len(content), 2):
            broken[at] ^= 0xFF
        (tmp_path / "broken.npz").write_bytes(broken)
        with contextlib.suppress(sj.DataError):  # nothing else may come of it; some bytes do not matter
            RankTable.load(tmp_path / "broken.npz")
    with np.load(whole) as file:
        columns = {name: file[name] for name in file}
    header = json.loads(str(columns["header"]))
    np.savez(tmp_path / "old.npz", **columns | {"header": np.array(json.dumps(header | {"version": 0}))})
    with pytest.raises(sj.DataError, match="version"):
        RankTable.load(tmp_path / "old.npz")
    np.savez(tmp_path / "less.npz", **{name: column for name, column in columns.items() if name != "entropy"})
    with pytest.raises(sj.DataError, match=r"lacks the columns \['entropy'\]"):
        RankTable.load(tmp_path / "less.npz")


RULES = [
    sj.Typical(0.7, 0.09, 0.3),
    sj.Typical(0.7, 0.3, 0.9, rule="abyo"),
]


@pytest.fixture(scope="module")
def typical_table(case):
    """With what typical acceptance needs, at temperature 0.7."""
    model, heads, texts, _ = case
    return measure(model, heads, texts, cap=61, typical_temperature=0.7, candidates=8)


@pytest.mark.parametrize("rule", RULES)
def test_typical_first_rounds_are_the_decoders(case, typical_table, rule):
    """A tree of one level is judged after the root alone: right after every prefix of the text."""
    model, heads, texts, _ = case
    tree = sj.Tree.cartesian((8,))
    depth, on_text = typical_reach(typical_table, tree, rule)
    assert on_text.all()
    assert 0 < depth.mean() < 1
    drafter = sj.MedusaDrafter(heads, tree)
    for text, start in zip(texts[:3], typical_table.starts, strict=False):
        for j in range(0, len(text.answer) - 2, 3):
            prefix = np.concatenate([text.prompt, text.answer[:j]])
            out = sj.generate(
                model, prefix, drafter=drafter, acceptance=rule, max_new_tokens=3, eos_token_ids=(), capacity=256
            )
            assert out.accepted_lengths[0] == depth[start + j]


def test_typical_simulation_is_near_the_decoder(case, typical_table):
    """Decoding leaves the text, the simulation does not: the error in tokens per round stays below a quarter."""
    model, heads, texts, _ = case
    trees = [sj.Tree.chain(2), sj.Tree.cartesian((3, 2))]
    for tree, one in zip(trees, simulate(typical_table, trees, RULES[0]), strict=True):
        assert not one.exact
        assert 0 < one.on_text < 1
        rounds = []
        for text in texts:
            rounds += sj.generate(
                model, text.prompt, drafter=sj.MedusaDrafter(heads, tree), acceptance=RULES[0],
                max_new_tokens=len(text.answer), eos_token_ids=(), capacity=256,
            ).accepted_lengths.tolist()  # fmt: skip
        error = one.tokens_per_round / (np.mean(rounds) + 1) - 1
        print(f"{tree.name}: simulated {one.tokens_per_round:.3f}, error {error:+.1%}, on text {one.on_text:.1%}")
        assert abs(error) < 0.25


def test_cold_typical_simulation_is_greedy_simulation(case, typical_table, tmp_path):
    model, heads, texts, table = case
    cold = measure(model, heads, texts, cap=61, typical_temperature=1e-3, candidates=8)
    cold.save(tmp_path / "cold.npz")
    cold = RankTable.load(tmp_path / "cold.npz")
    for one, greedy in zip(
        simulate(cold, TREES[9:], sj.Typical(1e-3, 0.5, 0.5)), simulate(table, TREES[9:]), strict=True
    ):
        assert one.by_depth.tolist() == greedy.by_depth.tolist()
        assert one.on_text == 1.0
    with pytest.raises(sj.DataError, match=r"at temperature 0\.7, the rule has 0\.5"):
        simulate(typical_table, TREES[:1], sj.Typical(0.5))
    with pytest.raises(sj.DataError, match="typical_temperature"):
        simulate(table, TREES[:1], RULES[0])
    with pytest.raises(sj.TreeError, match="ranks below 8"):
        simulate(typical_table, [sj.Tree.from_paths([(8,)])], RULES[0])
    with pytest.raises(sj.ConfigError, match="cannot be simulated"):
        simulate(table, TREES[:1], sj.Sample())
    with pytest.raises(sj.DataError, match="typical_temperature is 0"):
        measure(model, heads, texts, typical_temperature=0.0)


def test_the_shipped_table_is_that_of_the_shipped_heads(smollm2):
    heads = sj.load_heads("smollm2-135m-instruct", smollm2.config, dtype=jnp.float32)
    table = RankTable.load(packaged_ranks("smollm2-135m-instruct"))
    table.check(smollm2, heads, any_dtype=True)
    assert (table.manifest["dtype"], table.manifest["heads_dtype"]) == ("bfloat16", "bfloat16")
