"""Medusa heads fitted on packed text, with the target's features computed as they are needed, on a mesh.

Medusa-1 fits the heads to the frozen target. Medusa-2 (Cai et al. 2024) fits LoRA changes to the target along with
them: the backbone's own loss, which is that of the text or, when the target distils itself, its divergence from the
frozen target, and beside it the heads' losses with a small weight that rises by a sine ramp.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from specjax.corpus.conversation import text_identity
from specjax.errors import ConfigError
from specjax.fingerprint import fingerprint
from specjax.heads import Heads, draft_projection, project
from specjax.loading.head_files import BACKBONE
from specjax.loading.hf import save_hf
from specjax.loading.load import Model
from specjax.ranks.labels import IGNORED, label_ranks
from specjax.ranks.table import UNLABELLED
from specjax.target import params as parameters
from specjax.target.params import Params
from specjax.training import losses, mesh, preflight
from specjax.training.heads_export import save_bfloat16
from specjax.training.identity import of_head_run
from specjax.training.lora import Lora, LoraConfig, init_lora, lora_shardings, merge
from specjax.training.losses import Weighting, chunked_cross_entropy, token_losses
from specjax.training.objective import Batch, HostBatch, Moment
from specjax.training.packed_losses import (
    backbone_sum,
    by_shard,
    chunks,
    packed_features,
    reduced_rows,
    split_labels,
)
from specjax.training.packing import PackedConfig, PackedObjective
from specjax.training.quality import CAP, Quality, held_out_ranks, record, tree_for
from specjax.tree import Tree


@dataclass(frozen=True)
class PackedMedusaConfig(PackedConfig):
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


class Frozen(NamedTuple):
    """The target, and the LM head's rows that shared heads multiply by (None: they have their own)."""

    target: Params
    projection: Float[Array, "R D"] | None


class Fitted(NamedTuple):
    """The float32 heads and, of Medusa-2, the changes to the backbone."""

    heads: Heads
    lora: Lora | None


