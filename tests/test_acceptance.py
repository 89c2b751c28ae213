"""Acceptance rules against the path-by-path oracle, against exact laws, and against mutants that must fail."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ScriptedDrafter, tiny_model

import specjax as sj
from specjax import decode, reference
from specjax.acceptance import Proposal, top_token
from specjax.model import forward, unembed

TREES = [sj.Tree.chain(3), sj.Tree.cartesian((3, 2)), sj.Tree.preset("mc_sim_7b_63"), sj.Tree.chain(0)]


class TableDecoder:
    """The oracle's Decoder over a table of logits per tree node: what the fast rules see."""

    def __init__(self, tree, tokens, logits):
        self.tree, self.tokens, self.logits, self.vocab_size = tree, tokens, logits, logits.shape[1]
        self.node, self.trail = None, []

    def observe(self, token):
        """Steps to the first child that holds `token`, or to the root."""
        self.trail.append(self.node)
        below = [0] if self.node is None else self.tree.children[self.node]
        self.node = next(n for n in below if self.tokens[n] == token)

    def roll_back(self, n):
        """Undoes the last n steps."""
        for _ in range(n):
            self.node = self.trail.pop()

    def next_logits(self):
        """The node's row."""
        return self.logits[self.node]


@pytest.mark.parametrize("tree", TREES, ids=lambda t: t.name)
@pytest.mark.parametrize("rule", ["greedy", "paper", "abyo"])
def test_rules_equal_the_oracle(tree, rule):
    if rule == "greedy":
        ours, judge = sj.Greedy(), reference.greedy
    else:
        setting = {"temperature": 0.8, "epsilon": 0.2, "delta": 0.6, "rule": rule}
        ours, judge = sj.Typical(**setting), reference.typical(**setting)
    vocab, depths_seen = 40, set()
    call = jax.jit(lambda logits, tokens: ours(logits, Proposal(tokens), tree, jax.random.key(0)))
    for seed in range(25):
        rng = np.random.default_rng(seed)
        logits = rng.normal(size=(tree.size, vocab)).astype(np.float32) * 2
        tokens = np.zeros(tree.size, np.int32)
        for parent, below in enumerate(tree.children):
            # Distinct siblings, often the target's favourites, so that long paths are accepted too.
            favourites = np.argsort(-logits[parent])[: len(below) + 1]
            for node, token in zip(below, rng.permutation(favourites), strict=False):
                tokens[node] = token
        verdict = call(logits, tokens)
        accepted, nxt = reference.walk(TableDecoder(tree, tokens, logits), tokens.tolist(), tree.parents, judge)
        path = tree.node_paths[int(verdict.node)][1 : int(verdict.accepted) + 1]
        assert tokens[path].tolist() == list(accepted)
        assert int(verdict.next_token) == nxt
        depths_seen.add(int(verdict.accepted))
    assert len(depths_seen) > 1 or tree.size == 1


def test_top_token_breaks_ties_by_the_lowest_id():
    logits = jnp.array([[0.0, 2.0, 2.0, 1.0], [5.0, 5.0, 5.0, 5.0]])
    assert top_token(logits).tolist() == [1, 0]


def test_typical_by_hand():
    # p = (.5, .3, .2): H = 1.0296, exp(-H) = .35714.
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2]]))
    tree, key = sj.Tree.chain(1), jax.random.key(0)

    def accepted(token, **setting):
        rule = sj.Typical(temperature=1.0, **setting)
        return int(rule(logits, Proposal(jnp.array([0, token])), tree, key).accepted)

    assert accepted(2) == 1  # .2 > min(.09, .107)
    assert accepted(2, epsilon=0.25, delta=0.6) == 0  # .2 < min(.25, .214)
    assert accepted(1, epsilon=0.35, delta=0.6) == 1  # .3 > min(.35, .214)
    assert accepted(1, epsilon=0.35, delta=0.6, rule="abyo") == 0  # .3 < max(.35, .214)
    assert accepted(1, epsilon=0.25, delta=0.6, rule="abyo") == 1  # .3 > max(.25, .214)


@pytest.mark.parametrize(
    ("setting", "message"),
    [({"temperature": 0.0}, "temperature"), ({"epsilon": 2.0}, "epsilon"), ({"rule": "mine"}, "mine")],
)
def test_typical_refuses(setting, message):
    with pytest.raises(sj.ConfigError, match=message):
        sj.Typical(**setting)


