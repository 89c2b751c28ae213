"""Labels, losses, and the trainer from initialisation to a resumed run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_model

import specjax as sj
from specjax.corpus.answers import Answers, answer
from specjax.heads import init_heads, project
from specjax.loading import checkpoint
from specjax.ranks.labels import IGNORED, frequent_tokens, future_labels, label_ranks, reduce_labels
from specjax.training.cached_medusa import CachedMedusa, CachedMedusaConfig, dataset, teach
from specjax.training.losses import head_cross_entropy
from specjax.training.mesh import MeshConfig
from specjax.training.run import train


def test_head_i_is_to_predict_two_plus_i_positions_ahead_of_its_feature():
    # Feature j predicted token j, so it stands one position before it: head 0 gets token j + 1.
    labels = future_labels(np.array([10, 11, 12, 13, 20, 21]), np.array([4, 2]), 3)
    assert labels.tolist() == [
        [11, 12, 13],
        [12, 13, IGNORED],
        [13, IGNORED, IGNORED],
        [IGNORED] * 3,
        [21, IGNORED, IGNORED],
        [IGNORED] * 3,
    ]


def test_reduced_labels():
    labels = np.array([[3, 7], [IGNORED, 5]])
    assert reduce_labels(labels, np.array([3, 5, 9]), 12).tolist() == [[0, IGNORED], [IGNORED, 1]]
    assert frequent_tokens(np.array([4, 4, 4, 2, 2, 9, 1]), 3, 12).tolist() == [1, 2, 4]


def test_cross_entropy_and_ranks_by_hand():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 5, 7)).astype(np.float32)
    labels = np.array([[1, 6], [0, IGNORED], [IGNORED, IGNORED], [3, 2], [6, 6]])
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    for i, loss in enumerate(head_cross_entropy(jnp.asarray(logits), jnp.asarray(labels))):
        kept = [j for j in range(5) if labels[j, i] != IGNORED]
        assert float(loss) == pytest.approx(np.mean([-np.log(p[i, j, labels[j, i]]) for j in kept]), rel=1e-5)
    ranks = np.asarray(label_ranks(jnp.asarray(logits), jnp.asarray(labels)))
    for i in range(2):
        for j in range(5):
            order = np.argsort(-logits[i, j], kind="stable").tolist()
            assert ranks[i, j] == (-1 if labels[j, i] == IGNORED else order.index(labels[j, i]))
    assert label_ranks(jnp.zeros((1, 1, 4)), jnp.array([[2]])).tolist() == [[2]]  # ties: lowest id first


@pytest.fixture(scope="module")
def cyclic():
    """A model whose next token is a fixed function of the last one, and text of its own."""
    model = tiny_model(5, vocab=23, hidden_size=32, num_layers=1)  # most tokens lead to a cycle, not to one token
    layer = dataclasses.replace(model.params.layers[0], out=jnp.zeros_like(model.params.layers[0].out))
    model = dataclasses.replace(model, params=dataclasses.replace(model.params, layers=(layer,)))
    prompts = [[int(t)] for t in np.random.default_rng(0).integers(0, 23, 64)]
    text = answer(model, prompts, acceptance=sj.Sample(2.0), max_new_tokens=24, key=jax.random.key(0))
    held = answer(model, prompts, acceptance=sj.Greedy(), max_new_tokens=24, key=jax.random.key(1))
    return model, text, held


def objective(heads, model, data, held_out, config, tree=None):
    return CachedMedusa(heads=heads, target=model.params, data=data, held_out=held_out, settings=config, tree=tree)


def quality(heads, model, data):
    """What an evaluation says of heads."""
    judged = objective(heads, model, data, data, CachedMedusaConfig())
    constants = judged.constants(MeshConfig(1, 1).build())
    return judged.quality([judged.judge(heads.params, constants, batch) for batch in judged.held_out_batches()])


def new_heads(model, **changes):
    shape = {"num_heads": 2, "hidden_size": 32, "vocab_size": 23, "projection": "shared"} | changes
    return init_heads(sj.MedusaConfig(**shape), model.params)


@pytest.mark.full
def test_training_makes_drafts_that_are_accepted(cyclic, tmp_path):
    model, _, held = cyclic
    heads = new_heads(model)
    data = dataset(held, heads)
    settings = CachedMedusaConfig(epochs=20, batch_size=64, learning_rate=1e-2)
    trained, log = train(objective(heads, model, data, data, settings), tmp_path)
    first_head = [record["losses"][0] for record in log if "losses" in record]
    assert first_head[-1] < 0.3 * first_head[0]
    for head in range(2):
        assert log[-1]["eval"]["accuracy"]["top1"][head] > log[0]["eval"]["accuracy"]["top1"][head] + 0.3
    out = sj.generate(model, [3], drafter=sj.MedusaDrafter(trained, sj.Tree.chain(2)), max_new_tokens=40)
    before = sj.generate(model, [3], drafter=sj.MedusaDrafter(heads, sj.Tree.chain(2)), max_new_tokens=40)
    assert out.tokens_per_round > max(2.0, before.tokens_per_round)
    # The same labels one position off teach heads that accept little.
    shifted = dataclasses.replace(data, labels=np.roll(data.labels, -1, axis=0))
    wrong, _ = train(objective(heads, model, shifted, data, settings), tmp_path / "x")
    off = sj.generate(model, [3], drafter=sj.MedusaDrafter(wrong, sj.Tree.chain(2)), max_new_tokens=40)
    assert off.tokens_per_round < out.tokens_per_round - 0.5


def test_the_heads_at_first_say_what_the_lm_head_says(cyclic):
    model, _, held = cyclic
    logits = project(new_heads(model), model.params.unembedding, jnp.asarray(held.features[:5], jnp.float32))
    lm = jnp.einsum("TD,VD->TV", jnp.asarray(held.features[:5], jnp.float32), model.params.unembedding)
    for head in logits:
        np.testing.assert_allclose(head, lm, rtol=1e-5, atol=1e-5)


def untimed(record):
    """A log record without its throughputs."""
    return {name: value for name, value in record.items() if not name.endswith("_per_second")}


def test_a_resumed_run_equals_an_uninterrupted_one(cyclic, tmp_path):
    model, text, held = cyclic
    heads = new_heads(model)
    data, check = dataset(text, heads), dataset(held, heads)
    config = CachedMedusaConfig(epochs=4, batch_size=128)
    per_epoch = len(data.features) // 128

    class KilledError(Exception):
        pass

    def kill(record):
        if record["step"] == 2 * per_epoch:
            raise KilledError

    whole, log = train(objective(heads, model, data, check, config), tmp_path / "whole")
    with pytest.raises(KilledError):
        train(objective(heads, model, data, check, config), tmp_path / "cut", report=kill)
    assert checkpoint.latest(tmp_path / "cut" / "checkpoints") == per_epoch  # killed before the second epoch's
    resumed, relog = train(objective(heads, model, data, check, config), tmp_path / "cut")
    for ours, theirs in zip(relog, log, strict=True):
        assert untimed(ours) == untimed(theirs)
    for name, value in whole.params.items():
        np.testing.assert_array_equal(value, resumed.params[name])


def test_accuracy_counts_tokens_outside_the_reduced_vocabulary_as_misses(cyclic):
    model, _, held = cyclic
    keep = frequent_tokens(held.tokens, 4, 23)
    shape = sj.MedusaConfig(2, 32, 23, projection="shared", reduced_vocab_size=4)
    heads = init_heads(shape, model.params, keep)
    hits = quality(heads, model, dataset(held, heads)).ranks.hits()[:, :4]
    labels = future_labels(held.tokens, held.lengths, 2)
    share = [np.isin(labels[labels[:, i] != IGNORED, i], keep).mean() for i in range(2)]
    np.testing.assert_allclose(
        hits.sum(1), share, atol=1e-6
    )  # some rank below 4 is always right, if the token is there


def test_the_teacher_of_a_head_is_the_target_where_its_token_is_said(cyclic):
    model, _, held = cyclic
    heads = new_heads(model)
    data = dataset(held, heads)
    config = CachedMedusaConfig(batch_size=96, distillation=1.0, teacher_top_k=4)
    batch = next(iter(objective(heads, model, data, data, config).batches()))
    labels = batch["labels"]
    assert batch["tokens"].shape == batch["probabilities"].shape == (96, 2, 4)
    # Greedy text: the token that is to come is the likeliest one where the target says it.
    np.testing.assert_array_equal(batch["tokens"][..., 0][labels != IGNORED], labels[labels != IGNORED])
    np.testing.assert_allclose(batch["probabilities"].sum(-1), 1, rtol=1e-5)
    logits = np.asarray(held.features[7], np.float32) @ np.asarray(model.params.unembedding).T
    ids, p = teach(data, model.params.unembedding, 4)
    assert ids[7].tolist() == np.argsort(-logits)[:4].tolist()
    exp = np.exp(np.sort(logits)[::-1][:4])
    np.testing.assert_allclose(p[7], exp / exp.sum(), rtol=1e-3)


def test_distilled_heads_come_near_the_teacher(cyclic, tmp_path):
    model, _, held = cyclic
    heads = new_heads(model)
    data = dataset(held, heads)
    config = CachedMedusaConfig(
        epochs=4, batch_size=64, learning_rate=1e-2, distillation=1.0, z_loss=1e-4, select="best"
    )
    _, log = train(objective(heads, model, data, data, config), tmp_path)
    first = [record["losses"][0] for record in log if "loss" in record]
    assert first[-1] < 0.7 * first[0]
    assert log[-1]["eval"]["tokens_per_round"] > log[0]["eval"]["tokens_per_round"] + 0.1


def test_refusals(cyclic, tmp_path):
    model, text, _ = cyclic
    heads = new_heads(model)
    data = dataset(text, heads)
    with pytest.raises(sj.DataError, match="do not fill one batch"):
        train(objective(heads, model, data, data, CachedMedusaConfig(batch_size=10**6)), tmp_path)
    with pytest.raises(sj.DataError, match="width 8"):
        dataset(Answers(text.tokens, text.features[:, :8], text.lengths), heads)
    with pytest.raises(sj.DataError, match="after its first"):
        dataset(Answers(text.tokens[:2], text.features[:2], np.array([1, 1])), heads)
    other = Answers(text.tokens + 23, text.features, text.lengths)
    with pytest.raises(sj.DataError, match="token ids from 23 to 45, the target's vocabulary is 23"):
        dataset(other, heads)
    narrow = init_heads(sj.MedusaConfig(2, 32, 23, projection="shared", reduced_vocab_size=1), model.params, [5])
    with pytest.raises(sj.DataError, match="reduced vocabulary"):
        dataset(Answers(np.full(4, 3), text.features[:4], np.array([4])), narrow)
    with pytest.raises(sj.TreeError, match="2 heads can fill a depth of 2"):
        objective(heads, model, data, data, CachedMedusaConfig(batch_size=64), tree=sj.Tree.chain(3))
    for wrong, match in (
        ({"epochs": 0}, "epochs"),
        ({"distillation": 1.5}, "distillation is 1.5"),
        ({"compute": "float16"}, "compute is 'float16'"),
        ({"select": "newest"}, "select is 'newest'"),
        ({"weighting": "mean"}, "weighting is 'mean'"),
    ):
        with pytest.raises(sj.ConfigError, match=match):
            CachedMedusaConfig(**wrong)
    with pytest.raises(sj.CheckpointError, match="no checkpoint"):
        checkpoint.restore(tmp_path / "none", {})


def test_a_loss_that_is_not_finite_leaves_the_last_checkpoint(cyclic, tmp_path):
    model, text, _ = cyclic
    heads = new_heads(model)
    features = np.random.default_rng(0).normal(size=text.features.shape).astype(np.float32)
    data = dataclasses.replace(dataset(text, heads), features=features)
    config = CachedMedusaConfig(epochs=1, batch_size=256, checkpoint_every=1)
    third = list(objective(heads, model, data, data, config).batches())[2]["features"]
    (bad,) = np.flatnonzero((features == third[0]).all(1))
    features[bad] = np.nan
    with pytest.raises(sj.DataError, match="of step 3 is nan"):
        train(objective(heads, model, data, data, config), tmp_path)
    assert checkpoint.latest(tmp_path / "checkpoints") == 2


def test_a_run_with_other_settings_heads_or_data_is_refused(cyclic, tmp_path):
    model, text, held = cyclic
    heads = new_heads(model)
    data, check = dataset(text, heads), dataset(held, heads)
    short = dataset(Answers(text.tokens[:960], text.features[:960], text.lengths[:40]), heads)
    config = CachedMedusaConfig(epochs=1, batch_size=256)
    _, log = train(objective(heads, model, data, check, config), tmp_path)
    for changes, message in (
        (
            {"config": dataclasses.replace(config, learning_rate=1e-4)},
            r"training\.learning_rate 0\.002 \(now 0\.0001\)",
        ),
        ({"config": dataclasses.replace(config, epochs=2, seed=1)}, r"epochs 1 \(now 2\); training\.seed 0 \(now 1\)"),
        ({"heads": new_heads(model, num_layers=2)}, r"heads\.num_layers 1 \(now 2\)"),
        ({"data": short}, r"data\.positions \d+ \(now \d+\); data\.labels .*data\.fingerprint"),
        ({"held_out": short}, r"held_out\.positions"),
        ({"tree": sj.Tree.chain(2)}, r"tree\[1\]\[\d\] .* \(now \d\)"),
        (
            {"data": dataclasses.replace(data, features=data.features.astype(np.float16))},
            r"data\.features\.dtype '\w+' \(now 'float16'\): ",
        ),
        (
            {"data": dataclasses.replace(data, source="with another system prompt")},
            r"data\.text '' \(now 'with another",
        ),
        ({"model": tiny_model(1)}, r"target '\w+' \(now '\w+'\)"),
        (
            {"model": dataclasses.replace(model, params=jax.tree.map(lambda p: p.astype(jnp.bfloat16), model.params))},
            r"target_dtype 'float32' \(now 'bfloat16'\)",
        ),
    ):
        asked = {"heads": heads, "model": model, "data": data, "held_out": check, "config": config, "tree": None}
        asked |= changes
        with pytest.raises(sj.CheckpointError, match=f"was begun with .*{message}.*name another --output-dir"):
            train(objective(**asked), tmp_path)
    freely = dataclasses.replace(config, keep=5, checkpoint_every=3, select="best")
    assert train(objective(heads, model, data, check, freely), tmp_path)[1] == log
    rounded = np.nextafter(data.features, data.features.dtype.type(9))  # as by another CPU
    elsewhere = dataclasses.replace(data, features=rounded)
    assert train(objective(heads, model, elsewhere, check, freely), tmp_path)[1] == log
