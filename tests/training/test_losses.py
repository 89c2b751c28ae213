"""The loss and its gradient in one sweep: equal to the naive ones; what is not labelled counts for nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specjax as sj
from specjax.heads import MedusaHeads, init_heads, project
from specjax.ranks.labels import IGNORED, future_labels
from specjax.training import losses
from specjax.training.losses import Teacher, chunked_cross_entropy, head_cross_entropy, head_weights

T, C, V, K = 50, 3, 61, 4


def problem(model, projection):
    """Disturbed heads, the projection, features, labels and a teacher."""
    heads = init_heads(sj.MedusaConfig(C, 16, V, projection=projection), model.params)
    keys = iter(jax.random.split(jax.random.key(0), 16))
    params = {n: v + 0.3 * jax.random.normal(next(keys), v.shape) for n, v in sorted(heads.params.items())}
    features = jax.random.normal(next(keys), (T, 16))
    labels = jax.random.randint(next(keys), (T, C), 0, V).at[::7].set(IGNORED)
    teacher = Teacher(*_top(jax.random.normal(next(keys), (T, C, V))))
    return heads, params, None if projection == "full" else model.params.unembedding, features, labels, teacher


def _top(logits):
    kept, tokens = jax.lax.top_k(logits, K)
    return tokens, jax.nn.softmax(kept, -1)


def naive(heads, params, matrix, features, labels, teacher, distillation, z_loss):
    """The same by the book, with the whole distribution at once."""
    logits = project(dataclasses.replace(heads, params=params), matrix, features)
    log_q, valid = jax.nn.log_softmax(logits), labels.T != IGNORED
    p = jnp.zeros((C, T, V))
    at = jnp.arange(C)[:, None, None], jnp.arange(T)[None, :, None], jnp.moveaxis(teacher.tokens, 0, 1)
    p = p.at[at].set(jnp.moveaxis(teacher.probabilities, 0, 1))
    kl = jnp.sum(jnp.where(p > 0, p * (jnp.log(jnp.where(p > 0, p, 1)) - log_q), 0), -1)
    extra = distillation * kl + z_loss * jax.nn.logsumexp(logits, -1) ** 2
    count = jnp.maximum(valid.sum(1), 1)
    return (1 - distillation) * head_cross_entropy(logits, labels) + jnp.where(valid, extra, 0).sum(1) / count


@pytest.mark.parametrize(
    ("projection", "distillation", "z_loss"), [("full", 0.0, 0.0), ("shared", 0.0, 1e-2), ("shared", 0.7, 1e-3)]
)
def test_the_chunked_loss_and_its_gradient_equal_the_naive_ones(model, projection, distillation, z_loss, monkeypatch):
    heads, params, matrix, features, labels, teacher = problem(model, projection)
    monkeypatch.setattr(losses, "LOGIT_BYTES", 4 * C * V * 8)  # chunks of 8, the last one cut

    def ours(params, features):
        cast = dataclasses.replace(heads, params=params)
        return chunked_cross_entropy(
            cast, matrix, features, labels, teacher=teacher, distillation=distillation, z_loss=z_loss
        )

    def theirs(params, features):
        return naive(heads, params, matrix, features, labels, teacher, distillation, z_loss)

    weights = jnp.array([1.0, 0.5, 0.25])

    def derived(loss):
        def weighted(params, features):
            each = loss(params, features)
            return (weights * each).sum(), each

        return jax.jit(jax.value_and_grad(weighted, (0, 1), has_aux=True))(params, features)

    for a, b in zip(jax.tree.leaves(derived(ours)), jax.tree.leaves(derived(theirs)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_what_is_not_labelled_has_exactly_no_loss_and_no_gradient(model, monkeypatch):
    """Prompts have no features, ends of conversations and padding no label."""
    heads, params, matrix, features, labels, teacher = problem(model, "shared")
    monkeypatch.setattr(losses, "LOGIT_BYTES", 4 * C * V * 16)
    text = np.arange(1, 7)
    within = future_labels(text, np.array([4, 2]), C)  # two conversations: no label crosses from one to the next
    assert within[3].tolist() == [IGNORED] * C
    assert within[2].tolist() == [4, IGNORED, IGNORED]
    labels = labels.at[:6].set(within)

    @jax.jit
    def run(features, labels):
        def loss(params, features):
            cast = dataclasses.replace(heads, params=params)
            return chunked_cross_entropy(
                cast, matrix, features, labels, teacher=teacher, distillation=0.5, z_loss=1e-2
            ).sum()

        return jax.value_and_grad(loss, (0, 1))(params, features)

    value, (by_params, by_features) = run(features, labels)
    dead = np.flatnonzero((np.asarray(labels) == IGNORED).all(1))
    assert len(dead) == 9
    assert not np.asarray(by_features)[dead].any()
    alive = np.setdiff1d(np.arange(T), dead)
    assert np.abs(np.asarray(by_features)[alive]).max(1).min() > 0
    # Whatever stands there changes nothing, to the bit.
    again, (other, _) = run(features.at[dead].set(7.0), labels)
    assert again == value
    jax.tree.map(np.testing.assert_array_equal, by_params, other)
    nothing, (none, _) = run(features, jnp.full_like(labels, IGNORED))
    assert nothing == 0
    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(none))


def test_the_loss_over_a_large_vocabulary_fits_in_memory():
    """Compiled, not run: temporaries and outputs of the loss with its gradient; the docstring has the figure."""
    shape = sj.MedusaConfig(4, 896, 151_936, projection="shared")  # Qwen2.5-0.5B, 2,048 positions
    parameters = jax.eval_shape(MedusaHeads(shape).init, jax.random.key(0), jnp.zeros((1, 896)))["params"]

    def loss(params, projection, features, labels):
        return chunked_cross_entropy(sj.Heads(params, None, shape), projection, features, labels).sum()

    half = jnp.bfloat16
    arguments = (
        jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, half), parameters),
        jax.ShapeDtypeStruct((151_936, 896), half),
        jax.ShapeDtypeStruct((2048, 896), half),
        jax.ShapeDtypeStruct((2048, 4), jnp.int32),
    )
    memory = jax.jit(jax.value_and_grad(loss)).lower(*arguments).compile().memory_analysis()
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes < 1e9
    assert 4 * 2048 * 4 * 151_936 > 4e9  # what one array of all logits would take


def test_head_weights():
    assert head_weights("sum", 3).tolist() == [1, 1, 1]
    np.testing.assert_allclose(head_weights("decay", 3), [0.2, 0.16, 0.128])
    with pytest.raises(sj.ConfigError, match="weighting is 'mean'"):
        head_weights("mean", 3)