@dataclass(frozen=True, kw_only=True)
class PackedMedusa(PackedObjective):
    """Fits `heads` (float32), and with `settings.lora` the target's LoRA changes, to conversations; gives `Fitted`.

    Products run in the target's dtype. A step's record has `losses` [C], each head's mean in nats, and Medusa-2's
    `backbone`; an evaluation's is a `packed_record` on every token of `held_out`'s conversations up to `length` tokens.

    Attributes:
      model: the target, which stays as it is.
      tree: what `tokens_per_round` is of; None: `default_tree`.

    Raises:
      TreeError: a tree deeper than there are heads, or too wide to simulate.
    """

    model: Model
    heads: Heads
    settings: PackedMedusaConfig
    tree: Tree = None  # type: ignore[assignment]  # __post_init__ fills it
    score: ClassVar[str] = "tokens_per_round"

    def __post_init__(self) -> None:
        for name in ("data", "held_out"):  # features that the text may have are not used: these are computed
            object.__setattr__(self, name, [replace(item, features=None) for item in getattr(self, name)])
        object.__setattr__(self, "tree", tree_for(self.tree, self.heads.config.num_heads))

    @property
    def factors(self) -> dict[str, float]:  # type: ignore[override]
        return {"lora": self.settings.lora_learning_rate / self.settings.learning_rate}

    def check(self, on: Mesh) -> None:
        settings, config = self.settings, self.model.config
        mesh.check_rows(settings.batch_size, on)
        self.heads.check(config)
        preflight.check_conversations(config.vocab_size, self.data, self.held_out)
        for text, what in ((self.data, "training"), (self.held_out, "evaluation")):
            preflight.check_cut(text, settings.length, what, ahead=2)  # the first head's; the others' are fewer
        preflight.check_some_sayable(self.heads, self.data, settings.length)

    def identity(self) -> dict[str, Any]:
        text = (text_identity(self.data), text_identity(self.held_out))
        return of_head_run(self.settings, self.heads, self.model.params, *text, self.tree)

    def initial(self) -> dict[str, Any]:
        trained: dict[str, Any] = {"heads": self.heads.params}
        if self.settings.lora is not None:
            trained["lora"] = init_lora(jax.random.key(self.settings.seed), self.model.config, self.settings.lora)
        return trained

    def shardings(self, on: Mesh) -> dict[str, Any]:
        where = {"heads": mesh.head_shardings(self.heads, on)}
        if self.settings.lora is not None:
            where["lora"] = lora_shardings(self.model.config, self.settings.lora, on)
        return where

    def constants(self, on: Mesh) -> Frozen:
        """The target, and its LM head restricted to what the heads say."""
        params = self.model.params
        projection = mesh.put_rows(draft_projection(self.heads, params.unembedding), on)
        return Frozen(mesh.put(params, parameters.shardings(self.model.config, on)), projection)

    def loss(
        self, params: Mapping[str, Any], constants: Frozen, batch: Batch, moment: Moment
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The loss of a batch of `packing.packed`; `moment.key` is for LoRA's dropout, `moment.done` for the ramp."""
        settings, config, target = self.settings, self.model.config, constants.target
        heads, lora = self._in_dtype(params, target)
        base = None
        if lora is None or settings.backbone_loss == "kl":
            base = jax.lax.stop_gradient(packed_features(target, config, batch))
        ours = base
        if lora is not None:
            ours = packed_features(target, config, batch, lora=lora, key=moment.key, remat=settings.remat)
        assert ours is not None
        lm_labels, labels = split_labels(heads, batch)

        def head_sums(labels: Int[Array, "n C"], features: Float[Array, "n D"]) -> Float[Array, "C"]:
            each = chunked_cross_entropy(heads, constants.projection, features, labels)
            return each * jnp.sum(labels != IGNORED, axis=0)

        each = jnp.sum(by_shard(head_sums, moment.shards, reduced_rows(heads, labels), ours), axis=0)
        each = each / jnp.maximum(jnp.sum(reduced_rows(heads, labels) != IGNORED, axis=(0, 1)), 1)
        weights = losses.head_weights(settings.weighting, heads.config.num_heads, scale=1.0)
        value = settings.ramp(moment.done) * jnp.sum(each * weights)
        if lora is None:
            return value, {"losses": each}
        compared = (lm_labels, ours) if settings.backbone_loss == "text" else (lm_labels, ours, base)
        sums = by_shard(functools.partial(_backbone_sums, target), moment.shards, *compared)
        backbone = jnp.sum(sums) / jnp.maximum(jnp.sum(lm_labels != IGNORED), 1)
        return value + backbone, {"losses": each, "backbone": backbone}

    def _in_dtype(self, params: Mapping[str, Any], target: Params) -> tuple[Heads, Lora | None]:
        # What products take of the float32 master weights.
        cast = jax.tree.map(lambda leaf: leaf.astype(target.dtype), dict(params))
        return replace(self.heads, params=cast["heads"]), cast.get("lora")

    def judge(self, params: Mapping[str, Any], constants: Frozen, batch: Batch, shards: int = 1) -> dict[str, Array]:
        """What a batch says, without dropout.

        Gives `ranks` [B T C], of the true token that head i is to give at a slot: `CAP` for those and beyond,
        `UNLABELLED` where there is none; and sums: `losses` [C] in nats over `labels` [C] that the heads can say,
        `backbone`, the backbone loss, over `tokens` positions (both zero in Medusa-1).
        """
        config, target = self.model.config, constants.target
        heads, lora = self._in_dtype(params, target)
        ours = packed_features(target, config, batch, lora=lora)
        lm_labels, labels = split_labels(heads, batch)
        rows = reduced_rows(heads, labels)

        def one(part: tuple[Int[Array, "t C"], Float[Array, "t D"]]) -> tuple[Int[Array, "t C"], Float[Array, "C"]]:
            rows, features = part
            logits = project(heads, constants.projection, features)
            return label_ranks(logits, rows).T, jnp.sum(token_losses(logits, rows), axis=1)

        def by_chunk(
            rows: Int[Array, "n C"], features: Float[Array, "n D"]
        ) -> tuple[Int[Array, "n C"], Float[Array, "C"]]:
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
            if self.settings.backbone_loss == "kl":
                compared.append(packed_features(target, config, batch))
            sums = by_shard(functools.partial(_backbone_sums, target), shards, *compared)
            found |= {"backbone": jnp.sum(sums), "tokens": jnp.sum(lm_labels != IGNORED)}
        return found

    def record(self, found: Sequence[HostBatch]) -> dict[str, Any]:
        return packed_record(list(self.held_out_batches()), found, self.tree)

    def trained(self, params: Mapping[str, Any]) -> Fitted:
        return Fitted(replace(self.heads, params=params["heads"]), params.get("lora"))

    def export(self, directory: Path, trained: Fitted, metadata: Mapping[str, Any]) -> None:
        """Writes heads.safetensors and, where it changed, what the heads belong to: `backbone`, the changes merged, a
        Hugging Face directory with the tokenizer; its fingerprint goes into the heads' metadata. All in bfloat16."""
        if trained.lora is not None:
            merged = merge(self.model.params, trained.lora)
            params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), merged)
            save_hf(directory / BACKBONE, params, self.model.config)
            if self.model.tokenizer is not None:
                self.model.tokenizer.save(directory / BACKBONE)
            metadata = {**metadata, BACKBONE: fingerprint(params)}
        save_bfloat16(directory, trained.heads, metadata)


def _backbone_sums(
    target: Params, labels: Int[Array, "n 1"], ours: Float[Array, "n D"], base: Float[Array, "n D"] | None = None
) -> Float[Array, ""]:
    return backbone_sum(target, labels, ours, base)


def packed_quality(batches: Sequence[HostBatch], found: Sequence[HostBatch]) -> Quality:
    """Ranks, a sequence for every assistant turn, and losses, from what `PackedMedusa.judge` gives of packed batches.

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


def packed_record(batches: Sequence[HostBatch], found: Sequence[HostBatch], tree: Tree) -> dict[str, Any]:
    """The `eval` record: that of `quality.record`, and in Medusa-2 `backbone`, the mean backbone loss in nats.

    In Medusa-2 the text is the frozen target's own, the backbone that drafts are for has moved: tokens_per_round is
    what it would commit as long as it says this text.
    """
    made = record(packed_quality(batches, found), tree)
    tokens = sum(int(part["tokens"]) for part in found)
    return made | ({"backbone": sum(float(part["backbone"]) for part in found) / tokens} if tokens else {})
