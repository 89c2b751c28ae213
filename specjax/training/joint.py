"""Medusa heads fitted on packed text, with the target's features computed as they are needed, on a mesh.

Medusa-1 fits the heads to the frozen target. Medusa-2 (Cai et al. 2024) fits LoRA changes to the target along with
them: the backbone's own loss, which is that of the text or, when the target distils itself, its divergence from the
frozen target, and beside it the heads' losses with a small weight that rises by a sine ramp.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from specjax.config import ModelConfig
from specjax.errors import ConfigError
from specjax.heads import Heads, project
from specjax.model import forward, unembed
from specjax.params import Params
from specjax.training import losses
from specjax.training.data import attention_mask
from specjax.training.draft import DIVERGENCES
from specjax.training.lora import Lora, LoraConfig, adapters
from specjax.training.losses import IGNORED, chunked_cross_entropy, head_cross_entropy, label_ranks

Batch = Mapping[str, Array]


@dataclass(frozen=True)
class JointConfig:
    """How to fit. A step is `batch_size` packed rows of `length` tokens."""

    epochs: int = 2
    batch_size: int = 8
    length: int = 512
    lora: LoraConfig | None = None  # Medusa-2; None: Medusa-1, the target stays as it is
    backbone_loss: Literal["kl", "text"] = "kl"  # Medusa-2's: divergence from the frozen target, or of the text
    learning_rate: float = 1e-3  # the heads' peak; linear warm-up, then cosine to zero
    lora_learning_rate: float = 2.5e-4  # the backbone's, on the same schedule
    warmup: float = 0.1  # share of the steps
    head_decay: float = 0.8  # head k's loss counts head_decay ** k
    head_weight: float = 0.01  # Medusa-2: of the heads' losses beside the backbone's, once the ramp is over
    seed: int = 0
    checkpoint_every: int = 100  # steps
    remat: bool = True  # computes the layers again in the backward pass: a forward pass more, for less memory

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch_size, self.length, self.checkpoint_every) < 1 or not 0 <= self.warmup < 1:
            raise ConfigError(
                f"{self}: expected epochs, batch_size, length and checkpoint_every of at least 1, 0 <= warmup < 1."
            )
        if min(self.learning_rate, self.lora_learning_rate, self.head_decay, self.head_weight) <= 0:
            raise ConfigError(
                f"{self}: expected learning_rate, lora_learning_rate, head_decay and head_weight above 0."
            )
        if self.backbone_loss not in ("kl", "text"):
            raise ConfigError(f"backbone_loss is {self.backbone_loss!r}; expected 'kl' or 'text'.")

    def head_weights(self, heads: int, done: Float[Array, ""]) -> Float[Array, "C"]:
        """What each head's loss counts when the share `done` of the steps is over."""
        weights = self.head_decay ** jnp.arange(heads, dtype=jnp.float32)
        if self.lora is None:
            return weights
        return weights * self.head_weight * jnp.sin(jnp.minimum(done, 1.0) * (jnp.pi / 2))


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


