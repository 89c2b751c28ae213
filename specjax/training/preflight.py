"""What a training run checks before it starts: each refusal worded once, for every objective."""

import warnings
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from specjax.corpus.conversation import Conversation, answer_tokens, cut_tokens
from specjax.errors import ConfigError, DataError
from specjax.heads import Heads, MedusaConfig
from specjax.target import params as parameters
from specjax.target.config import ModelConfig
from specjax.training import mesh
from specjax.training.packing import labels


def check_vocabulary(what: str, tokens: Int[np.ndarray, "n"], size: int) -> None:
    """Raises DataError for token ids that the target does not have."""
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < size:
        raise DataError(
            f"{what} has token ids from {tokens.min()} to {tokens.max()}, the target's vocabulary is {size}; the data "
            "was made by another model."
        )


def check_conversations(size: int, *texts: Sequence[Conversation]) -> None:
    """`check_vocabulary` of every conversation."""
    for i, item in enumerate(item for text in texts for item in text):
        check_vocabulary(f"conversation {i}", np.concatenate([item.prompt, item.answer]), size)


def check_width(what: str, width: int, expected: int) -> None:
    """Raises DataError for features of another width than the target's."""
    if width != expected:
        raise DataError(
            f"{what} has features of width {width}, the target's are {expected} wide; the data was made by another "
            "model."
        )


def check_features(width: int, *texts: Sequence[Conversation]) -> None:
    """Raises DataError for a conversation whose features were not kept, or are of another width than the target's."""
    for i, item in enumerate(item for text in texts for item in text):
        if item.features is None:
            raise DataError(f"conversation {i} has no features, which a draft learns from; make the text with them.")
        check_width(f"conversation {i}", item.features.shape[1], width)


def check_sayable(sayable: bool) -> None:
    """Raises DataError where heads of a reduced vocabulary can say no token that they are to learn."""
    if not sayable:
        raise DataError("no token of the text is in the heads' reduced vocabulary; choose it from this text.")


def check_some_sayable(heads: Heads, data: Sequence[Conversation], length: int) -> None:
    """`check_sayable` for conversations that are cut at `length`."""
    if heads.token_map is not None:
        tokens = np.asarray(heads.token_map)
        check_sayable(any(np.isin(labels(item, length, 2), tokens).any() for item in data))


def check_cut(data: Sequence[Conversation], length: int, what: str, *, ahead: int) -> None:
    """Warns before a run of the assistant's tokens beyond `length`, where rows end.

    Args:
      what: the text is for, as messages name it.
      ahead: of `packing.labels`: 1 for a draft model, 2 for the first head.

    Raises:
      DataError: the text has no label, or none is left of it.
    """
    cut, total, longest = cut_tokens(data, length), answer_tokens(data), max(map(len, data), default=0)
    remedy = f"set its length to more ({longest} holds all of it), or shorten the chats"
    if not any(len(labels(item, length, ahead)) for item in data):
        if not any(len(labels(item, len(item), ahead)) for item in data):
            raise DataError(
                f"none of the {len(data)} conversations in the {what} text has {ahead} of the assistant's tokens in a "
                "row after its first token; add longer ones."
            )
        raise DataError(
            f"the {what} text is cut at length {length}, which takes {cut} of its {total} answer tokens and leaves no "
            f"label; {remedy}."
        )
    if cut and jax.process_index() == 0:
        warnings.warn(
            f"the {what} text is cut at length {length}, which takes {cut} of its {total} answer tokens "
            f"({cut / total:.1%}); {remedy}.",
            stacklevel=3,
        )


def check_heads_on_mesh(
    target: ModelConfig, heads: MedusaConfig, rows: int, on: Mesh, *, fixed_vocabulary: bool = False
) -> None:
    """All that a run with heads places on the mesh, by shapes alone: told before the text is made.

    Args:
      rows: of a batch.
      fixed_vocabulary: the heads go on from others, whose vocabulary holds.

    Raises:
      ConfigError: rows or a dimension that the mesh does not divide.
    """
    mesh.check_rows(rows, on)
    parameters.shardings(target, on)
    if heads.output_size % on.shape[mesh.MODEL]:
        remedy = "another mesh" if fixed_vocabulary else "a multiple of it as reduced_vocab_size, or another mesh"
        raise ConfigError(
            f"the heads' vocabulary of {heads.output_size} tokens does not divide over mesh axis {mesh.MODEL!r} of "
            f"size {on.shape[mesh.MODEL]}; choose {remedy}."
        )
