"""Distilling a draft: the loss by hand, what does not count, and a draft that is accepted more than before."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config, tiny_model

import specjax as sj
from specjax.corpus.answers import answer
from specjax.corpus.conversation import conversations
from specjax.loading.load import load_draft, save_draft
from specjax.ranks.labels import frequent_tokens
from specjax.target.model import forward, unembed
from specjax.training import run
from specjax.training.draft import (
    DraftConfig,
    DraftDistillation,
    Frozen,
    distil_loss,
    evaluate_draft,
    init_draft,
    reduced_map,
)
from specjax.training.losses import DIVERGENCES
from specjax.training.packing import packed, packed_steps
from specjax.training.run import train

VOCAB = 23


@pytest.fixture(scope="module")
def text():
    """A target whose next token depends on the last one alone, and conversations of its own."""
    target = tiny_model(5, vocab=VOCAB, hidden_size=32, num_layers=1)
    layer = dataclasses.replace(target.params.layers[0], out=jnp.zeros_like(target.params.layers[0].out))
    target = dataclasses.replace(target, params=dataclasses.replace(target.params, layers=(layer,)))
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, VOCAB, rng.integers(1, 5)) for _ in range(96)]
    made = answer(target, prompts, acceptance=sj.Sample(), max_new_tokens=20, key=jax.random.key(0))
    return target, conversations(prompts, made.tokens, made.lengths, made.features)


def distil(config, target, token_map, data, held_out, settings, directory):
    objective = DraftDistillation(
        config=config, target=target, token_map=token_map, data=data, held_out=held_out, settings=settings
    )
    return train(objective, directory)


def draft_config(rows):
    """A Qwen2."""
    return tiny_config(rows, family="qwen2", qkv_bias=True, tie_word_embeddings=True, num_layers=1)


def test_the_loss_by_hand(text):
    target, data = text
    token_map = reduced_map(np.arange(0, VOCAB, 2))
    config = draft_config(len(token_map))
    draft = init_draft(jax.random.key(1), config, target.params, token_map)
    batch = next(iter(packed(data, length=64, batch_size=2, seed=0)))
    rows = {int(t): i for i, t in enumerate(token_map[:-1])}
    to_draft = np.array([rows.get(t, len(token_map) - 1) for t in range(VOCAB)])
    kl, text_loss, counted = 0.0, 0.0, 0
    for b in range(2):
        for segment in range(1, batch["segments"][b].max() + 1):
            inside = np.flatnonzero(batch["segments"][b] == segment)
            tokens = batch["tokens"][b][inside]
            out = forward(draft, config, jnp.asarray(to_draft[tokens])).features
            law = np.asarray(jax.nn.log_softmax(unembed(draft, out)[:, :-1]))
            for i in range(1, len(inside)):
                if not batch["answer"][b][inside[i]]:
                    continue
                feature = batch["features"][b][inside[i]].astype(np.float32)
                p = jax.nn.log_softmax(jnp.asarray(target.params.unembedding)[token_map[:-1]] @ feature)
                kl += float(jnp.sum(jnp.exp(p) * (p - law[i - 1])))
                text_loss -= float(law[i - 1, rows[int(tokens[i])]]) if int(tokens[i]) in rows else 0.0
                counted += 1
    projection = target.params.unembedding[token_map[:-1]]
    frozen = Frozen(target.params.unembedding, projection, jnp.asarray(token_map), jnp.asarray(to_draft))
    ours = distil_loss(draft, config, frozen, batch, "forward_kl")
    np.testing.assert_allclose(ours, [kl / counted, text_loss / counted], rtol=1e-4)


def test_the_features_are_those_that_predict_the_answer(text):
    target, data = text
    item = data[0]
    exact = forward(target.params, target.config, jnp.concatenate([item.prompt, item.answer])).features
    np.testing.assert_allclose(item.features.astype(np.float32), exact[len(item.prompt) - 1 : -1], rtol=1e-2, atol=1e-3)


def test_divergences():
    rng = np.random.default_rng(0)
    log_p, log_q = (jax.nn.log_softmax(jnp.asarray(rng.normal(size=(5, 9)))) for _ in range(2))
    p, q = np.exp(log_p), np.exp(log_q)
    m = (p + q) / 2
    by_hand = {
        "forward_kl": (p * np.log(p / q)).sum(1),
        "reverse_kl": (q * np.log(q / p)).sum(1),
        "jsd": 0.5 * (p * np.log(p / m) + q * np.log(q / m)).sum(1),
        "tvd": 1 - np.minimum(p, q).sum(1),
    }
    assert set(by_hand) == set(DIVERGENCES)
    for name, expected in by_hand.items():
        np.testing.assert_allclose(DIVERGENCES[name](log_p, log_q), expected, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(DIVERGENCES[name](log_p, log_p), 0, atol=1e-6)


@pytest.mark.full
@pytest.mark.parametrize("divergence", ["forward_kl", "tvd"])
def test_a_distilled_draft_is_accepted_more(text, tmp_path, divergence):
    target, data = text
    token_map = reduced_map(frequent_tokens(np.concatenate([i.answer for i in data]), 16, VOCAB))
    config = draft_config(len(token_map))
    training = DraftConfig(
        epochs=12, batch_size=4, length=64, learning_rate=1e-2, divergence=divergence, checkpoint_every=50
    )
    draft, log = distil(config, target.params, token_map, data[16:], data[:16], training, tmp_path)
    before, after = log[0]["eval"], log[-1]["eval"]
    assert after["acceptance"] > before["acceptance"] + 0.1
    assert after["agreement"] > before["agreement"] + 0.1
    assert after == pytest.approx(evaluate_draft(draft, config, target.params, token_map, data[:16], training))
    again, relog = distil(config, target.params, token_map, data[16:], data[:16], training, tmp_path)  # nothing to do
    jax.tree.map(np.testing.assert_array_equal, again, draft)
    assert relog == log

    save_draft(tmp_path / "draft", draft, config, token_map)
    model, stored = load_draft(tmp_path / "draft")
    np.testing.assert_array_equal(stored, token_map)
    jax.tree.map(np.testing.assert_array_equal, model.params, draft)
    drafter = sj.DraftModelDrafter(model, sj.Tree.chain(3), token_map=stored)
    untrained = sj.Model(init_draft(jax.random.key(0), config, target.params, token_map), config, None)
    weak = dataclasses.replace(drafter, draft=untrained)
    prompt = [int(t) for t in data[0].prompt]
    fast, slow, plain = (
        sj.generate(target, prompt, drafter=d, max_new_tokens=60, eos_token_ids=()) for d in (drafter, weak, None)
    )
    np.testing.assert_array_equal(fast.tokens, plain.tokens)
    np.testing.assert_array_equal(slow.tokens, plain.tokens)
    assert fast.tokens_per_round > slow.tokens_per_round


def test_every_held_out_token_counts(text):
    """Whatever the batches: the last one is filled up with rows that count for nothing."""
    target, data = text
    token_map = reduced_map(np.arange(0, VOCAB, 2))
    config = draft_config(len(token_map))
    draft = init_draft(jax.random.key(1), config, target.params, token_map)
    alone, *others = (
        evaluate_draft(draft, config, target.params, token_map, data[:16], DraftConfig(batch_size=b, length=64))
        for b in (1, 4, 64)
    )
    for found in others:
        assert found == pytest.approx(alone, rel=1e-5)
    assert alone != pytest.approx(
        evaluate_draft(draft, config, target.params, token_map, data[:12], DraftConfig(batch_size=1, length=64)),
        rel=1e-3,
    )


def test_the_optimiser_is_the_one_of_the_config_and_so_is_the_run(text, tmp_path):
    target, data = text
    token_map = reduced_map(np.arange(0, VOCAB, 2))
    config = draft_config(len(token_map))
    training = DraftConfig(
        epochs=2, batch_size=2, length=64, schedule="linear", final=0.5, warmup=0.0, accumulate=2, ema=0.9,
        checkpoint_every=100, learning_rate=1e-2,
    )  # fmt: skip

    def fit(training=training, data=data[16:], weights=target.params):
        return distil(config, weights, token_map, data, text[1][:16], training, tmp_path)

    draft, log = fit()
    rates = [record["learning_rate"] for record in log if "loss" in record]
    assert len(rates) % 2 == 0
    assert rates[0] == rates[1] == pytest.approx(1e-2)
    assert rates[-1] == pytest.approx(1e-2 * (0.5 + 1 / len(rates)))
    judged = evaluate_draft(draft, config, target.params, token_map, data[:16], training)
    assert judged == pytest.approx(log[-1]["eval"])  # of the averaged parameters, which are those that it gives
    for changes, message in (
        ({"training": dataclasses.replace(training, b2=0.9)}, r"training\.b2 0\.95 \(now 0\.9\)"),
        ({"data": data[17:]}, r"data\.conversations 80 \(now 79\)"),
        ({"weights": tiny_model(6, vocab=VOCAB, hidden_size=32, num_layers=1).params}, r"target '\w+' \(now '\w+'\)"),
        (
            {"weights": jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), target.params)},
            r"target_dtype 'float32' \(now 'bfloat16'\)",
        ),
    ):
        with pytest.raises(sj.CheckpointError, match=f"was begun with .*{message}.*name another --output-dir"):
            fit(**changes)


def test_a_run_gets_the_batches_of_its_epochs(text, tmp_path, monkeypatch):
    """And no more: without an end, its last rows would hold conversations of a further epoch in place of its own."""
    target, data = text
    training = DraftConfig(epochs=2, batch_size=2, length=64)

    def fit(step, state, batches, *, steps, **others):
        assert len(list(itertools.islice(batches, steps + 1))) == steps == packed_steps(data, training)
        raise InterruptedError

    monkeypatch.setattr(run, "run_steps", fit)
    with pytest.raises(InterruptedError):
        distil(draft_config(9), target.params, reduced_map(np.arange(8)), data, data[:9], training, tmp_path)


def test_refusals(text, tmp_path):
    target, data = text
    token_map = reduced_map(np.arange(8))
    with pytest.raises(sj.ConfigError, match="vocab_size is 12, its token map has 9"):
        distil(draft_config(12), target.params, token_map, data, data, DraftConfig(), tmp_path)
    with pytest.raises(sj.ConfigError, match="divergence 'l2'"):
        DraftConfig(divergence="l2")
    config = dataclasses.replace(draft_config(9), hidden_size=64)
    with pytest.raises(sj.ConfigError, match="hidden_size 64 exceeds"):
        init_draft(jax.random.key(0), config, target.params, token_map)
    long = [dataclasses.replace(item, prompt=np.resize(item.prompt, 64)) for item in data]
    for pair, what in (((long, data), "training"), ((data, long), "evaluation")):
        with pytest.raises(sj.DataError, match=rf"the {what} text is cut at length 64, .* leaves no label; set its"):
            distil(draft_config(9), target.params, token_map, *pair, DraftConfig(length=64), tmp_path)
    with pytest.raises(sj.DataError, match="do not fill two batches of 8 x 256"):
        distil(draft_config(9), target.params, token_map, data[:1], data, DraftConfig(epochs=1), tmp_path)
    foreign = [dataclasses.replace(data[0], answer=data[0].answer + VOCAB), *data[1:]]
    bare = [dataclasses.replace(data[0], features=None), *data[1:]]
    for pair in ((foreign, data), (data, foreign)):
        with pytest.raises(sj.DataError, match=f"the target's vocabulary is {VOCAB}"):
            distil(draft_config(9), target.params, token_map, *pair, DraftConfig(), tmp_path)
    for pair in ((bare, data), (data, bare)):
        with pytest.raises(sj.DataError, match="has no features"):
            distil(draft_config(9), target.params, token_map, *pair, DraftConfig(), tmp_path)
    narrow = [data[0], dataclasses.replace(data[1], features=data[1].features[:, :-1]), *data[2:]]
    for pair in ((narrow, data), (data, narrow)):
        with pytest.raises(sj.DataError, match=r"conversation \d+ has features of width"):
            distil(draft_config(9), target.params, token_map, *pair, DraftConfig(), tmp_path)
    save_draft(
        tmp_path / "d",
        init_draft(jax.random.key(0), draft_config(9), target.params, token_map),
        draft_config(9),
        token_map[:4],
    )
    with pytest.raises(sj.CheckpointError, match=r"shape \(4,\); expected one integer for each of the draft's 9"):
        load_draft(tmp_path / "d")