def chunk_sums(
    function: Callable[..., Any], logit_width: int, labels: Int[Array, "n C"], *features: Float[Array, "n D"]
) -> Any:
    """The sum of `function(labels, *features)`, a pytree of sums over positions, taken a chunk of positions at a time.

    Args:
      function: gives zero for positions whose labels are `IGNORED`; it is computed again in the backward pass.
      logit_width: float32 logits per position; a chunk's take at most `losses.LOGIT_BYTES`, or one position.
    """
    total = len(labels)
    chunks = -(-total // max(1, losses.LOGIT_BYTES // (4 * logit_width)))
    if chunks == 1:
        return function(labels, *features)
    size = -(-total // chunks)
    more = chunks * size - total
    parts = [jnp.pad(labels, ((0, more), (0, 0)), constant_values=IGNORED)]
    parts += [jnp.pad(array, ((0, more), (0, 0))) for array in features]
    parts = [array.reshape(chunks, size, -1) for array in parts]
    once = jax.checkpoint(function)
    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(once, *(p[0] for p in parts)))
    return jax.lax.scan(lambda sums, part: (jax.tree.map(jnp.add, sums, once(*part)), None), zero, parts)[0]


def backbone_sum(
    params: Params, labels: Int[Array, "n 1"], ours: Float[Array, "n D"], frozen: Float[Array, "n D"] | None
) -> Float[Array, ""]:
    """Summed over labelled positions, in nats: KL(frozen || ours) of the next token's laws, or without `frozen` the
    text's cross-entropy under ours."""

    def sums(labels: Int[Array, "t 1"], ours: Float[Array, "t D"], *frozen: Float[Array, "t D"]) -> Float[Array, ""]:
        logits = unembed(params, ours)
        if not frozen:
            return head_cross_entropy(logits[None], labels)[0] * jnp.sum(labels != IGNORED)
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
    dtype = frozen.dtype
    half = replace(heads, params=jax.tree.map(lambda p: p.astype(dtype), trained["heads"]))
    lora = None if settings.lora is None else jax.tree.map(lambda p: p.astype(dtype), trained["lora"])
    base = None
    if lora is None or settings.backbone_loss == "kl":
        base = jax.lax.stop_gradient(packed_features(frozen, config, batch))
    ours = base if lora is None else packed_features(frozen, config, batch, lora=lora, key=key, remat=settings.remat)
    assert ours is not None
    lm_labels, labels = split_labels(heads, batch)

    def head_sums(labels: Int[Array, "n C"], features: Float[Array, "n D"]) -> Float[Array, "C"]:
        each = chunked_cross_entropy(half, projection, features, labels)
        return each * jnp.sum(labels != IGNORED, axis=0)

    each = jnp.sum(_by_shard(head_sums, shards, reduced_rows(heads, labels), ours), axis=0)
    each = each / jnp.maximum(jnp.sum(reduced_rows(heads, labels) != IGNORED, axis=(0, 1)), 1)
    value = jnp.sum(each * settings.head_weights(heads.config.num_heads, done))
    if lora is None:
        return value, {"losses": each}
    compared = (lm_labels, ours) if settings.backbone_loss == "text" else (lm_labels, ours, base)

    def backbone_sums(labels: Int[Array, "n 1"], ours: Array, base: Array | None = None) -> Float[Array, ""]:
        return backbone_sum(frozen, labels, ours, base)

    backbone = jnp.sum(_by_shard(backbone_sums, shards, *compared)) / jnp.maximum(jnp.sum(lm_labels != IGNORED), 1)
    return value + backbone, {"losses": each, "backbone": backbone}


def split_labels(heads: Heads, batch: Batch) -> tuple[Int[Array, "B T 1"], Int[Array, "B T C"]]:
    """The LM head's labels and the heads', as ids of the target."""
    ahead = functools.partial(future_tokens, count=1 + heads.config.num_heads)
    labels = jax.vmap(ahead)(batch["tokens"], batch["segments"], batch["answer"])
    return labels[..., :1], labels[..., 1:]


def _by_shard(function: Callable[..., Any], shards: int, *arrays: Any) -> Any:
    # Each device group goes through its own positions in chunks: chunks of all positions end to end would each lie on
    # one of the groups, while the others wait.
    return jax.vmap(function)(*(array.reshape(shards, -1, array.shape[-1]) for array in arrays))


def held_out_sums(
    trained: Mapping[str, Any],
    heads: Heads,
    frozen: Params,
    projection: Float[Array, "R D"] | None,
    config: ModelConfig,
    batch: Batch,
    settings: JointConfig,
    *,
    max_rank: int = 10,
    shards: int = 1,
) -> dict[str, Array]:
    """Sums over a batch, without dropout: `hits` [C max_rank], how often head i ranks the true token r-th; `labelled`
    [C]; `backbone`, the backbone loss, over `tokens` positions (both zero in Medusa-1). Arguments as in `joint_loss`.
    """
    dtype = frozen.dtype
    half = replace(heads, params=jax.tree.map(lambda p: p.astype(dtype), trained["heads"]))
    lora = None if settings.lora is None else jax.tree.map(lambda p: p.astype(dtype), trained["lora"])
    ours = packed_features(frozen, config, batch, lora=lora)
    lm_labels, labels = split_labels(heads, batch)
    rows = reduced_rows(heads, labels)

    def hits(labels: Int[Array, "t C"], features: Float[Array, "t D"]) -> Int[Array, "C r"]:
        ranks = label_ranks(project(half, projection, features), labels)
        return jnp.sum(ranks[..., None] == jnp.arange(max_rank), axis=1)

    def head_sums(labels: Int[Array, "n C"], features: Float[Array, "n D"]) -> Int[Array, "C r"]:
        return chunk_sums(hits, heads.config.num_heads * heads.config.output_size, labels, features)

    sums = {
        "hits": jnp.sum(_by_shard(head_sums, shards, rows, ours), axis=0),
        "labelled": jnp.sum(labels != IGNORED, axis=(0, 1)),
        "backbone": jnp.float32(0),
        "tokens": jnp.int32(0),
    }
    if lora is not None:
        compared = [lm_labels, ours]
        if settings.backbone_loss == "kl":
            compared.append(packed_features(frozen, config, batch))
        each = _by_shard(
            lambda labels, *f: backbone_sum(frozen, labels, f[0], f[1] if f[1:] else None), shards, *compared
        )
        sums |= {"backbone": jnp.sum(each), "tokens": jnp.sum(lm_labels != IGNORED)}
    return sums


def accuracies(sums: Sequence[Mapping[str, np.ndarray]], top: Sequence[int]) -> dict[str, Any]:
    """The `eval` record of `held_out_sums`: `accuracy` by top-k, `hits` as shares, and in Medusa-2 `backbone`, in nats.

    Labels outside the heads' vocabulary count as misses.
    """
    total = jax.tree.map(lambda *parts: np.sum(np.stack(parts), axis=0), *sums)
    hits = total["hits"] / np.maximum(total["labelled"], 1)[:, None]
    record = {
        "accuracy": {f"top{k}": hits[:, :k].sum(1).round(4).tolist() for k in top},
        "hits": hits.round(5).tolist(),
    }
    if total["tokens"]:
        record["backbone"] = float(total["backbone"] / total["tokens"])
    return record
