"""Medusa heads: shapes, the start at the LM head, the arithmetic against NumPy, and top-k with its ties."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax.drafters.medusa import MedusaDrafter
from specjax.errors import ConfigError
from specjax.heads import (
    Heads,
    MedusaConfig,
    MedusaHeads,
    check_token_map,
    draft_projection,
    init_heads,
    project,
    top_tokens,
)
from specjax.target.config import ModelConfig
from specjax.target.model import unembed
from specjax.target.params import init
from specjax.tree import Tree

TARGET = ModelConfig("llama", vocab_size=30, hidden_size=16, intermediate_size=24, num_layers=1, num_heads=4,
                     num_kv_heads=2, head_dim=4)  # fmt: skip
TIED = ModelConfig("llama", 30, 16, 24, 1, 4, 2, 4, tie_word_embeddings=True)
MAP = np.array([1, 4, 5, 9, 17, 28], np.int32)
KINDS = [("full", None), ("shared", None), ("full", len(MAP)), ("shared", len(MAP))]


def _heads(projection="full", reduced=None, heads=3, layers=2, seed=0, dtype=jnp.float32):
    """Random heads: nothing in them is zero."""
    config = MedusaConfig(heads, 16, 30, layers, projection, reduced)
    start = init_heads(config, init(jax.random.key(9), TARGET), None if reduced is None else MAP)
    rng = np.random.default_rng(seed)
    params = {n: jnp.asarray(rng.normal(size=p.shape), dtype) for n, p in sorted(start.params.items())}
    return Heads(params, start.token_map, config)


def _numpy_logits(heads, unembedding, features):
    """One head, one feature at a time, in float64."""
    rows = np.asarray(unembedding, np.float64)
    rows = rows if heads.token_map is None else rows[np.asarray(heads.token_map)]
    params = {n: np.asarray(p, np.float64) for n, p in heads.params.items()}
    out = np.zeros((heads.config.num_heads, len(features), heads.config.output_size))
    for i in range(heads.config.num_heads):
        for t, x in enumerate(np.asarray(features, np.float64)):
            for j in range(heads.config.num_layers):
                z = x @ params[f"kernel_{j}"][i] + params[f"bias_{j}"][i]
                x = x + z / (1 + np.exp(-z))
            out[i, t] = (params[f"projection_{i}"] if heads.config.projection == "full" else rows) @ x
    return out


@pytest.mark.parametrize(("projection", "reduced"), KINDS)
def test_logits_equal_a_numpy_computation(projection, reduced):
    heads, target = _heads(projection, reduced), init(jax.random.key(1), TARGET, stddev=0.5)
    features = jax.random.normal(jax.random.key(2), (5, 16))
    logits = project(heads, draft_projection(heads, target.unembedding), features)
    expected = _numpy_logits(heads, target.unembedding, features)
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("projection", ["full", "shared"])
@pytest.mark.parametrize("batch", [(), (1,), (5,), (2, 3)])
def test_any_leading_axes(projection, batch):
    heads, rows = _heads(projection), jax.random.normal(jax.random.key(3), (30, 16))
    features = jax.random.normal(jax.random.key(4), (*batch, 16))
    rows = draft_projection(heads, rows)
    logits = project(heads, rows, features)
    assert logits.shape == (3, *batch, 30)
    assert logits.dtype == jnp.float32
    one_by_one = [project(heads, rows, x)[:, None] for x in features.reshape(-1, 16)]
    np.testing.assert_allclose(logits.reshape(3, -1, 30), np.concatenate(one_by_one, 1), rtol=1e-4, atol=1e-4)


def test_one_feature_in_bfloat16_gives_what_many_give():
    heads = _heads(dtype=jnp.bfloat16)
    features = jax.random.normal(jax.random.key(4), (4, 16))
    single = jnp.stack([project(heads, None, x) for x in features], 1)
    np.testing.assert_allclose(
        single, project(heads, None, features), rtol=1e-2, atol=1e-2 * float(jnp.abs(single).max())
    )
    vmapped = jax.vmap(lambda x: project(heads, None, x), out_axes=1)(features)
    np.testing.assert_allclose(single, vmapped, rtol=1e-2, atol=1e-2 * float(jnp.abs(single).max()))


@pytest.mark.parametrize("config", [TARGET, TIED])
@pytest.mark.parametrize(("projection", "reduced"), KINDS)
def test_training_starts_exactly_at_the_lm_head(config, projection, reduced):
    target = init(jax.random.key(5), config)
    heads = init_heads(MedusaConfig(3, 16, 30, 2, projection, reduced), target, None if reduced is None else MAP)
    assert all(p.dtype == jnp.float32 for p in heads.params.values())
    features = jax.random.normal(jax.random.key(6), (5, 16))
    logits = project(heads, draft_projection(heads, target.unembedding), features)
    # Rounding depends on how many rows are multiplied at once; shared heads take all theirs to the LM head together.
    rows = jnp.tile(features, (3, 1)) if projection == "shared" else features
    expected = unembed(target, rows)[: len(features)]
    if reduced is not None:
        expected = expected[:, MAP]
    for head in logits:
        np.testing.assert_allclose(head, expected, atol=1e-6)
    if reduced is None:
        np.testing.assert_array_equal(logits, np.broadcast_to(expected, logits.shape))


@pytest.mark.parametrize(("projection", "reduced"), KINDS)
def test_the_first_heads_alone_give_what_they_gave(projection, reduced):
    heads, rows = _heads(projection, reduced), jax.random.normal(jax.random.key(3), (30, 16))
    features, two = jax.random.normal(jax.random.key(4), (5, 16)), heads.first(2)
    assert two.config.num_heads == 2
    assert sum(p.size for p in two.params.values()) == sum(p.size for p in heads.params.values()) * 2 // 3
    np.testing.assert_allclose(
        project(two, draft_projection(two, rows), features),
        project(heads, draft_projection(heads, rows), features)[:2],
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("count", [0, 4])
def test_heads_that_are_not_there_are_refused(count):
    with pytest.raises(ConfigError, match=f"{count} of 3 heads"):
        _heads().first(count)


@pytest.mark.parametrize(("depth", "left"), [(0, 1), (1, 1), (2, 2), (3, 3)])
def test_a_prepared_drafter_keeps_the_heads_that_its_tree_reaches(depth, left):
    target = init(jax.random.key(5), TARGET)
    drafter = MedusaDrafter(_heads("shared", len(MAP)), Tree.chain(depth)).prepare(target)
    assert drafter.heads.config.num_heads == left
    assert drafter.projection.shape == (len(MAP), 16)
    assert drafter.prepare(target).heads is drafter.heads


def test_residual_layers_are_distinct():
    heads = _heads(layers=3)
    assert {f"kernel_{j}" for j in range(3)} < set(heads.params)
    features = jax.random.normal(jax.random.key(7), (4, 16))
    swapped = heads.params | {"kernel_0": heads.params["kernel_1"], "kernel_1": heads.params["kernel_0"]}
    before, after = project(heads, None, features), project(Heads(swapped, None, heads.config), None, features)
    assert float(jnp.abs(before - after).max()) > 0.1


def test_heads_do_not_mix():
    heads = _heads()
    features = jax.random.normal(jax.random.key(7), (4, 16))
    changed = heads.params | {"kernel_1": heads.params["kernel_1"].at[2].add(1.0)}
    before, after = project(heads, None, features), project(Heads(changed, None, heads.config), None, features)
    np.testing.assert_array_equal(before[:2], after[:2])
    assert float(jnp.abs(before[2] - after[2]).max()) > 0.1


def test_gradients_reach_every_parameter():
    heads = _heads()
    features = jax.random.normal(jax.random.key(7), (4, 16))
    grads = jax.grad(lambda p: jnp.square(project(Heads(p, None, heads.config), None, features)).sum())(heads.params)
    assert all(float(jnp.abs(g).max()) > 0 for g in grads.values())
    assert set(grads) == set(MedusaHeads(heads.config).init(jax.random.key(0), features)["params"])


def _ranked(logits, k, token_map=None):
    """Top tokens of a single head whose logits are `logits`: the feature is a unit vector, the projection a column."""
    size = len(logits)
    config = MedusaConfig(1, 4, size if token_map is None else 100, 1, "shared", None if token_map is None else size)
    ids = None if token_map is None else jnp.asarray(token_map, jnp.int32)
    projection = jnp.zeros((size, 4)).at[:, 0].set(jnp.asarray(logits, jnp.float32))
    nothing = {"kernel_0": jnp.zeros((1, 4, 4)), "bias_0": jnp.zeros((1, 4))}
    heads = check_token_map(Heads(nothing, ids, config))
    return top_tokens(heads, projection, jnp.array([1.0, 0, 0, 0]), k)[0].tolist()


def test_top_tokens_best_first_with_ties_to_the_lowest_id():
    assert _ranked([0, 3, 1, 3, 2, 3, 1], 5) == [1, 3, 5, 4, 2]
    assert _ranked([7, 7, 7, 7], 3) == [0, 1, 2]


def test_top_tokens_clamps_k_to_the_vocabulary():
    assert _ranked([1, 3, 2], 10) == [1, 2, 0]
    assert _ranked([1, 3, 2], 10, [20, 50, 90]) == [50, 90, 20]


def test_top_tokens_maps_to_target_ids():
    assert _ranked([0, 3, 1, 3], 3, [2, 40, 41, 99]) == [40, 99, 41]


@pytest.mark.parametrize(("projection", "reduced"), KINDS)
def test_top_tokens_of_several_heads(projection, reduced):
    heads, target = _heads(projection, reduced), init(jax.random.key(1), TARGET, stddev=0.5)
    feature = jax.random.normal(jax.random.key(8), (16,))
    found = top_tokens(heads, draft_projection(heads, target.unembedding), feature, 4)
    assert (found.shape, found.dtype) == ((3, 4), jnp.int32)
    order = np.argsort(-_numpy_logits(heads, target.unembedding, feature[None])[:, 0], axis=-1, kind="stable")[:, :4]
    np.testing.assert_array_equal(found, order if reduced is None else MAP[order])


def test_published_defaults():
    assert MedusaConfig.vicuna_7b() == MedusaConfig(4, 4096, 32_000, 1, "full", None)
    assert hash(MedusaConfig.vicuna_7b()) == hash(MedusaConfig(4, 4096, 32_000))


@pytest.mark.parametrize(
    "wrong",
    [{"num_heads": 0}, {"num_heads": 2.0}, {"num_heads": True}, {"hidden_size": 0}, {"vocab_size": -1},
     {"num_layers": -1}, {"projection": "tied"}, {"reduced_vocab_size": 0}, {"reduced_vocab_size": 31},
     {"reduced_vocab_size": "8"}, {"reduced_vocab_size": 8.0}, {"reduced_vocab_size": True}],
)  # fmt: skip
def test_refused_configs(wrong):
    field, value = next(iter(wrong.items()))
    with pytest.raises(ConfigError, match=rf"{field} is {value!r}; expected"):
        MedusaConfig(**({"num_heads": 3, "hidden_size": 16, "vocab_size": 30} | wrong))


def test_sizes_may_be_numpys():
    config = MedusaConfig(np.int64(3), np.int32(16), np.int64(30), np.int64(1), "full", np.int64(8))
    assert config == MedusaConfig(3, 16, 30, 1, "full", 8)
    assert json.loads(json.dumps(dataclasses.asdict(config))) == dataclasses.asdict(config)


def test_heads_without_weights_are_refused():
    assert MedusaConfig(3, 16, 30, num_layers=0).num_layers == 0  # with projections of their own
    with pytest.raises(ConfigError, match="num_layers is 0 and projection 'shared': such heads have no weights"):
        MedusaConfig(3, 16, 30, num_layers=0, projection="shared")


@pytest.mark.parametrize(
    ("token_map", "message"),
    [(None, "no token map"), ([1, 2], "shape"), ([1, 3, 2], "ascend"), ([1, 1, 2], "ascend"), ([-1, 0, 2], "ascend"),
     ([1, 2, 30], "ascend")],
)  # fmt: skip
def test_refused_token_maps(token_map, message):
    target = init(jax.random.key(5), TARGET)
    with pytest.raises(ConfigError, match=message):
        init_heads(MedusaConfig(1, 16, 30, 1, "shared", 3), target, None if token_map is None else np.array(token_map))


def test_refused_targets():
    target = init(jax.random.key(5), TARGET)
    with pytest.raises(ConfigError, match="hidden size 16 and vocabulary 31, the target has 16 and 30"):
        init_heads(MedusaConfig(1, 16, 31), target)
    with pytest.raises(ConfigError, match="a token map; give both"):
        init_heads(MedusaConfig(1, 16, 30), target, MAP)
