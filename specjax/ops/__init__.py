"""How an operation is computed: the one room that knows the platform (law 10).

`plain` has every operation as the mathematics says it, `cpu` what XLA:CPU computes faster in another arrangement. What
is traced carries both, and lowering keeps the one of its platform (`jax.lax.platform_dependent`): the program of an
accelerator, also one that is compiled ahead of time on a CPU, has nothing of the other. How many rows a decoding step
has is a shape, and shapes are fixed when a program is traced: `padded_rows` goes by the platform that JAX runs on, or
by the one that `tracing_for` names. Under `vmap` a batch supplies the rows; operations can be differentiated.
"""

import functools
from contextlib import AbstractContextManager
from typing import Any

import jax
from jaxtyping import Array, Bool, Float, Int

from specjax.ops import cpu, plain
from specjax.ops.plain import Prefix

__all__ = [
    "Prefix",
    "attention",
    "cpu_products",
    "cpu_products_here",
    "dot",
    "embedding",
    "nucleus",
    "padded_rows",
    "rms_norm",
    "top_token",
    "tracing_for",
]

# Part of what `jit` remembers a traced function by: one traced for another platform is not taken for this one's.
_platform = jax.make_user_context(None)
cpu_products, cpu_products_here = cpu.products, cpu.products_here


def tracing_for(platform: str) -> AbstractContextManager[None]:
    """Traces programs for another platform than JAX runs on, such as "cuda" or "tpu", to be compiled ahead of time."""
    return _platform(platform)


def padded_rows(rows: int, dtype: Any) -> int:
    """The number of rows, at least as many, that a forward pass is fastest with."""
    return cpu.padded_rows(rows, dtype) if (_platform.value or jax.default_backend()) == "cpu" else rows


def dot(spec: str, x: Float[Array, "T *in"], w: Array) -> Float[Array, "T *out"]:
    """`einsum(spec, x, w)` with operands in the weights' dtype and a float32 result; fastest if w is [*out *in]."""
    x = x.astype(w.dtype)
    if not cpu.rearranges(spec, x):
        return plain.dot(spec, x, w)
    forms = {"cpu": functools.partial(cpu.dot, spec), "default": functools.partial(plain.dot, spec)}
    return jax.lax.platform_dependent(x, w, **forms)


def attention(
    q: Float[Array, "K GT H"],
    k: Float[Array, "K H T"],
    v: Float[Array, "K T H"],
    mask: Bool[Array, "T T"],
    prefix: Prefix | None,
) -> Float[Array, "K GT H"]:
    """What queries gather from the new tokens that they see, and from the cached prefix."""
    if prefix is None or not cpu.reads(prefix, mask.shape[0]):
        return plain.attention(q, k, v, mask, prefix)
    return jax.lax.platform_dependent(q, k, v, mask, prefix, cpu=cpu.attention, default=plain.attention)


def rms_norm(x: Float[Array, "*T D"], scale: Float[Array, "D"], eps: float) -> Float[Array, "*T D"]:
    """RMSNorm (Zhang & Sennrich 2019) in float32."""
    if not cpu.few(x):
        return plain.rms_norm(x, scale, eps)
    forms = {"cpu": functools.partial(cpu.rms_norm, eps), "default": functools.partial(plain.rms_norm, eps=eps)}
    return jax.lax.platform_dependent(x, scale, **forms)


def embedding(table: Float[Array, "V D"], tokens: Int[Array, "T"]) -> Float[Array, "T D"]:
    """The tokens' rows, float32."""
    return jax.lax.platform_dependent(table, tokens, cpu=cpu.embedding, default=plain.embedding)


def top_token(logits: Float[Array, "*T V"]) -> Int[Array, "*T"]:
    """Arg-max, ties to the lowest id."""
    return jax.lax.platform_dependent(logits, cpu=cpu.top_token, default=plain.top_token)


def nucleus(logits: Float[Array, "*T V"], top_p: float) -> Float[Array, "*T V"]:
    """Logits with -inf for all but the smallest set of most probable tokens whose mass reaches `top_p`; of equals the
    lowest ids first, always at least one."""
    forms = {"cpu": functools.partial(cpu.nucleus, top_p), "default": functools.partial(plain.nucleus, top_p)}
    return jax.lax.platform_dependent(logits, **forms)
