"""One description of the parameters, from which initialisation, loading targets and shardings derive."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config
from jax.sharding import AbstractMesh, PartitionSpec

import specjax as sj
from specjax.target import params


@pytest.mark.parametrize("changes", [{}, {"family": "qwen2", "qkv_bias": True, "tie_word_embeddings": True}])
def test_everything_has_the_described_shape(changes):
    config = tiny_config(**changes)
    made = params.init(jax.random.key(0), config, jnp.bfloat16)
    structs = params.shape_structs(config, jnp.bfloat16)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), made) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), structs
    )
    assert (made.lm_head is None) == config.tie_word_embeddings
    assert made.unembedding.shape == (61, 16)
    np.testing.assert_array_equal(made.final_norm, 1)
    if config.qkv_bias:
        np.testing.assert_array_equal(made.layers[0].qkv_bias, 0)


def test_count():
    config = tiny_config()
    layer = 16 * 2 * 4 * 8 + 2 * 2 * 8 * 16 + 16 * 2 * 24 + 24 * 16 + 2 * 16  # qkv, out, gate and up, down, two norms
    total = 2 * layer + 2 * 61 * 16 + 16
    assert params.count(params.abstract(config)) == total
    assert params.count(params.init(jax.random.key(0), config)) == total
    assert params.count(params.abstract(sj.ModelConfig.preset("smollm2-135m"))) == 134_515_008


def test_shardings_split_heads_feed_forward_and_vocabulary():
    mesh = AbstractMesh((2, 2), ("data", "model"))
    made = params.shardings(tiny_config(vocab=62), mesh)
    assert made.embed.spec == PartitionSpec("model", None)
    assert made.layers[0].qkv.spec == PartitionSpec("model", None, None, None)
    assert made.layers[1].gate_up.spec == PartitionSpec(None, "model", None)
    assert made.layers[1].down.spec == PartitionSpec(None, "model")
    assert made.final_norm.spec == PartitionSpec(None)
    replicated = params.shardings(tiny_config(), AbstractMesh((2,), ("data",)))
    assert all(all(axis is None for axis in leaf.spec) for leaf in jax.tree.leaves(replicated))
    with pytest.raises(sj.ConfigError, match="axis V of size 61"):
        params.shardings(tiny_config(), mesh)
