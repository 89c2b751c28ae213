"""Self-distillation: batches equal single generations, features are the right ones, ended members make room."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specjax as sj
from specjax.corpus import answers as distill
from specjax.corpus.answers import Answers, answer, distinct, user_turns
from specjax.corpus.conversation import Conversation
from specjax.corpus.features import with_features
from specjax.target.model import forward, unembed

PROMPTS = [[7, 3, 50], [1], list(range(40)), [9, 9, 2, 4], [5], [8, 1], [30, 2, 2], [11]]
LENGTH = 20


@pytest.fixture(scope="module")
def stopping(model) -> sj.Model:
    """The model with EOS tokens that the prompts' answers reach at different times."""
    told = [sj.generate(model, prompt, max_new_tokens=LENGTH).tokens for prompt in PROMPTS]
    stops = {int(told[0][5]), int(told[1][9]), int(told[4][2]), int(told[6][3])}
    return dataclasses.replace(model, config=dataclasses.replace(model.config, eos_token_ids=tuple(sorted(stops))))


def pieces(made):
    ends = np.cumsum(made.lengths)
    assert len(made.tokens) == len(made.features) == ends[-1]
    return zip(np.split(made.tokens, ends[:-1]), np.split(made.features, ends[:-1]), strict=True)


def test_answers_are_those_of_generate_with_the_features_that_predicted_them(stopping, monkeypatch):
    sizes = []
    pick = distill._pick
    monkeypatch.setattr(distill, "_pick", lambda carry, members: sizes.append(len(members)) or pick(carry, members))
    made = answer(stopping, PROMPTS, acceptance=sj.Greedy(), max_new_tokens=LENGTH, key=jax.random.key(0), smallest=4)
    assert sizes == [4]  # ended members made room
    assert len(set(made.lengths.tolist())) > 3
    for prompt, (tokens, _) in zip(PROMPTS, pieces(made), strict=True):
        np.testing.assert_array_equal(tokens, sj.generate(stopping, prompt, max_new_tokens=LENGTH).tokens)
    # One pass over the finished text sees the same features, bfloat16 both.
    read = with_features(
        stopping, [Conversation(np.array(p), t) for p, (t, _) in zip(PROMPTS, pieces(made), strict=True)]
    )
    for item, (_, features) in zip(read, pieces(made), strict=True):
        np.testing.assert_allclose(features.astype(np.float32), item.features.astype(np.float32), rtol=2e-2, atol=2e-3)
    tokens, features = next(pieces(made))
    exact = forward(stopping.params, stopping.config, jnp.asarray([*PROMPTS[0], *tokens])).features
    exact = exact[len(PROMPTS[0]) - 1 : -1]
    np.testing.assert_allclose(features.astype(np.float32), exact, rtol=1e-2, atol=1e-3)
    np.testing.assert_array_equal(unembed(stopping.params, exact).argmax(-1), tokens)


def test_company_does_not_change_what_is_sampled(stopping):
    key, rule = jax.random.key(1), sj.Sample(0.8)
    prompts = PROMPTS[:6]  # the second batch is filled up with rows that count for nothing
    made = answer(stopping, prompts, acceptance=rule, max_new_tokens=LENGTH, key=key, batch_size=4)
    assert len(made.lengths) == 6
    for prompt, own, (tokens, _) in zip(prompts, jax.random.split(key, 6), pieces(made), strict=True):
        alone = sj.generate(stopping, prompt, acceptance=rule, max_new_tokens=LENGTH, key=own)
        np.testing.assert_array_equal(tokens, alone.tokens)


def test_prompts_of_like_length_share_a_batch():
    lengths = [100] * 10 + [300] * 20 + [40] * 70
    groups = list(distill._grouped(lengths, 64, 8))
    assert [(len(members), size, width) for members, size, width in groups] == [
        (64, 64, 128),
        (16, 16, 128),
        (20, 32, 384),
    ]
    assert {lengths[i] for i in groups[0][0]} == {40}
    assert sorted(i for members, *_ in groups for i in members) == list(range(100))


def test_prompts_that_cannot_be_answered(model):
    def ask(prompts, count=4):
        answer(model, prompts, acceptance=sj.Greedy(), max_new_tokens=count, key=jax.random.key(0))

    with pytest.raises(sj.DataError, match="no prompts"):
        ask([])
    with pytest.raises(sj.DataError, match="prompt 1 has 0 tokens"):
        ask([[1], []])
    with pytest.raises(sj.DataError, match=r"prompt 0 has 500 tokens; with answers of up to 20 .* takes 1 to 492"):
        ask([[1] * 500], 20)


@pytest.mark.full
def test_user_turns_are_text_without_markers(smollm2):
    turns = user_turns(smollm2, 6, key=jax.random.key(3), max_tokens=24)
    assert turns == user_turns(smollm2, 6, key=jax.random.key(3), max_tokens=24)
    assert all(turn and "<|im" not in turn for turn in turns)


def test_distinct_drops_repeats_and_leaks():
    def made(*conversations):
        tokens = np.concatenate(conversations)
        return Answers(tokens, tokens[:, None].astype(np.float32), np.array([len(c) for c in conversations]))

    kept = distinct(made([1, 2], [3], [1, 2], [4, 5], [6]), without=made([3], [4]))
    assert kept.tokens.tolist() == [1, 2, 4, 5, 6]
    assert kept.lengths.tolist() == [2, 2, 1]
    assert kept.features[:, 0].tolist() == [1, 2, 4, 5, 6]
