"""The decoder of Qwen2/2.5 and Llama 1/2/3.x (and Mistral) as pure, unbatched functions.

Matrix products take operands in the parameters' dtype and accumulate in float32; the residual stream, norms, rotary
angles and softmax are float32 throughout. Checked layer by layer against transformers (tests/parity).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from specjax import ops
from specjax.target.cache import KVCache, Rows, write, zeros
from specjax.target.config import ModelConfig
from specjax.target.params import Layer, Params

PREFILL_CHUNK = 64  # prompt tokens per prefill step: one compiled step serves prompts of every length

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


def _attention(
    q: Float[Array, "T K G H"],
    rows: tuple[Float[Array, "K H T"], Float[Array, "K T H"]],
    mask: Bool[Array, "T T"],
    prefix: ops.Prefix | None,
) -> Float[Array, "T K G H"]:
    # The prefix is read where it lies and the new rows beside it: nothing is written before it is accepted.
    t, kv_heads, g, h = q.shape
    q = (q * h**-0.5).transpose(1, 2, 0, 3).reshape(kv_heads, g * t, h)
    mixed = ops.attention(q, *rows, mask, prefix)
    return mixed.reshape(kv_heads, g, t, h).transpose(2, 0, 1, 3)


def layer_forward(
    layer: Layer,
    config: ModelConfig,
    x: Float[Array, "T D"],
    tables: tuple[Float[Array, "T h"], Float[Array, "T h"]],
    mask: Bool[Array, "T T"],
    prefix: ops.Prefix | None = None,
    adapter: Adapter | None = None,
) -> tuple[Float[Array, "T D"], Float[Array, "K H T"], Float[Array, "K T H"]]:
    """One decoder layer: pre-norm attention and SwiGLU, each added to the residual stream. Gives (x, k, v)."""
    g = config.group_size
    extra = None if adapter is None else adapter(x.shape[0])

    def product(name: Product, spec: str, x: Float[Array, "T *in"]) -> Float[Array, "T *out"]:
        out = ops.dot(spec, x, getattr(layer, name))
        return out if extra is None else out + extra(name, x)

    with jax.named_scope("attention"):
        h = ops.rms_norm(x, layer.attn_norm, config.rms_norm_eps)
        qkv = product("qkv", "TD,KQHD->TKQH", h)
        if layer.qkv_bias is not None:
            qkv = qkv + layer.qkv_bias.astype(jnp.float32)
        qk = _rotate(qkv[:, :, : g + 1], *tables)
        k = jnp.einsum("TKH->KHT", qk[:, :, g])
        v = jnp.einsum("TKH->KTH", qkv[:, :, g + 1])
        x = x + product("out", "TKGH,DKGH->TD", _attention(qk[:, :, :g], (k, v), mask, prefix))
    with jax.named_scope("mlp"):
        h = ops.rms_norm(x, layer.mlp_norm, config.rms_norm_eps)
        gate_up = product("gate_up", "TD,CFD->TCF", h)
        x = x + product("down", "TF,DF->TD", jax.nn.silu(gate_up[:, 0]) * gate_up[:, 1])
    return x, k, v


# Layers of one shape are traced once for a config, not once each in every program. XLA inlines the calls.
_layer = jax.jit(layer_forward, static_argnames="config")


def embed(params: Params, tokens: Int[Array, "T"]) -> Float[Array, "T D"]:
    """Token embeddings, float32 (no scaling in these families)."""
    return ops.embedding(params.embed, tokens)


def unembed(params: Params, features: Float[Array, "T D"]) -> Float[Array, "T V"]:
    """LM-head logits, float32."""
    return ops.dot("TD,VD->TV", features, params.unembedding)


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

    Without a cache it can be differentiated; a long cache may be read in a loop, and cannot.

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
        prefix = None if cache is None else ops.Prefix(cache.k[i], cache.v[i], prefix_mask, first, start)
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
    features = ops.rms_norm(x, params.final_norm, config.rms_norm_eps)
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
