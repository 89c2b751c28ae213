"""Which token each head is to give at a position, and how the head ranks it."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

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


def frequent_tokens(tokens: Int[np.ndarray, "n"], size: int, vocab: int) -> Int[np.ndarray, "R"]:
    """The `size` most frequent tokens, ascending (ties in frequency to the lowest id): a reduced vocabulary."""
    counts = np.bincount(tokens, minlength=vocab)
    return np.sort(np.argsort(-counts, kind="stable")[:size]).astype(np.int32)


def label_ranks(logits: Float[Array, "C T V"], labels: Int[Array, "T C"]) -> Int[Array, "C T"]:
    """How many tokens a head prefers to the true one (0: none), ties to the lowest id; -1 where unlabelled.

    A logit that is not a number counts as preferred: broken heads rank nothing well.
    """
    valid = labels.T != IGNORED
    safe = jnp.where(valid, labels.T, 0)[..., None]
    picked = jnp.take_along_axis(logits, safe, axis=-1)
    ahead = ~(logits <= picked) | ((logits == picked) & (jnp.arange(logits.shape[-1], dtype=jnp.int32) < safe))
    return jnp.where(valid, jnp.sum(ahead, axis=-1), -1)
