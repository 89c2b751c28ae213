"""The fixed-size functional key/value cache.

Slots at `length` and beyond are garbage by definition: nothing attends to them, so a rejected draft costs nothing.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from specjax.target.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """Keys and values of T freshly computed tokens, one array a layer: what `forward` returns and `write` stores."""

    k: tuple[Float[Array, "K H T"], ...]
    v: tuple[Float[Array, "K T H"], ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of the committed tokens, float32, one array a layer.

    The layout is what XLA:CPU multiplies in place: a stacked [L S K H] cache is sliced and transposed, hence copied, at
    every step; slots last makes the product with the keys six times faster than slots before H; and bfloat16 would be
    converted at every step, because there is no batched bf16 product.
    """

    k: tuple[Float[Array, "K H S"], ...]
    v: tuple[Float[Array, "K S H"], ...]
    length: Int[Array, ""]

    @property
    def capacity(self) -> int:
        """S, the number of slots."""
        return self.v[0].shape[-2]


def zeros(config: ModelConfig, capacity: int) -> KVCache:
    """An empty cache of `capacity` slots. Zeroed, not uninitialised: 0 x NaN would poison masked attention."""
    k, h = config.num_kv_heads, config.head_dim
    return KVCache(
        k=tuple(jnp.zeros((k, h, capacity), jnp.float32) for _ in range(config.num_layers)),
        v=tuple(jnp.zeros((k, capacity, h), jnp.float32) for _ in range(config.num_layers)),
        length=jnp.zeros((), jnp.int32),
    )


def gather(rows: Rows, index: Int[Array, "E1"]) -> Rows:
    """Picks rows by position, e.g. the nodes of an accepted path."""
    return Rows(
        k=tuple(jnp.take(k, index, axis=2) for k in rows.k),
        v=tuple(jnp.take(v, index, axis=1) for v in rows.v),
    )


def write(cache: KVCache, rows: Rows, count: Int[Array, ""] | int, *, after: Int[Array, ""] | None = None) -> KVCache:
    """Stores all T rows at slots [length, length + T) and counts the first `count` of them as committed.

    The caller guarantees length + T <= capacity: `dynamic_update_slice` would otherwise shift the write backwards.

    Args:
      after: a token id computed from the forward pass that read this cache. It ties the write to the end of that pass;
        without such a dependency XLA, which may not reorder the reads before the write, copies the whole cache twice.
    """
    start = cache.length if after is None else jnp.where(after >= 0, cache.length, 0)
    update, zero = jax.lax.dynamic_update_slice, jnp.zeros_like(start)
    return KVCache(
        k=tuple(update(slots, new, (zero, zero, start)) for slots, new in zip(cache.k, rows.k, strict=True)),
        v=tuple(update(slots, new, (zero, start, zero)) for slots, new in zip(cache.v, rows.v, strict=True)),
        length=cache.length + jnp.asarray(count, jnp.int32),
    )
