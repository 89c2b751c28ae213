"""Medusa-1: fits the heads alone, with Optax, on features of the frozen target."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from specjax.errors import ConfigError, DataError
from specjax.heads import Heads, draft_projection, project
from specjax.params import Params
from specjax.training import loop
from specjax.training.distill import Answers
from specjax.training.losses import IGNORED, chunked_cross_entropy, future_labels, label_ranks, reduce_labels

TOP = (1, 2, 3, 5, 10)


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation settings. One step is `batch_size` positions; an epoch visits every position once."""

    epochs: int = 3
    batch_size: int = 2048
    learning_rate: float = 2e-3  # peak; linear warm-up, then cosine to zero
    warmup: float = 0.05  # share of the steps
    head_decay: float = 1.0  # weight of head k is head_decay ** k (Medusa-1 in the paper: 0.8)
    seed: int = 0
    checkpoint_every: int | None = None  # steps between checkpoints and evaluations; None: once an epoch

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1 or not self.learning_rate > 0 or not 0 <= self.warmup < 1:
            raise ConfigError(
                f"{self}: expected epochs and batch_size of at least 1, learning_rate > 0, 0 <= warmup < 1."
            )


@dataclass(frozen=True)
class Dataset:
    """Features with the labels of every head, in the heads' (possibly reduced) vocabulary."""

    features: Float[np.ndarray, "n D"]
    labels: Int[np.ndarray, "n C"]
    unseen: Int[np.ndarray, "C"]  # labels outside the reduced vocabulary: no head can be right there


def dataset(answers: Answers, heads: Heads) -> Dataset:
    """Labels `answers` for `heads`.

    Raises:
      DataError: no labelled position (every conversation is shorter than two tokens), or features of another width.
    """
    config = heads.config
    if answers.features.shape[1] != config.hidden_size:
        raise DataError(
            f"the features have width {answers.features.shape[1]}, the heads read {config.hidden_size}; "
            "the data was made by another model."
        )
    full = future_labels(answers.tokens, answers.lengths, config.num_heads)
    if not (full != IGNORED).any():
        raise DataError(
            f"none of the {len(answers.lengths)} conversations has a token after its first; add longer ones."
        )
    if heads.token_map is None:
        return Dataset(answers.features, full, np.zeros(config.num_heads, np.int64))
    labels = reduce_labels(full, np.asarray(heads.token_map), config.vocab_size)
    return Dataset(answers.features, labels, ((full != IGNORED) & (labels == IGNORED)).sum(0))


def frequent_tokens(tokens: Int[np.ndarray, "n"], size: int, vocab: int) -> Int[np.ndarray, "R"]:
    """The `size` most frequent tokens, ascending (ties in frequency to the lowest id): a reduced vocabulary."""
    counts = np.bincount(tokens, minlength=vocab)
    return np.sort(np.argsort(-counts, kind="stable")[:size]).astype(np.int32)


@jax.jit
def _ranks(
    heads: Heads, projection: Float[Array, "R D"] | None, features: Float[Array, "T D"], labels: Int[Array, "T C"]
) -> Int[Array, "C T"]:
    return label_ranks(project(heads, projection, features), labels)


def evaluate(heads: Heads, target: Params, data: Dataset, *, max_rank: int = 10, batch_size: int = 2048) -> np.ndarray:
    """hits[i, r]: the share of positions where head i ranks the true token r-th, r < `max_rank`: [C max_rank].

    Labels outside the heads' vocabulary count as misses.
    """
    projection = draft_projection(heads, target.unembedding)
    hits = np.zeros((heads.config.num_heads, max_rank))
    for at in range(0, len(data.features), batch_size):
        ranks = _ranks(
            heads,
            projection,
            jnp.asarray(data.features[at : at + batch_size]),
            jnp.asarray(data.labels[at : at + batch_size]),
        )
        hits += np.stack([np.bincount(r[(r >= 0) & (r < max_rank)], minlength=max_rank) for r in np.asarray(ranks)])
    labelled = (data.labels != IGNORED).sum(0) + data.unseen
    return hits / labelled[:, None]


def train(
    heads: Heads,
    target: Params,
    data: Dataset,
    held_out: Dataset,
    config: TrainConfig,
    directory: Path,
    *,
    report: Callable[[dict[str, Any]], None] = lambda record: None,
) -> tuple[Heads, list[dict[str, Any]]]:
    """Trains `heads` (float32 parameters) and gives them with the log of `loop.fit`.

    A step's record has the mean loss, that of each head (`losses`, nats) and the gradient's norm; an evaluation's
    `eval` the top-k accuracy of every head on `held_out` and `hits`. A later call resumes from `directory`.

    Raises:
      DataError: fewer positions than one batch, or a loss that is not finite (the last checkpoint stays as it was).
    """
    per_epoch = len(data.features) // config.batch_size
    if per_epoch == 0:
        raise DataError(
            f"{len(data.features)} positions do not fill one batch of {config.batch_size}; lower batch_size."
        )
    steps = per_epoch * config.epochs
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, max(1, int(config.warmup * steps)), steps, 0.0
    )
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.0))
    projection = draft_projection(heads, target.unembedding)
    projection = None if projection is None else projection.astype(jnp.bfloat16)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: Any, batch: dict[str, Array]) -> tuple[Any, dict[str, Array]]:
        def loss(params: Any) -> tuple[Float[Array, ""], Float[Array, "C"]]:
            # bfloat16 operands, float32 master weights: the cast's gradient comes back as float32.
            half = replace(heads, params=jax.tree.map(lambda p: p.astype(jnp.bfloat16), params))
            each = chunked_cross_entropy(half, projection, batch["features"], batch["labels"])
            return jnp.sum(each * config.head_decay ** jnp.arange(each.shape[0])), each

        (value, each), grads = jax.value_and_grad(loss, has_aux=True)(state["params"])
        updates, opt = optimiser.update(grads, state["opt"], state["params"])
        metrics = {"loss": value, "losses": each, "gradient_norm": optax.global_norm(grads)}
        return {"params": optax.apply_updates(state["params"], updates), "opt": opt}, metrics

    trained = loop.fit(
        step,
        {"params": heads.params, "opt": optimiser.init(heads.params)},
        _batches(data, config),
        steps=steps,
        directory=directory,
        checkpoint_every=config.checkpoint_every or per_epoch,
        evaluate=lambda state: _record(replace(heads, params=state["params"]), target, held_out),
        report=report,
    )
    return replace(heads, params=trained.state["params"]), trained.log


def _batches(data: Dataset, config: TrainConfig) -> grain.IterDataset:
    def rows(chosen: np.ndarray) -> dict[str, np.ndarray]:
        chosen = np.sort(chosen)  # the order within a batch is free, and sorted reads are faster
        return {"features": data.features[chosen], "labels": data.labels[chosen]}

    order = grain.MapDataset.range(len(data.features)).seed(config.seed).shuffle().repeat(config.epochs)
    return order.batch(config.batch_size, drop_remainder=True).map(rows).to_iter_dataset()


def _record(heads: Heads, target: Params, held_out: Dataset) -> dict[str, Any]:
    hits = evaluate(heads, target, held_out)
    accuracy = {f"top{k}": hits[:, :k].sum(1).round(4).tolist() for k in TOP}
    return {"accuracy": accuracy, "hits": hits.round(5).tolist()}
