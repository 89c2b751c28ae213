"""Self-distillation: batches equal single generations, features are the right ones, shards resume."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specjax as sj
from specjax.model import forward, unembed
from specjax.training.distill import Answers, answer, distinct, read_shards, user_turns, write_shards
from specjax.training.seeds import seed_prompts

PROMPTS = [[7, 3, 50], [1], list(range(40)), [9, 9, 2, 4]]


def stopping(model: sj.Model) -> sj.Model:
    """The model with an EOS that some of the prompts' answers reach early."""
    told = sj.generate(model, PROMPTS[0], max_new_tokens=20).tokens
    return dataclasses.replace(model, config=dataclasses.replace(model.config, eos_token_ids=(int(told[5]),)))


def test_answers_are_those_of_generate_with_the_features_that_predicted_them(model):
    model = stopping(model)
    made = answer(model, PROMPTS, acceptance=sj.Greedy(), max_new_tokens=20, key=jax.random.key(0))
    ends = np.cumsum(made.lengths)
    assert len(made.tokens) == len(made.features) == ends[-1]
    for prompt, tokens, features in zip(
        PROMPTS, np.split(made.tokens, ends[:-1]), np.split(made.features, ends[:-1]), strict=True
    ):
        np.testing.assert_array_equal(tokens, sj.generate(model, prompt, max_new_tokens=20).tokens)
        exact = forward(model.params, model.config, jnp.asarray([*prompt, *tokens])).features
        exact = exact[len(prompt) - 1 : -1]
        np.testing.assert_allclose(features.astype(np.float32), exact, rtol=1e-2, atol=1e-3)  # bfloat16 on disk
        np.testing.assert_array_equal(unembed(model.params, exact).argmax(-1), tokens)


def test_no_prompts(model):
    with pytest.raises(sj.DataError, match="no prompts"):
        answer(model, [], acceptance=sj.Greedy(), max_new_tokens=4, key=jax.random.key(0))


def test_shards_resume_without_redoing_or_losing_any(smollm2, tmp_path):
    def prompts_for(shard):
        return seed_prompts(3, shard)

    def write(directory, shards):
        done = []
        write_shards(smollm2, directory, shards, prompts_for, max_new_tokens=6, progress=lambda s, n: done.append(s))
        return done

    assert write(tmp_path / "a", 3) == [0, 1, 2]
    assert write(tmp_path / "b", 2) == [0, 1]
    (tmp_path / "b" / "shard_00002.tmp.npz").write_bytes(b"cut off")  # what a kill leaves behind
    assert write(tmp_path / "b", 3) == [2]
    one, two = (read_shards(sorted((tmp_path / d).glob("shard_?????.npz"))) for d in "ab")
    np.testing.assert_array_equal(one.tokens, two.tokens)
    np.testing.assert_array_equal(one.features, two.features)
    assert one.lengths.tolist() == two.lengths.tolist()
    assert len(one.lengths) == 9


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


def test_no_shards():
    with pytest.raises(sj.DataError, match="no data shards"):
        read_shards([])
