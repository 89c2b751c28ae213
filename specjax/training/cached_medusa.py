"""Medusa-1 from cached features: the heads alone are fitted, to positions whose features the text brings along."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from specjax import ops
from specjax.corpus.answers import Answers
from specjax.errors import ConfigError, DataError
from specjax.fingerprint import arrays_fingerprint
from specjax.heads import Heads, draft_projection, project
from specjax.ranks.labels import IGNORED, future_labels, label_ranks, reduce_labels
from specjax.ranks.table import UNLABELLED
from specjax.target.params import Params
from specjax.training import mesh, preflight
from specjax.training.heads_export import save_bfloat16
from specjax.training.identity import of_head_run
from specjax.training.losses import LOGIT_BYTES, Teacher, Weighting, chunked_cross_entropy, head_weights, token_losses
from specjax.training.objective import Batch, HostBatch, Moment, Objective, RunConfig
from specjax.training.optimiser import whole_updates
from specjax.training.quality import CAP, Quality, held_out_ranks, record, tree_for
from specjax.tree import Tree


@dataclass(frozen=True)
class CachedMedusaConfig(RunConfig):
    """Training settings. One step is `batch_size` positions; an epoch visits every position once."""

    epochs: int = 3
    batch_size: int = 2048
    weighting: Weighting = "sum"  # of the heads' losses: 1 each, or scale * 0.8 ** i
    scale: float = 0.2
    distillation: float = 0.0  # share of the loss that is KL to the target's distribution, the rest is cross-entropy
    teacher_top_k: int = 16  # tokens of that distribution that are kept
    z_loss: float = 0.0  # weight of the squared log-partition function
    compute: Literal["bfloat16", "float32"] = "bfloat16"  # of the products; the parameters are float32

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.distillation <= 1 or self.z_loss < 0 or self.teacher_top_k < 1:
            raise ConfigError(
                f"distillation is {self.distillation}, z_loss {self.z_loss}, teacher_top_k {self.teacher_top_k}; "
                "expected 0 to 1, at least 0, and at least 1."
            )
        if self.compute not in ("bfloat16", "float32"):
            raise ConfigError(f"compute is {self.compute!r}; expected 'bfloat16' or 'float32'.")
        head_weights(self.weighting, 1, self.scale)


@dataclass(frozen=True)
class Dataset:
    """Features with the labels of every head, in the heads' (possibly reduced) vocabulary.

    Attributes:
      features: conversations end to end.
      labels: `IGNORED` past a conversation's end, and for tokens outside the reduced vocabulary.
      lengths: positions per conversation; they sum to n.
      source: as in `Answers`.
    """

    features: Float[np.ndarray, "n D"]
    labels: Int[np.ndarray, "n C"]
    lengths: Int[np.ndarray, "c"]
    source: str = ""

    @functools.cached_property
    def following(self) -> Int[np.ndarray, "n"]:
        """How many tokens of its conversation come after each position's own."""
        return np.repeat(np.cumsum(self.lengths), self.lengths) - np.arange(len(self.features)) - 1


def dataset(answers: Answers, heads: Heads) -> Dataset:
    """Labels `answers` for `heads`.

    Raises:
      DataError: no labelled position (every conversation is shorter than two tokens), features of another width, or
        tokens that the target does not have.
    """
    config = heads.config
    preflight.check_width("the text", answers.features.shape[1], config.hidden_size)
    preflight.check_vocabulary("the text", answers.tokens, config.vocab_size)
    full = future_labels(answers.tokens, answers.lengths, config.num_heads)
    if not (full != IGNORED).any():
        raise DataError(
            f"none of the {len(answers.lengths)} conversations has a token after its first; add longer ones."
        )
    labels = full
    if heads.token_map is not None:
        labels = reduce_labels(full, np.asarray(heads.token_map), config.vocab_size)
        preflight.check_sayable(bool((labels != IGNORED).any()))
    return Dataset(answers.features, labels, answers.lengths, answers.source)


@functools.partial(jax.jit, static_argnames="k")
def _likeliest(
    matrix: Float[Array, "R D"], features: Float[Array, "T D"], k: int
) -> tuple[Int[Array, "T k"], Float[Array, "T k"]]:
    logits, tokens = jax.lax.top_k(ops.dot("TD,RD->TR", features, matrix), k)
    return tokens, jax.nn.softmax(logits, axis=-1)


