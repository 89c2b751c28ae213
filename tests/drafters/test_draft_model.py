"""The draft model as a drafter: its cache, its vocabulary, its drafts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from conftest import tiered, tiny_model

import specjax as sj
from specjax import decode, loop
from specjax.drafters.base import Context
from specjax.loading.tokenizer import Tokenizer
from specjax.target.model import forward, unembed

PROMPT = np.array([7, 3, 50, 11, 4])
CHAIN = sj.Tree.chain(1)
TREE = sj.Tree.from_paths([(0,), (1,), (0, 0), (0, 2), (1, 0), (0, 0, 0)])


@pytest.mark.parametrize(
    "case", tiered(lambda case: case in ("greedy", "subtrees"), ["greedy", "sampled", "hybrid", "subtrees"])
)
def test_both_caches_hold_exactly_the_committed_tokens(case):
    model, draft = tiny_model(0, 0.3), tiny_model(9, 0.3, num_layers=1, family="qwen2", qkv_bias=True)
    read_anew = jax.jit(forward, static_argnums=1)
    drafter = sj.DraftModelDrafter(draft, TREE, 1.0 if case == "sampled" else 0.0)
    acceptance = sj.Sample() if case == "sampled" else sj.Greedy()
    if case == "hybrid":  # whose other part is deeper, and right: the draft model must read more than its own depth
        model = tiny_model(3, 0.0)  # says one token for ever
        drafter = sj.HybridDrafter((sj.NgramDrafter(sj.Tree.chain(4)), dataclasses.replace(drafter, tree=CHAIN)))
    if case == "subtrees":  # the target reads 3, 4 or 8 rows of them
        ngram = sj.NgramDrafter(sj.Tree.chain(5), reach=(1,))
        drafter = sj.HybridDrafter((ngram, dataclasses.replace(drafter, tree=sj.Tree.chain(2))))
    step = jax.jit(loop.decode_round)
    state = decode.prefill(
        model, PROMPT, drafter=drafter, acceptance=acceptance, max_new_tokens=30, key=jax.random.key(2)
    )
    while True:
        drafted = state.draft[1] if isinstance(drafter, sj.HybridDrafter) else state.draft
        for cache, owner, length in (
            (state.cache, model, int(state.length) - 1),
            (drafted.cache, draft, int(state.length)),
        ):
            assert int(cache.length) == length
            fresh = read_anew(owner.params, owner.config, state.tokens)  # causal: what lies behind does not matter
            for mine, theirs in zip(cache.k, fresh.rows.k, strict=True):
                np.testing.assert_allclose(mine[:, :, :length], theirs[:, :, :length], atol=1e-5)
            for mine, theirs in zip(cache.v, fresh.rows.v, strict=True):
                np.testing.assert_allclose(mine[:, :length], theirs[:, :length], atol=1e-5)
        np.testing.assert_allclose(drafted.features, fresh.features[length - 1], atol=1e-5)
        if state.finished:
            break
        state = step(loop.Plan(model.params, drafter, (), model.config, acceptance), state)
    assert int(state.length) == len(PROMPT) + 30
    if case == "hybrid":
        assert int(state.accepted.max()) == 4


def path_to(tree, node):
    return tree.node_paths[node][: tree.depths[node] + 1]


def propose(drafter, target, key=0):
    tokens = jnp.zeros(64, jnp.int32).at[: len(PROMPT)].set(PROMPT)
    context = Context(tokens, jnp.int32(len(PROMPT)), jnp.zeros(target.config.hidden_size))
    drafter = drafter.prepare(target.params)
    state = jax.jit(drafter.init)(target.params, context)
    return jax.jit(drafter.propose)(target.params, state, context, jax.random.key(key))


@functools.partial(jax.jit, static_argnums=1)
def _every_logit(params, config, tokens):
    return unembed(params, forward(params, config, tokens).features)


def logits_after(model, before):
    """The model's logits after these tokens; one compilation for all lengths."""
    tokens = np.zeros(16, np.int32)
    tokens[: len(before)] = before
    return np.asarray(_every_logit(model.params, model.config, tokens)[len(before) - 1])


