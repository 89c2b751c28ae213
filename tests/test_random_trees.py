"""Any valid tree: the loop agrees with the path-by-path oracle, and committing any of its paths is a replay of it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import noisy_heads
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

import specjax as sj
from specjax import decode, loop, reference
from specjax.heads import draft_projection, top_tokens
from specjax.proposal import Verdict
from specjax.target.model import forward

PROMPT = np.array([7, 3, 50, 11, 4])
HEADS, RANKS, NODES = 4, 6, 14


@st.composite
def trees(draw):
    """Trees of up to NODES nodes, in any order of children and ranks that a tree may have."""
    paths = [()]
    for _ in range(draw(st.integers(1, NODES - 1))):
        above = draw(st.sampled_from([path for path in paths if len(path) < HEADS]))
        free = [rank for rank in range(RANKS) if (*above, rank) not in paths]
        if free:
            paths.append((*above, draw(st.sampled_from(free))))
    return sj.Tree.from_paths(paths[1:])


def cases(fast, many):
    """So many examples, the same in every run; none is shrunk, for every tree compiles."""
    phases = (Phase.explicit, Phase.generate)
    return settings(max_examples=many if not fast else 4, deadline=None, derandomize=True, phases=phases, database=None)


def drafting(model):
    """Heads, and their proposals as the oracle asks for them."""
    heads = noisy_heads(model, HEADS)
    projection = draft_projection(heads, model.params.unembedding)

    def propose(context, features):
        return np.asarray(top_tokens(heads, projection, jnp.asarray(features), RANKS)).tolist()

    return heads, propose


@pytest.fixture(scope="module")
def many(fast):
    """A decorator with the tier's number of examples."""
    return lambda count: cases(fast, count)


def test_the_loop_agrees_with_the_oracle(model, many):
    heads, propose = drafting(model)
    decoder = reference.ModelDecoder(model.params, model.config)

    @many(60)
    @given(trees(), st.integers(0, 60), st.booleans())
    def agree(tree, last, typical):
        prompt = [*PROMPT.tolist(), last]
        rule = sj.Typical(1.5, epsilon=0.05) if typical else sj.Greedy()
        judge = reference.typical(temperature=1.5, epsilon=0.05) if typical else reference.greedy
        drafter = sj.MedusaDrafter(heads, tree)
        ours = sj.generate(model, prompt, drafter=drafter, acceptance=rule, max_new_tokens=16, capacity=128)
        theirs = reference.generate(decoder, prompt, propose, tree, judge=judge, max_new_tokens=16)
        assert ours.tokens.tolist() == list(theirs.tokens)
        assert ours.accepted_lengths.tolist() == list(theirs.accepted_lengths)

    agree()


def test_committing_any_path_is_a_replay(model, many):
    heads, _ = drafting(model)
    prefill = jax.jit(lambda tokens: forward(model.params, model.config, tokens))
    commit = jax.jit(loop.commit)

    @many(40)
    @given(trees(), st.lists(st.integers(0, 60), min_size=2, max_size=9))
    @example(sj.Tree.from_paths([(2,), (2, 1), (2, 1, 0), (2, 1, 0, 5), (0,)]), [1, 2])
    def replay(tree, prompt):
        drafter = sj.MedusaDrafter(heads, tree)
        state = decode.prefill(model, prompt, drafter=drafter, max_new_tokens=40, capacity=128)
        plan = decode.plan_for(model, drafter, sj.Greedy(), ())
        found = jax.jit(loop.draft_and_verify)(plan, state)
        drafts = np.asarray(found.proposal.tokens)
        for node in range(tree.size):
            path = [n for n in np.flatnonzero(tree.ancestors[node]).tolist() if n]
            next_token = int(np.argmax(found.logits[node]))
            verdict = Verdict(jnp.int32(node), jnp.int32(len(path)), jnp.int32(next_token))
            done = commit(plan, state, dataclasses.replace(found, verdict=verdict))
            length = int(done.length)
            said = [*prompt, int(state.tokens[len(prompt)]), *drafts[path].tolist(), next_token]
            assert done.tokens[:length].tolist() == said
            assert int(done.cache.length) == length - 1
            # Replayed from nothing; what stands past the length cannot be seen from before it.
            fresh = prefill(done.tokens)
            np.testing.assert_allclose(done.features, fresh.features[length - 2], atol=1e-4)
            for mine, theirs in zip(done.cache.k, fresh.rows.k, strict=True):
                np.testing.assert_allclose(mine[:, :, : length - 1], theirs[:, :, : length - 1], atol=1e-4)
            for mine, theirs in zip(done.cache.v, fresh.rows.v, strict=True):
                np.testing.assert_allclose(mine[:, : length - 1], theirs[:, : length - 1], atol=1e-4)

    replay()
