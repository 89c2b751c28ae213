"""A conversation: a prompt with its answer, as token ids."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from specjax.errors import DataError
from specjax.fingerprint import arrays_fingerprint


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


def answer_tokens(data: Sequence[Conversation]) -> int:
    """How many tokens the assistant says."""
    return cut_tokens(data, 0)


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


def text_identity(data: Sequence[Conversation]) -> dict[str, Any]:
    """How many conversations and tokens, their features' width and dtype, and a fingerprint of prompts, answers, masks.

    Features' bits have no part in it: the text and the target give them, but differently on another kind of CPU.
    """
    empty = np.zeros(0, np.int32)

    def end_to_end(parts: Iterator[np.ndarray]) -> np.ndarray:
        return np.concatenate([empty, *(np.asarray(part, np.int32) for part in parts)])

    parts = [
        end_to_end(np.array([len(item.prompt), len(item.answer)]) for item in data),
        end_to_end(item.prompt for item in data),
        end_to_end(item.answer for item in data),
        end_to_end(np.ones(len(item.answer)) if item.mask is None else item.mask for item in data),
    ]
    kinds = {(item.features.shape[1], item.features.dtype.name) for item in data if item.features is not None}
    return {
        "conversations": len(data),
        "tokens": sum(map(len, data)),
        "features": [list(kind) for kind in sorted(kinds)],
        "fingerprint": arrays_fingerprint(*parts),
    }