def test_greedy_drafts_are_the_best_tokens_after_each_path(model):
    draft = tiny_model(9)
    tokens = np.asarray(propose(sj.DraftModelDrafter(draft, TREE), model).tokens)
    for node in range(1, TREE.size):
        before = [*PROMPT[:-1], *tokens[path_to(TREE, TREE.parents[node])]]
        assert tokens[node] == np.argsort(-logits_after(draft, before), kind="stable")[TREE.ranks[node]]


def test_sampled_drafts_carry_the_laws_they_were_drawn_from(model):
    draft = tiny_model(9)
    drafter = sj.DraftModelDrafter(draft, TREE, 0.8, top_k=9)
    out = propose(drafter, model)
    tokens, q = np.asarray(out.tokens), np.exp(np.asarray(out.log_q))
    for parent, below in enumerate(TREE.children):
        before = [*PROMPT[:-1], *tokens[path_to(TREE, parent)]]
        logits = np.asarray(logits_after(draft, before), np.float64) / 0.8
        logits[np.argsort(-logits)[9:]] = -np.inf
        for node in below:
            law = np.exp(logits - logits.max())
            np.testing.assert_allclose(q[node], law / law.sum(), atol=1e-5)
            logits[tokens[node]] = -np.inf  # drawn without replacement
        assert len(set(tokens[list(below)])) == len(below)


def test_first_sibling_is_drawn_from_the_draft(model):
    drafter = sj.DraftModelDrafter(tiny_model(9), CHAIN, 1.0).prepare(model.params)
    tokens = jnp.zeros(64, jnp.int32).at[: len(PROMPT)].set(PROMPT)
    context = Context(tokens, jnp.int32(len(PROMPT)), jnp.zeros(model.config.hidden_size))
    state = jax.jit(drafter.init)(model.params, context)
    draw = jax.jit(jax.vmap(lambda key: drafter.propose(model.params, state, context, key).tokens[1]))
    drawn = np.asarray(draw(jax.random.split(jax.random.key(0), 20_000)))
    q = np.exp(np.asarray(propose(drafter, model).log_q[1]))
    np.testing.assert_allclose(np.bincount(drawn, minlength=61) / 20_000, q, atol=4 * np.sqrt(0.25 / 20_000))


def test_a_model_drafting_for_itself_is_always_right(model):
    out = sj.generate(model, PROMPT, drafter=sj.DraftModelDrafter(model, sj.Tree.chain(4)), max_new_tokens=41)
    assert set(out.accepted_lengths) == {4}
    sampled = sj.generate(
        model, PROMPT, drafter=sj.DraftModelDrafter(model, sj.Tree.chain(4), 0.9), acceptance=sj.Sample(0.9),
        max_new_tokens=41, key=jax.random.key(1),
    )  # fmt: skip
    assert set(sampled.accepted_lengths) == {4}


def relabelled(draft, ids):
    """The draft over a reduced vocabulary: rows `ids` of its embedding, and the first of all for the other tokens."""
    embed = jnp.concatenate([draft.params.embed[jnp.asarray(ids)], draft.params.embed[:1]])
    lm_head = None if draft.params.lm_head is None else jnp.concatenate([draft.params.lm_head[jnp.asarray(ids)]] * 2)
    params = dataclasses.replace(draft.params, embed=embed, lm_head=lm_head)
    return sj.Model(params, dataclasses.replace(draft.config, vocab_size=len(ids) + 1), None)


def test_a_reduced_vocabulary_drafts_target_ids(model):
    draft, ids = tiny_model(9, tie_word_embeddings=True), [7, 3, 50, 11, 4, 20, 33]
    small, token_map = relabelled(draft, ids), jnp.array([*ids, -1])
    drafter = sj.DraftModelDrafter(small, TREE, token_map=token_map)
    drafter.check(model)
    tokens = np.asarray(propose(drafter, model).tokens)
    assert set(tokens.tolist()) <= set(ids)
    for node in (1, 2):
        logits = logits_after(draft, PROMPT)[ids]
        assert tokens[node] == ids[np.argsort(-logits, kind="stable")[TREE.ranks[node]]]
    base = sj.generate(model, PROMPT, max_new_tokens=30)
    out = sj.generate(model, PROMPT, drafter=drafter, max_new_tokens=30)
    np.testing.assert_array_equal(out.tokens, base.tokens)


def word_level(names):
    """A tokenizer of one word per token."""
    vocab = {name: number for number, name in enumerate(names)}
    return Tokenizer(tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token=names[0])))


