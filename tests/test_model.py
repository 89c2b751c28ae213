"""Attention over the cache: read in blocks on a CPU, and only as far as anyone sees."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_model

import specjax as sj
import specjax.ops.cpu
import specjax.target.model
from specjax import decode, loop
from specjax.drafters.base import NoDrafter
from specjax.ops.cpu import BLOCK
from specjax.target import cache as kv
from specjax.target.model import forward, layer_forward, read

LENGTH, SLOTS = 2 * BLOCK + 5, 4 * BLOCK
on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="elsewhere the whole cache is read at once")


@functools.cache
def filled(window=None, length=LENGTH):
    """A model and a cache of its own keys and values."""
    model = tiny_model(sliding_window=window)
    tokens = jnp.asarray(np.random.default_rng(length).integers(0, 61, SLOTS), jnp.int32)
    return model, read(model.params, model.config, tokens, jnp.int32(length))[1]


def features(model, cache, tokens=(5, 8, 13)):
    return forward(model.params, model.config, jnp.array(tokens), cache=cache).features


@pytest.mark.parametrize("window", [None, BLOCK - 3, 4])
@pytest.mark.parametrize("length", [1, BLOCK, LENGTH])
def test_blocks_give_what_the_whole_cache_gives(window, length, monkeypatch):
    model, cache = filled(window, length)
    blocks = features(model, cache)
    monkeypatch.setattr(specjax.ops.cpu, "BLOCK", SLOTS)
    monkeypatch.setattr(specjax.target.model, "_layer", layer_forward)  # a trace with the other blocks is kept of it
    np.testing.assert_allclose(blocks, features(model, cache), atol=1e-5)


def poisoned(cache, slots):
    """NaN there: reading them would show, also behind a mask (0 x NaN)."""
    return dataclasses.replace(
        cache,
        k=tuple(k.at[:, :, slots].set(jnp.nan) for k in cache.k),
        v=tuple(v.at[:, slots].set(jnp.nan) for v in cache.v),
    )


@on_cpu
@pytest.mark.usefixtures("xla_products")
def test_blocks_that_nobody_sees_are_not_read():
    model, cache = filled()
    np.testing.assert_array_equal(features(model, cache), features(model, poisoned(cache, slice(3 * BLOCK, None))))
    assert np.isnan(features(model, poisoned(cache, slice(LENGTH, None)))).any()  # the last one is half full
    model, cache = filled(4)
    before = slice(0, BLOCK)
    np.testing.assert_array_equal(features(model, cache), features(model, poisoned(cache, before)))


@pytest.mark.parametrize("window", [None, BLOCK - 3])
def test_a_batch_reads_as_far_as_its_longest_member(window):
    model, longest = filled(window)
    caches = [longest, filled(window, 3)[1], filled(window, BLOCK)[1]]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *caches)
    batch = jax.jit(jax.vmap(functools.partial(features, model)))(stacked)
    for got, cache in zip(batch, caches, strict=True):
        np.testing.assert_allclose(got, features(model, cache), atol=1e-5)


def test_a_cache_shared_by_a_batch_of_tokens():
    model, cache = filled()
    tokens = jnp.array([[1, 2], [3, 4], [5, 6]])
    batch = jax.vmap(lambda tokens: features(model, cache, tokens))(tokens)
    for got, one in zip(batch, tokens, strict=True):
        np.testing.assert_allclose(got, features(model, cache, one), atol=1e-5)


def test_any_number_of_slots():
    model, cache = filled(length=70)
    rows = kv.Rows(tuple(k[:, :, :70] for k in cache.k), tuple(v[:, :70] for v in cache.v))
    for slots in (75, 2 * BLOCK + 1, 2 * BLOCK + BLOCK // 2):
        odd = kv.write(kv.zeros(model.config, slots), rows, 70)
        np.testing.assert_allclose(features(model, cache), features(model, odd), atol=1e-5)


@on_cpu
@pytest.mark.parametrize("shape", [
    {"vocab": 4096, "intermediate_size": 96},
    pytest.param({"vocab": 64, "intermediate_size": 1024}, marks=pytest.mark.full),
])  # fmt: skip
def test_a_bfloat16_loop_copies_no_weights(shape):
    """XLA:CPU would transpose the weights and widen the embeddings before a loop: 273 MB for SmolLM2, and 100 ms."""
    model = tiny_model(hidden_size=64, family="qwen2", qkv_bias=True, **shape)
    model = dataclasses.replace(model, params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params))
    state = decode.prefill(model, [1, 2, 3], max_new_tokens=20)
    plan = loop.Plan(model.params, NoDrafter(), (), model.config, sj.Greedy())
    compiled = jax.jit(loop.run_rounds).lower(plan, state).compile()
    weights = sum(x.nbytes for x in jax.tree.leaves(model.params))
    assert compiled.memory_analysis().temp_size_in_bytes < weights / 2


def test_layers_computed_again_give_the_same_gradient():
    model, tokens = tiny_model(), jnp.arange(20) * 3 % 61

    def gradient(remat):
        return jax.grad(lambda params: jnp.square(forward(params, model.config, tokens, remat=remat).features).sum())

    kept, again = (jax.tree.leaves(gradient(remat)(model.params)) for remat in (False, True))
    for one, other in zip(kept, again, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-4)
    assert any(jnp.abs(one).max() > 0 for one in kept)
    flops = [jax.jit(gradient(remat)).lower(model.params).compile().cost_analysis()["flops"] for remat in (False, True)]
    assert flops[1] > 1.1 * flops[0]
