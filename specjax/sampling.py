"""Logit warpers: temperature, top-k and top-p (nucleus), in that order, as every decoding library applies them."""

import math
import numbers
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from specjax import ops
from specjax.checks import is_whole
from specjax.errors import ConfigError


def check_temperature(temperature: float) -> None:
    """Raises ConfigError for one that is not a positive, finite number, or that float32 does not hold."""
    if not isinstance(temperature, numbers.Real) or not np.finfo(np.float32).tiny <= temperature < math.inf:
        raise ConfigError(
            f"temperature is {temperature!r}; sampling needs a positive, finite one (for 0, or nearly, use Greedy)."
        )


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn, wherever that is said: temperature, then top-k, then top-p. At temperature 0 nothing is
    drawn: it is the most probable token.

    Raises:
      ConfigError: a parameter outside its range, or top-k or top-p at temperature 0.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        greedy = isinstance(self.temperature, numbers.Real) and self.temperature == 0
        if not greedy:
            check_temperature(self.temperature)
        if self.top_k is not None and (not is_whole(self.top_k) or self.top_k < 1):
            raise ConfigError(
                f"top_k is {self.top_k!r}; expected a whole number of at least 1, or None for the whole vocabulary."
            )
        if not isinstance(self.top_p, numbers.Real) or not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p!r}; expected 0 < top_p <= 1.")
        if greedy:
            self.refuse_warping("greedy decoding has none: raise the temperature above 0")

    def refuse_warping(self, reason: str) -> None:
        """Raises ConfigError where top-k or top-p is set, which would do nothing."""
        if self.top_k is not None or self.top_p != 1.0:
            raise ConfigError(
                f"top_k {self.top_k} and top_p {self.top_p} shape sampling, but {reason}, or leave them out."
            )

    def warp(self, logits: Float[Array, "*T V"]) -> Float[Array, "*T V"]:
        """As `warp`; the temperature is above 0."""
        return warp(logits, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)


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
        kept = values if top_p == 1.0 else ops.nucleus(values, top_p)
        return jnp.put_along_axis(jnp.full_like(logits, -jnp.inf), ids, kept, axis=-1, inplace=False)
    return logits if top_p == 1.0 else ops.nucleus(logits, top_p)
