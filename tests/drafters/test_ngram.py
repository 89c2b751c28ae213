"""The n-gram drafter against a plain search of the text."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import noisy_heads, tiny_model

import specjax as sj
from specjax import loop
from specjax.acceptance import NO_DRAFT
from specjax.drafters.base import Context
from specjax.target.model import read

TREES = [sj.Tree.chain(5), sj.Tree.cartesian((3, 2)), sj.Tree.from_paths([(0,), (0, 0), (0, 0, 1), (2,), (2, 0)])]


@jax.jit
def propose(drafter, tokens, length):
    return drafter.propose(None, None, Context(tokens, length, jnp.zeros(1)), jax.random.key(0)).tokens


def draft(drafter, text, slots=64):
    """What it proposes after `text`; the slots behind hold garbage."""
    tokens = np.ones(slots, np.int32)
    tokens[: len(text)] = text
    return np.asarray(propose(drafter, tokens, len(text)))


def by_search(drafter, text):
    """The same, path by path in plain Python."""

    def match(context, limit, at):
        n = 0
        while n < limit and n <= at and text[at - n] == context[-1 - n]:
            n += 1
        return n

    tree, out = drafter.tree, [text[-1]]
    longest = max((match(text, drafter.max_n, at) for at in range(len(text) - 1)), default=0)
    limited = longest < drafter.max_n and longest <= len(drafter.reach)
    reach = [0, *drafter.reach][longest] if limited else tree.max_depth
    for node in range(1, tree.size):
        path = []
        above = tree.parents[node]
        while above > 0:
            path.insert(0, out[above])
            above = tree.parents[above]
        if NO_DRAFT in path or len(path) >= reach:
            out.append(NO_DRAFT)
            continue
        context, limit, found = [*text, *path], drafter.max_n + len(path), []
        for at in range(len(text) - 1):  # the match ends at `at`, what followed is text[at + 1]
            n = match(context, limit, at)
            if n >= drafter.min_n:
                found.append((n, at))
        followers = list(dict.fromkeys(text[at + 1] for _, at in sorted(found, reverse=True)))
        rank = tree.ranks[node]
        out.append(followers[rank] if rank < len(followers) else NO_DRAFT)
    return out


@pytest.mark.parametrize("tree", TREES, ids=str)
@pytest.mark.parametrize(
    ("min_n", "max_n", "reach"), [(1, 1, ()), (1, 3, (3, 7)), (1, 3, (1, 2)), (2, 4, (1, 2, 1)), (1, 2, (3, 2, 4))]
)
def test_drafts_equal_a_plain_search(tree, min_n, max_n, reach):
    drafter, rng, drafted = sj.NgramDrafter(tree, max_n, min_n, reach), np.random.default_rng(0), 0
    for _ in range(60):
        text = rng.integers(0, 4, rng.integers(1, 60)).tolist()
        ours = draft(drafter, text).tolist()
        assert ours == by_search(drafter, text)
        drafted += sum(token != NO_DRAFT for token in ours[1:])
    assert drafted > 60


def test_a_chain_copies_the_passage_after_the_longest_match():
    text = [5, 6, 7, 8, 9, 10, 3, 7, 1, 2, 5, 6, 7]
    assert draft(sj.NgramDrafter(sj.Tree.chain(3)), text).tolist() == [7, 8, 9, 10]


def test_several_continuations_become_a_tree():
    text = [5, 6, 1, 5, 6, 2, 5, 6, 3, 5, 6]
    assert draft(sj.NgramDrafter(sj.Tree.cartesian((4,))), text).tolist() == [6, 3, 2, 1, NO_DRAFT]


def test_nothing_to_repeat_means_no_drafts(model):
    assert draft(sj.NgramDrafter(sj.Tree.chain(2)), [1, 2, 3]).tolist() == [3, NO_DRAFT, NO_DRAFT]
    assert draft(sj.NgramDrafter(sj.Tree.chain(2)), [4]).tolist() == [4, NO_DRAFT, NO_DRAFT]


@pytest.mark.parametrize(("max_n", "min_n"), [(3, 0), (2, 3)])
def test_impossible_lengths_are_refused(max_n, min_n):
    with pytest.raises(sj.ConfigError, match="min_n"):
        sj.NgramDrafter(sj.Tree.chain(2), max_n, min_n)


@pytest.mark.parametrize("reach", [(0,), (3, -1), (2.5,), (True,), 3])
def test_an_impossible_reach_is_refused(reach):
    with pytest.raises(sj.ConfigError, match="expected a tuple of positive whole numbers"):
        sj.NgramDrafter(sj.Tree.chain(2), reach=reach)


def test_the_subtrees_are_those_within_reach():
    tree = sj.Tree.from_paths([(0,), (1,), (0, 0), (0, 0, 0), (0, 0, 0, 0)])
    assert sj.NgramDrafter(tree, reach=(1, 3)).subtrees == ((0,), (0, 1, 2), (0, 1, 2, 3, 4))
    assert sj.NgramDrafter(tree, reach=(4, 9)).subtrees == ((0,),)
    # A match of max_n tokens is as long as any, and one below min_n drafts nothing.
    assert sj.NgramDrafter(tree, max_n=2, reach=(1, 3)).subtrees == ((0,), (0, 1, 2))
    assert sj.NgramDrafter(tree, max_n=1, reach=(1, 3)).subtrees == ((0,),)
    assert sj.NgramDrafter(tree, min_n=2, reach=(1, 3)).subtrees == ((0,), (0, 1, 2, 3, 4))


PROMPTS = [[5, 6, 7, 5, 6], [9, 3, 1, 9, 3, 1]]
# Reads 1, 2 or 4 nodes.
ADAPTIVE = sj.NgramDrafter(sj.Tree.chain(3), reach=(1,))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class WholeTree(sj.NgramDrafter):
    """The same drafts; the whole tree is always read."""

    subtrees = ()


def needed(drafts):
    """How many nodes of the chain of three must be read."""
    return {0: 1, 1: 2, 3: 4}[int(np.sum(drafts != NO_DRAFT))]


def begin(model, drafter, acceptance, prompt, seed=1):
    """The state after the prompt, 40 tokens before the end."""
    tokens, n = jnp.asarray(prompt + [0] * (64 - len(prompt))), jnp.int32(len(prompt))
    plan = loop.Plan(model.params, drafter, (), model.config, acceptance)
    return jax.jit(loop.start)(plan, tokens, n, n + 40, jax.random.key(seed))


@pytest.fixture
def widths(monkeypatch):
    """How many tokens every target forward reads, as it runs."""
    found, forward = [], loop.forward

    def recorded(params, config, tokens, **kwargs):
        jax.debug.callback(lambda: found.append(tokens.shape[0]))
        return forward(params, config, tokens, **kwargs)

    monkeypatch.setattr(loop, "forward", recorded)
    return found


@pytest.mark.parametrize(
    ("acceptance", "window"),
    [
        pytest.param(sj.Greedy(), None, id="greedy"),
        pytest.param(sj.Greedy(), 6, id="sliding window", marks=pytest.mark.full),
        pytest.param(sj.Sample(0.3), None, id="sample"),
        pytest.param(sj.Typical(), None, id="typical", marks=pytest.mark.full),
    ],
)
def test_a_round_reads_the_nodes_with_drafts_alone(widths, acceptance, window):
    """The widths of the target forwards beside what was drafted in each round, and the cache after each."""
    model = tiny_model(0, 0.3, sliding_window=window)  # as in test_draft_model.py: caches are compared to 1e-5
    plan = loop.Plan(model.params, ADAPTIVE, (), model.config, acceptance)
    state, expected = begin(model, ADAPTIVE, acceptance, PROMPTS[0]), []
    step, prefill = jax.jit(loop.decode_round), jax.jit(read, static_argnums=1)
    while not state.finished:
        drafts = propose(ADAPTIVE, state.tokens, state.length)[1:]
        expected.append(needed(drafts))
        state = step(plan, state)
        jax.effects_barrier()
        assert widths == expected
        _, fresh = prefill(model.params, model.config, state.tokens, state.length - 1)
        kept = int(state.length) - 1
        for ours, theirs in zip(state.cache.v, fresh.v, strict=True):
            np.testing.assert_allclose(ours[:, :kept], theirs[:, :kept], atol=1e-5)
        for ours, theirs in zip(state.cache.k, fresh.k, strict=True):
            np.testing.assert_allclose(ours[:, :, :kept], theirs[:, :, :kept], atol=1e-5)
    assert {1, 2, 4} == set(expected)
    whole_tree = WholeTree(ADAPTIVE.tree, reach=(1,))
    other = begin(model, whole_tree, acceptance, PROMPTS[0])
    whole = jax.jit(loop.run_rounds)(loop.Plan(model.params, whole_tree, (), model.config, acceptance), other)
    np.testing.assert_array_equal(state.tokens[:45], whole.tokens[:45])
    assert int(state.rounds) == int(whole.rounds)
    np.testing.assert_array_equal(state.accepted[: state.rounds], whole.accepted[: state.rounds])


@pytest.mark.parametrize("acceptance", [sj.Greedy(), sj.Sample(0.3)], ids=["greedy", "sample"])
def test_a_batch_reads_the_nodes_where_some_member_has_a_draft(model, widths, acceptance):
    """One forward a round for the whole batch: a predicate for every member would make it two."""
    states = [begin(model, ADAPTIVE, acceptance, prompt) for prompt in PROMPTS]
    plan, going, expected = loop.Plan(model.params, ADAPTIVE, (), model.config, acceptance), states, []
    step = jax.jit(loop.decode_round)
    while not all(bool(s.finished) for s in going):
        drafts = [propose(ADAPTIVE, s.tokens, s.length)[1:] for s in going if not s.finished]
        expected.append(max(needed(one) for one in drafts))
        going = [step(plan, s) for s in going]
    jax.effects_barrier()
    widths.clear()
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    together = jax.jit(loop.batch_rounds)(plan, batch)
    jax.block_until_ready(together)
    jax.effects_barrier()
    assert widths == expected
    assert {1, 2, 4} == set(expected)
    for i, one in enumerate(going):
        length = int(one.length)
        np.testing.assert_array_equal(together.tokens[i, :length], one.tokens[:length])


@pytest.mark.usefixtures("xla_products")
def test_a_hybrid_reads_what_its_parts_need(model, widths):
    """Without an n-gram draft, the Medusa nodes alone."""
    ngram, heads = sj.NgramDrafter(sj.Tree.chain(3), min_n=2, reach=()), noisy_heads(model, 2)
    medusa = sj.MedusaDrafter(heads, sj.Tree.from_paths([(0,), (1,), (0, 0)]))
    both = sj.HybridDrafter((ngram, medusa))
    assert both.subtrees == ((0, 2, 3, 5),)
    assert both.tree.subtree((0, 2, 3, 5)) == sj.Tree.from_paths([(1,), (2,), (1, 0)])
    out = sj.generate(model, PROMPTS[0], drafter=both, max_new_tokens=40)
    jax.effects_barrier()
    assert set(widths) == {4, 8}  # 7 are padded
    alone = sj.generate(model, PROMPTS[0], max_new_tokens=40)
    np.testing.assert_array_equal(out.tokens, alone.tokens)


def test_two_ngram_parts_need_none_one_or_both():
    parts = sj.NgramDrafter(sj.Tree.chain(1)), sj.NgramDrafter(sj.Tree.chain(2), min_n=2)
    assert sj.HybridDrafter(parts).subtrees == ((0,), (0, 2, 3), (0, 1))


class Torn(sj.NgramDrafter):
    """Its subtrees are not those of its tree."""

    subtrees = ((0, 2),)


def test_subtrees_that_are_none_are_refused_before_tracing(model):
    with pytest.raises(sj.TreeError, match="node 2 is there without its parent"):
        sj.generate(model, PROMPTS[0], drafter=Torn(sj.Tree.chain(2)))


def test_many_combinations_are_thinned():
    part = sj.NgramDrafter(sj.Tree.chain(10))
    assert len(part.subtrees) == 3
    assert sj.HybridDrafter((part, part)).subtrees == ((0,), (0, *range(2, 21, 2)), (0, *range(1, 20, 2)))


@pytest.mark.usefixtures("xla_products")
def test_subtree_choices_are_the_cheapest_that_hold_the_drafts():
    """By number of rows; one that is padded to as many as one that holds it is left out, another as wide is not."""
    part = sj.NgramDrafter(sj.Tree.chain(2))
    both = loop.subtree_choices(sj.HybridDrafter((part, part)), jnp.bfloat16, batched=False)
    assert both == [((0,), 1), ((0, 2, 4), 3), ((0, 1, 3), 3), ((0, 1, 2, 3, 4), 5)]
    long = sj.NgramDrafter(sj.Tree.chain(7), reach=(5,))
    assert loop.subtree_choices(long, jnp.float32, batched=False) == [((0,), 1), (tuple(range(8)), 8)]
    assert [rows for _, rows in loop.subtree_choices(long, jnp.float32, batched=True)] == [1, 6, 8]
    assert loop.subtree_choices(sj.drafters.base.NoDrafter(), jnp.float32, batched=False) == [((0,), 1)]
