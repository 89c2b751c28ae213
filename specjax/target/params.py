"""Model parameters: dataclass pytrees, and the one description that everything about them derives from.

`abstract(config)` gives the same tree with a `ParamSpec` at every leaf: shape, axis letters and initialiser. Random
initialisation, the target that loaders fill, and device shardings are all read off it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from specjax.errors import ConfigError
from specjax.target.config import ModelConfig


def check_dtype(dtype: DTypeLike) -> None:
    """Raises ConfigError for one that parameters cannot have."""
    try:
        name = jnp.dtype(dtype).name
    except TypeError as error:
        raise ConfigError(f"dtype is {dtype!r}; parameters can be float32 or bfloat16.") from error
    if name not in ("float32", "bfloat16"):
        raise ConfigError(f"dtype is {name}; parameters can be float32 or bfloat16.")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Layer:
    """One decoder layer; matrices have their input axes last. Q is G + 2: a group's query heads, its key, its value.

    Keeping a key/value head together with its query heads makes q, k and v one matrix product (on CPU a third of the
    launches) and lets the whole group shard over K.
    """

    attn_norm: Float[Array, "D"]
    qkv: Float[Array, "K Q H D"]
    qkv_bias: Float[Array, "K Q H"] | None
    out: Float[Array, "D K G H"]
    mlp_norm: Float[Array, "D"]
    gate_up: Float[Array, "2 F D"]  # the gate, then the up projection
    down: Float[Array, "D F"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Params:
    """A decoder's weights. `layers` is a tuple, not a stacked axis: XLA:CPU copies the slices of a stacked weight."""

    embed: Float[Array, "V D"]
    layers: tuple[Layer, ...]
    final_norm: Float[Array, "D"]
    lm_head: Float[Array, "V D"] | None  # None: tied to `embed`

    @property
    def unembedding(self) -> Float[Array, "V D"]:
        """The LM head's rows, which are the embedding's when tied."""
        return self.embed if self.lm_head is None else self.lm_head

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the matrices (norm scales stay in it too; arithmetic on them is float32)."""
        return self.embed.dtype


@dataclass(frozen=True)
class ParamSpec:
    """A parameter before it exists. `axes` names each dimension by its letter."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: Literal["normal", "zeros", "ones"]


def abstract(config: ModelConfig) -> Params:
    """The parameter tree of `config` with a `ParamSpec` at every leaf."""
    sizes = {
        "V": config.vocab_size,
        "D": config.hidden_size,
        "F": config.intermediate_size,
        "K": config.num_kv_heads,
        "G": config.group_size,
        "Q": config.group_size + 2,
        "H": config.head_dim,
        "2": 2,
    }

    def spec(axes: str, init: Literal["normal", "zeros", "ones"] = "normal") -> Any:
        letters = tuple(axes.split())
        return ParamSpec(tuple(sizes[a] for a in letters), letters, init)

    layer = Layer(
        attn_norm=spec("D", "ones"),
        qkv=spec("K Q H D"),
        qkv_bias=spec("K Q H", "zeros") if config.qkv_bias else None,
        out=spec("D K G H"),
        mlp_norm=spec("D", "ones"),
        gate_up=spec("2 F D"),
        down=spec("D F"),
    )
    return Params(
        embed=spec("V D"),
        layers=(layer,) * config.num_layers,
        final_norm=spec("D", "ones"),
        lm_head=None if config.tie_word_embeddings else spec("V D"),
    )


def init(key: jax.Array, config: ModelConfig, dtype: DTypeLike = jnp.float32, stddev: float = 0.02) -> Params:
    """Random parameters: matrices normal with `stddev`, biases zero, norm scales one (transformers' convention)."""
    specs, treedef = jax.tree.flatten(abstract(config))
    makers = {
        "normal": lambda k, s: (stddev * jax.random.normal(k, s.shape, jnp.float32)).astype(dtype),
        "zeros": lambda k, s: jnp.zeros(s.shape, dtype),
        "ones": lambda k, s: jnp.ones(s.shape, dtype),
    }
    keys = jax.random.split(key, len(specs))
    return jax.tree.unflatten(treedef, [makers[s.init](k, s) for k, s in zip(keys, specs, strict=True)])


def shape_structs(config: ModelConfig, dtype: DTypeLike = jnp.float32) -> Params:
    """`jax.ShapeDtypeStruct` at every leaf: the target for checkpoint restoring and for `jax.eval_shape` users."""
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, dtype), abstract(config))


# Megatron's scheme: heads and feed-forward columns are split, so that each layer needs one all-reduce per half.
DEFAULT_SHARDING: Mapping[str, str] = {"K": "model", "F": "model", "V": "model"}


def shardings(config: ModelConfig, mesh: Mesh, rules: Mapping[str, str] = DEFAULT_SHARDING) -> Params:
    """A `NamedSharding` at every leaf.

    Args:
      config: the model.
      mesh: any mesh; rules that name an axis it lacks do not apply.
      rules: axis letter -> mesh axis.

    Raises:
      ConfigError: a dimension that its mesh axis does not divide.
    """

    return jax.tree.map(lambda spec: named_sharding(spec, mesh, rules), abstract(config))


def named_sharding(spec: ParamSpec, mesh: Mesh, rules: Mapping[str, str] = DEFAULT_SHARDING) -> NamedSharding:
    """The sharding of one parameter; arguments and errors as in `shardings`."""
    names = [rules.get(a) if rules.get(a) in mesh.axis_names else None for a in spec.axes]
    for letter, size, name in zip(spec.axes, spec.shape, names, strict=True):
        if name is not None and size % mesh.shape[name]:
            raise ConfigError(
                f"axis {letter} of size {size} does not divide over mesh axis {name!r} of size {mesh.shape[name]}; "
                "choose another mesh shape or drop the letter from the sharding rules."
            )
    return NamedSharding(mesh, PartitionSpec(*names))


def count(params: Any) -> int:
    """The number of scalars in a parameter tree (or in a tree of specs)."""
    return sum(int(leaf.size) if hasattr(leaf, "size") else _size(leaf.shape) for leaf in jax.tree.leaves(params))


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size
