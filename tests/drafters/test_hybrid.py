"""Hybrids, and what all drafters have in common: greedy identity, streaming, seeds, batches."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from conftest import noisy_heads, tiered, tiny_model
from fast_keys import fast_key

import specjax as sj

PROMPT = np.array([7, 3, 50, 11, 4, 7, 3, 50])
TREES = [sj.Tree.chain(3), sj.Tree.cartesian((3, 2)), sj.Tree.preset("mc_sim_7b_63")]
# Shapes and rules that tests have in common, so that they share compiled programs.
EOS = (17,)
RULES = [sj.Greedy(), sj.Sample(0.8, top_p=0.95), sj.Typical()]


@pytest.fixture(scope="module")
def model():
    """One layer, which compiles faster; tests/test_decode.py has two."""
    return target()


@functools.cache
def target():
    return tiny_model(num_layers=1)


@functools.cache
def drafters(tree):
    model = target()
    ngram, medusa = sj.NgramDrafter(tree), sj.MedusaDrafter(noisy_heads(model, 5), tree)
    draft = sj.DraftModelDrafter(tiny_model(9, num_layers=1), sj.Tree.cartesian((2, 1)))
    drawn = dataclasses.replace(draft, temperature=1.0)
    return {
        "ngram": ngram,
        "medusa": medusa,
        "draft model": dataclasses.replace(draft, tree=tree),
        "sampled draft model": dataclasses.replace(drawn, tree=tree),
        "ngram + medusa": sj.HybridDrafter((sj.NgramDrafter(sj.Tree.chain(4)), medusa)),
        "medusa + ngram + draft model": sj.HybridDrafter((medusa, ngram, draft)),
        "ngram + sampled draft model": sj.HybridDrafter((ngram, drawn)),
        "hybrid of a hybrid": sj.HybridDrafter((sj.HybridDrafter((ngram, drawn)), medusa)),
    }


NAMES = list(drafters(TREES[0]))
WIDEST = "medusa + ngram + draft model"  # of all kinds of parts
STREAMED = ("ngram", "sampled draft model", "ngram + sampled draft model", WIDEST)  # in the fast tier, where sampled


def named(value):
    """In a test's id."""
    return value if isinstance(value, str) else getattr(value, "name", None) or type(value).__name__


@pytest.mark.parametrize(
    ("name", "tree"),
    tiered(lambda name, tree: tree is TREES[1] or name in ("medusa", WIDEST), NAMES, TREES, ids=named),
)
def test_greedy_output_is_autoregressive(model, tree, name):
    drafter, request = (
        drafters(tree)[name],
        {"max_new_tokens": 60, "capacity": 128, "eos_token_ids": (), "key": fast_key(5)},
    )
    base = sj.generate(model, PROMPT, **request)
    out = sj.generate(model, PROMPT, drafter=drafter, **request)
    np.testing.assert_array_equal(out.tokens, base.tokens)


@pytest.mark.parametrize(
    ("acceptance", "name"),
    tiered(
        lambda rule, name: name == "medusa" or (isinstance(rule, sj.Sample) and name in STREAMED),
        RULES,
        NAMES,
        ids=named,
    ),
)
def test_streams_and_seeds_agree(model, name, acceptance):
    drafter = drafters(sj.Tree.cartesian((2, 2)))[name]
    request = {"drafter": drafter, "acceptance": acceptance, "max_new_tokens": 25, "eos_token_ids": EOS}
    first = sj.generate(model, PROMPT, key=fast_key(4), **request)
    again = sj.generate(model, PROMPT, key=fast_key(4), **request)
    np.testing.assert_array_equal(first.tokens, again.tokens)
    assert len(first.tokens) > 9
    streamed = [t for item in sj.stream(model, PROMPT, key=fast_key(4), **request) for t in item.tokens]
    assert streamed == first.tokens.tolist()
    if isinstance(acceptance, sj.Sample):
        other = sj.generate(model, PROMPT, key=fast_key(6), **request)
        assert other.tokens.tolist() != first.tokens.tolist()


