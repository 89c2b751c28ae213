"""Logit warpers: temperature, top-k and top-p (nucleus), in that order, as every decoding library applies them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from specjax.errors import ConfigError


def check(temperature: float, top_k: int | None, top_p: float) -> None:
    """Raises ConfigError when a parameter is outside its range."""
    if not 0 < temperature < math.inf:
        raise ConfigError(f"temperature is {temperature}; sampling needs a positive, finite one (for 0 use Greedy).")
    if top_k is not None and (not isinstance(top_k, int | np.integer) or isinstance(top_k, bool) or top_k < 1):
        raise ConfigError(
            f"top_k is {top_k!r}; expected a whole number of at least 1, or None for the whole vocabulary."
        )
    if not 0 < top_p <= 1:
        raise ConfigError(f"top_p is {top_p}; expected 0 < top_p <= 1.")


def warp(
    logits: Float[Array, "*T V"], *, temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0
) -> Float[Array, "*T V"]:
    """Logits of the warped distribution; excluded tokens get -inf.

    Top-k keeps exactly k tokens (ties to the lowest id). Top-p keeps the smallest set of most probable tokens whose
    mass reaches `top_p`, always at least one.
    """
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        values, ids = jax.lax.top_k(logits, top_k)
        return _scatter(jnp.full_like(logits, -jnp.inf), ids, _nucleus(values, top_p))
    if top_p < 1.0:
        values, ids = jax.lax.top_k(logits, logits.shape[-1])
        return _scatter(logits, ids, _nucleus(values, top_p))
    return logits


def _nucleus(values: Float[Array, "*T k"], top_p: float) -> Float[Array, "*T k"]:
    # `values` are sorted. A token stays while the mass before it has not reached top_p.
    p = jax.nn.softmax(values, axis=-1)
    before = jnp.cumsum(p, axis=-1) - p
    keep = (before < top_p) | (jnp.arange(values.shape[-1]) == 0)
    return jnp.where(keep, values, -jnp.inf)


def _scatter(target: Float[Array, "*T V"], ids: Array, values: Array) -> Float[Array, "*T V"]:
    return jnp.put_along_axis(target, ids, values, axis=-1, inplace=False)
