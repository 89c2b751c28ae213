"""The decoder of Qwen2/2.5 and Llama 1/2/3.x (and Mistral) as pure, unbatched functions.

Matrix products take operands in the parameters' dtype and accumulate in float32; the residual stream, norms, rotary
angles and softmax are float32 throughout. Checked layer by layer against transformers (tests/parity).
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from specjax.target.cache import KVCache, Rows, write, zeros
from specjax.target.config import ModelConfig
from specjax.target.params import Layer, Params

PREFILL_CHUNK = 64  # prompt tokens per prefill step: one compiled step serves prompts of every length
BLOCK = 128  # cached tokens that attention reads at a time on a CPU
FEW_ROWS = 64  # the rows of a decoding step: up to here products are arranged for XLA:CPU
NEG_INF = -1e30  # a finite stand-in: a fully masked row stays free of NaN

Product = Literal["qkv", "out", "gate_up", "down"]
# Called with T once in every layer; gives what is added to the layer's products, such as LoRA's low-rank ones, as a
# function of a product's name and operand: [T *in] -> [T *out].
Adapter = Callable[[int], Callable[[Product, Array], Array]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Output:
    """What one forward pass gives."""

    features: Float[Array, "T D"]  # after the final RMSNorm: what the LM head and Medusa heads read
    rows: Rows  # keys and values of these T tokens, not yet in any cache
    taps: tuple[Float[Array, "T D"], ...]  # residual stream after the layers asked for


def dot(spec: str, x: Float[Array, "T *in"], w: Array) -> Float[Array, "T *out"]:
    """`einsum(spec, x, w)` with operands in the weights' dtype and a float32 result; fastest if w is [*out *in]."""
    x = x.astype(w.dtype)
    operands, out = spec.split("->")
    rows, weights = operands.split(",")
    if weights != out[1:] + rows[1:] or x.shape[0] > FEW_ROWS:
        return _plain_dot(spec, x, w)  # with axes that a mesh may shard
    # Flat, because of several input or output axes XLA may reorder, hence copy, those of the weights: in bfloat16 it
    # transposed all of them at the start of every loop (100 ms for 135M parameters).
    shape = (x.shape[0], *w.shape[: w.ndim - x.ndim + 1])
    x = x.reshape(x.shape[0], -1)
    w = w.reshape(-1, x.shape[1])
    if x.shape[0] == 1 and w.dtype == jnp.bfloat16:
        return _row_dot(x, w).reshape(shape)
    if w.dtype == jnp.float32:
        # XLA:CPU multiplies a tall matrix by a few columns up to 1.9 times as fast as a few rows by its transpose. The
        # barrier keeps it from folding the transposition back into the product.
        columns = jnp.einsum("OI,TI->OT", w, x)
        return jax.lax.optimization_barrier(columns).T.reshape(shape)
    return _plain_dot("TI,OI->TO", x, w).reshape(shape)


def fast_rows(rows: int, dtype: Any) -> int:
    """The number of rows, at least as many, that a forward pass is fastest with.

    XLA:CPU's float32 products of 5 to 7 rows take 1.25 times as long as those of 8, of 9 to 15 at least 1.2 times as
    long as of 16. On other devices the rows are added too, and what they cost there has not been measured.
    """
    return -(-rows // 8) * 8 if 5 <= rows <= 16 and dtype == jnp.float32 else rows


def _plain_dot(spec: str, x: Array, w: Array) -> Array:
    # Without preferred_element_type XLA:CPU runs bf16 products on a slow path, and rounds twice.
    return jnp.einsum(spec, x, w, preferred_element_type=jnp.float32)


def _row_dot(x: Float[Array, "1 I"], w: Float[Array, "O I"]) -> Float[Array, "1 O"]:
    # XLA:CPU has no fast bf16 matrix-vector product, one row takes several times as long as two: add an empty row.
    # Under vmap the batch supplies the rows.
    @jax.custom_batching.custom_vmap
    def product(x: Array, w: Array) -> Array:
        return _plain_dot("TI,OI->TO", jnp.concatenate([x, jnp.zeros_like(x)]), w)[:1]

    @product.def_vmap
    def _batched(size: int, batched: list[bool], x: Array, w: Array) -> tuple[Array, bool]:
        axes = tuple(0 if b else None for b in batched)
        return jax.vmap(lambda x, w: _plain_dot("TI,OI->TO", x, w), axes)(x, w), True

    return product(x, w)


def rms_norm(x: Float[Array, "*T D"], scale: Float[Array, "D"], eps: float) -> Float[Array, "*T D"]:
    """RMSNorm (Zhang & Sennrich 2019) in float32."""
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + eps) * scale.astype(jnp.float32)


