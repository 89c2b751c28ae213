"""Losses and accuracies of Medusa heads over cached features.

Feature j predicted token j of its conversation, so that 0-based head i is to give token j + 1 + i: with the feature at
text position t, the LM head gives t + 1 (token j) and head i gives t + 2 + i.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from specjax import ops
from specjax.errors import ConfigError
from specjax.heads import Heads, MedusaHeads
from specjax.ranks.labels import IGNORED

LOGIT_BYTES = 160 << 20  # of float32 logits that exist at once, for all heads together
_CACHED_BYTES = 16 << 20  # as many stay in a CPU's cache
_FEWEST = 64  # positions of a chunk: with fewer, reading the projection takes longer than the arithmetic
Weighting = Literal["sum", "decay"]
Divergence = Literal["forward_kl", "reverse_kl", "jsd", "tvd"]


class Teacher(NamedTuple):
    """The target's own distribution of the token that each head is to give, truncated to its k likeliest tokens.

    Attributes:
      tokens: rows of the heads' vocabulary [T C k].
      probabilities: renormalised over them [T C k].
    """

    tokens: Int[Array, "T C k"]
    probabilities: Float[Array, "T C k"]


def head_weights(weighting: Weighting, heads: int, scale: float = 0.2) -> Float[np.ndarray, "C"]:
    """What each head's loss counts: 1 each (`sum`), or `scale` * 0.8 ** i for 0-based head i (`decay`; Medusa's).

    Raises:
      ConfigError: another weighting, or a scale that is not positive.
    """
    if weighting not in ("sum", "decay") or not scale > 0:
        raise ConfigError(f"weighting is {weighting!r}, scale {scale}; expected 'sum' or 'decay', and a scale > 0.")
    return np.ones(heads) if weighting == "sum" else scale * 0.8 ** np.arange(heads)


def head_cross_entropy(logits: Float[Array, "C T V"], labels: Int[Array, "T C"]) -> Float[Array, "C"]:
    """Mean cross-entropy of each head over its labelled positions, in nats."""
    return jnp.sum(token_losses(logits, labels), axis=1) / jnp.maximum(jnp.sum(labels.T != IGNORED, axis=1), 1)


def _kl(log_p: Float[Array, "T R"], log_q: Float[Array, "T R"]) -> Float[Array, "T"]:
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def _jsd(log_p: Float[Array, "T R"], log_q: Float[Array, "T R"]) -> Float[Array, "T"]:
    log_m = jnp.logaddexp(log_p, log_q) - jnp.log(2.0)
    return 0.5 * (_kl(log_p, log_m) + _kl(log_q, log_m))


# Of target p and draft q, both as logarithms, in nats; total variation is the rejection rate itself.
DIVERGENCES: dict[str, Callable[[Array, Array], Array]] = {
    "forward_kl": _kl,
    "reverse_kl": lambda log_p, log_q: _kl(log_q, log_p),
    "jsd": _jsd,
    "tvd": lambda log_p, log_q: 0.5 * jnp.sum(jnp.abs(jnp.exp(log_p) - jnp.exp(log_q)), axis=-1),
}


def token_losses(logits: Float[Array, "C T V"], labels: Int[Array, "T C"]) -> Float[Array, "C T"]:
    """Cross-entropy of each head at each position, in nats; zero where unlabelled."""
    valid = labels.T != IGNORED
    picked = jnp.take_along_axis(logits, jnp.where(valid, labels.T, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(valid, jax.nn.logsumexp(logits, axis=-1) - picked, 0.0)


def chunked_cross_entropy(
    heads: Heads,
    projection: Float[Array, "R D"] | None,
    features: Float[Array, "T D"],
    labels: Int[Array, "T C"],
    *,
    teacher: Teacher | None = None,
    distillation: float = 0.0,
    z_loss: float = 0.0,
) -> Float[Array, "C"]:
    """Mean loss of each head over its labelled positions, in nats, a chunk of positions at a time.

    No array of T x C x V exists: a chunk's logits take at most `LOGIT_BYTES`, or one position. The gradient is computed
    with the loss, while a chunk's logits are at hand, so that nothing is computed twice. For V = 151,936, C = 4,
    T = 2,048, D = 896 (a shared projection, bfloat16) temporaries and outputs of the loss with its gradient take
    365 MB on CPU by `memory_analysis`. There is no gradient for a shared projection: it is the frozen target's.

    Args:
      projection: of `draft_projection`.
      teacher: with it, `distillation` of the loss is the KL divergence from the teacher to the head (both over the
        teacher's support; the head normalised over its whole vocabulary), the rest the cross-entropy with the labels.
      z_loss: weight of the squared log-partition function, which keeps logits from drifting.
    """
    valid = labels.T != IGNORED
    tokens = jnp.where(valid, labels.T, 0)[..., None]
    weights, offset = jnp.ones(tokens.shape, jnp.float32), jnp.float32(0.0)
    if teacher is not None and distillation:
        p = jnp.moveaxis(teacher.probabilities, 0, 1).astype(jnp.float32)
        tokens = jnp.concatenate([tokens, jnp.moveaxis(teacher.tokens, 0, 1)], axis=-1)
        weights = jnp.concatenate([(1 - distillation) * weights, distillation * p], axis=-1)
        entropy = -jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1.0)), 0.0), axis=-1)
        offset = jnp.sum(jnp.where(valid, distillation * entropy, 0.0), axis=1)
    weights = jnp.where(valid[..., None], weights, 0.0)  # no weight: neither loss nor gradient
    hidden, matrices = _hidden(heads, projection, features)
    total = _summed_loss(z_loss, projection is None, hidden, matrices, tokens, weights)
    return (total - offset) / jnp.maximum(jnp.sum(valid, axis=1), 1)


def _hidden(
    heads: Heads, projection: Float[Array, "R D"] | None, features: Float[Array, "T D"]
) -> tuple[Float[Array, "C T D"], tuple[Float[Array, "R D"], ...]]:
    # What the projections read, and the projections: one, or one for each head.
    shared = replace(heads.config, projection="shared")
    hidden = MedusaHeads(shared).apply({"params": heads.params}, features)
    assert isinstance(hidden, jax.Array)
    if projection is not None:
        return hidden, (projection,)
    return hidden, tuple(heads.params[f"projection_{i}"] for i in range(heads.config.num_heads))


Sums = Float[Array, "C"]
Matrices = tuple[Float[Array, "R D"], ...]
Row = tuple[Float[Array, "c t D"], Int[Array, "c t k"], Float[Array, "c t k"]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _summed_loss(
    z_loss: float,
    trained: bool,
    hidden: Float[Array, "C T D"],
    matrices: Matrices,
    tokens: Int[Array, "C T k"],
    weights: Float[Array, "C T k"],
) -> Sums:
    return _sweep(z_loss, False, False, hidden, matrices, tokens, weights)[0]


def _summed_loss_fwd(z_loss, trained, hidden, matrices, tokens, weights):  # type: ignore[no-untyped-def]
    total, d_hidden, d_matrices = _sweep(z_loss, True, trained, hidden, matrices, tokens, weights)
    return total, (d_hidden, d_matrices)


def _summed_loss_bwd(z_loss, trained, saved, g):  # type: ignore[no-untyped-def]
    d_hidden, d_matrices = saved
    scaled = tuple((g[i] * d).astype(d.dtype) for i, d in enumerate(d_matrices)) if trained else None
    return g[:, None, None] * d_hidden, scaled, None, None


_summed_loss.defvjp(_summed_loss_fwd, _summed_loss_bwd)


def _sweep(
    z_loss: float,
    gradient: bool,
    trained: bool,
    hidden: Float[Array, "C T D"],
    matrices: Matrices,
    tokens: Int[Array, "C T k"],
    weights: Float[Array, "C T k"],
) -> tuple[Sums, Float[Array, "C T D"], Matrices]:
    # Summed losses; with `gradient` also their derivatives by what is projected and, if `trained`, by the projections.
    heads, total, _ = hidden.shape
    each = 4 * heads * matrices[0].shape[0]
    chunks = -(-total // max(1, min(LOGIT_BYTES // each, max(_FEWEST, _CACHED_BYTES // each))))
    size = -(-total // chunks)

    def split(x: Float[Array, "C T a"]) -> Float[Array, "n C t a"]:
        # Every `chunks`-th position: where positions are spread over devices, each chunk is too.
        x = jnp.pad(x, ((0, 0), (0, chunks * size - total), (0, 0)))
        return jnp.moveaxis(x.reshape(heads, size, chunks, -1), 2, 0)

    def chunk(carry: tuple[Sums, Matrices], part: Row) -> tuple[tuple[Sums, Matrices], Float[Array, "C t D"]]:
        summed, d_matrices = carry
        losses, d_parts, grown = [], [], []
        per = heads // len(matrices)  # all heads with the shared projection, or one with its own
        for i, matrix in enumerate(matrices):
            x, ids, w = (leaf[i * per : (i + 1) * per].reshape(per * size, -1) for leaf in part)
            loss, d_x, d_matrix = _rows(z_loss, gradient, trained, x, matrix, ids, w)
            losses.append(loss.reshape(per, size).sum(1))
            d_parts.append(d_x.reshape(per, size, -1))
            if trained and gradient:
                grown.append(d_matrices[i] + d_matrix)
        return (summed + jnp.concatenate(losses), tuple(grown)), jnp.concatenate(d_parts)

    zeros = tuple(jnp.zeros(m.shape, jnp.float32) for m in matrices) if trained and gradient else ()
    first = jnp.zeros(heads, jnp.float32), zeros
    if chunks == 1:
        (summed, d_matrices), d_hidden = chunk(first, (hidden, tokens, weights))
    else:
        parts = split(hidden), split(tokens), split(weights)
        (summed, d_matrices), pieces = jax.lax.scan(chunk, first, parts)
        d_hidden = jnp.moveaxis(pieces, 0, 2).reshape(heads, chunks * size, -1)[:, :total]
    return summed, d_hidden, tuple(d.astype(m.dtype) for d, m in zip(d_matrices, matrices, strict=False))


def _rows(
    z_loss: float,
    gradient: bool,
    trained: bool,
    x: Float[Array, "n D"],
    matrix: Float[Array, "R D"],
    tokens: Int[Array, "n k"],
    weights: Float[Array, "n k"],
) -> tuple[Float[Array, "n"], Float[Array, "n a"], Float[Array, "*a"]]:
    # Loss per row: the cross-entropy with `weights` on `tokens`, and the derivatives where they are wanted.
    nothing = jnp.zeros(0, jnp.float32)
    logits = ops.dot("TD,RD->TR", x, matrix)
    mass = jnp.sum(weights, axis=-1)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, tokens, axis=-1)
    loss = mass * (log_z + z_loss * log_z**2) - jnp.sum(weights * picked, axis=-1)
    loss = jnp.where(mass > 0, loss, 0.0)
    if not gradient:
        return loss, jnp.zeros((len(x), 0), jnp.float32), nothing
    row = (mass * (1 + 2 * z_loss * log_z))[:, None]
    d_logits = row * jnp.exp(logits - log_z[:, None])
    if tokens.shape[1] == 1:
        d_logits -= jnp.where(jnp.arange(matrix.shape[0], dtype=jnp.int32) == tokens, weights, 0.0)
    else:
        d_logits = d_logits.at[jnp.arange(len(x), dtype=jnp.int32)[:, None], tokens].add(-weights)
    d_logits = jnp.where(mass[:, None] > 0, d_logits, 0.0).astype(matrix.dtype)
    d_x = jnp.einsum("TR,RD->TD", d_logits, matrix, preferred_element_type=jnp.float32)
    if not trained:
        return loss, d_x, nothing
    d_matrix = jnp.einsum("TR,TD->RD", d_logits, x.astype(matrix.dtype), preferred_element_type=jnp.float32)
    return loss, d_x, d_matrix
