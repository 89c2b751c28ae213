"""LoRA (Hu et al. 2021): low-rank changes B A to a frozen decoder's products, beside its parameters.

All seven matrices of a layer have a pair of their own, q, k and v and gate and up apart although `Params` keeps them
fused. Training adds the low-rank product to the frozen one; `merge` writes it into the weights once that is done.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from specjax import ops
from specjax.errors import ConfigError
from specjax.target import params as parameters
from specjax.target.config import ModelConfig
from specjax.target.model import Adapter, Product
from specjax.target.params import DEFAULT_SHARDING, Layer, Params, ParamSpec, named_sharding


@dataclass(frozen=True)
class LoraConfig:
    """The changes' rank, their factor `alpha / rank`, and the share of a product's inputs that training drops."""

    rank: int = 32
    alpha: float = 16.0
    dropout: float = 0.05

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.alpha > 0 or not 0 <= self.dropout < 1:
            raise ConfigError(f"{self}: expected a rank of at least 1, alpha > 0 and 0 <= dropout < 1.")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pair:
    """One change, B A: A reads the product's input, B writes its output; input axes last, as in `Params`."""

    a: Float[Array, "r *in"]
    b: Float[Array, "*out r"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerLora:
    """A layer's changes."""

    q: Pair
    k: Pair
    v: Pair
    out: Pair
    gate: Pair
    up: Pair
    down: Pair


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Lora:
    """A decoder's changes: a pytree."""

    layers: tuple[LayerLora, ...]
    config: LoraConfig = field(metadata={"static": True})


_AXES = {
    "q": ("r D", "K G H r"),
    "k": ("r D", "K H r"),
    "v": ("r D", "K H r"),
    "out": ("r K G H", "D r"),
    "gate": ("r D", "F r"),
    "up": ("r D", "F r"),
    "down": ("r F", "D r"),
}


def abstract(model: ModelConfig, config: LoraConfig) -> Lora:
    """The tree with a `ParamSpec` at every leaf, as `params.abstract` gives it for the decoder."""
    sizes = {
        "D": model.hidden_size,
        "F": model.intermediate_size,
        "K": model.num_kv_heads,
        "G": model.group_size,
        "H": model.head_dim,
        "r": config.rank,
    }

    def spec(axes: str, init: Any) -> Any:
        letters = tuple(axes.split())
        return ParamSpec(tuple(sizes[a] for a in letters), letters, init)

    layer = LayerLora(**{name: Pair(spec(a, "normal"), spec(b, "zeros")) for name, (a, b) in _AXES.items()})
    return Lora((layer,) * model.num_layers, config)


@functools.partial(jax.jit, static_argnames=("model", "config"))
def init_lora(key: jax.Array, model: ModelConfig, config: LoraConfig) -> Lora:
    """Float32 changes that change nothing yet: A normal with variance 1 / inputs, B zero."""
    specs, treedef = jax.tree.flatten(abstract(model, config))
    sizes = [parameters.count(spec) if spec.init == "normal" else 0 for spec in specs]
    # One draw for all: a draw each would be a hundred programs to compile.
    parts = jnp.split(jax.random.normal(key, (sum(sizes),), jnp.float32), np.cumsum(sizes)[:-1])
    leaves = [
        part.reshape(spec.shape) * (config.rank / size) ** 0.5 if size else jnp.zeros(spec.shape, jnp.float32)
        for spec, size, part in zip(specs, sizes, parts, strict=True)
    ]
    return jax.tree.unflatten(treedef, leaves)


def lora_shardings(
    model: ModelConfig, config: LoraConfig, mesh: Mesh, rules: Mapping[str, str] = DEFAULT_SHARDING
) -> Lora:
    """A `NamedSharding` at every leaf, by the rules that `params.shardings` takes: a pair splits as its matrix does.

    Raises:
      ConfigError: a dimension that its mesh axis does not divide.
    """
    return jax.tree.map(lambda spec: named_sharding(spec, mesh, rules), abstract(model, config))


def adapters(lora: Lora, key: jax.Array | None) -> tuple[Adapter, ...]:
    """What `model.forward` takes as `adapters`.

    Args:
      key: for dropout, drawn once for each operand (q, k and v read the same one); None: no dropout.
    """
    keys = [None] * len(lora.layers) if key is None else list(jax.random.split(key, len(lora.layers)))
    return tuple(
        functools.partial(_adapter, layer, lora.config, key) for layer, key in zip(lora.layers, keys, strict=True)
    )


def _adapter(layer: LayerLora, config: LoraConfig, key: jax.Array | None, t: int) -> Callable[[Product, Array], Array]:
    readers: dict[Product, Pair] = {"qkv": layer.q, "out": layer.out, "gate_up": layer.gate, "down": layer.down}
    kept: dict[Product, Array] = {}
    if key is not None and config.dropout:
        # One draw for the four operands: random bits take long to compile on CPU.
        shapes = {name: pair.a.shape[1:] for name, pair in readers.items()}
        ends = np.cumsum([math.prod(shape) for shape in shapes.values()])
        drawn = jnp.split(jax.random.bernoulli(key, 1 - config.dropout, (t, int(ends[-1]))), ends[:-1], axis=1)
        kept = {name: part.reshape(t, *shapes[name]) for name, part in zip(shapes, drawn, strict=True)}

    def extra(name: Product, x: Array) -> Array:
        if name in kept:
            x = jnp.where(kept[name], x / (1 - config.dropout), 0.0)

        def low(pair: Pair, into: str, out: str) -> Array:
            return ops.dot(f"Tr,{out}r->T{out}", ops.dot(f"T{into},r{into}->Tr", x, pair.a), pair.b)

        if name == "qkv":
            made = _fuse_qkv(low(layer.q, "D", "KGH"), low(layer.k, "D", "KH"), low(layer.v, "D", "KH"), axis=2)
        elif name == "gate_up":
            made = jnp.stack([low(layer.gate, "D", "F"), low(layer.up, "D", "F")], axis=1)
        elif name == "out":
            made = low(layer.out, "KGH", "D")
        else:
            made = low(layer.down, "F", "D")
        return made * (config.alpha / config.rank)

    return extra


def _fuse_qkv(q: Array, k: Array, v: Array, *, axis: int) -> Array:
    # `axis` is that of the G query heads, which k and v lack.
    return jnp.concatenate([q, jnp.expand_dims(k, axis), jnp.expand_dims(v, axis)], axis)


def merge(params: Params, lora: Lora) -> Params:
    """The decoder with its changes written into the weights, computed in float32 and kept in the weights' dtype.

    Raises:
      ConfigError: changes to another decoder.
    """
    if len(params.layers) != len(lora.layers):
        raise ConfigError(
            f"the changes are to {len(lora.layers)} layers, the model has {len(params.layers)}; take those that were "
            "trained on it."
        )
    layers = [_merged(layer, change, lora.config) for layer, change in zip(params.layers, lora.layers, strict=True)]
    return replace(params, layers=tuple(layers))


def _merged(layer: Layer, change: LayerLora, config: LoraConfig) -> Layer:
    def full(pair: Pair) -> Array:
        return jnp.tensordot(pair.b.astype(jnp.float32), pair.a.astype(jnp.float32), 1)

    parts = {part.name: full(getattr(change, part.name)) for part in fields(change)}
    extra = {
        "qkv": _fuse_qkv(parts["q"], parts["k"], parts["v"], axis=1),
        "out": parts["out"],
        "gate_up": jnp.stack([parts["gate"], parts["up"]]),
        "down": parts["down"],
    }
    merged = {}
    for name, delta in extra.items():
        weight = getattr(layer, name)
        if weight.shape != delta.shape:
            raise ConfigError(
                f"the change to {name} has shape {delta.shape}, the weight {weight.shape}; take the changes that were "
                "trained on this model."
            )
        merged[name] = (weight.astype(jnp.float32) + delta * (config.alpha / config.rank)).astype(weight.dtype)
    return replace(layer, **merged)