def rope_frequencies(config: ModelConfig) -> np.ndarray:
    """Inverse frequencies [H/2] in radians per position, scaling applied; static, float64 until the end."""
    half = config.head_dim // 2
    freqs = config.rope_theta ** (-np.arange(half, dtype=np.float64) / half)
    scaling = config.rope_scaling
    if scaling is None:
        return freqs.astype(np.float32)
    if scaling.kind == "linear":
        freqs = freqs / scaling.factor
    elif scaling.kind == "divisors":
        freqs = freqs / np.asarray(scaling.divisors)
    else:
        # Llama 3.1: a wavelength counts as long when fewer than low_freq_factor turns fit in the original context.
        turns = scaling.original_max_positions * freqs / (2 * np.pi)
        keep = np.clip(
            (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor), 0.0, 1.0
        )
        freqs = keep * freqs + (1 - keep) * freqs / scaling.factor
    return freqs.astype(np.float32)


def rope_tables(config: ModelConfig, positions: Int[Array, "T"]) -> tuple[Float[Array, "T h"], Float[Array, "T h"]]:
    """cos and sin of the rotary angles, float32; h = H/2."""
    angles = positions.astype(jnp.float32)[:, None] * rope_frequencies(config)
    return jnp.cos(angles), jnp.sin(angles)


def _rotate(x: Float[Array, "T *heads H"], cos: Float[Array, "T h"], sin: Float[Array, "T h"]) -> Array:
    shape = cos.shape[:1] + (1,) * (x.ndim - 2) + cos.shape[1:]
    cos, sin = cos.reshape(shape), sin.reshape(shape)
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prefix:
    """Cached keys and values of one layer, and which of the S slots each new token sees."""

    k: Float[Array, "K H S"]
    v: Float[Array, "K S H"]
    mask: Bool[Array, "T S"]
    first: Int[Array, ""]  # nobody sees a slot before this one,
    end: Int[Array, ""]  # nor this one or a later one


def _attention(
    q: Float[Array, "T K G H"],
    rows: tuple[Float[Array, "K H T"], Float[Array, "K T H"]],
    mask: Bool[Array, "T T"],
    prefix: Prefix | None,
) -> Float[Array, "T K G H"]:
    # The prefix is read where it lies and the new rows beside it: nothing is written before it is accepted.
    t, kv_heads, g, h = q.shape
    q = (q * h**-0.5).transpose(1, 2, 0, 3).reshape(kv_heads, g * t, h)
    nothing = jnp.full((kv_heads, g * t, 1), NEG_INF), jnp.zeros((kv_heads, g * t, 1)), jnp.zeros((kv_heads, g * t, h))
    mixture = _attend(q, nothing, *rows, mask)
    if prefix is not None:
        mixture = _attend_prefix(q, mixture, prefix)
    _, total, mixed = mixture
    return (mixed / total).reshape(kv_heads, g, t, h).transpose(2, 0, 1, 3)


# What attention has gathered: the running maximum of the scores, and relative to it the sums of weights and of weighted
# values (online softmax, Milakov & Gimelshein 2018).
Mixture = tuple[Float[Array, "K GT 1"], Float[Array, "K GT 1"], Float[Array, "K GT H"]]


