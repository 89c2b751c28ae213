"""Medusa heads (Cai et al. 2024) as a Flax module, and the pytree that carries them.

0-based head i predicts the token 2 + i positions after its input position: with the feature (the target's hidden state
after the final RMSNorm) at position t, the LM head gives t + 1, the tree's root, head 0 gives t + 2, and so on.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from specjax import ops
from specjax.checks import is_whole
from specjax.errors import ConfigError, SpecJaxError
from specjax.target.config import ModelConfig
from specjax.target.params import Params

_STACKED = ("kernel_", "bias_")  # parameters with a leading axis C


@dataclass(frozen=True)
class MedusaConfig:
    """The heads' shape.

    Attributes:
      num_heads: C.
      hidden_size: D, the target's width.
      vocab_size: V, the target's vocabulary.
      num_layers: residual blocks per head, each with weights of its own; 0 only with projections of their own.
      projection: `full`: every head has its own projection; `shared`: all use the target's LM head.
      reduced_vocab_size: R, when the heads propose only the tokens of a token map; None for the whole vocabulary.
    """

    num_heads: int
    hidden_size: int
    vocab_size: int
    num_layers: int = 1
    projection: Literal["full", "shared"] = "full"
    reduced_vocab_size: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("num_heads", 1), ("hidden_size", 1), ("vocab_size", 1), ("num_layers", 0)):
            value = getattr(self, name)
            if not is_whole(value) or value < least:
                raise ConfigError(f"{name} is {value!r}; expected an integer of at least {least}.")
            object.__setattr__(self, name, int(value))  # NumPy's integers are no JSON
        if self.projection not in ("full", "shared"):
            raise ConfigError(f"projection is {self.projection!r}; expected 'full' or 'shared'.")
        if self.projection == "shared" and self.num_layers == 0:
            raise ConfigError(
                "num_layers is 0 and projection 'shared': such heads have no weights and give what the LM head gives. "
                "Set num_layers to at least 1."
            )
        size = self.reduced_vocab_size
        if size is not None and (not is_whole(size) or not 1 <= size <= self.vocab_size):
            raise ConfigError(
                f"reduced_vocab_size is {size!r}; expected 1 to {self.vocab_size}, the model's vocabulary. Set it to "
                "None to keep all of that, or to fewer tokens."
            )
        object.__setattr__(self, "reduced_vocab_size", None if size is None else int(size))

    @classmethod
    def vicuna_7b(cls) -> "MedusaConfig":
        """FasterDecoding/medusa-vicuna-7b-v1.3 as the paper describes it: four heads of one layer."""
        return cls(num_heads=4, hidden_size=4096, vocab_size=32_000)

    def check_target(
        self, width: int, vocab: int, *, what: str = "the heads", error: type[SpecJaxError] = ConfigError
    ) -> None:
        """Raises `error` where a target has another width or vocabulary than these heads (`what`, in its message)."""
        if (self.hidden_size, self.vocab_size) != (width, vocab):
            raise error(
                f"{what} are for hidden size {self.hidden_size} and vocabulary {self.vocab_size}, the target has "
                f"{width} and {vocab}; take heads that were trained on this model."
            )

    @property
    def output_size(self) -> int:
        """R where the vocabulary is reduced, otherwise V."""
        return self.reduced_vocab_size or self.vocab_size


class MedusaHeads(nn.Module):
    """All heads at once: residual blocks x + SiLU(x W + b), then, when `full`, the heads' own projections.

    Call with features [..., D]. `full` gives logits [C, ..., R], `shared` the hidden states [C, ..., D] that the LM
    head is to read. Weights and biases start at zero, so that training starts from the LM head.
    """

    config: MedusaConfig

    @nn.compact
    def __call__(self, features: Float[Array, "*B D"]) -> Float[Array, "C *B R"]:
        c, d, r = self.config.num_heads, self.config.hidden_size, self.config.output_size
        zeros = nn.initializers.zeros
        shapes: dict[str, tuple[int, ...]] = {}
        for i in range(self.config.num_layers):
            shapes |= {f"kernel_{i}": (c, d, d), f"bias_{i}": (c, d)}
        if self.config.projection == "full":
            shapes |= {f"projection_{i}": (r, d) for i in range(c)}
        params = {name: self.param(name, zeros, shape, jnp.float32) for name, shape in shapes.items()}
        return apply_heads(self.config, params, features)


def apply_heads(
    config: MedusaConfig, params: Mapping[str, Any], features: Float[Array, "*B D"]
) -> Float[Array, "C *B R"]:
    """What `MedusaHeads` computes; kernels and biases may also be a tuple of one array a head (`Heads.split`)."""
    # One product per head: XLA:CPU has no batched bf16 product.
    heads = [features.astype(jnp.float32).reshape(-1, config.hidden_size)] * config.num_heads
    for i in range(config.num_layers):
        biases = jax.tree.map(lambda bias: bias.astype(jnp.float32), params[f"bias_{i}"])
        layer = zip(heads, params[f"kernel_{i}"], biases, strict=True)
        heads = [x + nn.silu(ops.dot("TD,DE->TE", x, w) + b) for x, w, b in layer]
    if config.projection == "full":
        heads = [ops.dot("TD,RD->TR", x, params[f"projection_{i}"]) for i, x in enumerate(heads)]
    return jnp.stack(heads).reshape(config.num_heads, *features.shape[:-1], -1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Heads:
    """Heads with their weights: a pytree.

    Attributes:
      params: of `MedusaHeads`.
      token_map: target ids of the reduced vocabulary [R], ascending; None for the whole vocabulary.
      config: the shape (static).
    """

    params: Any
    token_map: Int[Array, "R"] | None
    config: MedusaConfig = field(metadata={"static": True})

    def check(self, target: ModelConfig) -> None:
        """Raises a `ConfigError` for a target of another width or vocabulary."""
        self.config.check_target(target.hidden_size, target.vocab_size)

    def first(self, count: int) -> "Heads":
        """The first `count` heads alone, without the weights of the others.

        Raises:
          ConfigError: more heads than there are, or none.
        """
        if not 1 <= count <= self.config.num_heads:
            raise ConfigError(
                f"{count} of {self.config.num_heads} heads were asked for; expected at least 1 and no more."
            )
        params = {name: x[:count] for name, x in self.params.items() if name.startswith(_STACKED)}
        if self.config.projection == "full":
            params |= {f"projection_{i}": self.params[f"projection_{i}"] for i in range(count)}
        return replace(self, params=params, config=replace(self.config, num_heads=count))

    def split(self) -> "Heads":
        """One array a head in place of stacked kernels and biases, slices of which would be copied in every round."""
        whole = {name for name, x in self.params.items() if name.startswith(_STACKED) and not isinstance(x, tuple)}
        return (
            replace(self, params={n: tuple(x) if n in whole else x for n, x in self.params.items()}) if whole else self
        )


def init_heads(config: MedusaConfig, target: Params, token_map: np.ndarray | None = None) -> Heads:
    """Float32 heads that all give what the target's LM head gives: where training starts.

    Raises:
      ConfigError: a target of another shape, or a token map that does not fit `reduced_vocab_size`.
    """
    vocab, width = target.unembedding.shape
    config.check_target(width, vocab)
    ids = None if token_map is None else jnp.asarray(token_map, jnp.int32)
    params = MedusaHeads(config).init(jax.random.key(0), jnp.zeros((1, width), jnp.float32))["params"]
    if config.projection == "full":
        rows = target.unembedding if ids is None else target.unembedding[ids]
        params |= {f"projection_{i}": jnp.array(rows, jnp.float32) for i in range(config.num_heads)}
    return check_token_map(Heads(params, ids, config))


def check_token_map(heads: Heads) -> Heads:
    """Gives `heads` back if its token map is consistent with its config.

    Raises:
      ConfigError: a map of another length, not strictly ascending (ties would not go to the lowest id), or with ids
        outside the vocabulary.
    """
    size, ids = heads.config.reduced_vocab_size, heads.token_map
    if (size is None) != (ids is None):
        raise ConfigError(
            f"reduced_vocab_size is {size}, but there is {'no' if ids is None else 'a'} token map; give both."
        )
    if ids is not None:
        found = np.asarray(ids)
        if found.shape != (size,):
            raise ConfigError(f"the token map has shape {found.shape}; expected ({size},).")
        if (np.diff(found) <= 0).any() or found[0] < 0 or found[-1] >= heads.config.vocab_size:
            raise ConfigError(
                f"the token map must ascend strictly within [0, {heads.config.vocab_size}); it runs from {found[0]} to "
                f"{found[-1]}. Sort it and drop duplicates."
            )
    return heads


def draft_projection(heads: Heads, unembedding: Float[Array, "V D"]) -> Float[Array, "R D"] | None:
    """What shared heads multiply by: the LM head's rows, restricted to the token map. None for heads with their own.

    Restricting gathers R rows, so decoding does it once per generation, not once per round.
    """
    if heads.config.projection == "full":
        return None
    return unembedding if heads.token_map is None else unembedding[heads.token_map]


def project(
    heads: Heads, projection: Float[Array, "R D"] | None, features: Float[Array, "*B D"]
) -> Float[Array, "C *B R"]:
    """Every head's logits over its (possibly reduced) vocabulary; `projection` comes from `draft_projection`."""
    out = apply_heads(heads.config, heads.params, features)
    if projection is None:
        return out
    logits = ops.dot("TD,RD->TR", out.reshape(-1, out.shape[-1]), projection)
    return logits.reshape(*out.shape[:-1], projection.shape[0])


def top_tokens(
    heads: Heads, projection: Float[Array, "R D"] | None, features: Float[Array, "D"], k: int
) -> Int[Array, "C k"]:
    """The k best target ids of every head, best first, ties to the lowest id; k is clamped to the vocabulary."""
    rows = jax.lax.top_k(project(heads, projection, features), min(k, heads.config.output_size))[1]
    return rows.astype(jnp.int32) if heads.token_map is None else heads.token_map[rows]
