"""The shipped draft model as a target: sampling is lossless on real weights, and its own heads are good."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specjax as sj
from specjax.corpus.prompts import load_prompts
from specjax.heads import init_heads
from specjax.ranks.measuring import Text, measure
from specjax.studies.two_sample import p_value, sample


@pytest.fixture(scope="module")
def small():
    """The shipped draft model as a target: a trained Qwen2."""
    model, token_map = sj.load_draft("smollm2-draft")
    assert model.config.family == "qwen2"
    assert model.params.layers[0].qkv_bias is not None
    assert token_map.shape == (model.config.vocab_size,)
    return model


def disturbed(model):
    """A draft of the same kind that is often wrong."""
    leaves, structure = jax.tree.flatten(model.params)
    keys = jax.random.split(jax.random.key(3), len(leaves))
    noisy = [x + 0.3 * x.std() * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return dataclasses.replace(model, params=jax.tree.unflatten(structure, noisy))


@pytest.fixture(scope="module")
def repeated(smollm2, small):
    """A question, its greedy answer and the question again, in the draft's tokens: what n-grams are good at."""
    token_map = sj.load_draft("smollm2-draft")[1].tolist()
    chat = smollm2.tokenizer.apply_chat_template([{"role": "user", "content": "Name three rivers."}])
    question = [token_map.index(t) for t in chat if t in token_map]
    return [*question, *sj.generate(small, question, max_new_tokens=12, eos_token_ids=()).tokens, *question]


@pytest.fixture(scope="module")
def draw(small, repeated):
    """Samples three tokens, 20,000 times."""

    @functools.cache
    def plain(seed, temperature=1.0):
        return sampled(None, seed, temperature)[0]

    def sampled(drafter, seed, temperature=1.0):
        return sample(
            small, repeated, drafter=drafter, acceptance=sj.Sample(temperature), length=3, samples=20_000,
            batch_size=500, key=jax.random.key(seed),
        )  # fmt: skip

    return plain, sampled


@pytest.fixture(scope="module")
def questions(smollm2):
    """Shipped prompts in the draft model's tokens; those that it lacks are its last one."""
    row = {token: i for i, token in enumerate(sj.load_draft("smollm2-draft")[1].tolist())}
    texts = [p.turns[0] for p in load_prompts() if p.category in ("chat", "code", "math")]
    chats = [smollm2.tokenizer.apply_chat_template([{"role": "user", "content": text}]) for text in texts[:20]]
    return sorted(([row.get(token, len(row) - 1) for token in chat] for chat in chats), key=len)


@pytest.mark.full
def test_a_trained_qwen2_with_its_own_heads(small, questions):
    """Greedy answers stay what they are, and the heads know them far better than the LM head, where they started."""
    heads = sj.load_heads("smollm2-draft", small.config)
    request = {"max_new_tokens": 64, "capacity": 512}
    plain = sj.generate_batch(small, questions, **request)
    drafter = sj.MedusaDrafter(heads, sj.Tree.cartesian((3, 2, 1)))
    drafted = sj.generate_batch(small, questions, drafter=drafter, **request)
    for ours, theirs in zip(drafted, plain, strict=True):
        np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    assert sum(len(out.tokens) - 1 for out in plain) / sum(out.rounds for out in drafted) > 1.6
    texts = [Text(ids, out.tokens) for ids, out in zip(questions, plain, strict=True) if len(out.tokens) > 1]
    start = init_heads(heads.config, small.params, np.asarray(heads.token_map))
    fitted, before = (measure(small, h, texts).hits()[:, 0] for h in (heads, start))
    assert (fitted - before > np.array([0.25, 0.15, 0.1, 0.1])).all()


@pytest.mark.full
@pytest.mark.parametrize("name", ["draft chain", "draft tree", "ngram"])
def test_sampling_is_the_targets_on_real_weights(small, draw, name):
    """T = 1, three tokens, 20,000 samples with and without speculation."""
    plain, sampled = draw
    wrong = disturbed(small)
    chain = sj.DraftModelDrafter(wrong, sj.Tree.chain(2), temperature=1.0)
    drafter = {
        "draft chain": chain,
        "draft tree": dataclasses.replace(chain, tree=sj.Tree.cartesian((2, 1))),
        "ngram": sj.NgramDrafter(sj.Tree.cartesian((2, 1))),
    }[name]
    ours, accepted = sampled(drafter, len(name))
    assert accepted > 0.1
    assert p_value(plain(0), ours) > 1e-3


@pytest.mark.full
def test_two_autoregressive_samples_agree_and_a_greedier_one_does_not(draw):
    plain, _ = draw
    assert p_value(plain(0), plain(1)) > 1e-3
    assert p_value(plain(0), plain(5, 0.9)) < 1e-3


def test_the_shipped_draft_is_small_and_knows_its_target(smollm2):
    model, token_map = sj.load_draft("smollm2-draft", dtype=jnp.bfloat16)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)) < 16e6
    sj.DraftModelDrafter(model, sj.Tree.chain(1), token_map=jnp.asarray(token_map)).check(smollm2)
