"""Medusa heads fitted on packed text, with the target's features computed as they are needed, on a mesh.

Medusa-1 fits the heads to the frozen target. Medusa-2 (Cai et al. 2024) fits LoRA changes to the target along with
them: the backbone's own loss, which is that of the text or, when the target distils itself, its divergence from the
frozen target, and beside it the heads' losses with a small weight that rises by a sine ramp.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from specjax.errors import ConfigError
from specjax.heads import Heads
from specjax.ranks.labels import IGNORED
from specjax.target.config import ModelConfig
from specjax.target.model import forward, unembed
from specjax.target.params import Params
from specjax.training import losses
from specjax.training.draft import DIVERGENCES
from specjax.training.lora import Lora, LoraConfig, adapters
from specjax.training.losses import Weighting, chunked_cross_entropy, token_losses
from specjax.training.packing import PackedConfig, attention_mask

Batch = Mapping[str, Array]


@dataclass(frozen=True)
class JointConfig(PackedConfig):
    """How to fit; the best checkpoint is the one with the most tokens_per_round."""

    lora: LoraConfig | None = None  # Medusa-2; None: Medusa-1, the target stays as it is
    backbone_loss: Literal["kl", "text"] = "kl"  # Medusa-2's: divergence from the frozen target, or of the text
    learning_rate: float = 1e-3  # the heads' peak
    lora_learning_rate: float = 2.5e-4  # the backbone's, on the same schedule
    warmup: float = 0.1
    weighting: Weighting = "decay"  # of the heads' losses: 1 each, or 0.8 ** i
    head_weight: float = 0.01  # Medusa-2: of the heads' losses beside the backbone's, once the ramp is over
    remat: bool = True  # computes the layers again in the backward pass: a forward pass more, for less memory

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.lora_learning_rate, self.head_weight) <= 0:
            raise ConfigError(f"{self}: expected lora_learning_rate and head_weight above 0.")
        if self.backbone_loss not in ("kl", "text"):
            raise ConfigError(f"backbone_loss is {self.backbone_loss!r}; expected 'kl' or 'text'.")
        losses.head_weights(self.weighting, 1)

    def ramp(self, done: Float[Array, ""]) -> Float[Array, ""]:
        """What the heads' losses count beside the backbone's when the share `done` of the steps is over."""
        if self.lora is None:
            return jnp.float32(1.0)
        return self.head_weight * jnp.sin(jnp.minimum(done, 1.0) * (jnp.pi / 2))


def future_tokens(
    tokens: Int[Array, "T"], segments: Int[Array, "T"], answer: Bool[Array, "T"], count: int
) -> Int[Array, "T count"]:
    """The token of slot t + 1 + j at [t, j]; j = 0 is the LM head's label at slot t, j = 1 + i head i's.

    It counts, and is not `IGNORED`, where everything from slot t + 1 to t + 1 + j is the assistant's, in t's
    conversation: these are the positions at which heads are asked when decoding.
    """
    live = segments > 0
    labels = []
    for ahead in range(1, count + 1):
        token, segment, ours = (jnp.pad(x[ahead:], (0, min(ahead, len(x)))) for x in (tokens, segments, answer))
        live &= ours & (segment == segments)
        labels.append(jnp.where(live, token, IGNORED))
    return jnp.stack(labels, axis=1)


def reduced_rows(heads: Heads, labels: Int[Array, "*T"]) -> Int[Array, "*T"]:
    """The labels as rows of the heads' vocabulary; tokens outside it become `IGNORED`."""
    if heads.token_map is None:
        return labels
    rows = jnp.full(heads.config.vocab_size, IGNORED, jnp.int32)
    rows = rows.at[heads.token_map].set(jnp.arange(len(heads.token_map), dtype=jnp.int32))
    return jnp.where(labels == IGNORED, IGNORED, rows[jnp.maximum(labels, 0)])


def packed_features(
    params: Params,
    config: ModelConfig,
    batch: Batch,
    *,
    lora: Lora | None = None,
    key: jax.Array | None = None,
    remat: bool = False,
) -> Float[Array, "B T D"]:
    """The decoder's features at every slot of packed rows; conversations do not see each other.

    Args:
      lora: changes to the decoder.
      key: for their dropout, one draw per row; None: no dropout.
      remat: as in `model.forward`.
    """

    def row(tokens: Array, positions: Array, segments: Array, key: jax.Array | None) -> Float[Array, "T D"]:
        extra = None if lora is None else adapters(lora, key)
        mask = attention_mask(segments)
        return forward(params, config, tokens, positions=positions, mask=mask, adapters=extra, remat=remat).features

    keys = None if key is None else jax.random.split(key, len(batch["tokens"]))
    return jax.vmap(row)(batch["tokens"], batch["positions"], batch["segments"], keys)


