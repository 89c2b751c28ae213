"""The n-gram drafter against a plain search of the text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import noisy_heads

import specjax as sj
from specjax import loop
from specjax.acceptance import NO_DRAFT
from specjax.drafters.base import Context

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
    tree, out = drafter.tree, [text[-1]]
    for node in range(1, tree.size):
        path = []
        above = tree.parents[node]
        while above > 0:
            path.insert(0, out[above])
            above = tree.parents[above]
        if NO_DRAFT in path:
            out.append(NO_DRAFT)
            continue
        context, limit, found = [*text, *path], drafter.max_n + len(path), []
        for at in range(len(text) - 1):  # the match ends at `at`, what followed is text[at + 1]
            n = 0
            while n < limit and n <= at and text[at - n] == context[-1 - n]:
                n += 1
            if n >= drafter.min_n:
                found.append((n, at))
        followers = list(dict.fromkeys(text[at + 1] for _, at in sorted(found, reverse=True)))
        rank = tree.ranks[node]
        out.append(followers[rank] if rank < len(followers) else NO_DRAFT)
    return out


@pytest.mark.parametrize("tree", TREES, ids=str)
@pytest.mark.parametrize(("min_n", "max_n"), [(1, 1), (1, 3), (2, 4)])
def test_drafts_equal_a_plain_search(tree, min_n, max_n):
    drafter, rng, drafted = sj.NgramDrafter(tree, max_n, min_n), np.random.default_rng(0), 0
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


@pytest.mark.parametrize("acceptance", [sj.Greedy(), sj.Sample(0.8)], ids=["greedy", "sampled"])
def test_a_round_without_drafts_reads_the_root_alone(model, monkeypatch, acceptance):
    """The widths of the target forwards as they ran, beside what was drafted in each round."""
    drafter, widths, expected, prompt = sj.NgramDrafter(sj.Tree.chain(3), min_n=2), [], [], [5, 6, 7, 5, 6]
    forward = loop.forward

    def recorded(params, config, tokens, **kwargs):
        jax.debug.callback(widths.append, tokens.shape[0], ordered=True)
        return forward(params, config, tokens, **kwargs)

    monkeypatch.setattr(loop, "forward", recorded)
    state = jax.jit(loop.start, static_argnums=(1, 3, 4))(
        model.params, model.config, drafter, acceptance, (), jnp.asarray(prompt + [0] * 59), jnp.int32(len(prompt)),
        jnp.int32(45), jax.random.key(1),
    )  # fmt: skip
    step = jax.jit(loop.round_, static_argnums=(1, 3, 4))
    while not state.finished:
        drafts = propose(drafter, state.tokens, state.length)[1:]
        expected.append(4 if np.any(drafts != NO_DRAFT) else 1)
        state = step(model.params, model.config, drafter, acceptance, (), state)
    jax.effects_barrier()
    assert [int(width) for width in widths] == expected
    assert {1, 4} == set(expected)
    if acceptance == sj.Greedy():
        alone = sj.generate(model, prompt, max_new_tokens=40, eos_token_ids=()).tokens
        assert state.tokens[5:45].tolist() == alone.tolist()


def test_a_hybrid_abstains_only_where_all_its_parts_do(model):
    ngram, medusa = sj.NgramDrafter(sj.Tree.chain(1)), sj.MedusaDrafter(noisy_heads(model, 1), sj.Tree.chain(1))
    assert sj.HybridDrafter((ngram, ngram)).abstains
    assert not sj.HybridDrafter((ngram, medusa)).abstains