@pytest.mark.parametrize(
    ("setting", "message"), [((0.0,), "temperature"), ((1.0, 0), "top_k"), ((1.0, None, 0.0), "top_p")]
)
def test_sample_refuses(setting, message):
    with pytest.raises(sj.ConfigError, match=message):
        sj.Sample(*setting)


def test_lossless_rules_say_so():
    assert sj.Greedy.lossless
    assert sj.Sample.lossless
    assert not sj.Typical.lossless


# --- the law of several consecutive tokens ---------------------------------------------------------------------------

VOCAB, LENGTH, RUNS = 3, 4, 40_000
PROMPT = np.array([1, 2])


def exact_law(model, acceptance):
    """The probability of every continuation of LENGTH tokens, by enumeration."""
    law = np.ones([VOCAB] * LENGTH)
    for n in range(LENGTH):
        for prefix in itertools.product(range(VOCAB), repeat=n):
            features = forward(model.params, model.config, jnp.array([*PROMPT, *prefix])).features[-1:]
            logits = unembed(model.params, features)[0] / acceptance.temperature
            p = np.asarray(jax.nn.softmax(logits), np.float64)
            order = np.argsort(-p, kind="stable")
            keep = np.cumsum(p[order]) - p[order] < acceptance.top_p
            p = np.where(np.isin(np.arange(VOCAB), order[keep]), p, 0)
            p /= p.sum()
            law[prefix] *= p.reshape([VOCAB] + [1] * (LENGTH - n - 1))
    return law


def empirical_law(model, acceptance, tree):
    # A drafter that guesses the same cycle for ever, with distinct siblings.
    future = jnp.arange(64, dtype=jnp.int32) % VOCAB
    shift = jnp.arange(max(tree.ranks) + 1)[None].repeat(max(tree.max_depth, 1), 0)
    drafter = ScriptedDrafter(future, shift, jnp.int32(VOCAB), tree)
    tokens = jnp.zeros(64, jnp.int32).at[: len(PROMPT)].set(PROMPT)

    def run(key):
        plan = (model.params, model.config, drafter, acceptance, ())
        n = jnp.int32(len(PROMPT))
        state = decode.loop(*plan, decode.start(*plan, tokens, n, n + LENGTH, key))
        return jax.lax.dynamic_slice(state.tokens, (len(PROMPT),), (LENGTH,))

    batch = jax.jit(jax.vmap(run))
    out = np.concatenate([np.asarray(batch(jax.random.split(jax.random.key(i), 8000))) for i in range(RUNS // 8000)])
    counts = np.zeros([VOCAB] * LENGTH)
    np.add.at(counts, tuple(out.T), 1)
    return counts


@pytest.fixture(scope="module")
def mock():
    return tiny_model(2, 0.25, vocab=VOCAB, hidden_size=8, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4)


def total_variation(law, counts):
    return 0.5 * np.abs(law - counts / counts.sum()).sum()


@pytest.mark.parametrize("tree", [sj.Tree.chain(2), sj.Tree.cartesian((2, 2))], ids=lambda t: t.name)
@pytest.mark.parametrize("acceptance", [sj.Sample(), sj.Sample(0.7, top_p=0.9)], ids=["T=1", "T=0.7, top-p"])
def test_sampling_keeps_the_joint_law(mock, tree, acceptance):
    law, counts = exact_law(mock, acceptance), empirical_law(mock, acceptance, tree)
    assert law.sum() == pytest.approx(1)
    assert counts[law == 0].sum() == 0
    likely = law * RUNS > 5
    statistic = (((counts - law * RUNS) ** 2)[likely] / (law * RUNS)[likely]).sum()
    freedom = int(likely.sum()) - 1
    assert freedom > 10  # a law worth testing
    # Wilson-Hilferty: a chi-square this large has probability below 1e-3.
    assert ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / np.sqrt(2 / (9 * freedom)) < 3.09
    assert total_variation(law, counts) < 0.02


@dataclasses.dataclass(frozen=True)
class KeepsRejected(sj.Sample):
    """A mutant: after a rejection the rejected draft stays (the Rust system's error)."""

    def __call__(self, logits, proposal, tree, key):
        """Right, but for the token it commits."""
        right = super().__call__(logits, proposal, tree, key)
        child = jnp.asarray([min(c, default=n) for n, c in enumerate(tree.children)])[right.node]
        return dataclasses.replace(
            right, next_token=jnp.where(child == right.node, right.next_token, proposal.tokens[child])
        )


def test_a_broken_rule_fails_the_same_test(mock):
    law, counts = exact_law(mock, sj.Sample()), empirical_law(mock, KeepsRejected(), sj.Tree.chain(2))
    assert total_variation(law, counts) > 0.05
