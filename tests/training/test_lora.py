"""LoRA: nothing changes at first, merging equals adding, dropout keeps the mean, a change lands in its own matrix."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_model

import specjax as sj
from specjax.target.model import forward, unembed
from specjax.training.lora import LoraConfig, Pair, abstract, adapters, init_lora, merge

CONFIG = LoraConfig(rank=4, alpha=8.0, dropout=0.25)
TOKENS = jnp.arange(9, dtype=jnp.int32)


def noise(tree):
    """The tree, every array disturbed."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32)), tree)


@pytest.fixture(scope="module")
def qwen2():
    """A tiny Qwen2, with biases."""
    model = tiny_model(family="qwen2", qkv_bias=True)
    return dataclasses.replace(model, params=noise(model.params))


def disturbed(model, config=CONFIG):
    """Changes with a B that is not zero."""
    return noise(init_lora(jax.random.key(0), model.config, config))


@jax.jit
def logits(model, lora=None, key=None):
    """Of nine tokens."""
    extra = None if lora is None else adapters(lora, key)
    return unembed(model.params, forward(model.params, model.config, TOKENS, adapters=extra).features)


def test_changes_that_are_zero_give_exactly_the_base(qwen2):
    lora, base = init_lora(jax.random.key(0), qwen2.config, CONFIG), logits(qwen2)
    np.testing.assert_array_equal(logits(qwen2, lora), base)
    np.testing.assert_array_equal(logits(qwen2, lora, jax.random.key(1)), base)
    jax.tree.map(np.testing.assert_array_equal, merge(qwen2.params, lora), qwen2.params)
    assert all(float(jnp.abs(pair.a).max()) > 0 for pair in vars(lora.layers[0]).values())


def test_merged_weights_equal_added_products(qwen2):
    lora = disturbed(qwen2)
    merged = dataclasses.replace(qwen2, params=merge(qwen2.params, lora))
    added = logits(qwen2, lora)
    np.testing.assert_allclose(logits(merged), added, rtol=1e-5, atol=1e-5 * float(jnp.abs(added).max()))
    assert float(jnp.abs(added - logits(qwen2)).max()) > 0.1
    layer, pair = qwen2.params.layers[1], lora.layers[1].down
    np.testing.assert_allclose(merged.params.layers[1].down - layer.down, 2.0 * pair.b @ pair.a, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "weight", "where"),
    [("q", "qkv", np.s_[:, :2]), ("k", "qkv", np.s_[:, 2]), ("v", "qkv", np.s_[:, 3]),
     ("gate", "gate_up", np.s_[0]), ("up", "gate_up", np.s_[1])],
)  # fmt: skip
def test_a_change_lands_in_its_own_matrix(qwen2, name, weight, where):
    lora, full = init_lora(jax.random.key(0), qwen2.config, CONFIG), disturbed(qwen2)
    pair: Pair = getattr(full.layers[0], name)
    layer = dataclasses.replace(lora.layers[0], **{name: pair})
    merged = merge(qwen2.params, dataclasses.replace(lora, layers=(layer, *lora.layers[1:])))
    change = np.array(getattr(merged.layers[0], weight) - getattr(qwen2.params.layers[0], weight))
    expected = 2.0 * np.tensordot(pair.b, pair.a, 1)
    np.testing.assert_allclose(change[where], expected, atol=1e-6)
    change[where] = 0
    assert not change.any()


def test_dropout_keeps_the_mean_and_drops_its_share(qwen2):
    lora, x = disturbed(qwen2), jax.random.normal(jax.random.key(2), (3, 24))
    plain, keys = adapters(lora, None)[0](3), jax.random.split(jax.random.key(5), 4000)
    draws = jax.vmap(lambda key: adapters(lora, key)[0](len(x))("down", x))(keys)
    expected = plain("down", x)
    spread = np.std(draws, axis=0) / np.sqrt(len(keys))
    assert (np.abs(np.mean(draws, axis=0) - expected) < 5 * spread).all()
    # One input alone reaches the output in three draws of four, a third larger.
    alone = jnp.zeros((1, 24)).at[0, 7].set(1.0)
    one = jax.vmap(lambda key: adapters(lora, key)[0](1)("down", alone))(keys)[:, 0]
    kept = np.asarray(jnp.abs(one).max(1) > 0)
    assert 0.72 < kept.mean() < 0.78
    np.testing.assert_allclose(one[kept][0], plain("down", alone)[0] / 0.75, rtol=1e-5)


def test_refusals(qwen2):
    for bad in ({"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}):
        with pytest.raises(sj.ConfigError, match="rank of at least 1"):
            LoraConfig(**bad)
    lora = init_lora(jax.random.key(0), qwen2.config, CONFIG)
    with pytest.raises(sj.ConfigError, match="to 1 layers, the model has 2"):
        merge(qwen2.params, dataclasses.replace(lora, layers=lora.layers[:1]))
    shapes = abstract(dataclasses.replace(qwen2.config, hidden_size=32), CONFIG)
    other = jax.tree.map(lambda spec: np.zeros(spec.shape, np.float32), shapes)
    with pytest.raises(sj.ConfigError, match="change to qkv has shape"):
        merge(qwen2.params, other)
