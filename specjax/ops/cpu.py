"""What XLA:CPU computes faster in another arrangement. Measurements stand in docs/log.md."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from specjax.ops import plain
from specjax.ops.plain import Mixture, Prefix

BLOCK = 128  # cached tokens that attention reads at a time
FEW_ROWS = 64  # the rows of a decoding step: up to here products are rearranged


def padded_rows(rows: int, dtype: Any) -> int:
    """XLA:CPU's float32 products of 5 to 7 rows take longer than those of 8, of 9 to 15 longer than those of 16."""
    return -(-rows // 8) * 8 if 5 <= rows <= 16 and dtype == jnp.float32 else rows


def rearranges(spec: str, x: Float[Array, "T *in"]) -> bool:
    """Whether `dot` is for this product: few rows, by weights whose axes are those of the result and then x's."""
    operands, out = spec.split("->")
    rows, weights = operands.split(",")
    return weights == out[1:] + rows[1:] and x.shape[0] <= FEW_ROWS


def dot(spec: str, x: Float[Array, "T *in"], w: Array) -> Float[Array, "T *out"]:
    """A product of few rows."""
    # Flat, because of several input or output axes XLA may reorder, hence copy, those of the weights: in bfloat16 it
    # transposed all of them at the start of every loop.
    shape = (x.shape[0], *w.shape[: w.ndim - x.ndim + 1])
    x = x.reshape(x.shape[0], -1)
    w = w.reshape(-1, x.shape[1])
    if x.shape[0] == 1 and w.dtype == jnp.bfloat16:
        return _row_dot(x, w).reshape(shape)
    if w.dtype == jnp.float32:
        # XLA:CPU multiplies a tall matrix by a few columns faster than a few rows by its transpose. The barrier keeps
        # it from folding the transposition back into the product.
        columns = jnp.einsum("OI,TI->OT", w, x)
        return jax.lax.optimization_barrier(columns).T.reshape(shape)
    return plain.dot("TI,OI->TO", x, w).reshape(shape)


def _row_dot(x: Float[Array, "1 I"], w: Float[Array, "O I"]) -> Float[Array, "1 O"]:
    # XLA:CPU has no fast bf16 matrix-vector product, one row takes several times as long as two: add an empty row.
    # Under vmap the batch supplies the rows.
    spec = "TI,OI->TO"

    @jax.custom_batching.custom_vmap
    def product(x: Array, w: Array) -> Array:
        return plain.dot(spec, jnp.concatenate([x, jnp.zeros_like(x)]), w)[:1]

    @product.def_vmap
    def _batched(size: int, batched: list[bool], x: Array, w: Array) -> tuple[Array, bool]:
        axes = tuple(0 if b else None for b in batched)
        return jax.vmap(lambda x, w: plain.dot(spec, x, w), axes)(x, w), True

    @jax.custom_jvp  # what has a rule for vmap has none for gradients
    def differentiable(x: Array, w: Array) -> Array:
        return product(x, w)

    @differentiable.defjvp
    def _tangent(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
        (x, w), (dx, dw) = primals, tangents
        return product(x, w), plain.dot(spec, dx, w) + plain.dot(spec, x, dw)

    return differentiable(x, w)


def _block(prefix: Prefix) -> int:
    return math.gcd(prefix.v.shape[-2], BLOCK)


def has_blocks(prefix: Prefix) -> bool:
    """Whether the cache has more than one block, of a size that pays."""
    return prefix.v.shape[-2] > BLOCK and _block(prefix) >= BLOCK // 2


def attend_prefix(q: Float[Array, "K GT H"], mixture: Mixture, prefix: Prefix) -> Mixture:
    """Block by block, and only those that anyone sees: a free slot would cost as much as a filled one."""
    block = _block(prefix)

    def step(i: Array, q: Array, mixture: Mixture, prefix: Prefix) -> Mixture:
        k = jax.lax.dynamic_slice_in_dim(prefix.k, i * block, block, axis=2)
        v = jax.lax.dynamic_slice_in_dim(prefix.v, i * block, block, axis=1)
        return plain.attend(q, mixture, k, v, jax.lax.dynamic_slice_in_dim(prefix.mask, i * block, block, axis=1))

    @jax.custom_batching.custom_vmap
    def blocks(q: Array, mixture: Mixture, prefix: Prefix) -> Mixture:
        first, end = prefix.first // block, -(-prefix.end // block)
        return jax.lax.fori_loop(first, end, lambda i, mixture: step(i, q, mixture, prefix), mixture)

    @blocks.def_vmap
    def _batched(size: int, batched: list[Any], q: Array, mixture: Mixture, prefix: Prefix) -> tuple[Mixture, Any]:
        # One loop for the whole batch, over the blocks that any member sees; to the others they add nothing. With a
        # counter for each member, slices would be gathers.
        axes = jax.tree.map(lambda one: 0 if one else None, batched)
        steps = jax.vmap(step, (None, axes[0], 0, axes[2]))
        mixture = jax.tree.map(lambda x, one: x if one else jnp.stack([x] * size), mixture, batched[1])
        first, end = jnp.min(prefix.first) // block, -(-jnp.max(prefix.end) // block)
        mixture = jax.lax.fori_loop(first, end, lambda i, mixture: steps(i, q, mixture, prefix), mixture)
        return mixture, jax.tree.map(lambda _: True, mixture)

    return blocks(q, mixture, prefix)


def embedding(table: Float[Array, "V D"], tokens: Int[Array, "T"]) -> Float[Array, "T D"]:
    """XLA:CPU widens a bfloat16 table before it gathers: tied to the tokens, not for all rows before a loop."""
    return plain.embedding(*jax.lax.optimization_barrier((table, tokens)))


def top_token(logits: Float[Array, "*T V"]) -> Int[Array, "*T"]:
    """`top_k` has arg-max's order, and XLA:CPU runs it faster."""
    return jax.lax.top_k(logits, 1)[1][..., 0].astype(jnp.int32)


def nucleus(top_p: float, logits: Float[Array, "*T V"]) -> Float[Array, "*T V"]:
    """The least probability that stays is found by halving an interval, not by sorting, which XLA:CPU is slow at.
    Positive floats are in the order of their bits."""
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
    before = (
        above(bits)[..., None] + (jnp.cumsum(tied, axis=-1, dtype=least.dtype) - tied.astype(least.dtype)) * least
    )  # of equals the lowest ids first
    return jnp.where((p > least) | (tied & (before < top_p)), logits, -jnp.inf)
