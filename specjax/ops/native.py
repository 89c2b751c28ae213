"""Products, attention and norms of few rows in C++ (native.cc), called through JAX's FFI.

`python -m specjax.ops.build` builds them; where they are not built, XLA's products serve.
"""

import ctypes
import functools
import hashlib
import platform
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from specjax.ops.plain import Prefix

MOST_ROWS = 32
SOURCE = Path(__file__).with_suffix(".cc")
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-ffp-contract=fast", "-w")


def file() -> Path:
    """Where the library of this source, jaxlib and machine is, or would be."""
    mark = hashlib.sha256(SOURCE.read_bytes())
    mark.update(f"{version('jaxlib')} {platform.system()} {platform.machine()} {FLAGS}".encode())
    return SOURCE.with_name(f"native-{mark.hexdigest()[:12]}.so")


@functools.cache
def missing() -> str | None:
    """Why these products cannot serve here, or None where they can: then XLA knows them."""
    if not file().exists():
        return "they are not built; `python -m specjax.ops.build` builds them"
    try:
        library = ctypes.CDLL(str(file()))
        if not library.SpecjaxServes():
            return "they know no instruction set of this CPU"
        for name in ("Dot", "Attend", "Norm"):
            symbol = getattr(library, f"Specjax{name}")
            jax.ffi.register_ffi_target(f"specjax_{name.lower()}", jax.ffi.pycapsule(symbol), platform="cpu")
    except (AttributeError, OSError, RuntimeError, ValueError) as error:
        return f"they cannot be loaded ({error})"
    return None


def dot(x: Float[Array, "T I"], w: Float[Array, "O I"]) -> Float[Array, "T O"]:
    """Float32 sums of products of one dtype, float32 or bfloat16; up to `MOST_ROWS` rows are fast.

    A row's sums do not depend on the other rows.
    """
    return jax.ffi.ffi_call("specjax_dot", jax.ShapeDtypeStruct((x.shape[0], w.shape[0]), jnp.float32))(x, w)


def attend(
    q: Float[Array, "K GT H"],
    k: Float[Array, "K H T"],
    v: Float[Array, "K T H"],
    mask: Bool[Array, "T T"],
    prefix: Prefix,
) -> Float[Array, "K GT H"]:
    """What queries gather from the cached prefix and the new tokens, in the order of slots.

    What a token gathers does not depend on the other new tokens, nor on which of those it sees are in the cache.
    """
    bounds = (prefix.first[None].astype(jnp.int32), prefix.end[None].astype(jnp.int32))
    call = jax.ffi.ffi_call("specjax_attend", jax.ShapeDtypeStruct(q.shape, jnp.float32))
    return call(q, k, v, mask, prefix.k, prefix.v, prefix.mask, *bounds)


def rms_norm(x: Float[Array, "T D"], scale: Float[Array, "D"], eps: float) -> Float[Array, "T D"]:
    """`plain.rms_norm`; a row's does not depend on the other rows."""
    call = jax.ffi.ffi_call("specjax_norm", jax.ShapeDtypeStruct(x.shape, jnp.float32))
    return call(x, scale, eps=np.float32(eps))
