"""Conversations as training text: split without leaks, joined end to end, given features by one pass of the target."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from specjax.corpus.answers import Answers
from specjax.corpus.conversation import Conversation, text_identity
from specjax.errors import ConfigError, DataError


class Split(NamedTuple):
    """Conversations to train on and to evaluate with; no prompt and no answer is in both.

    An answer that a limit of tokens cut in one conversation alone counts as another one.
    """

    training: list[Conversation]
    evaluation: list[Conversation]


def split(data: Sequence[Conversation], share: float, report: Callable[[str], None] = lambda message: None) -> Split:
    """Splits by a hash of the prompt (all before the first answer), which neither order nor company changes.

    Conversations with the same answer are kept once. An assistant turn that is trained on anywhere, such as "You're
    welcome!", is not evaluated on: it stands as context to the turns after it, and a conversation of such turns alone
    is left out.

    Args:
      share: about this part of the prompts goes to the evaluation.
      report: told of conversations that are left out and of turns that are not evaluated on, where there are any.

    Raises:
      ConfigError: a share outside (0, 1).
      DataError: too few conversations for both sides; the message says how many were left out as leaks.
    """
    if not 0 < share < 1:
        raise ConfigError(f"the evaluation share is {share}; expected more than 0 and less than 1.")
    held = [int.from_bytes(_digest(item.prompt)[:8], "big") < share * 2**64 for item in data]
    training = _distinct([item for item, out in zip(data, held, strict=True) if not out])
    seen = set().union(*map(_turn_digests, training))
    candidates = [item for item, out in zip(data, held, strict=True) if out]
    apart = [(item, kept) for item in candidates if (kept := _without(item, seen)) is not None]
    evaluation = _distinct([kept for _, kept in apart])
    if not training or not evaluation:
        remedy = "Make more, or change the share."
        if leaks := len(candidates) - len(apart):
            remedy = (
                f"{leaks} that were held out are left out, because all that the assistant says in them recurs in those "
                "to train on: take recurring turns out of the text, or add other conversations."
            )
        raise DataError(
            f"of {len(data)} conversations {len(training)} are left to train on and {len(evaluation)} to evaluate "
            f"with, at an evaluation share of {share}; both sides need some. {remedy}"
        )
    if left := len(data) - len(training) - len(evaluation):
        report(f"{left} of {len(data)} conversations are left out: their answers stand in others, too")
    counts = {id(kept): len(_spans(item)) - len(_spans(kept)) for item, kept in apart}
    if lost := sum(counts[id(kept)] for kept in evaluation):
        report(f"{lost} assistant turns of held-out conversations are not evaluated on: they are trained on elsewhere")
    return Split(training, evaluation)


def _distinct(data: list[Conversation]) -> list[Conversation]:
    # Of several with one answer the one with the smallest hash is kept, so that the order does not decide.
    best: dict[bytes, bytes] = {}
    keys = [(_digest(item.answer), _digest(item.prompt)) for item in data]
    for answer, prompt in keys:
        best[answer] = min(prompt, best.get(answer, prompt))
    kept = []
    for item, (answer, prompt) in zip(data, keys, strict=True):
        if best.get(answer) == prompt:
            del best[answer]
            kept.append(item)
    return kept


def _turn_digests(item: Conversation) -> set[bytes]:
    return {_digest(tokens) for _, tokens, _ in turns(item)}


def _without(item: Conversation, seen: set[bytes]) -> Conversation | None:
    """The conversation with those assistant turns as mere context; None where no other is left."""
    spans = _spans(item)
    kept = [span for span in spans if _digest(item.answer[slice(*span)]) not in seen]
    if len(kept) == len(spans):
        return item
    if not kept:
        return None
    said = np.zeros(len(item.answer), bool)
    for span in kept:
        said[slice(*span)] = True
    rest = slice(kept[0][0], kept[-1][1])
    features = None if item.features is None else item.features[rest]
    prompt = np.concatenate([item.prompt, item.answer[: rest.start]])
    return Conversation(prompt, item.answer[rest], features, said[rest])


def _spans(item: Conversation) -> list[tuple[int, int]]:
    """Where in the answer the assistant's turns begin and end."""
    said = np.ones(len(item.answer), bool) if item.mask is None else item.mask
    edges = np.flatnonzero(np.diff(np.concatenate([[False], said, [False]])))
    return [(int(begin), int(end)) for begin, end in edges.reshape(-1, 2)]


def _digest(tokens: Int[np.ndarray, "n"]) -> bytes:
    return hashlib.sha256(np.asarray(tokens, "<i4").tobytes()).digest()


def turns(conversation: Conversation) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
    """(all before it, its tokens, their features) of every assistant turn."""
    for begin, end in _spans(conversation):
        before = np.concatenate([conversation.prompt, conversation.answer[:begin]])
        features = conversation.features
        yield before, conversation.answer[begin:end], None if features is None else features[begin:end]


def joined(data: Sequence[Conversation]) -> Answers:
    """The assistant turns end to end, each for itself, so that no label crosses from one to the next.

    Raises:
      DataError: no conversations, or one without features.
    """
    parts = [(tokens, features) for item in data for _, tokens, features in turns(item)]
    if not parts:
        raise DataError("there are no conversations to train on.")
    if any(features is None for _, features in parts):
        raise DataError("a conversation has no features; let `with_features` compute them.")
    return Answers(
        np.concatenate([tokens for tokens, _ in parts]),
        np.concatenate([features for _, features in parts if features is not None]),
        np.array([len(tokens) for tokens, _ in parts], np.int32),
        text_identity(data)["fingerprint"],
    )