def chunks(logit_width: int, *arrays: Shaped[Array, "n _"]) -> list[Shaped[Array, "c t _"]]:
    """Positions in chunks of one size, the first array's padded with `IGNORED`, the others with zeros.

    Args:
      logit_width: float32 logits per position; a chunk's take at most `losses.LOGIT_BYTES`, or one position.
    """
    total = len(arrays[0])
    count = -(-total // max(1, losses.LOGIT_BYTES // (4 * logit_width)))
    size = -(-total // count)
    pad = ((0, count * size - total), (0, 0))
    filled = [jnp.pad(array, pad, constant_values=0 if i else IGNORED) for i, array in enumerate(arrays)]
    return [array.reshape(count, size, array.shape[1]) for array in filled]


def chunk_sums(
    function: Callable[..., Any], logit_width: int, labels: Int[Array, "n C"], *features: Float[Array, "n D"]
) -> Any:
    """The sum of `function(labels, *features)`, a pytree of sums over positions, taken a chunk of positions at a time.

    Args:
      function: gives zero for positions whose labels are `IGNORED`; it is computed again in the backward pass.
      logit_width: as for `chunks`.
    """
    parts = chunks(logit_width, labels, *features)
    if len(parts[0]) == 1:
        return function(labels, *features)
    once = jax.checkpoint(function)
    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(once, *(p[0] for p in parts)))
    return jax.lax.scan(lambda sums, part: (jax.tree.map(jnp.add, sums, once(*part)), None), zero, parts)[0]


def in_dtype(trained: Mapping[str, Any], heads: Heads, dtype: Any) -> tuple[Heads, Lora | None]:
    """What products take of the float32 master weights: the heads and, in Medusa-2, the LoRA changes, in `dtype`."""
    cast = jax.tree.map(lambda leaf: leaf.astype(dtype), dict(trained))
    return replace(heads, params=cast["heads"]), cast.get("lora")


def backbone_sum(
    params: Params, labels: Int[Array, "n 1"], ours: Float[Array, "n D"], frozen: Float[Array, "n D"] | None
) -> Float[Array, ""]:
    """Summed over labelled positions, in nats: KL(frozen || ours) of the next token's laws, or without `frozen` the
    text's cross-entropy under ours."""

    def sums(labels: Int[Array, "t 1"], ours: Float[Array, "t D"], *frozen: Float[Array, "t D"]) -> Float[Array, ""]:
        logits = unembed(params, ours)
        if not frozen:
            return jnp.sum(token_losses(logits[None], labels))
        apart = DIVERGENCES["forward_kl"](
            jax.nn.log_softmax(unembed(params, frozen[0]), -1), jax.nn.log_softmax(logits, -1)
        )
        return jnp.sum(jnp.where(labels[:, 0] != IGNORED, apart, 0.0))

    compared = (ours,) if frozen is None else (ours, frozen)
    return chunk_sums(sums, params.unembedding.shape[0] * len(compared), labels, *compared)


def joint_loss(
    trained: Mapping[str, Any],
    heads: Heads,
    frozen: Params,
    projection: Float[Array, "R D"] | None,
    config: ModelConfig,
    batch: Batch,
    settings: JointConfig,
    *,
    done: Float[Array, ""],
    key: jax.Array | None,
    shards: int = 1,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The loss of a batch, and its parts: `losses` [C], every head's mean, and in Medusa-2 `backbone`, in nats.

    Args:
      trained: what gradients flow to: `heads`, the heads' parameters, and in Medusa-2 `lora`. Products run in the
        frozen target's dtype, so that these can be float32 master weights.
      heads: give the token map and the shape.
      frozen: the target; it is not changed.
      projection: of `draft_projection`.
      batch: of `data.packed`.
      done: share of the steps that are over, for the ramp.
      key: for LoRA's dropout; None: none.
      shards: groups of rows that are computed side by side, each in chunks: the mesh's `data`.
    """
    half, lora = in_dtype(trained, heads, frozen.dtype)
    base = None
    if lora is None or settings.backbone_loss == "kl":
        base = jax.lax.stop_gradient(packed_features(frozen, config, batch))
    ours = base if lora is None else packed_features(frozen, config, batch, lora=lora, key=key, remat=settings.remat)
    assert ours is not None
    lm_labels, labels = split_labels(heads, batch)

    def head_sums(labels: Int[Array, "n C"], features: Float[Array, "n D"]) -> Float[Array, "C"]:
        each = chunked_cross_entropy(half, projection, features, labels)
        return each * jnp.sum(labels != IGNORED, axis=0)

    each = jnp.sum(by_shard(head_sums, shards, reduced_rows(heads, labels), ours), axis=0)
    each = each / jnp.maximum(jnp.sum(reduced_rows(heads, labels) != IGNORED, axis=(0, 1)), 1)
    weights = losses.head_weights(settings.weighting, heads.config.num_heads, scale=1.0)
    value = settings.ramp(done) * jnp.sum(each * weights)
    if lora is None:
        return value, {"losses": each}
    compared = (lm_labels, ours) if settings.backbone_loss == "text" else (lm_labels, ours, base)

    def backbone_sums(labels: Int[Array, "n 1"], ours: Array, base: Array | None = None) -> Float[Array, ""]:
        return backbone_sum(frozen, labels, ours, base)

    backbone = jnp.sum(by_shard(backbone_sums, shards, *compared)) / jnp.maximum(jnp.sum(lm_labels != IGNORED), 1)
    return value + backbone, {"losses": each, "backbone": backbone}


def split_labels(heads: Heads, batch: Batch) -> tuple[Int[Array, "B T 1"], Int[Array, "B T C"]]:
    """The LM head's labels and the heads', as ids of the target."""
    ahead = functools.partial(future_tokens, count=1 + heads.config.num_heads)
    labels = jax.vmap(ahead)(batch["tokens"], batch["segments"], batch["answer"])
    return labels[..., :1], labels[..., 1:]


def by_shard(function: Callable[..., Any], shards: int, *arrays: Any) -> Any:
    """`function` of each device group's own positions: chunks of all positions end to end would each lie on one of the
    groups, while the others wait. The results are stacked."""
    return jax.vmap(function)(*(array.reshape(shards, -1, array.shape[-1]) for array in arrays))
