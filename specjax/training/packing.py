"""The input pipeline, on Grain: conversations packed into rows of one length, in an order that a seed fixes.

A row holds whole conversations end to end. `segments` numbers them from 1 (0 is padding) and `positions` begin anew in
each, so that neither attention nor labels cross from one to the next. The iterator's position is a small dict
(`get_state`, `set_state`) that goes into the checkpoint with the training state.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import grain
import jax
import numpy as np
from grain.experimental import FirstFitPackIterDataset
from jaxtyping import Int

from specjax.corpus.conversation import Conversation
from specjax.errors import ConfigError, DataError
from specjax.training.objective import Objective, RunConfig
from specjax.training.optimiser import whole_updates

_Mask = TypeVar("_Mask", np.ndarray, jax.Array)
_BINS = 32  # rows that are filled side by side: more waste less, and hold back more conversations


@dataclass(frozen=True)
class PackedConfig(RunConfig):
    """Training on packed text: a step is `batch_size` rows of `length` tokens."""

    length: int = 512
    checkpoint_every: int | None = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length < 1:
            raise ConfigError(f"length is {self.length}; expected at least 1 token in a row.")


@dataclass(frozen=True, kw_only=True)
class PackedObjective(Objective):
    """What objectives on packed conversations share."""

    data: Sequence[Conversation]
    held_out: Sequence[Conversation]
    settings: PackedConfig

    @functools.cached_property
    def steps(self) -> int:
        """As `packed_steps`."""
        return packed_steps(self.data, self.settings)

    @property
    def amounts(self) -> dict[str, float]:
        """Slots, padding included."""
        return {"tokens": self.settings.batch_size * self.settings.length}

    def batches(self) -> grain.IterDataset:
        """Of every epoch."""
        return self._packed(self.data, epochs=self.settings.epochs)

    def held_out_batches(self, shards: int = 1) -> grain.IterDataset:
        """Of one epoch; no row is left out."""
        return self._packed(self.held_out, epochs=1, whole=True)

    def _packed(self, data: Sequence[Conversation], *, epochs: int, whole: bool = False) -> grain.IterDataset:
        shape = {"length": self.settings.length, "batch_size": self.settings.batch_size, "seed": self.settings.seed}
        return packed(data, **shape, epochs=epochs, whole=whole)


def packed_steps(data: Sequence[Conversation], config: PackedConfig) -> int:
    """Batches in a whole run: those that `packed` makes of the epochs, down to a whole number of updates.

    Raises:
      DataError: fewer than two updates.
    """
    rows = packed_rows(data, length=config.length, seed=config.seed, epochs=config.epochs)
    steps = whole_updates(rows // config.batch_size, config)
    if steps < 2 * config.accumulate:
        tokens = sum(min(len(item), config.length) for item in data)
        raise DataError(
            f"{len(data)} conversations of {tokens} tokens, {rows} rows in {config.epochs} epochs, do not fill two "
            f"batches of {config.batch_size} x {config.length}, {config.accumulate} times; lower batch_size or "
            "accumulate."
        )
    return steps


def packed_rows(data: Sequence[Conversation], *, length: int, seed: int, epochs: int) -> int:
    """How many rows `packed` makes in `epochs`: Grain's first-fit packing, of lengths alone."""
    if not data:
        return 0
    full, free = 0, list[int]()  # rows of the sets that are complete; what is free in those that are being filled
    order = _order(len(data), seed, epochs)
    for at in range(len(order)):  # Grain's own iterator takes twenty times as long
        size = min(len(data[order[at]]), length)
        fits = next((row for row, room in enumerate(free) if size <= room), None)
        if fits is not None:
            free[fits] -= size
            continue
        if len(free) == _BINS:  # it fits nowhere: the set is given out as it is, and this one begins the next
            full, free = full + _BINS, []
        free.append(length - size)
    return full + len(free)


def _order(count: int, seed: int, epochs: int | None) -> grain.MapDataset:
    return grain.MapDataset.range(count).seed(seed).shuffle().repeat(epochs)


def labels(item: Conversation, length: int, ahead: int) -> Int[np.ndarray, "n"]:
    """The tokens of a conversation cut at `length` that some slot is to give `ahead` slots on: those where all that
    comes after that slot, up to the token itself, is the assistant's."""
    row = _row(replace(item, features=None), length)
    live, count = row["answer"], max(0, len(row["tokens"]) - ahead)
    wanted = np.all([live[1 + i : 1 + i + count] for i in range(ahead)], axis=0)
    return row["tokens"][len(row["tokens"]) - count :][wanted]


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
    # Rows are never more than full, so that they need not be counted where there are tokens enough.
    if not whole and epochs is not None and total * epochs < length * batch_size:
        count = packed_rows(data, length=length, seed=seed, epochs=epochs)
        if count < batch_size:
            raise DataError(
                f"{len(data)} conversations of {total} tokens, {count} rows in {epochs} epochs, do not fill one batch "
                f"of {batch_size} x {length}; lower batch_size."
            )
    rows = _order(len(data), seed, epochs).map(lambda i: _row(data[i], length))
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
