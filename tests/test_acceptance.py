"""Acceptance rules against the path-by-path oracle. Their laws: tests/drafters/test_laws.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specjax as sj
from specjax import reference
from specjax.acceptance import Proposal, draw
from specjax.ops import top_token
from specjax.sampling import warp

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
    ("setting", "message"),
    [
        ((0.0,), "temperature"),
        ((float("inf"),), "temperature is inf"),
        ((float("nan"),), "temperature is nan"),
        ((1.0, 0), "top_k"),
        ((1.0, 2.5), "top_k is 2.5"),
        ((1.0, True), "top_k is True"),
        ((1.0, None, 0.0), "top_p"),
    ],
)
def test_sample_refuses(setting, message):
    with pytest.raises(sj.ConfigError, match=message):
        sj.Sample(*setting)


@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("top_k", [None, 5])
@pytest.mark.parametrize("vocab", [1, 2, 7, 500])
def test_top_p_keeps_the_fewest_tokens_that_reach_the_mass(vocab, top_k, top_p):
    """With ties, tokens of no probability and several rows, against a sort."""
    rng = np.random.default_rng(vocab)
    logits = rng.normal(size=(2, 50, vocab)) * rng.choice([0.1, 1, 5], size=(2, 50, 1))
    logits[0] = np.round(logits[0]) + 0.0  # ties; top_k puts -0 behind 0
    logits[1, ::7, : vocab // 3] = -np.inf
    kept = np.isfinite(warp(jnp.asarray(logits, jnp.float32), temperature=0.7, top_k=top_k, top_p=top_p))
    for row, inside in zip(logits.reshape(-1, vocab) / 0.7, kept.reshape(-1, vocab), strict=True):
        order = np.argsort(-row, kind="stable")[:top_k]
        p = np.exp(row[order] - row.max()) / np.exp(row[order] - row.max()).sum()
        count = inside.sum()
        assert set(np.flatnonzero(inside)) == set(order[:count])
        assert count == 1 or p[: count - 1].sum() < top_p + 1e-6
        assert p[:count].sum() > top_p - 1e-6


def test_lossless_rules_say_so():
    assert sj.Greedy.lossless
    assert sj.Sample.lossless
    assert not sj.Typical.lossless


def test_a_token_is_drawn_as_jax_draws_one():
    """`jax.random.categorical` for every key; impossible tokens never, and every possible one at times."""
    logits = jnp.where(jnp.arange(50) % 3 == 1, -jnp.inf, jnp.sin(jnp.arange(50.0)))
    keys = jax.random.split(jax.random.key(0), 2_000)
    drawn = jax.jit(jax.vmap(draw, (None, 0)))(logits, keys)
    np.testing.assert_array_equal(drawn, jax.vmap(jax.random.categorical, (0, None))(keys, logits))
    assert set(drawn.tolist()) == set(np.flatnonzero(np.isfinite(logits)).tolist())


def test_typical_draws_after_the_path_that_it_accepts():
    """With bonus="sample": from the deepest accepted node's law, cooled."""
    logits = jnp.array([[5.0, 0.0, 0.0, 0.0], [0.0, 1.0, 2.0, 0.5]])  # of the root and of its child, token 0
    rule, proposal = sj.Typical(temperature=0.5, bonus="sample"), Proposal(jnp.array([1, 0]))
    keys = jax.random.split(jax.random.key(1), 500)
    verdict = jax.vmap(lambda key: rule(logits, proposal, sj.Tree.chain(1), key))(keys)
    assert (verdict.node == 1).all()
    expected = jax.vmap(jax.random.categorical, (0, None))(keys, logits[1] / 0.5)
    np.testing.assert_array_equal(verdict.next_token, expected)
    assert len(set(expected.tolist())) == 4
