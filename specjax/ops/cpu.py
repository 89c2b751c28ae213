"""What a CPU computes faster in another arrangement, or natively. Measurements stand in docs/log.md."""

import functools
import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from specjax.errors import ConfigError
from specjax.ops import native, plain
from specjax.ops.plain import Mixture, Prefix

BLOCK = 128  # cached tokens that attention reads at a time
_FLAT = "TI,OI->TO"
Product = Callable[[Float[Array, "T I"], Float[Array, "O I"]], Float[Array, "T O"]]
FEW_ROWS = 64  # the rows of a decoding step: up to here products are rearranged


def native_serves() -> bool:
    """Whether products are native ones: where they are built, and nobody asked for XLA's.

    Raises:
      ConfigError: SPECJAX_CPU_PRODUCTS names no kind of products, or native ones that cannot serve.
    """
    asked = _products.value or os.environ.get("SPECJAX_CPU_PRODUCTS")
    if asked not in (None, "native", "xla"):
        raise ConfigError(f"the CPU's products are to be {asked!r}; expected 'native' or 'xla'.")
    if asked == "xla" or (asked is None and jax.local_device_count() > 1):  # a mesh splits XLA's alone
        return False
    if (why := native.missing()) is not None and asked == "native":
        raise ConfigError(f"native products were asked for, but {why}.")
    return why is None


def products_here() -> str:
    """Which products run, and why not native ones, in words."""
    if native_serves():
        return "native"
    asked = _products.value or os.environ.get("SPECJAX_CPU_PRODUCTS")
    if asked == "xla":
        return "XLA's, as was asked"
    return f"XLA's: {native.missing() or 'several devices share them out'}"


# Part of what `jit` remembers a traced function by.
_products = jax.make_user_context(None)


def products(kind: str) -> AbstractContextManager[None]:
    """Inside, what is traced has these products: "native" or "xla"."""
    return _products(kind)