@pytest.mark.parametrize("name", NAMES)
def test_eos_ends_the_output(model, name):
    drafter = drafters(sj.Tree.cartesian((2, 2)))[name]
    told = sj.generate(model, PROMPT, max_new_tokens=30, eos_token_ids=(), key=fast_key(0)).tokens.tolist()
    stop = told[17]
    out = sj.generate(model, PROMPT, drafter=drafter, max_new_tokens=30, eos_token_ids=(stop,), key=fast_key(0))
    assert out.tokens.tolist() == told[: told.index(stop) + 1]


@pytest.mark.parametrize("name", tiered(lambda name: name in ("none", "medusa", WIDEST), ["none", *NAMES]))
def test_a_batch_gives_each_prompt_what_it_gets_alone(model, name):
    drafter = None if name == "none" else drafters(sj.Tree.cartesian((2, 2)))[name]
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 61, n) for n in (1, 70, 5, 64, 23)]
    keys = jax.random.split(fast_key(8), len(prompts))
    stop = tuple(sj.generate(model, prompts[2], max_new_tokens=9, key=keys[0]).tokens[-1:].tolist())  # one ends early
    for acceptance in RULES[:2]:
        request = {"drafter": drafter, "acceptance": acceptance, "max_new_tokens": 30, "capacity": 128}
        together = sj.generate_batch(model, prompts, keys=keys, eos_token_ids=stop, **request)
        for prompt, key, out in zip(prompts, keys, together, strict=True):
            alone = sj.generate(model, prompt, key=key, eos_token_ids=stop, **request)
            np.testing.assert_array_equal(out.tokens, alone.tokens)
            np.testing.assert_array_equal(out.accepted_lengths, alone.accepted_lengths)


def test_a_batch_refuses_what_it_cannot_decode(model):
    with pytest.raises(sj.PromptError, match="no prompts"):
        sj.generate_batch(model, [])
    with pytest.raises(sj.PromptError, match="split"):
        sj.generate_batch(model, [PROMPT, PROMPT], acceptance=sj.Sample(), keys=jax.random.split(fast_key(0), 3))
    with pytest.raises(sj.PromptError, match="-1"):
        sj.generate_batch(model, [PROMPT], max_new_tokens=-1)
    assert sj.generate_batch(model, [PROMPT], max_new_tokens=0)[0].tokens.size == 0


def test_merged_trees_keep_their_shapes(model):
    parts = (
        sj.NgramDrafter(sj.Tree.chain(3)),
        sj.NgramDrafter(sj.Tree.cartesian((2, 2))),
        sj.NgramDrafter(sj.Tree.chain(1)),
    )
    tree = sj.HybridDrafter(parts).tree
    assert tree.size == 1 + 3 + 6 + 1
    assert set(tree.rank_paths) == {
        (0,), (0, 0), (0, 0, 0), (1,), (2,), (1, 0), (1, 1), (2, 0), (2, 1), (3,)
    }  # fmt: skip


def test_a_hybrid_is_as_good_as_its_best_part(model):
    ngram, draft = sj.NgramDrafter(sj.Tree.chain(3)), sj.DraftModelDrafter(model, sj.Tree.chain(3))
    out = sj.generate(model, PROMPT, drafter=sj.HybridDrafter((ngram, draft)), max_new_tokens=41)
    # The n-gram branch comes first; the draft model's own branch is right to the end, and the longest one wins.
    assert set(out.accepted_lengths[:-1]) == {3}


def test_a_hybrid_needs_parts():
    with pytest.raises(sj.ConfigError, match="no parts"):
        sj.HybridDrafter(())


def test_a_part_that_does_not_fit_is_refused(model):
    medusa = sj.MedusaDrafter(noisy_heads(model, 2), sj.Tree.chain(4))
    with pytest.raises(sj.TreeError, match="2 heads"):
        sj.generate(model, PROMPT, drafter=sj.HybridDrafter((medusa,)))