WORDS = [f"word{n}" for n in range(56)]


@pytest.mark.full
def test_vocabularies_that_differ_in_padding_work():
    tokenizer = word_level(WORDS)
    larger, smaller = (dataclasses.replace(tiny_model(3, vocab=n), tokenizer=tokenizer) for n in (64, 56))
    for target, draft in ((larger, smaller), (smaller, larger)):
        for temperature in (0.0, 1.0):
            acceptance = sj.Sample() if temperature else sj.Greedy()
            drafter = sj.DraftModelDrafter(draft, sj.Tree.cartesian((2, 1)), temperature)
            request = {"acceptance": acceptance, "max_new_tokens": 12, "key": jax.random.key(0)}
            out = sj.generate(target, PROMPT, drafter=drafter, **request)
            assert len(out.tokens) == 12
            if not temperature:
                np.testing.assert_array_equal(out.tokens, sj.generate(target, PROMPT, **request).tokens)


def test_different_vocabularies_are_refused(model):
    with pytest.raises(sj.ConfigError, match="62 and 61"):
        sj.generate(model, PROMPT, drafter=sj.DraftModelDrafter(tiny_model(vocab=62), TREE))
    swapped = [*WORDS[:10], WORDS[11], WORDS[10], *WORDS[12:]]
    draft = dataclasses.replace(tiny_model(vocab=56), tokenizer=word_level(swapped))
    target = dataclasses.replace(tiny_model(vocab=56), tokenizer=word_level(WORDS))
    with pytest.raises(sj.ConfigError, match="id 10"):
        sj.generate(target, PROMPT, drafter=sj.DraftModelDrafter(draft, TREE))


def test_a_request_beyond_the_drafts_context_is_refused(model):
    drafter = sj.HybridDrafter((sj.NgramDrafter(CHAIN), sj.DraftModelDrafter(tiny_model(9, max_positions=32), CHAIN)))
    with pytest.raises(sj.PromptError, match="draft model's context of 32"):
        sj.generate(model, PROMPT, drafter=drafter, max_new_tokens=28)


def test_an_equal_draft_loaded_anew_compiles_nothing(model):
    def request():
        tokenizer = word_level(WORDS)  # hashed by identity
        draft = dataclasses.replace(tiny_model(9, vocab=56), tokenizer=tokenizer)
        target = dataclasses.replace(tiny_model(vocab=56), tokenizer=tokenizer)
        sj.generate(target, PROMPT, drafter=sj.DraftModelDrafter(draft, CHAIN), max_new_tokens=4)
        return decode._first_token._cache_size(), decode._run_rounds._cache_size()

    assert request() == request()


@pytest.mark.parametrize(
    ("ids", "message"), [([1, 2], "shape"), ([1] * 61, "distinct"), ([*range(60), 99], "below 61"), ([-1, -1], "shape")]
)
def test_bad_token_maps_are_refused(model, ids, message):
    with pytest.raises(sj.ConfigError, match=message):
        sj.generate(model, PROMPT, drafter=sj.DraftModelDrafter(tiny_model(9), TREE, token_map=jnp.array(ids)))


def test_a_map_must_say_how_other_tokens_are_read(model):
    small = relabelled(tiny_model(9), [1, 2, 3])
    with pytest.raises(sj.ConfigError, match="stands for all others"):
        sj.generate(model, PROMPT, drafter=sj.DraftModelDrafter(small, TREE, token_map=jnp.array([1, 2, 3, 4])))


def test_more_siblings_than_tokens_are_refused():
    mock = tiny_model(vocab=3)
    with pytest.raises(sj.TreeError, match="siblings"):
        sj.generate(mock, [1], drafter=sj.DraftModelDrafter(mock, sj.Tree.cartesian((4,))))


def test_a_drafter_prepared_for_another_target_is_refused(model):
    ready = sj.DraftModelDrafter(tiny_model(9), TREE).prepare(model.params)
    ready.check(model)
    with pytest.raises(sj.ConfigError, match="prepared for a target of 61 tokens, and this one has 70"):
        sj.generate(tiny_model(vocab=70), PROMPT, drafter=ready)


def test_sampling_parameters_are_checked(model):
    with pytest.raises(sj.ConfigError, match="temperature"):
        sj.DraftModelDrafter(model, TREE, -1.0)
