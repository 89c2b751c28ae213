"""The input pipeline, on Grain: conversations packed into rows of one length, in an order that a seed fixes.

A row holds whole conversations end to end. `segments` numbers them from 1 (0 is padding) and `positions` begin anew in
each, so that neither attention nor labels cross from one to the next. The iterator's position is a small dict
(`get_state`, `set_state`) that goes into the checkpoint with the training state.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import grain
import jax
import numpy as np
from grain.experimental import FirstFitPackIterDataset
from jaxtyping import Bool, Float, Int

from specjax.errors import ConfigError, DataError
from specjax.training.optimiser import OptimiserConfig, whole_updates

_Mask = TypeVar("_Mask", np.ndarray, jax.Array)
Select = Literal["best", "last"]  # which checkpoint a run gives; best: by its score on held-out text
_BINS = 32  # rows that are filled side by side: more waste less, and hold back more conversations


@dataclass(frozen=True)
class Conversation:
    """A prompt [p] with its answer [a]; `features` [a D], where there are any, predicted the answer's tokens.

    In a conversation of several turns the answer runs from the first assistant turn to the end of the last, and `mask`
    [a] says which of its tokens are the assistant's; None: all.
    """

    prompt: Int[np.ndarray, "p"]
    answer: Int[np.ndarray, "a"]
    features: Float[np.ndarray, "a D"] | None = None
    mask: Bool[np.ndarray, "a"] | None = None

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


@dataclass(frozen=True)
class PackedConfig(OptimiserConfig):
    """Training on packed text: a step is `batch_size` rows of `length` tokens."""

    epochs: int = 2
    batch_size: int = 8
    length: int = 512
    seed: int = 0
    checkpoint_every: int = 100  # steps between checkpoints and evaluations
    keep: int = 2  # newest checkpoints; the best one stays as well
    select: Select = "last"  # which checkpoint counts in the end

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.epochs, self.batch_size, self.length, self.checkpoint_every, self.keep) < 1:
            raise ConfigError(f"{self}: expected epochs, batch_size, length, checkpoint_every and keep of at least 1.")
        if self.select not in ("best", "last"):
            raise ConfigError(f"select is {self.select!r}; expected 'best' or 'last'.")


def packed_steps(data: Sequence[Conversation], config: PackedConfig) -> int:
    """Batches in a whole run: what the epochs' tokens fill, down to a whole number of updates.

    Raises:
      DataError: fewer than two updates.
    """
    tokens = sum(min(len(item), config.length) for item in data)
    steps = whole_updates(config.epochs * tokens // (config.batch_size * config.length), config)
    if steps < 2 * config.accumulate:
        raise DataError(
            f"{len(data)} conversations of {tokens} tokens do not fill two batches of {config.batch_size} x "
            f"{config.length}, {config.accumulate} times, in {config.epochs} epochs; lower batch_size or accumulate."
        )
    return steps


def cut_tokens(data: Sequence[Conversation], length: int) -> int:
    """How many of the assistant's tokens lie beyond `length`, where `packed` cuts conversations."""
    beyond = (slice(max(0, length - len(item.prompt)), None) for item in data)
    return sum(
        len(item.answer[part]) if item.mask is None else int(item.mask[part].sum())
        for item, part in zip(data, beyond, strict=True)
    )


def conversations(
    prompts: Sequence[np.ndarray],
    answers: Int[np.ndarray, "n"],
    lengths: Int[np.ndarray, "c"],
    features: Float[np.ndarray, "n D"] | None = None,
) -> list[Conversation]:
    """Takes answers that lie end to end apart again.

    Raises:
      DataError: another number of prompts than of answers.
    """
    if len(prompts) != len(lengths):
        raise DataError(f"there are {len(prompts)} prompts and {len(lengths)} answers; expected one of each.")
    ends = np.cumsum(lengths)
    parts = np.split(features, ends[:-1]) if features is not None else [None] * len(prompts)
    return [Conversation(p, a, f) for p, a, f in zip(prompts, np.split(answers, ends[:-1]), parts, strict=True)]


def packed(
    data: Sequence[Conversation],
    *,
    length: int,
    batch_size: int,
    seed: int,
    epochs: int | None = None,
    whole: bool = False,
) -> grain.IterDataset:
    """Batches of packed rows, [B length] each: `tokens`, `segments`, `positions` (int32), `answer` (bool).

    `answer` marks the assistant's tokens. With features there are also `features` [B length D]: at an answer's token
    the feature that predicted it, zero elsewhere. Conversations of more than `length` tokens are cut at the end.

    Args:
      epochs: passes over the data, each in another order; None: without end.
      whole: fills the last batch up with empty rows (no segments, no answer), so that no conversation is left out;
        otherwise the rows that do not fill a batch are.

    Raises:
      DataError: no conversations, one that is empty, or, unless `whole`, too few to fill a batch.
      ConfigError: a length or batch size below 1.
    """
    if length < 1 or batch_size < 1:
        raise ConfigError(f"length is {length}, batch_size {batch_size}; expected at least 1.")
    if not data:
        raise DataError("there are no conversations to train on.")
    for i, item in enumerate(data):
        if len(item) == 0:
            raise DataError(f"conversation {i} is empty; remove it.")
    total = sum(min(len(item), length) for item in data)
    if not whole and total * (epochs or 1) < length * batch_size:
        raise DataError(
            f"{len(data)} conversations of {total} tokens do not fill one batch of {batch_size} x {length}; "
            "lower batch_size."
        )
    rows = grain.MapDataset.range(len(data)).seed(seed).shuffle().repeat(epochs).map(lambda i: _row(data[i], length))
    wide = {"tokens": length, "answer": length}
    if data[0].features is not None:
        wide["features"] = length
    filled = FirstFitPackIterDataset(rows.to_iter_dataset(), length_struct=wide, num_packing_bins=_BINS, seed=seed)
    batches = filled.map(_named).batch(batch_size, drop_remainder=not whole)
    return batches.map(functools.partial(_with_empty_rows, count=batch_size)) if whole else batches


def _row(item: Conversation, length: int) -> dict[str, np.ndarray]:
    said = np.ones(len(item.answer), bool) if item.mask is None else item.mask
    row: dict[str, np.ndarray] = {
        "tokens": np.concatenate([item.prompt, item.answer])[:length].astype(np.int32),
        "answer": np.concatenate([np.zeros(len(item.prompt), bool), said])[:length],
    }
    if item.features is not None:
        before = np.zeros((len(item.prompt), item.features.shape[1]), item.features.dtype)
        row["features"] = np.concatenate([before, item.features])[:length]
    return row


def _named(row: dict[str, Any]) -> dict[str, Any]:
    kept = {name: row[name] for name in ("tokens", "answer", "features") if name in row}
    return kept | {"segments": row["tokens_segment_ids"], "positions": row["tokens_positions"]}


def _with_empty_rows(batch: dict[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    return {
        name: np.pad(array, ((0, count - len(array)), *[(0, 0)] * (array.ndim - 1))) for name, array in batch.items()
    }


def attention_mask(segments: _Mask) -> _Mask:
    """mask[i, j], bool [T T]: token i sees token j, earlier or the same, within one conversation of segments [T]."""
    return (segments[:, None] == segments[None, :]) & np.tri(segments.shape[0], dtype=bool)
