"""Logit warpers: temperature, top-k and top-p (nucleus), in that order, as every decoding library applies them."""

import math
import numbers

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from specjax.errors import ConfigError


def check(temperature: float, top_k: int | None, top_p: float) -> None:
    """Raises ConfigError when a parameter is outside its range."""
    check_temperature(temperature)
    if top_k is not None and (not isinstance(top_k, int | np.integer) or isinstance(top_k, bool) or top_k < 1):
        raise ConfigError(
            f"top_k is {top_k!r}; expected a whole number of at least 1, or None for the whole vocabulary."
        )
    if not isinstance(top_p, numbers.Real) or not 0 < top_p <= 1:
        raise ConfigError(f"top_p is {top_p!r}; expected 0 < top_p <= 1.")


def check_temperature(temperature: float) -> None:
    """Raises ConfigError for one that is not a positive, finite number, or that float32 does not hold."""
    if not isinstance(temperature, numbers.Real) or not np.finfo(np.float32).tiny <= temperature < math.inf:
        raise ConfigError(
            f"temperature is {temperature!r}; sampling needs a positive, finite one (for 0, or nearly, use Greedy)."
        )


def cooled(logits: Float[Array, "*T V"], temperature: float) -> Float[Array, "*T V"]:
    """Logits over temperature, the largest shifted to 0: a tiny temperature makes none of them infinite."""
    return (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature


def warp(
    logits: Float[Array, "*T V"], *, temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0
) -> Float[Array, "*T V"]:
    """Logits of the warped distribution; excluded tokens get -inf.

    Top-k keeps exactly k tokens (ties to the lowest id). Top-p keeps the smallest set of most probable tokens whose
    mass reaches `top_p`, always at least one.
    """
    logits = cooled(logits, temperature)
    if top_k is not None and top_k < logits.shape[-1]:
        values, ids = jax.lax.top_k(logits, top_k)
        return _scatter(jnp.full_like(logits, -jnp.inf), ids, _nucleus(values, top_p))
    return _nucleus(logits, top_p)


def _nucleus(logits: Float[Array, "*T V"], top_p: float) -> Float[Array, "*T V"]:
    # A token stays while the mass before it has not reached top_p. The least probability that stays is found by
    # halving an interval, not by sorting, which XLA:CPU is slow at. Positive floats are in the order of their bits.
    if top_p == 1.0:
        return logits
    p = jax.nn.softmax(logits, axis=-1)

    def value(bits: Int[Array, "*T"]) -> Float[Array, "*T 1"]:
        return jax.lax.bitcast_convert_type(bits, jnp.float32)[..., None]

    def above(bits: Int[Array, "*T"]) -> Float[Array, "*T"]:
        return jnp.sum(jnp.where(p > value(bits), p, 0), axis=-1)

    def halve(_: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends  # the least that stays is in [low, high]: the mass above `high` does not reach top_p
        middle = low + (high - low) // 2
        reached = above(middle) >= top_p
        return jnp.where(reached, middle, low), jnp.where(reached, high, middle)

    zero = jnp.zeros(p.shape[:-1], jnp.int32)
    one = jax.lax.bitcast_convert_type(jnp.float32(1), jnp.int32)
    _, bits = jax.lax.fori_loop(0, 31, halve, (zero, zero + one))
    least, tied = value(bits), p == value(bits)
    before = above(bits)[..., None] + (jnp.cumsum(tied, axis=-1) - tied) * least  # of equals the lowest ids first
    return jnp.where((p > least) | (tied & (before < top_p)), logits, -jnp.inf)


def _scatter(target: Float[Array, "*T V"], ids: Array, values: Array) -> Float[Array, "*T V"]:
    return jnp.put_along_axis(target, ids, values, axis=-1, inplace=False)
