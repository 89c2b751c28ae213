"""Packed training: labels, Medusa-1 on the fly against cached features, and Medusa-2 on a target's own text."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import noisy_heads, tiny_model

import specjax as sj
from specjax.corpus.answers import Answers
from specjax.corpus.conversation import Conversation
from specjax.corpus.split import turns
from specjax.heads import draft_projection, init_heads
from specjax.ranks.labels import IGNORED, frequent_tokens
from specjax.target.model import forward, unembed
from specjax.training import losses, run
from specjax.training.cached_medusa import CachedMedusa, CachedMedusaConfig, dataset
from specjax.training.lora import LoraConfig, adapters, init_lora, merge
from specjax.training.losses import chunked_cross_entropy
from specjax.training.mesh import MeshConfig
from specjax.training.objective import Moment
from specjax.training.packed_losses import backbone_sum, future_tokens, reduced_rows, split_labels
from specjax.training.packed_medusa import Frozen, PackedMedusa, PackedMedusaConfig, packed_quality, packed_record
from specjax.training.packing import packed, packed_steps
from specjax.training.quality import record
from specjax.training.run import selected, train

MEDUSA1 = PackedMedusaConfig(batch_size=4, length=24)
MEDUSA2 = PackedMedusaConfig(
    epochs=3, batch_size=4, length=24, lora=LoraConfig(4, 8.0, 0.1), learning_rate=1e-2, lora_learning_rate=2e-3,
    head_weight=0.3, checkpoint_every=60,
)  # fmt: skip


def language(count, seed):
    """Conversations in which the next token follows from the last: x -> 5x + 3 (mod 61)."""
    rng, made = np.random.default_rng(seed), []
    for _ in range(count):
        tokens = [int(rng.integers(61))]
        while len(tokens) < 12:
            tokens.append((5 * tokens[-1] + 3) % 61)
        cut = int(rng.integers(1, 5))
        made.append(Conversation(np.array(tokens[:cut]), np.array(tokens[cut:])))
    return made


@pytest.fixture(scope="module")
def batch():
    """Four packed rows."""
    return next(iter(packed(language(60, 0), length=24, batch_size=4, seed=0)))


@functools.cache
def loss_and_grad(config, settings):
    """Jitted: (trained, heads, frozen, projection, batch, key) -> ((loss, parts), gradients)."""

    def loss(trained, heads, frozen, projection, batch, key):
        objective = PackedMedusa(
            model=sj.Model(frozen, config, None), heads=heads, data=(), held_out=(), settings=settings
        )
        return objective.loss(trained, Frozen(frozen, projection), batch, Moment(key, jnp.float32(1.0), 2))

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def test_labels_stay_within_an_answer():
    # Two conversations of two prompt tokens each, an unfinished one, and padding.
    tokens = jnp.array([10, 11, 12, 13, 14, 20, 21, 22, 30, 0])
    segments = jnp.array([1, 1, 1, 1, 1, 2, 2, 2, 3, 0])
    answer = jnp.array([0, 0, 1, 1, 1, 0, 0, 1, 0, 0], bool)
    x = IGNORED
    lm = [x, 12, 13, 14, x, x, 22, x, x, x]
    head0 = [x, 13, 14, x, x, x, x, x, x, x]  # two slots ahead
    head1 = [x, 14, x, x, x, x, x, x, x, x]
    assert future_tokens(tokens, segments, answer, 3).T.tolist() == [lm, head0, head1]
    heads = sj.Heads({}, jnp.array([12, 14]), sj.MedusaConfig(1, 16, 61, reduced_vocab_size=2))
    assert reduced_rows(heads, jnp.array(lm)).tolist() == [x, 0, x, 1, x, x, x, x, x, x]


@pytest.mark.parametrize("reduced", [pytest.param(None, marks=pytest.mark.full), 40])
def test_on_the_fly_equals_cached_features(model, batch, reduced):
    """The loss of the cached trainer on the same positions, from features of each conversation on its own."""
    config = sj.MedusaConfig(3, 16, 61, projection="shared", reduced_vocab_size=reduced)
    ids = None if reduced is None else frequent_tokens(np.concatenate([i.answer for i in language(60, 0)]), reduced, 61)
    heads = init_heads(config, model.params, ids)
    rng = np.random.default_rng(0)
    params = {n: jnp.asarray(v + 0.3 * rng.normal(size=v.shape).astype("f")) for n, v in heads.params.items()}
    tokens, features, lengths = [], [], []
    features_of = jax.jit(lambda t: forward(model.params, model.config, t).features)
    for row in range(4):
        for segment in range(1, batch["segments"][row].max() + 1):
            inside = np.flatnonzero(batch["segments"][row] == segment)
            text, first = batch["tokens"][row][inside], int(np.argmax(batch["answer"][row][inside]))
            assert len(text) == 12
            features.append(features_of(text)[first - 1 : -1])
            tokens.append(text[first:])
            lengths.append(len(text) - first)
    answers = Answers(np.concatenate(tokens), np.concatenate(features), np.array(lengths))
    data = dataset(answers, heads)
    projection = draft_projection(heads, model.params.unembedding)
    expected = chunked_cross_entropy(dataclasses.replace(heads, params=params), projection, data.features, data.labels)
    run = loss_and_grad(model.config, MEDUSA1)
    (value, parts), _ = run({"heads": params}, heads, model.params, projection, batch, None)
    np.testing.assert_allclose(parts["losses"], expected, rtol=0, atol=1e-5)
    assert float(value) == pytest.approx(float(np.sum(expected * 0.8 ** np.arange(3))), abs=1e-5)


def test_what_is_no_answer_counts_for_exactly_nothing(model, batch):
    heads = noisy_heads(model, 2)
    run = loss_and_grad(model.config, MEDUSA1)
    silent = batch | {"answer": np.zeros_like(batch["answer"])}
    (value, _), grads = run({"heads": heads.params}, heads, model.params, None, silent, None)
    assert float(value) == 0
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(grads))
    # Other tokens in a conversation without an answer: not a bit changes, though it shares a row with others.
    muted = (batch["segments"] == 2) | (batch["segments"] == 0)
    half = batch | {"answer": batch["answer"] & ~muted}
    other = half | {"tokens": np.where(muted, (batch["tokens"] + 7) % 61, batch["tokens"]).astype(np.int32)}
    (one, _), grad = run({"heads": heads.params}, heads, model.params, None, half, None)
    (two, _), grad_two = run({"heads": heads.params}, heads, model.params, None, other, None)
    assert float(one) == float(two) > 0
    jax.tree.map(np.testing.assert_array_equal, grad, grad_two)


def test_the_backbone_loss_by_hand_in_chunks(model, batch, monkeypatch):
    heads = noisy_heads(model, 2)
    labels, _ = split_labels(heads, batch)
    labels = labels.reshape(-1, 1)
    rng = np.random.default_rng(0)
    ours, frozen = (jnp.asarray(rng.normal(size=(len(labels), 16)).astype("f")) for _ in range(2))
    log_q, log_p = (jax.nn.log_softmax(unembed(model.params, f)) for f in (ours, frozen))
    valid = np.asarray(labels[:, 0] != IGNORED)
    kl = (np.exp(log_p) * (log_p - log_q)).sum(1)[valid].sum()
    text = -np.asarray(log_q)[valid, np.asarray(labels)[valid, 0]].sum()

    def both(ours):
        return backbone_sum(model.params, labels, ours, frozen), backbone_sum(model.params, labels, ours, None)

    whole = jax.grad(lambda x: sum(both(x)))(ours)
    monkeypatch.setattr(losses, "LOGIT_BYTES", 4 * 61 * 14)  # chunks of 14 and 7, the last ones cut
    np.testing.assert_allclose(both(ours), [kl, text], rtol=1e-5)
    np.testing.assert_allclose(jax.grad(lambda x: sum(both(x)))(ours), whole, rtol=1e-4, atol=1e-5)
    assert not np.asarray(whole)[~valid].any()


def test_medusa2_starts_at_the_frozen_model_and_moves_heads_and_lora_alone(model, batch):
    heads = noisy_heads(model, 2)
    lora = init_lora(jax.random.key(0), model.config, MEDUSA2.lora)
    run = loss_and_grad(model.config, MEDUSA2)
    (value, parts), grads = run(
        {"heads": heads.params, "lora": lora}, heads, model.params, None, batch, jax.random.key(1)
    )
    assert float(parts["backbone"]) == pytest.approx(0, abs=1e-6)
    assert float(value) == pytest.approx(0.3 * float(parts["losses"] @ np.array([1, 0.8])), rel=1e-5)
    for pair in vars(grads["lora"].layers[1]).values():
        assert float(jnp.abs(pair.b).max()) > 0
        assert not np.asarray(pair.a).any()  # B is zero
    plain = dataclasses.replace(MEDUSA2, remat=False)
    again = loss_and_grad(model.config, plain)(
        {"heads": heads.params, "lora": lora}, heads, model.params, None, batch, jax.random.key(1)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), again, ((value, parts), grads))


def test_the_ramp():
    ramp = [float(MEDUSA2.ramp(jnp.float32(x))) for x in (0, 1 / 3, 1)]
    np.testing.assert_allclose(ramp, [0, 0.15, 0.3], atol=1e-6)  # 0.3 * sin(0, 30, 90 degrees)
    assert float(MEDUSA1.ramp(jnp.float32(0))) == 1


@pytest.mark.parametrize("reduced", [pytest.param(None, marks=pytest.mark.full), 20])
def test_an_evaluation_is_that_of_the_cached_trainer(model, reduced, monkeypatch):
    """On packed rows, in chunks, over two shards: ranks, losses and tokens per round of each turn on its own.

    Conversations have a second turn, or no answer, or no prompt: the first token then has no feature.
    """
    rng, data = np.random.default_rng(0), language(21, 1)
    for i, item in enumerate(data):
        if i % 3 == 0:
            mask = np.ones(len(item.answer), bool)
            mask[2:4] = False
            data[i] = dataclasses.replace(item, mask=mask)
    data.append(Conversation(np.array([3, 4]), np.zeros(0, int)))
    data.append(Conversation(np.zeros(0, int), np.array([5, 8, 9, 2])))
    ids = None if reduced is None else frequent_tokens(np.concatenate([i.answer for i in data]), reduced, 61)
    shape = sj.MedusaConfig(3, 16, 61, projection="shared", reduced_vocab_size=reduced)
    heads = init_heads(shape, model.params, ids)
    params = {n: jnp.asarray(v + 0.3 * rng.normal(size=v.shape).astype("f")) for n, v in heads.params.items()}
    heads = dataclasses.replace(heads, params=params)
    features_of = jax.jit(lambda t: forward(model.params, model.config, t).features)
    parts = []
    for item in data:
        features = features_of(np.concatenate([item.prompt, item.answer]))
        for before, tokens, _ in turns(item):
            first = max(len(before), 1)
            tokens = tokens[first - len(before) :]
            parts.append((tokens, features[first - 1 : first - 1 + len(tokens)]))
    parts = [(t, np.asarray(f)) for t, f in parts]
    tokens, features = (np.concatenate(x) for x in zip(*parts, strict=True))
    cached = dataset(Answers(tokens, features, np.array([len(t) for t, _ in parts])), heads)
    alone = CachedMedusa(heads=heads, target=model.params, data=cached, held_out=cached, settings=CachedMedusaConfig())
    constants = alone.constants(MeshConfig(1, 1).build())
    whole = alone.quality([alone.judge(params, constants, part) for part in alone.held_out_batches()])
    tree = sj.Tree.cartesian((3, 2, 2))
    expected = record(whole, tree)

    monkeypatch.setattr(losses, "LOGIT_BYTES", 4 * 3 * heads.config.output_size * 14)
    projection = draft_projection(heads, model.params.unembedding)
    settings = dataclasses.replace(MEDUSA1, batch_size=8)
    packed_too = PackedMedusa(model=model, heads=heads, data=(), held_out=data, settings=settings, tree=tree)
    batches, frozen = list(packed_too.held_out_batches()), Frozen(model.params, projection)
    found = jax.device_get([packed_too.judge({"heads": params}, frozen, b, shards=2) for b in batches])
    ours = packed_too.record(found)
    assert "backbone" not in ours
    assert sum(packed_quality(batches, found).ranks.lengths) == len(tokens)
    np.testing.assert_allclose(ours.pop("losses"), expected.pop("losses"), atol=2e-5)  # rounded to five places
    assert ours == expected
    assert expected["tokens_per_round"] > 1


@pytest.mark.full
def test_medusa2_fits_backbone_and_heads(tmp_path):
    """On text that the target does not know yet: the loss falls, the frozen weights stay, the export is the model."""
    model = tiny_model(stddev=0.3, num_layers=1)
    before = jax.tree.map(np.array, model.params)
    heads = init_heads(sj.MedusaConfig(2, 16, 61, projection="shared"), model.params)
    settings = dataclasses.replace(
        MEDUSA2, backbone_loss="text", remat=False, epochs=8, checkpoint_every=500, lora=LoraConfig(8, 16.0, 0.05),
        learning_rate=2e-2, lora_learning_rate=1e-2,
    )  # fmt: skip
    objective = PackedMedusa(
        model=model, heads=heads, data=language(480, 0), held_out=language(40, 1), settings=settings
    )
    fitted, log = train(objective, tmp_path)
    first, last = log[0]["eval"], log[-1]["eval"]
    assert last["backbone"] < 0.6 * first["backbone"]
    assert min(last["accuracy"]["top1"]) > max(first["accuracy"]["top1"]) + 0.3
    records = [record for record in log if "loss" in record]
    assert np.mean([r["loss"] for r in records[-10:]]) < np.mean([r["loss"] for r in records[:10]])  # with the ramp
    full = [r["backbone"] + 0.3 * np.array([1, 0.8]) @ r["losses"] for r in records]  # with the heads' last weight
    assert np.mean(full[-10:]) < 0.7 * np.mean(full[:10])
    jax.tree.map(np.testing.assert_array_equal, model.params, before)

    objective.export(tmp_path / "out", fitted, {"target": "tiny"})
    loaded = sj.load_model(tmp_path / "out" / "backbone", dtype=jnp.bfloat16)
    merged = merge(model.params, fitted.lora)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y.astype(x.dtype)), loaded.params, merged)
    stored = sj.load_heads(tmp_path / "out" / "heads.safetensors", model.config, dtype=jnp.float32)
    adapted = dataclasses.replace(model, params=merge(model.params, fitted.lora))
    tokens = jnp.asarray(language(1, 2)[0].answer)
    added = forward(model.params, model.config, tokens, adapters=adapters(fitted.lora, None)).features
    plain = forward(adapted.params, model.config, tokens).features
    np.testing.assert_allclose(plain, added, rtol=1e-5, atol=1e-5 * float(jnp.abs(added).max()))
    # Drafts for the backbone that they were fitted with, and what the heads say at first.
    rounds = [
        np.mean([
            sj.generate(
                adapted, item.prompt, drafter=sj.MedusaDrafter(h, sj.Tree.chain(2)), max_new_tokens=8, eos_token_ids=()
            ).tokens_per_round
            for item in language(12, 3)
        ])
        for h in (stored, heads)
    ]  # fmt: skip
    assert rounds[0] > rounds[1] + 0.3


def test_the_best_checkpoint_of_averaged_accumulated_steps(model, tmp_path):
    """Medusa-2 with all that the optimiser offers: what is exported is what the best evaluation judged."""
    heads = init_heads(sj.MedusaConfig(2, 16, 61, projection="shared"), model.params)
    settings = dataclasses.replace(
        MEDUSA2, epochs=2, schedule="linear", final=0.5, accumulate=2, ema=0.8, checkpoint_every=7, select="best",
        backbone_loss="text", remat=False, learning_rate=0.5, weighting="sum", keep=1, warmup=0.1,
    )  # fmt: skip
    data, held_out, on = language(90, 0), language(9, 1), MeshConfig(1, 1).build()
    tree = sj.Tree.chain(2)

    def objective(settings=settings, data=data, held_out=held_out, weights=model.params):
        target = dataclasses.replace(model, params=weights)
        return PackedMedusa(model=target, heads=heads, data=data, held_out=held_out, settings=settings, tree=tree)

    def fit(*args, **changes):
        return train(objective(*args, **changes), tmp_path, on=on)

    fitted, log = fit()
    steps = [r for r in log if "loss" in r]
    assert len(steps) == packed_steps(data, settings) == 22
    rates = [r["learning_rate"] for r in steps]
    assert rates[2] == rates[3] == 0.5  # one of eleven updates to warm up, two steps each
    assert rates[-1] == pytest.approx(0.5 * (0.5 + 0.5 / 10))
    chosen = selected(log, "best")
    scores = {r["step"]: r["eval"]["tokens_per_round"] for r in log if "eval" in r}
    assert scores[chosen["step"]] == max(v for step, v in scores.items() if step)
    batches = list(packed(held_out, length=24, batch_size=4, seed=0, epochs=1, whole=True))
    assert sum(batch["answer"].sum() for batch in batches) == sum(len(item.answer) for item in held_out)
    trained = {"heads": fitted.heads.params, "lora": fitted.lora}
    projection = draft_projection(heads, model.params.unembedding)
    judge = jax.jit(objective().judge)
    found = jax.device_get([judge(trained, Frozen(model.params, projection), batch) for batch in batches])
    again, evaluation = packed_record(batches, found, tree), chosen["eval"]
    assert again["tokens_per_round"] == evaluation["tokens_per_round"]
    assert again["hits"] == evaluation["hits"]
    assert again["backbone"] == pytest.approx(evaluation["backbone"], rel=1e-5)

    # It goes on with the settings, the target and the data that it had, or not at all.
    for changes, message in (
        ({"settings": dataclasses.replace(settings, lora=LoraConfig(2))}, r"training\.lora\.rank 4 \(now 2\)"),
        ({"data": language(90, 2)}, r"data\.fingerprint '\w+' \(now '\w+'\): "),
        ({"held_out": language(8, 1)}, r"held_out\.conversations 9 \(now 8\)"),
        ({"weights": tiny_model(1).params}, r"target '\w+' \(now '\w+'\)"),
        (
            {"weights": jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model.params)},
            r"target_dtype 'float32' \(now 'bfloat16'\)",
        ),
    ):
        with pytest.raises(sj.CheckpointError, match=f"was begun with .*{message}.*name another --output-dir"):
            fit(**changes)
    last = fit(dataclasses.replace(settings, select="last", keep=3, checkpoint_every=9))  # those are free
    assert last.log == log


def test_a_run_without_a_label_is_refused_before_its_first_step(model, tmp_path):
    """As where every prompt is longer than a row: each loss would be zero. Where a part is cut, it is told how much."""
    heads, on = noisy_heads(model, 2), MeshConfig(1, 1).build()
    long = [Conversation(np.resize(item.prompt, 23), item.answer) for item in language(20, 0)]
    narrow = sj.Heads({}, jnp.array([60]), sj.MedusaConfig(2, 16, 61, reduced_vocab_size=1))

    def fit(data, held_out, heads=heads, settings=MEDUSA1):
        objective = PackedMedusa(model=model, heads=heads, data=data, held_out=held_out, settings=settings)
        return train(objective, tmp_path / "run", on=on)

    for data, held_out, what in ((long, language(9, 1), "training"), (language(60, 0), long, "evaluation")):
        answers = sum(len(item.answer) for item in long)
        message = f"the {what} text is cut at length 24, which takes {answers - 20} of its {answers} answer tokens and "
        with pytest.raises(sj.DataError, match=f"{message}.*set its length to more"):
            fit(data, held_out, settings=MEDUSA2)
    unsaid = [Conversation(np.array([1, 2]), np.arange(3, 13)) for _ in range(20)]
    with pytest.raises(sj.DataError, match="no token of the text is in the heads' reduced vocabulary"):
        fit(unsaid, language(9, 1), narrow)
    assert not (tmp_path / "run").exists()
    settings = dataclasses.replace(MEDUSA1, length=10, batch_size=2, epochs=1, checkpoint_every=100)
    cut = r"the training text is cut at length 10, which takes 16 of its \d+ answer tokens \(\d+\.\d%\); set its"
    with pytest.warns(UserWarning, match=cut):
        fitted = fit(language(8, 0), language(4, 1), settings=settings)
    assert [r["step"] for r in fitted.log if "loss" in r] == [1, 2, 3, 4]  # eight rows


def test_a_run_gets_the_batches_of_its_epochs(model, tmp_path, monkeypatch):
    """And no more: without an end, its last rows would hold conversations of a further epoch in place of its own."""

    def fit(step, state, batches, *, steps, **others):
        assert len(list(itertools.islice(batches, steps + 1))) == steps == 22
        raise InterruptedError

    monkeypatch.setattr(run, "run_steps", fit)
    on = MeshConfig(1, 1).build()
    with pytest.raises(InterruptedError):
        train(
            PackedMedusa(
                model=model,
                heads=noisy_heads(model, 2),
                data=language(90, 0),
                held_out=language(9, 1),
                settings=MEDUSA1,
            ),
            tmp_path,
            on=on,
        )


def test_refusals(model, tmp_path):
    for bad in ({"batch_size": 0}, {"head_weight": 0.0}, {"backbone_loss": "l2"}, {"select": "x"}, {"final": 2.0}):
        with pytest.raises(sj.ConfigError, match="expected"):
            PackedMedusaConfig(**bad)
    heads = noisy_heads(model, 2)
    on = MeshConfig(1, 1).build()

    def fit(heads, data):
        objective = PackedMedusa(model=model, heads=heads, data=data, held_out=language(9, 1), settings=MEDUSA1)
        train(objective, tmp_path, on=on)

    with pytest.raises(sj.DataError, match="do not fill two batches of 4 x 24"):
        fit(heads, language(2, 0))
    with pytest.raises(sj.DataError, match="conversation 0 has token ids from 3 to 61, the target's vocabulary is 61"):
        fit(heads, [Conversation(np.array([3]), np.array([5, 61]))])
    other = init_heads(sj.MedusaConfig(2, 16, 40), tiny_model(vocab=40).params)
    with pytest.raises(sj.ConfigError, match="vocabulary 40, the target has 16 and 61"):
        fit(other, language(60, 0))
