"""Labels and losses of packed rows: what heads and backbone are to say at every slot, summed a chunk at a time."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from specjax.heads import Heads
from specjax.ranks.labels import IGNORED
from specjax.target.config import ModelConfig
from specjax.target.model import forward, unembed
from specjax.target.params import Params
from specjax.training import losses
from specjax.training.lora import Lora, adapters
from specjax.training.losses import DIVERGENCES, token_losses
from specjax.training.objective import Batch
from specjax.training.packing import attention_mask


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


def split_labels(heads: Heads, batch: Batch) -> tuple[Int[Array, "B T 1"], Int[Array, "B T C"]]:
    """The LM head's labels and the heads', as ids of the target."""
    ahead = functools.partial(future_tokens, count=1 + heads.config.num_heads)
    labels = jax.vmap(ahead)(batch["tokens"], batch["segments"], batch["answer"])
    return labels[..., :1], labels[..., 1:]


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


def by_shard(function: Callable[..., Any], shards: int, *arrays: Any) -> Any:
    """`function` of each device group's own positions: chunks of all positions end to end would each lie on one of the
    groups, while the others wait. The results are stacked."""
    return jax.vmap(function)(*(array.reshape(shards, -1, array.shape[-1]) for array in arrays))


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
