"""Losses and accuracies of Medusa heads over cached features.

Feature j predicted token j of its conversation, so that 0-based head i is to give token j + 1 + i: with the feature at
text position t, the LM head gives t + 1 (token j) and head i gives t + 2 + i.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from specjax.heads import Heads, project

LOGIT_BYTES = 128 << 20  # of float32 logits that exist at once, for all heads together
IGNORED = -100  # label of a position that counts for nothing


def future_labels(tokens: Int[np.ndarray, "n"], lengths: Int[np.ndarray, "c"], heads: int) -> Int[np.ndarray, "n C"]:
    """labels[j, i]: the token that head i should give at feature j; `IGNORED` past the end of j's conversation."""
    labels = np.full((len(tokens), heads), IGNORED, np.int32)
    end = np.repeat(np.cumsum(lengths), lengths)
    for i in range(heads):
        source = np.arange(len(tokens)) + 1 + i
        inside = source < end
        labels[inside, i] = tokens[source[inside]]
    return labels


def reduce_labels(
    labels: Int[np.ndarray, "n C"], token_map: Int[np.ndarray, "R"], vocab: int
) -> Int[np.ndarray, "n C"]:
    """The labels as rows of the reduced vocabulary; tokens outside it become `IGNORED`."""
    rows = np.full(vocab, IGNORED, np.int32)
    rows[token_map] = np.arange(len(token_map), dtype=np.int32)
    return np.where(labels == IGNORED, IGNORED, rows[np.maximum(labels, 0)])


def head_cross_entropy(logits: Float[Array, "C T V"], labels: Int[Array, "T C"]) -> Float[Array, "C"]:
    """Mean cross-entropy of each head over its labelled positions, in nats."""
    valid = labels.T != IGNORED
    picked = jnp.take_along_axis(logits, jnp.where(valid, labels.T, 0)[..., None], axis=-1)[..., 0]
    losses = jax.nn.logsumexp(logits, axis=-1) - picked
    return jnp.sum(jnp.where(valid, losses, 0.0), axis=1) / jnp.maximum(jnp.sum(valid, axis=1), 1)


def chunked_cross_entropy(
    heads: Heads, projection: Float[Array, "R D"] | None, features: Float[Array, "T D"], labels: Int[Array, "T C"]
) -> Float[Array, "C"]:
    """`head_cross_entropy` of the heads' logits, a chunk of positions at a time: no large array of T x C x V exists.

    A chunk's logits take at most `LOGIT_BYTES`, or one position. Where there are several chunks, each one's logits are
    computed again in the backward pass.
    """
    total, width = features.shape[0], 4 * labels.shape[1] * heads.config.output_size
    chunks = -(-total // max(1, LOGIT_BYTES // width))
    if chunks == 1:
        return head_cross_entropy(project(heads, projection, features), labels)
    size = -(-total // chunks)
    features = jnp.pad(features, ((0, chunks * size - total), (0, 0)))
    labels = jnp.pad(labels, ((0, chunks * size - total), (0, 0)), constant_values=IGNORED)

    @jax.checkpoint
    def sums(features: Float[Array, "t D"], labels: Int[Array, "t C"]) -> Float[Array, "C"]:
        each = head_cross_entropy(project(heads, projection, features), labels)
        return each * jnp.sum(labels.T != IGNORED, axis=1)

    def add(total: Float[Array, "C"], chunk: tuple[Array, Array]) -> tuple[Float[Array, "C"], None]:
        return total + sums(*chunk), None

    parts = features.reshape(chunks, size, -1), labels.reshape(chunks, size, -1)
    summed, _ = jax.lax.scan(add, jnp.zeros(labels.shape[1]), parts)
    return summed / jnp.maximum(jnp.sum(labels != IGNORED, axis=0), 1)


def label_ranks(logits: Float[Array, "C T V"], labels: Int[Array, "T C"]) -> Int[Array, "C T"]:
    """How many tokens a head prefers to the true one (0: none), ties to the lowest id; -1 where unlabelled."""
    valid = labels.T != IGNORED
    safe = jnp.where(valid, labels.T, 0)[..., None]
    picked = jnp.take_along_axis(logits, safe, axis=-1)
    ahead = (logits > picked) | ((logits == picked) & (jnp.arange(logits.shape[-1]) < safe))
    return jnp.where(valid, jnp.sum(ahead, axis=-1), -1)