def padded_rows(rows: int, dtype: Any) -> int:
    """XLA:CPU's float32 products of 5 to 7 rows take longer than those of 8, of 9 to 15 longer than those of 16."""
    slow = 5 <= rows <= 16 and dtype == jnp.float32 and not native_serves()
    return -(-rows // 8) * 8 if slow else rows


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
    if x.shape[0] <= native.MOST_ROWS and w.dtype in (jnp.float32, jnp.bfloat16) and native_serves():
        return _rows_dot(native.dot, x, w).reshape(shape)
    if x.shape[0] == 1 and w.dtype == jnp.bfloat16:
        return _rows_dot(_two_rows, x, w).reshape(shape)
    if w.dtype == jnp.float32:
        # XLA:CPU multiplies a tall matrix by a few columns faster than a few rows by its transpose. The barrier keeps
        # it from folding the transposition back into the product.
        columns = jnp.einsum("OI,TI->OT", w, x)
        return jax.lax.optimization_barrier(columns).T.reshape(shape)
    return plain.dot(_FLAT, x, w).reshape(shape)


def _two_rows(x: Float[Array, "1 I"], w: Float[Array, "O I"]) -> Float[Array, "1 O"]:
    # XLA:CPU has no fast bf16 matrix-vector product, one row takes several times as long as two: add an empty row.
    return plain.dot(_FLAT, jnp.concatenate([x, jnp.zeros_like(x)]), w)[:1]


def _rows_dot(form: Product, x: Float[Array, "T I"], w: Float[Array, "O I"]) -> Float[Array, "T O"]:
    """A form of the product that `vmap` and gradients do without: the batch supplies rows, tangents are plain."""

    @jax.custom_batching.custom_vmap
    def product(x: Array, w: Array) -> Array:
        return form(x, w)

    @product.def_vmap
    def _batched(size: int, batched: list[bool], x: Array, w: Array) -> tuple[Array, bool]:
        rows = size * x.shape[-2]
        if form is native.dot and batched == [True, False] and rows <= native.MOST_ROWS:
            return _rows_dot(form, x.reshape(rows, -1), w).reshape(size, -1, w.shape[0]), True
        axes = tuple(0 if b else None for b in batched)
        return jax.vmap(lambda x, w: plain.dot(_FLAT, x, w), axes)(x, w), True

    @jax.custom_jvp  # what has a rule for vmap has none for gradients
    def differentiable(x: Array, w: Array) -> Array:
        return product(x, w)

    @differentiable.defjvp
    def _tangent(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
        (x, w), (dx, dw) = primals, tangents
        return product(x, w), plain.dot(_FLAT, dx, w) + plain.dot(_FLAT, x, dw)

    return differentiable(x, w)


def few(x: Float[Array, "T D"]) -> bool:
    """Whether native operations are for so many rows."""
    return x.ndim == 2 and x.shape[0] <= native.MOST_ROWS and native_serves()


def rms_norm(eps: float, x: Float[Array, "T D"], scale: Float[Array, "D"]) -> Float[Array, "T D"]:
    """Native: XLA:CPU sums a row in another order beside others."""
    plainly = functools.partial(plain.rms_norm, eps=eps)

    @jax.custom_batching.custom_vmap
    def norm(x: Array, scale: Array) -> Array:
        return native.rms_norm(x, scale.astype(jnp.float32), eps)

    @norm.def_vmap
    def _batched(size: int, batched: list[bool], x: Array, scale: Array) -> tuple[Array, bool]:
        if batched == [True, False] and size * x.shape[1] <= native.MOST_ROWS:
            return norm(x.reshape(-1, x.shape[-1]), scale).reshape(x.shape), True
        return jax.vmap(plainly, tuple(0 if one else None for one in batched))(x, scale), True

    @jax.custom_jvp
    def differentiable(x: Array, scale: Array) -> Array:
        return norm(x, scale)

    differentiable.defjvp(lambda primals, tangents: jax.jvp(plainly, primals, tangents))
    return differentiable(x, scale)


def _block(prefix: Prefix) -> int:
    return math.gcd(prefix.v.shape[-2], BLOCK)


def reads(prefix: Prefix, tokens: int) -> bool:
    """Whether `attention` has a form of its own for this cache."""
    return _has_blocks(prefix) or (tokens <= native.MOST_ROWS and native_serves())


def _has_blocks(prefix: Prefix) -> bool:
    # More than one, of a size that pays.
    return prefix.v.shape[-2] > BLOCK and _block(prefix) >= BLOCK // 2


def attention(
    q: Float[Array, "K GT H"],
    k: Float[Array, "K H T"],
    v: Float[Array, "K T H"],
    mask: Bool[Array, "T T"],
    prefix: Prefix,
) -> Float[Array, "K GT H"]:
    """Native for few tokens; otherwise the prefix in blocks."""
    if mask.shape[0] <= native.MOST_ROWS and native_serves():
        return _native_attention(q, k, v, mask, prefix)
    return _in_blocks(q, k, v, mask, prefix)


def _in_blocks(q: Array, k: Array, v: Array, mask: Array, prefix: Prefix) -> Array:
    return plain.attended(attend_prefix if _has_blocks(prefix) else plain.attend_prefix, q, k, v, mask, prefix)


@jax.custom_jvp
def _native_attention(q: Array, k: Array, v: Array, mask: Array, prefix: Prefix) -> Array:
    @jax.custom_batching.custom_vmap
    def one(*operands: Any) -> Array:
        return native.attend(*operands)

    @one.def_vmap
    def _batched(size: int, batched: list[Any], *operands: Any) -> tuple[Array, bool]:
        axes = jax.tree.map(lambda one: 0 if one else None, tuple(batched))
        return jax.vmap(_in_blocks, axes)(*operands), True

    return one(q, k, v, mask, prefix)


@_native_attention.defjvp
def _native_attention_tangent(primals: Any, tangents: Any) -> tuple[Array, Array]:
    return jax.jvp(plain.attention, primals, tangents)


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