def _attend(
    q: Float[Array, "K GT H"], mixture: Mixture, k: Float[Array, "K H U"], v: Float[Array, "K U H"], mask: Array
) -> Mixture:
    # float32 throughout: XLA:CPU has no batched bf16 product, and this is a small part of the arithmetic. matmul, not
    # einsum: einsum may put the cache on the left, which XLA:CPU multiplies several times slower.
    scores = jnp.where(jnp.tile(mask, (q.shape[1] // mask.shape[0], 1)), jnp.matmul(q, k), NEG_INF)
    top, total, mixed = mixture
    new_top = jnp.maximum(top, scores.max(-1, keepdims=True))
    kept, weights = jnp.exp(top - new_top), jnp.exp(scores - new_top)
    return new_top, total * kept + weights.sum(-1, keepdims=True), mixed * kept + jnp.matmul(weights, v)


def _attend_prefix(q: Float[Array, "K GT H"], mixture: Mixture, prefix: Prefix) -> Mixture:
    """On a CPU block by block, and only those that anyone sees: a free slot would cost as much as a filled one.

    Elsewhere the whole cache is read at once, so that no loop waits for its length; no GPU has been measured.
    """
    slots = prefix.v.shape[-2]
    block = math.gcd(slots, BLOCK)
    if slots <= BLOCK or block < BLOCK // 2:
        return _attend(q, mixture, prefix.k, prefix.v, prefix.mask)

    def step(i: Array, q: Array, mixture: Mixture, prefix: Prefix) -> Mixture:
        k = jax.lax.dynamic_slice_in_dim(prefix.k, i * block, block, axis=2)
        v = jax.lax.dynamic_slice_in_dim(prefix.v, i * block, block, axis=1)
        return _attend(q, mixture, k, v, jax.lax.dynamic_slice_in_dim(prefix.mask, i * block, block, axis=1))

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

    def whole(q: Array, mixture: Mixture, prefix: Prefix) -> Mixture:
        return _attend(q, mixture, prefix.k, prefix.v, prefix.mask)

    return jax.lax.platform_dependent(q, mixture, prefix, cpu=blocks, default=whole)


def layer_forward(
    layer: Layer,
    config: ModelConfig,
    x: Float[Array, "T D"],
    tables: tuple[Float[Array, "T h"], Float[Array, "T h"]],
    mask: Bool[Array, "T T"],
    prefix: Prefix | None = None,
    adapter: Adapter | None = None,
) -> tuple[Float[Array, "T D"], Float[Array, "K H T"], Float[Array, "K T H"]]:
    """One decoder layer: pre-norm attention and SwiGLU, each added to the residual stream. Gives (x, k, v)."""
    g = config.group_size
    extra = None if adapter is None else adapter(x.shape[0])

    def product(name: Product, spec: str, x: Float[Array, "T *in"]) -> Float[Array, "T *out"]:
        out = dot(spec, x, getattr(layer, name))
        return out if extra is None else out + extra(name, x)

    with jax.named_scope("attention"):
        h = rms_norm(x, layer.attn_norm, config.rms_norm_eps)
        qkv = product("qkv", "TD,KQHD->TKQH", h)
        if layer.qkv_bias is not None:
            qkv = qkv + layer.qkv_bias.astype(jnp.float32)
        qk = _rotate(qkv[:, :, : g + 1], *tables)
        k = jnp.einsum("TKH->KHT", qk[:, :, g])
        v = jnp.einsum("TKH->KTH", qkv[:, :, g + 1])
        x = x + product("out", "TKGH,DKGH->TD", _attention(qk[:, :, :g], (k, v), mask, prefix))
    with jax.named_scope("mlp"):
        h = rms_norm(x, layer.mlp_norm, config.rms_norm_eps)
        gate_up = product("gate_up", "TD,CFD->TCF", h)
        x = x + product("down", "TF,DF->TD", jax.nn.silu(gate_up[:, 0]) * gate_up[:, 1])
    return x, k, v


# Layers of one shape are traced once for a config, not once each in every program; BLOCK and FEW_ROWS are read then.
# XLA inlines the calls.
_layer = jax.jit(layer_forward, static_argnames="config")


def embed(params: Params, tokens: Int[Array, "T"]) -> Float[Array, "T D"]:
    """Token embeddings, float32 (no scaling in these families)."""
    # XLA:CPU widens a bfloat16 table before it gathers. Tied to the tokens, it cannot do so for all rows before a loop.
    table, tokens = jax.lax.optimization_barrier((params.embed, tokens))
    return jnp.take(table, tokens, axis=0).astype(jnp.float32)


def unembed(params: Params, features: Float[Array, "T D"]) -> Float[Array, "T V"]:
    """LM-head logits, float32."""
    return dot("TD,VD->TV", features, params.unembedding)


@functools.partial(jax.named_call, name="forward")
def forward(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, "T"],
    *,
    cache: KVCache | None = None,
    positions: Int[Array, "T"] | None = None,
    mask: Bool[Array, "T T"] | np.ndarray | None = None,
    taps: tuple[int, ...] = (),
    adapters: tuple[Adapter, ...] | None = None,
    remat: bool = False,
) -> Output:
    """One pass over T tokens that attend to the cached prefix and to each other; the cache is read, never written.

    Without a cache it can be differentiated; a cache of more than `BLOCK` slots is read in a loop, and cannot.

    Args:
      params: the weights.
      config: the model (static).
      tokens: ids, each in [0, V).
      cache: the committed prefix; None means there is none.
      positions: absolute positions, int32; by default they follow the prefix one by one. Siblings in a tree share one.
      mask: mask[i, j] says that new token i sees new token j; by default causal. For a tree: its ancestor mask.
      taps: layers (0-based) after which to return the residual stream, for feature-level drafters.
      adapters: one per layer, each adding to its layer's products.
      remat: keeps only the residual stream for the backward pass and computes the layers again there.
    """
    t, start = tokens.shape[0], jnp.int32(0) if cache is None else cache.length
    if positions is None:
        positions = start + jnp.arange(t, dtype=jnp.int32)
    mask = jnp.asarray(np.tri(t, dtype=bool) if mask is None else mask)
    first = jnp.int32(0)
    if cache is not None:
        slots = jnp.arange(cache.capacity, dtype=jnp.int32)
        prefix_mask = jnp.broadcast_to(slots < start, (t, cache.capacity))
        if config.sliding_window is not None:
            prefix_mask &= positions[:, None] - slots < config.sliding_window
            first = jnp.clip(jnp.min(positions) - config.sliding_window + 1, 0, start)
    if config.sliding_window is not None:
        mask &= positions[:, None] - positions < config.sliding_window

    x, tables = embed(params, tokens), rope_tables(config, positions)
    ks, vs, tapped = [], [], {}
    for i, layer in enumerate(params.layers):
        prefix = None if cache is None else Prefix(cache.k[i], cache.v[i], prefix_mask, first, start)
        with jax.named_scope(f"layer_{i}"):
            adapter = None if adapters is None else adapters[i]
            apply: Callable[..., Any] = _layer if adapter is None else functools.partial(layer_forward, adapter=adapter)
            if remat:
                apply = jax.checkpoint(apply, static_argnums=1)
            x, k, v = apply(layer, config, x, tables, mask, prefix)
        ks.append(k)
        vs.append(v)
        if i in taps:
            tapped[i] = x
    features = rms_norm(x, params.final_norm, config.rms_norm_eps)
    return Output(features, Rows(tuple(ks), tuple(vs)), tuple(tapped[i] for i in taps))


def read(
    params: Params, config: ModelConfig, tokens: Int[Array, "S"], length: Int[Array, ""]
) -> tuple[Float[Array, "D"], KVCache]:
    """Reads `tokens[:length]` (at least one) into a fresh cache of S slots; gives the last one's feature and the cache.

    It goes `PREFILL_CHUNK` tokens at a time, S being a multiple of it, so that one compiled step serves every length.
    """

    def step(carry: tuple[Float[Array, "D"], KVCache]) -> tuple[Float[Array, "D"], KVCache]:
        _, cache = carry
        out = forward(params, config, jax.lax.dynamic_slice(tokens, (cache.length,), (PREFILL_CHUNK,)), cache=cache)
        count = jnp.minimum(PREFILL_CHUNK, length - cache.length)
        return out.features[count - 1], write(cache, out.rows, count)

    first = (jnp.zeros((config.hidden_size,), jnp.float32), zeros(config, tokens.shape[0]))
    return jax.lax.while_loop(lambda carry: carry[1].length < length, step, first)