def teach(
    data: Dataset, matrix: Float[Array, "R D"], k: int
) -> tuple[Int[np.ndarray, "n k"], Float[np.ndarray, "n k"]]:
    """The k likeliest tokens after each feature with the target's probabilities, renormalised over them.

    Args:
      matrix: the LM head's rows that the heads can say.
    """
    k = min(k, matrix.shape[0])
    size = max(1, min(len(data.features), LOGIT_BYTES // (4 * matrix.shape[0])))
    found = [_likeliest(matrix, batch["features"], k) for batch in _in_order(data, size)]
    tokens, law = (np.concatenate(part)[: len(data.features)] for part in zip(*found, strict=True))
    return tokens, law


def _in_order(data: Dataset, size: int) -> Iterator[HostBatch]:
    """Every position once, in batches of one shape: one compilation."""
    for at in range(0, len(data.features), size):
        here = slice(at, at + size)
        features = np.zeros((size, data.features.shape[1]), data.features.dtype)
        labels = np.full((size, data.labels.shape[1]), IGNORED, np.int32)
        count = len(data.features[here])
        features[:count], labels[:count] = data.features[here], data.labels[here]
        yield {"features": features, "labels": labels}


class Rows(NamedTuple):
    """The LM head's rows that shared heads multiply by, in training's dtype and in the target's; None: their own."""

    training: Float[Array, "R D"] | None
    judging: Float[Array, "R D"] | None


@dataclass(frozen=True, kw_only=True)
class CachedMedusa(Objective):
    """Fits `heads` (float32) to features of the frozen target; gives `Heads`.

    A step's record has `losses` [C], each head's mean in nats; an evaluation's is a `quality.record`.

    Attributes:
      target: its LM head is what shared heads multiply by.
      tree: what `tokens_per_round` is of; None: `default_tree`.

    Raises:
      TreeError: a tree deeper than there are heads, or too wide to simulate.
    """

    heads: Heads
    target: Params
    data: Dataset
    held_out: Dataset
    settings: CachedMedusaConfig
    tree: Tree = None  # type: ignore[assignment]  # __post_init__ fills it
    score: ClassVar[str] = "tokens_per_round"

    def __post_init__(self) -> None:
        object.__setattr__(self, "tree", tree_for(self.tree, self.heads.config.num_heads))

    @property
    def steps_per_epoch(self) -> int:
        return len(self.data.features) // self.settings.batch_size

    @property
    def steps(self) -> int:
        """Batches of every epoch, down to a whole number of updates.

        Raises:
          DataError: fewer positions than one batch, or batches than one update.
        """
        config, per_epoch = self.settings, self.steps_per_epoch
        steps = whole_updates(per_epoch * config.epochs, config)
        if per_epoch == 0 or steps == 0:
            raise DataError(
                f"{len(self.data.features)} positions in {config.epochs} epochs do not fill one batch of "
                f"{config.batch_size}, {config.accumulate} times; lower batch_size or accumulate."
            )
        return steps

    @property
    def amounts(self) -> dict[str, float]:
        size = self.settings.batch_size
        return {"tokens": size, "labels": size * float((self.data.labels != IGNORED).sum(1).mean())}

    def check(self, on: Mesh) -> None:
        mesh.check_rows(self.settings.batch_size, on)

    def identity(self) -> dict[str, Any]:
        text = (_identity(self.data), _identity(self.held_out))
        return of_head_run(self.settings, self.heads, self.target, *text, self.tree)

    def initial(self) -> Any:
        return self.heads.params

    def shardings(self, on: Mesh) -> Any:
        return mesh.head_shardings(self.heads, on)

    def constants(self, on: Mesh) -> Rows:
        """Of shared heads; the others bring projections of their own."""
        rows = mesh.put_rows(draft_projection(self.heads, self.target.unembedding), on)
        return Rows(None if rows is None else rows.astype(self.settings.compute), rows)

    def batches(self) -> grain.IterDataset:
        """Positions in an order of their own in every epoch, with the teacher's laws where there is distillation."""
        data, settings, taught = self.data, self.settings, None
        if settings.distillation:
            matrix, ids = self.target.unembedding, self.heads.token_map
            taught = teach(data, matrix if ids is None else matrix[ids], settings.teacher_top_k)
        ahead = 1 + np.arange(self.heads.config.num_heads)

        def rows(chosen: np.ndarray) -> dict[str, np.ndarray]:
            chosen = np.sort(chosen)  # the order within a batch is free, and sorted reads are faster
            batch = {"features": data.features[chosen], "labels": data.labels[chosen]}
            if taught is not None:
                # Head i at feature j learns the distribution that feature j + 1 + i gives: the token j + 1 + i's own.
                source = np.minimum(chosen[:, None] + ahead, len(data.features) - 1)  # past the end there is no label
                batch |= {"tokens": taught[0][source], "probabilities": taught[1][source]}
            return batch

        order = grain.MapDataset.range(len(data.features)).seed(settings.seed).shuffle().repeat(settings.epochs)
        return order.batch(settings.batch_size, drop_remainder=True).map(rows).to_iter_dataset()

    def loss(
        self, params: Any, constants: Rows, batch: Batch, moment: Moment
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The heads' weighted losses of `features` [T D] with `labels` [T C] and, when distilling, the teacher's
        `tokens` and `probabilities` [T C k]."""
        settings, shape = self.settings, self.heads.config
        # Operands in the compute dtype, float32 master weights: the cast's gradient comes back as float32.
        cast = Heads(jax.tree.map(lambda p: p.astype(settings.compute), params), None, shape)
        each = chunked_cross_entropy(
            cast,
            constants.training,
            batch["features"],
            batch["labels"],
            teacher=Teacher(batch["tokens"], batch["probabilities"]) if settings.distillation else None,
            distillation=settings.distillation,
            z_loss=settings.z_loss,
        )
        return jnp.sum(each * head_weights(settings.weighting, shape.num_heads, settings.scale)), {"losses": each}

    def held_out_batches(self, shards: int = 1) -> Iterator[HostBatch]:
        """Positions in order, as many at once as their logits have room."""
        shape, count = self.heads.config, len(self.held_out.features)
        size = max(1, min(count, LOGIT_BYTES // (4 * shape.num_heads * shape.output_size)))
        return _in_order(self.held_out, -(-size // shards) * shards)

    def judge(self, params: Any, constants: Rows, batch: Batch, shards: int = 1) -> dict[str, Array]:
        """`ranks` [T C] of the true tokens, and `losses` [C] summed, in nats."""
        logits = project(replace(self.heads, params=params), constants.judging, batch["features"])
        ranks, losses = label_ranks(logits, batch["labels"]), token_losses(logits, batch["labels"])
        return {"ranks": ranks.T, "losses": jnp.sum(losses, axis=1)}

    def quality(self, found: Sequence[HostBatch]) -> Quality:
        """Ranks and losses; labels outside the heads' vocabulary count as misses."""
        data, num = self.held_out, self.heads.config.num_heads
        ranks = np.concatenate([part["ranks"] for part in found])[: len(data.labels)].astype(np.int64)
        losses = np.zeros(num)
        for part in found:
            losses += part["losses"]
        losses /= np.maximum((data.labels != IGNORED).sum(0), 1)
        there = data.following[:, None] > np.arange(num)
        ranks = np.where(there, np.where(data.labels == IGNORED, CAP, np.minimum(ranks, CAP)), UNLABELLED)
        return Quality(held_out_ranks(ranks, data.lengths), losses)

    def record(self, found: Sequence[HostBatch]) -> dict[str, Any]:
        return record(self.quality(found), self.tree)

    def trained(self, params: Any) -> Heads:
        return replace(self.heads, params=params)

    def export(self, directory: Path, trained: Heads, metadata: Mapping[str, Any]) -> None:
        """heads.safetensors, bfloat16."""
        save_bfloat16(directory, trained, metadata)


def _identity(data: Dataset) -> dict[str, Any]:
    # Without the features' bits, which the text and the target give, but differently on another kind of CPU.
    return {
        "positions": len(data.features),
        "labels": int((data.labels != IGNORED).sum()),
        "features": {"width": data.features.shape[1], "dtype": data.features.dtype.name},
        "fingerprint": arrays_fingerprint(data.labels, data.lengths),
        "text": data.source,
    }
