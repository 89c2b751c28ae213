"""The slow oracle against straightforward decoding, on a context-dependent decoder and on a tiny real model."""

import itertools

import jax
import numpy as np
import pytest

from specjax import reference
from specjax.errors import ConfigError, PromptError, TreeError
from specjax.target import params as params_lib
from specjax.target.config import ModelConfig
from specjax.target.model import forward, unembed
from specjax.tree import Tree

VOCAB = 11
TREES = [Tree.chain(0), Tree.chain(1), Tree.chain(5), Tree.cartesian((3, 2, 2)), Tree.preset("mc_sim_7b_63")]


def table_logits(history: list[int]) -> np.ndarray:
    """Logits that depend on the last two tokens."""
    return np.random.default_rng([7, *history[-2:]]).normal(size=VOCAB).astype(np.float32)


class TableDecoder:
    """A context-dependent decoder that costs nothing."""

    vocab_size = VOCAB

    def __init__(self):
        self.history: list[int] = []

    def observe(self, token):
        assert 0 <= token < VOCAB
        self.history.append(token)

    def next_logits(self):
        return table_logits(self.history)

    def roll_back(self, count):
        assert count <= len(self.history)
        self.history = self.history[: len(self.history) - count]


class FixedDecoder(TableDecoder):
    """Logits looked up by the tokens observed."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def next_logits(self):
        return np.asarray(self.logits[tuple(self.history)], np.float32)


def continuation(prompt, count):
    """The plainest greedy decoding there is."""
    history = list(prompt)
    for _ in range(count):
        history.append(int(np.argmax(table_logits(history))))
    return history[len(prompt) :]


def oracle(tree, rank_of_truth=0):
    """Candidates that hold the truth at one rank wherever the tree reaches that rank."""

    def propose(context, features):
        truth = continuation(context, tree.max_depth)
        lists = []
        for token, width in zip(truth, tree.max_rank_by_depth, strict=True):
            others = [t for t in range(VOCAB) if t != token]
            others.insert(min(rank_of_truth, width - 1), token)
            lists.append(others[:width])
        return lists

    return propose


def adversarial(tree):
    """Candidates that never hold the truth."""

    def propose(context, features):
        truth = continuation(context, tree.max_depth)
        return [
            [t for t in range(VOCAB) if t != token][:k] for token, k in zip(truth, tree.max_rank_by_depth, strict=True)
        ]

    return propose


def random(tree):
    rng = np.random.default_rng(3)
    return lambda context, features: [rng.permutation(VOCAB)[:k].tolist() for k in tree.max_rank_by_depth]


@pytest.mark.parametrize("tree", TREES, ids=lambda tree: tree.name)
@pytest.mark.parametrize("drafter", [oracle, adversarial, random])
def test_greedy_speculation_is_lossless(tree, drafter):
    decoder = TableDecoder()
    for prompt in ([0], [3, 1, 4], list(range(VOCAB))):
        out = reference.generate(decoder, prompt, drafter(tree), tree, max_new_tokens=37)
        assert out.tokens == continuation(prompt, 37)
        assert out.tokens == reference.autoregressive(decoder, prompt, max_new_tokens=37).tokens
        assert len(out.tokens) == 1 + sum(n + 1 for n in out.accepted_lengths)
        assert decoder.history == []


def test_accepted_lengths():
    tree, decoder = Tree.chain(4), TableDecoder()
    perfect = reference.generate(decoder, [1], oracle(tree), tree, max_new_tokens=1 + 3 * 5)
    assert perfect.accepted_lengths == [4, 4, 4]
    cut = reference.generate(decoder, [1], oracle(tree), tree, max_new_tokens=1 + 5 + 2)
    assert cut.accepted_lengths == [4, 1]
    wrong = reference.generate(decoder, [1], adversarial(tree), tree, max_new_tokens=6)
    assert wrong.accepted_lengths == [0] * 5
    assert reference.autoregressive(decoder, [1], max_new_tokens=6).accepted_lengths == [0] * 5
    # The truth at the third rank is found at the tree's first depth only.
    wide = Tree.from_paths([(0,), (1,), (2,), (0, 0), (0, 1), (0, 2)])
    side = reference.generate(decoder, [1], oracle(wide, rank_of_truth=2), wide, max_new_tokens=7)
    assert side.accepted_lengths == [1, 1, 1]


@pytest.mark.parametrize("budget", range(8))
@pytest.mark.parametrize("drafter", [oracle, adversarial])
def test_budget_is_exact(budget, drafter):
    tree = Tree.chain(3)
    out = reference.generate(TableDecoder(), [2, 5], drafter(tree), tree, max_new_tokens=budget)
    assert out.tokens == continuation([2, 5], budget)
    assert reference.autoregressive(TableDecoder(), [2, 5], max_new_tokens=budget).tokens == out.tokens
    per_round = 4 if drafter is oracle else 1
    assert len(out.accepted_lengths) == -(-max(budget - 1, 0) // per_round)


def test_eos_ends_at_any_depth_and_is_kept():
    tree, truth = Tree.chain(3), continuation([2, 5], 30)
    for eos in range(VOCAB):
        expected = truth[: truth.index(eos) + 1] if eos in truth else truth
        for drafter in (oracle(tree), adversarial(tree), random(tree)):
            out = reference.generate(TableDecoder(), [2, 5], drafter, tree, max_new_tokens=30, eos_token_ids=(eos, 99))
            assert out.tokens == expected
        plain = reference.autoregressive(TableDecoder(), [2, 5], max_new_tokens=30, eos_token_ids={eos})
        assert plain.tokens == expected
    # EOS is the second draft of the first round: the third draft and the bonus are dropped; it stands for the bonus.
    eos = truth[2]
    assert truth.index(eos) == 2
    out = reference.generate(TableDecoder(), [2, 5], oracle(tree), tree, max_new_tokens=30, eos_token_ids=[eos])
    assert out.accepted_lengths == [1]


def test_prompt_errors():
    tree = Tree.chain(1)
    for prompt, budget, message in (
        ([], 3, "empty"),
        ([1, VOCAB], 3, str(VOCAB)),
        ([-1], 3, "-1"),
        ([1], -1, "max_new_tokens is -1"),
    ):
        with pytest.raises(PromptError, match=message):
            reference.generate(TableDecoder(), prompt, oracle(tree), tree, max_new_tokens=budget)
        with pytest.raises(PromptError, match=message):
            reference.autoregressive(TableDecoder(), prompt, max_new_tokens=budget)


def test_builders():
    candidates = [[5, 6], [7, 8, 9]]
    assert reference.build_chain(1, candidates, 2) == ([1, 5, 7], (-1, 0, 1))
    tokens, parents = reference.build_cartesian(1, candidates, 2)
    assert tokens == [1, 5, 6, 7, 8, 9, 7, 8, 9]
    assert parents == (-1, 0, 0, 1, 1, 1, 2, 2, 2)
    assert reference.build(Tree.cartesian((2, 3)), 1, candidates) == tokens
    assert reference.build(Tree.chain(2), 1, candidates) == [1, 5, 7]
    assert reference.build(Tree.from_paths([(1,), (1, 2)]), 1, candidates) == [1, 6, 9]
    for widths in itertools.product((1, 2, 3), repeat=3):
        lists = [list(range(k)) for k in widths]
        tree = Tree.cartesian(widths)
        assert reference.build_cartesian(4, lists, 3) == (reference.build(tree, 4, lists), tree.parents)
    for builder in (reference.build_chain, reference.build_cartesian):
        with pytest.raises(TreeError, match="2 candidate lists for 3 heads"):
            builder(1, candidates, 3)
        with pytest.raises(TreeError, match="head 1 offers no candidates"):
            builder(1, [[5], []], 2)
    with pytest.raises(TreeError, match="the tree is 3 deep"):
        reference.build(Tree.chain(3), 1, candidates)
    with pytest.raises(TreeError, match="at depth 2 there are 3 candidates; the tree takes the best 4"):
        reference.build(Tree.cartesian((2, 4)), 1, candidates)


def test_top_k_breaks_ties_by_the_lowest_id():
    logits = np.array([1.0, 3.0, 2.0, 3.0, 2.0])
    assert reference.top_k(logits, 3) == [1, 3, 2]
    assert reference.top_k(logits, 9) == [1, 3, 2, 4, 0]


def test_walk_judges_a_child_by_its_parent_and_stops_at_the_first_failure():
    # After 0 comes 1; after 1 comes 2; after 2 (wrong below the root) would come 3.
    decoder = FixedDecoder({(0,): [0, 9, 0, 0], (0, 1): [0, 0, 9, 0], (0, 1, 2): [7, 0, 0, 0], (0, 2): [0, 0, 0, 9]})
    tree = Tree.from_paths([(0,), (0, 0), (1,), (1, 0)])
    assert reference.walk(decoder, [0, 2, 1, 3, 2], tree.parents) == ([1, 2], 0)
    assert reference.walk(decoder, [0, 2, 1, 3, 3], tree.parents) == ([1], 2)
    assert reference.walk(decoder, [0, 2, 3, 3, 0], tree.parents) == ([], 1)
    assert reference.walk(decoder, [0], [-1]) == ([], 1)
    assert decoder.history == []


def test_walk_leaves_the_decoder_as_it_was_even_when_it_fails():
    decoder = FixedDecoder({(0,): [0.0, 9.0]})
    decoder.observe(0)
    with pytest.raises(KeyError):
        reference.walk(decoder, [1, 1], [-1, 0])
    assert decoder.history == [0]


def test_typical_rules_by_hand():
    # p = (.6, .3, .1): H = .898, exp(-H) = .407. With delta .5 the typical bound is .204; epsilon is .09 or .35.
    logits = np.log([0.6, 0.3, 0.1])
    entropy = -(0.6 * np.log(0.6) + 0.3 * np.log(0.3) + 0.1 * np.log(0.1))
    assert 0.5 * np.exp(-entropy) == pytest.approx(0.2037, abs=1e-4)
    low = {"epsilon": 0.09, "delta": 0.5}  # min .09, max .204
    accepted = {
        rule: [reference.typical(1.0, **low, rule=rule)(logits, t) for t in range(3)] for rule in ("paper", "abyo")
    }
    assert accepted["paper"] == pytest.approx(list(logits))
    assert accepted["abyo"][:2] == pytest.approx(list(logits[:2]))
    assert accepted["abyo"][2] is None
    high = {"epsilon": 0.35, "delta": 0.5}  # min .204, max .35
    assert reference.typical(1.0, **high)(logits, 1) == pytest.approx(np.log(0.3))
    assert reference.typical(1.0, **high)(logits, 2) is None
    assert reference.typical(1.0, **high, rule="abyo")(logits, 1) is None
    # A temperature of one half squares p: (.36, .09, .01) / .46.
    assert reference.typical(0.5)(logits, 0) == pytest.approx(np.log(0.36 / 0.46))
    assert reference.typical(0.5, epsilon=0.05)(logits, 2) is None
    # Exactly at the bound: the paper's rule is strict, the Rust system's is not.
    even = np.zeros(4)
    assert reference.typical(epsilon=0.25, delta=100.0)(even, 0) is None
    assert reference.typical(epsilon=0.25, delta=0.0, rule="abyo")(even, 0) == pytest.approx(np.log(0.25))
    # The entropy's 1e-5 moves the bound: with delta 1 a certain token has exp(-H) = 1 + 1e-5, not 1.
    certain = np.array([0.0, -1e4])
    assert reference.typical(epsilon=0.0, delta=1.0, rule="abyo")(certain, 0) is None
    with pytest.raises(ConfigError, match="temperature is 0"):
        reference.typical(0)
    with pytest.raises(ConfigError, match="paperr"):
        reference.typical(rule="paperr")


def test_typical_walk_takes_the_longest_then_the_likeliest_then_the_first():
    half = np.log([0.5, 0.3, 0.1, 0.1])
    decoder = FixedDecoder({(0,): half, (0, 1): half, (0, 0): half, (0, 2): half, (0, 1, 0): half, (0, 3): -half})
    judge = reference.typical(1.0, epsilon=0.05)
    two = Tree.from_paths([(0,), (1,)])
    assert reference.walk(decoder, [0, 1, 0], two.parents, judge) == ([0], 0)  # .5 beats .3
    assert reference.walk(decoder, [0, 2, 3], two.parents, judge) == ([2], 0)  # .1 each: the first path
    assert reference.walk(decoder, [0, 3, 2], two.parents, judge) == ([3], 2)  # its own arg-max follows
    longer = Tree.from_paths([(0,), (1,), (1, 0)])
    assert reference.walk(decoder, [0, 0, 1, 0], longer.parents, judge) == ([1, 0], 0)  # length comes first
    assert reference.walk(decoder, [0, 1, 0], two.parents) == ([0], 0)  # greedy takes the arg-max only


def test_typical_generation_can_leave_the_greedy_path():
    tree = Tree.chain(3)
    judge = reference.typical(epsilon=0.01)
    out = reference.generate(TableDecoder(), [1], adversarial(tree), tree, judge=judge, max_new_tokens=13)
    assert len(out.tokens) == 13
    assert max(out.accepted_lengths) > 0
    assert out.tokens != continuation([1], 13)


@pytest.fixture(scope="module")
def model():
    config = ModelConfig("qwen2", VOCAB, 16, 24, 2, 4, 2, 4, qkv_bias=True, max_positions=256)
    return params_lib.init(jax.random.key(0), config, stddev=0.5), config


def test_model_decoder_equals_a_plain_forward_pass(model):
    params, config = model
    decoder = reference.ModelDecoder(params, config)
    assert decoder.vocab_size == VOCAB
    with pytest.raises(PromptError, match="nothing has been observed"):
        decoder.next_logits()
    with pytest.raises(PromptError, match=f"token id {VOCAB}"):
        decoder.observe(VOCAB)
    tokens = np.random.default_rng(0).integers(0, VOCAB, 70)
    features = forward(params, config, tokens).features
    logits = unembed(params, features)
    for position, token in enumerate(tokens):
        decoder.observe(int(token))
        if position % 23 == 0 or position >= 62:
            np.testing.assert_allclose(decoder.features(), features[position], atol=1e-5)
            np.testing.assert_allclose(decoder.next_logits(), logits[position], atol=1e-4)
    decoder.roll_back(0)
    decoder.roll_back(69)
    np.testing.assert_allclose(decoder.next_logits(), logits[0], atol=1e-4)
    decoder.observe(int(tokens[1]))
    np.testing.assert_allclose(decoder.next_logits(), logits[1], atol=1e-4)


@pytest.mark.parametrize("tree", [Tree.chain(3), Tree.cartesian((3, 2))], ids=lambda tree: tree.name)
def test_speculation_on_a_real_model_is_lossless(model, tree):
    params, config = model
    decoder = reference.ModelDecoder(params, config)
    weights = np.random.default_rng(1).normal(size=(tree.max_depth, VOCAB, config.hidden_size))
    seen = []

    def heads(context, features):
        seen.append((len(context), features))
        return [reference.top_k(w @ features, k) for w, k in zip(weights, tree.max_rank_by_depth, strict=True)]

    out = reference.generate(decoder, [3, 1], heads, tree, max_new_tokens=24)
    assert out.tokens == reference.autoregressive(decoder, [3, 1], max_new_tokens=24).tokens
    assert len(seen) == len(out.accepted_lengths)
    everything = forward(params, config, np.asarray([3, 1, *out.tokens])).features
    for length, features in seen:  # heads see the state that predicted the root, one before the root's own
        np.testing.assert_allclose(features, everything[length - 2], atol=1e-5)
