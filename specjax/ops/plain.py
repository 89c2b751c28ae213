"""Every operation as the mathematics says it: what runs on any platform that has no file of its own."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

NEG_INF = -1e30  # a finite stand-in: a fully masked row stays free of NaN

# What attention has gathered: the running maximum of the scores, and relative to it the sums of weights and of weighted
# values (online softmax, Milakov & Gimelshein 2018).
Mixture = tuple[Float[Array, "K GT 1"], Float[Array, "K GT 1"], Float[Array, "K GT H"]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prefix:
    """Cached keys and values of one layer, and which of the S slots each new token sees."""

    k: Float[Array, "K H S"]
    v: Float[Array, "K S H"]
    mask: Bool[Array, "T S"]
    first: Int[Array, ""]  # nobody sees a slot before this one,
    end: Int[Array, ""]  # nor this one or a later one


def dot(spec: str, x: Float[Array, "T *in"], w: Array) -> Float[Array, "T *out"]:
    """Operands of one dtype, accumulated in float32, with the axes that a mesh may shard."""
    # Without preferred_element_type XLA:CPU runs bf16 products on a slow path, and rounds twice.
    return jnp.einsum(spec, x, w, preferred_element_type=jnp.float32)


def attend(
    q: Float[Array, "K GT H"], mixture: Mixture, k: Float[Array, "K H U"], v: Float[Array, "K U H"], mask: Array
) -> Mixture:
    """Adds to `mixture` what queries gather from U keys and values; mask [T U], the same for the G query heads."""
    # float32 throughout: XLA:CPU has no batched bf16 product, and this is a small part of the arithmetic. matmul, not
    # einsum: einsum may put the cache on the left, which XLA:CPU multiplies several times slower.
    scores = jnp.where(jnp.tile(mask, (q.shape[1] // mask.shape[0], 1)), jnp.matmul(q, k), NEG_INF)
    top, total, mixed = mixture
    new_top = jnp.maximum(top, scores.max(-1, keepdims=True))
    kept, weights = jnp.exp(top - new_top), jnp.exp(scores - new_top)
    return new_top, total * kept + weights.sum(-1, keepdims=True), mixed * kept + jnp.matmul(weights, v)


def attention(
    q: Float[Array, "K GT H"],
    k: Float[Array, "K H T"],
    v: Float[Array, "K T H"],
    mask: Bool[Array, "T T"],
    prefix: Prefix | None,
) -> Float[Array, "K GT H"]:
    """What queries gather from the new tokens that they see, and from the cached prefix."""
    return attended(attend_prefix, q, k, v, mask, prefix)


def attended(
    reads: Callable[[Array, Mixture, Prefix], Mixture],
    q: Float[Array, "K GT H"],
    k: Float[Array, "K H T"],
    v: Float[Array, "K T H"],
    mask: Bool[Array, "T T"],
    prefix: Prefix | None,
) -> Float[Array, "K GT H"]:
    """`attention` with a way to read the prefix."""
    nothing = jnp.full((*q.shape[:2], 1), NEG_INF, jnp.float32), jnp.zeros((*q.shape[:2], 1)), jnp.zeros(q.shape)
    mixture = attend(q, nothing, k, v, mask)
    if prefix is not None:
        mixture = reads(q, mixture, prefix)
    _, total, mixed = mixture
    return mixed / total


def attend_prefix(q: Float[Array, "K GT H"], mixture: Mixture, prefix: Prefix) -> Mixture:
    """The whole cache at once, so that no loop waits for its length."""
    return attend(q, mixture, prefix.k, prefix.v, prefix.mask)


def rms_norm(x: Float[Array, "*T D"], scale: Float[Array, "D"], eps: float) -> Float[Array, "*T D"]:
    """RMSNorm (Zhang & Sennrich 2019) in float32."""
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + eps) * scale.astype(jnp.float32)


def embedding(table: Float[Array, "V D"], tokens: Int[Array, "T"]) -> Float[Array, "T D"]:
    """Rows, float32."""
    return jnp.take(table, tokens, axis=0).astype(jnp.float32)


def top_token(logits: Float[Array, "*T V"]) -> Int[Array, "*T"]:
    """Arg-max, ties to the lowest id."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def nucleus(top_p: float, logits: Float[Array, "*T V"]) -> Float[Array, "*T V"]:
    """A token stays while the mass before it, in the order of probability, has not reached `top_p`."""
    p = jax.nn.softmax(logits, axis=-1)
    order = jnp.argsort(-p, axis=-1, stable=True)
    ranked = jnp.take_along_axis(p, order, axis=-1)
    stays = jnp.cumsum(ranked, axis=-1) - ranked < top_p
    return jnp.where(
        jnp.put_along_axis(jnp.zeros(p.shape, bool), order, stays, axis=-1, inplace=False), logits, -jnp.inf
    )
