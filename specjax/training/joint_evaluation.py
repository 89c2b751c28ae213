"""How good heads on packed text are, with the backbone that they are fitted with: exact ranks, from any mesh."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from specjax.heads import Heads, project
from specjax.ranks.labels import IGNORED, label_ranks
from specjax.ranks.table import UNLABELLED
from specjax.target.config import ModelConfig
from specjax.target.params import Params
from specjax.training.joint import (
    Batch,
    JointConfig,
    backbone_sum,
    by_shard,
    chunks,
    in_dtype,
    packed_features,
    reduced_rows,
    split_labels,
)
from specjax.training.losses import token_losses
from specjax.training.quality import CAP, Quality, held_out_ranks, record
from specjax.tree import Tree


def judged(
    trained: Mapping[str, Any],
    heads: Heads,
    frozen: Params,
    projection: Float[Array, "R D"] | None,
    config: ModelConfig,
    batch: Batch,
    settings: JointConfig,
    *,
    shards: int = 1,
) -> dict[str, Array]:
    """What a batch says of `trained`, without dropout. Arguments as in `joint_loss`.

    Gives `ranks` [B T C], of the true token that head i is to give at a slot: `CAP` for those and beyond, `UNLABELLED`
    where there is none; and sums: `losses` [C] in nats over `labels` [C] that the heads can say, `backbone`, the
    backbone loss, over `tokens` positions (both zero in Medusa-1).
    """
    half, lora = in_dtype(trained, heads, frozen.dtype)
    ours = packed_features(frozen, config, batch, lora=lora)
    lm_labels, labels = split_labels(heads, batch)
    rows = reduced_rows(heads, labels)

    def one(part: tuple[Int[Array, "t C"], Float[Array, "t D"]]) -> tuple[Int[Array, "t C"], Float[Array, "C"]]:
        rows, features = part
        logits = project(half, projection, features)
        return label_ranks(logits, rows).T, jnp.sum(token_losses(logits, rows), axis=1)

    def by_chunk(rows: Int[Array, "n C"], features: Float[Array, "n D"]) -> tuple[Int[Array, "n C"], Float[Array, "C"]]:
        width = heads.config.num_heads * heads.config.output_size
        ranks, each = jax.lax.map(one, tuple(chunks(width, rows, features)))
        return ranks.reshape(-1, ranks.shape[-1])[: len(rows)], jnp.sum(each, axis=0)

    ranks, each = by_shard(by_chunk, shards, rows, ours)
    ranks = jnp.where(rows == IGNORED, CAP, jnp.minimum(ranks.reshape(labels.shape), CAP))
    found = {
        "ranks": jnp.where(labels == IGNORED, UNLABELLED, ranks),
        "losses": jnp.sum(each, axis=0),
        "labels": jnp.sum(rows != IGNORED, axis=(0, 1)),
        "backbone": jnp.float32(0),
        "tokens": jnp.int32(0),
    }
    if lora is not None:
        compared = [lm_labels, ours]
        if settings.backbone_loss == "kl":
            compared.append(packed_features(frozen, config, batch))
        sums = by_shard(
            lambda labels, *f: backbone_sum(frozen, labels, f[0], f[1] if f[1:] else None), shards, *compared
        )
        found |= {"backbone": jnp.sum(sums), "tokens": jnp.sum(lm_labels != IGNORED)}
    return found


def quality(batches: Sequence[Mapping[str, np.ndarray]], found: Sequence[Mapping[str, np.ndarray]]) -> Quality:
    """Ranks, a sequence for every assistant turn, and losses, from what `judged` gives of packed batches.

    A turn's token counts where a feature predicted it: not as the first of its conversation.
    """
    ranks, lengths = [], []
    for batch, part in zip(batches, found, strict=True):
        segments = batch["segments"]
        # The feature of slot t - 1 predicted token t, so that its heads are asked in a round whose root is token t.
        predicted = batch["answer"][:, 1:] & (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
        ranks.append(part["ranks"][:, :-1][predicted])
        edges = np.diff(np.pad(predicted, ((0, 0), (1, 1))).astype(np.int8), axis=1)
        lengths.append(np.nonzero(edges == -1)[1] - np.nonzero(edges == 1)[1])
    losses, labels = (np.sum([part[name] for part in found], axis=0) for name in ("losses", "labels"))
    return Quality(held_out_ranks(np.concatenate(ranks), np.concatenate(lengths)), losses / np.maximum(labels, 1))


def joint_record(
    batches: Sequence[Mapping[str, np.ndarray]], found: Sequence[Mapping[str, np.ndarray]], tree: Tree
) -> dict[str, Any]:
    """The `eval` record of what `judged` gives of packed batches: that of `quality.record`, and in Medusa-2 `backbone`,
    the mean backbone loss in nats.

    In Medusa-2 the text is the frozen target's own, the backbone that drafts are for has moved: tokens_per_round is
    what it would commit as long as it says this text.
    """
    made = record(quality(batches, found), tree)
    tokens = sum(int(part["tokens"]) for part in found)
    return made | ({"backbone": sum(float(part["backbone"]) for part in found) / tokens} if tokens else {})
