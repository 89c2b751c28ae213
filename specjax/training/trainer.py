"""Medusa-1: fits the heads alone, with Optax, on features of the frozen target."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from specjax.corpus.answers import Answers
from specjax.errors import ConfigError, DataError
from specjax.fingerprint import arrays_fingerprint
from specjax.heads import Heads, draft_projection, project
from specjax.ranks.labels import IGNORED, future_labels, label_ranks, reduce_labels
from specjax.ranks.table import UNLABELLED
from specjax.target.model import dot
from specjax.target.params import Params
from specjax.training import loop
from specjax.training.identity import of_head_run
from specjax.training.losses import LOGIT_BYTES, Teacher, Weighting, chunked_cross_entropy, head_weights, token_losses
from specjax.training.optimiser import Optimiser, OptimiserConfig, State, build, whole_updates
from specjax.training.packing import Select
from specjax.training.quality import CAP, Quality, held_out_ranks, record, tree_for
from specjax.tree import Tree


@dataclass(frozen=True)
class TrainConfig(OptimiserConfig):
    """Training settings. One step is `batch_size` positions; an epoch visits every position once."""

    epochs: int = 3
    batch_size: int = 2048
    weighting: Weighting = "sum"  # of the heads' losses: 1 each, or scale * 0.8 ** i
    scale: float = 0.2
    distillation: float = 0.0  # share of the loss that is KL to the target's distribution, the rest is cross-entropy
    teacher_top_k: int = 16  # tokens of that distribution that are kept
    z_loss: float = 0.0  # weight of the squared log-partition function
    compute: Literal["bfloat16", "float32"] = "bfloat16"  # of the products; the parameters are float32
    seed: int = 0
    checkpoint_every: int | None = None  # steps between checkpoints and evaluations; None: once an epoch
    keep: int = 2  # newest checkpoints; the best one stays as well
    select: Select = "last"  # which checkpoint's heads `train` gives; best: by tokens_per_round

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.epochs, self.batch_size, self.teacher_top_k, self.keep, self.checkpoint_every or 1) < 1:
            raise ConfigError(
                f"{self}: expected epochs, batch_size, teacher_top_k, keep and checkpoint_every of at least 1."
            )
        if not 0 <= self.distillation <= 1 or self.z_loss < 0:
            raise ConfigError(
                f"distillation is {self.distillation}, z_loss {self.z_loss}; expected 0 to 1, and at least 0."
            )
        if self.compute not in ("bfloat16", "float32"):
            raise ConfigError(f"compute is {self.compute!r}; expected 'bfloat16' or 'float32'.")
        if self.select not in ("best", "last"):
            raise ConfigError(f"select is {self.select!r}; expected 'best' or 'last'.")
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
    if answers.features.shape[1] != config.hidden_size:
        raise DataError(
            f"the features have width {answers.features.shape[1]}, the heads read {config.hidden_size}; "
            "the data was made by another model."
        )
    if len(answers.tokens) and not 0 <= answers.tokens.min() <= answers.tokens.max() < config.vocab_size:
        raise DataError(
            f"the text has token ids from {answers.tokens.min()} to {answers.tokens.max()}, the target's vocabulary is "
            f"{config.vocab_size}; the data was made by another model."
        )
    full = future_labels(answers.tokens, answers.lengths, config.num_heads)
    if not (full != IGNORED).any():
        raise DataError(
            f"none of the {len(answers.lengths)} conversations has a token after its first; add longer ones."
        )
    labels = full
    if heads.token_map is not None:
        labels = reduce_labels(full, np.asarray(heads.token_map), config.vocab_size)
        if not (labels != IGNORED).any():
            raise DataError("no token of the text is in the heads' reduced vocabulary; choose it from this text.")
    return Dataset(answers.features, labels, answers.lengths, answers.source)


def frequent_tokens(tokens: Int[np.ndarray, "n"], size: int, vocab: int) -> Int[np.ndarray, "R"]:
    """The `size` most frequent tokens, ascending (ties in frequency to the lowest id): a reduced vocabulary."""
    counts = np.bincount(tokens, minlength=vocab)
    return np.sort(np.argsort(-counts, kind="stable")[:size]).astype(np.int32)


@functools.partial(jax.jit, static_argnames="k")
def _likeliest(
    matrix: Float[Array, "R D"], features: Float[Array, "T D"], k: int
) -> tuple[Int[Array, "T k"], Float[Array, "T k"]]:
    logits, tokens = jax.lax.top_k(dot("TD,RD->TR", features, matrix), k)
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
    tokens, law = np.zeros((len(data.features), k), np.int32), np.zeros((len(data.features), k), np.float32)
    for at in range(0, len(tokens), size):
        part = np.zeros((size, data.features.shape[1]), data.features.dtype)  # one shape: one compilation
        here = data.features[at : at + size]
        part[: len(here)] = here
        ids, p = _likeliest(matrix, part, k)
        tokens[at : at + size], law[at : at + size] = np.asarray(ids)[: len(here)], np.asarray(p)[: len(here)]
    return tokens, law


@jax.jit
def _evaluate(
    heads: Heads, projection: Float[Array, "R D"] | None, features: Float[Array, "T D"], labels: Int[Array, "T C"]
) -> tuple[Int[Array, "C T"], Float[Array, "C"]]:
    logits = project(heads, projection, features)
    return label_ranks(logits, labels), jnp.sum(token_losses(logits, labels), axis=1)


def evaluate(heads: Heads, target: Params, data: Dataset) -> Quality:
    """Ranks and losses of `heads` on `data`; labels outside the heads' vocabulary count as misses."""
    projection = draft_projection(heads, target.unembedding)
    count, num = len(data.features), heads.config.num_heads
    size = max(1, min(count, LOGIT_BYTES // (4 * num * heads.config.output_size)))
    ranks, losses = np.full((count, num), UNLABELLED, np.int64), np.zeros(num)
    for at in range(0, count, size):
        features = np.zeros((size, data.features.shape[1]), data.features.dtype)  # one shape: one compilation
        labels = np.full((size, num), IGNORED, np.int32)
        here = slice(at, min(at + size, count))
        features[: here.stop - at], labels[: here.stop - at] = data.features[here], data.labels[here]
        found, summed = _evaluate(heads, projection, features, labels)
        ranks[here] = np.asarray(found).T[: here.stop - at]
        losses += np.asarray(summed)
    losses /= np.maximum((data.labels != IGNORED).sum(0), 1)
    there = data.following[:, None] > np.arange(num)
    ranks = np.where(there, np.where(data.labels == IGNORED, CAP, np.minimum(ranks, CAP)), UNLABELLED)
    return Quality(held_out_ranks(ranks, data.lengths), losses)


def medusa_step(
    heads: Heads, optimiser: Optimiser, config: TrainConfig
) -> Callable[[Float[Array, "R D"] | None, State, dict[str, Array]], tuple[State, dict[str, Array]]]:
    """The Medusa-1 step, pure: (projection, state, batch) -> (state, metrics).

    The projection is `draft_projection`'s in the compute dtype; a batch holds `features` [T D], `labels` [T C] and,
    when distilling, the teacher's `tokens` and `probabilities` [T C k]. Any of them may be spread over a mesh.
    """
    weights, dtype = head_weights(config.weighting, heads.config.num_heads, config.scale), jnp.dtype(config.compute)

    def step(projection: Array | None, state: State, batch: dict[str, Array]) -> tuple[State, dict[str, Array]]:
        teacher = Teacher(batch["tokens"], batch["probabilities"]) if config.distillation else None

        def loss(params: Any) -> tuple[Float[Array, ""], Float[Array, "C"]]:
            # Operands in the compute dtype, float32 master weights: the cast's gradient comes back as float32.
            cast = Heads(jax.tree.map(lambda p: p.astype(dtype), params), None, heads.config)
            each = chunked_cross_entropy(
                cast,
                projection,
                batch["features"],
                batch["labels"],
                teacher=teacher,
                distillation=config.distillation,
                z_loss=config.z_loss,
            )
            return jnp.sum(each * weights), each

        (value, each), gradients = jax.value_and_grad(loss, has_aux=True)(state["params"])
        state, metrics = optimiser.update(state, gradients)
        return state, {"loss": value, "losses": each, **metrics}

    return step


def train(
    heads: Heads,
    target: Params,
    data: Dataset,
    held_out: Dataset,
    config: TrainConfig,
    directory: Path,
    *,
    tree: Tree | None = None,
    report: Callable[[dict[str, Any]], None] = lambda record: None,
    monitor: loop.Monitor | None = None,
    placement: loop.Placement = loop.ANYWHERE,
) -> tuple[Heads, list[dict[str, Any]]]:
    """Trains `heads` (float32 parameters) and gives those that `config.select` names with the log of `loop.fit`.

    A step's record has the mean loss, that of each head (`losses`, nats), the gradient's norm and the learning rate; at
    every evaluation there are throughputs and, as `eval`, a `record` on `held_out`. A later call resumes from
    `directory`.

    Args:
      tree: what `tokens_per_round` is of; None: `default_tree`.
      monitor: follows the run (`monitor.RunMonitor`).
      placement: where state and batches are to be; heads and target given on a mesh stay there.

    Raises:
      TreeError: a tree deeper than there are heads, or too wide to simulate.
      DataError: fewer positions than one batch, or a loss that is not finite (the last checkpoint stays as it was).
      CheckpointError: a full disk, or a directory in which a run of other settings, heads, target, data or tree was
        begun.
    """
    num, dtype = heads.config.num_heads, jnp.dtype(config.compute)
    tree = tree_for(tree, num)
    steps = steps_of(data, config)
    optimiser, batches = build(config, steps), _batches(data, heads, target, config)
    rows = draft_projection(heads, target.unembedding)
    projection = None if rows is None else rows.astype(dtype)
    jitted = jax.jit(medusa_step(heads, optimiser, config), donate_argnums=1)

    def judged(state: State) -> dict[str, Any]:
        return record(evaluate(replace(heads, params=optimiser.evaluated(state)), target, held_out), tree)

    labelled = float((data.labels != IGNORED).sum(1).mean())  # per position
    trained = loop.fit(
        functools.partial(jitted, projection),
        optimiser.init(heads.params),
        batches,
        steps=steps,
        directory=directory,
        checkpoint_every=config.checkpoint_every or len(data.features) // config.batch_size,
        settings=of_head_run(config, heads, target, _identity(data), _identity(held_out), tree),
        evaluate=judged,
        report=report,
        score=lambda found: found["tokens_per_round"],
        keep=config.keep,
        per_step={"tokens": config.batch_size, "labels": config.batch_size * labelled},
        monitor=monitor,
        placement=placement,
    )
    chosen = trained.state if config.select == "last" else loop.best_state(directory, trained.state, batches)
    return replace(heads, params=optimiser.evaluated(chosen)), trained.log


def _identity(data: Dataset) -> dict[str, Any]:
    # Without the features' bits, which the text and the target give, but differently on another kind of CPU.
    return {
        "positions": len(data.features),
        "labels": int((data.labels != IGNORED).sum()),
        "features": {"width": data.features.shape[1], "dtype": data.features.dtype.name},
        "fingerprint": arrays_fingerprint(data.labels, data.lengths),
        "text": data.source,
    }


def steps_of(data: Dataset, config: TrainConfig) -> int:
    """Batches in a whole run: those of every epoch, down to a whole number of updates.

    Raises:
      DataError: fewer positions than one batch, or batches than one update.
    """
    per_epoch = len(data.features) // config.batch_size
    steps = whole_updates(per_epoch * config.epochs, config)
    if per_epoch == 0 or steps == 0:
        raise DataError(
            f"{len(data.features)} positions in {config.epochs} epochs do not fill one batch of {config.batch_size}, "
            f"{config.accumulate} times; lower batch_size or accumulate."
        )
    return steps


def _batches(data: Dataset, heads: Heads, target: Params, config: TrainConfig) -> grain.IterDataset:
    taught = None
    if config.distillation:
        matrix = target.unembedding if heads.token_map is None else target.unembedding[heads.token_map]
        taught = teach(data, matrix, config.teacher_top_k)
    ahead = 1 + np.arange(heads.config.num_heads)

    def rows(chosen: np.ndarray) -> dict[str, np.ndarray]:
        chosen = np.sort(chosen)  # the order within a batch is free, and sorted reads are faster
        batch = {"features": data.features[chosen], "labels": data.labels[chosen]}
        if taught is not None:
            # Head i at feature j learns the distribution that feature j + 1 + i gives: the token j + 1 + i's own.
            source = np.minimum(chosen[:, None] + ahead, len(data.features) - 1)  # past the end there is no label
            batch |= {"tokens": taught[0][source], "probabilities": taught[1][source]}
        return batch

    order = grain.MapDataset.range(len(data.features)).seed(config.seed).shuffle().repeat(config.epochs)
    return order.batch(config.batch_size, drop_remainder=True).map(rows).to_iter_dataset()
