"""Text to measure on: the target's own greedy answers to prompts, or conversations to train on."""

from collections.abc import Callable, Sequence

import numpy as np

from specjax.batch import generate_batch
from specjax.corpus.conversation import Conversation
from specjax.corpus.prompts import Prompt
from specjax.corpus.split import turns
from specjax.errors import DataError
from specjax.journal import NOWHERE, Journal, whole
from specjax.loading.load import Model
from specjax.ranks.measuring import Text


def greedy_answers(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 16,
    progress: Callable[[int], None] = lambda prompts: None,
    journal: Journal = NOWHERE,
) -> list[Text]:
    """Answers the first turn of every prompt, in batches of prompts of like length; the order is kept.

    Args:
      journal: keeps the batches that are done.

    Raises:
      DataError: no prompts, a batch size below 1, or a model without a tokenizer.
      Stopped: that was asked for; what is done is in the journal.
    """
    if batch_size < 1:
        raise DataError(f"batch_size is {batch_size}; expected at least 1.")
    if not prompts or model.tokenizer is None:
        raise DataError(f"{len(prompts)} prompts, tokenizer {model.tokenizer}; answering needs both.")
    ids = [model.tokenizer.apply_chat_template([{"role": "user", "content": p.turns[0]}]) for p in prompts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    batches = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]

    def answered(number: int) -> dict[str, np.ndarray]:
        made = generate_batch(model, [ids[i] for i in batches[number]], max_new_tokens=max_new_tokens)
        return {
            "tokens": np.concatenate([out.tokens for out in made]),
            "lengths": np.array([len(o.tokens) for o in made]),
        }

    done = journal.pieces("answers", len(batches), answered, progress=lambda number: progress(len(batches[number])))
    texts: dict[int, Text] = {}
    for batch, piece in zip(batches, whole(done), strict=True):
        answers = np.split(piece["tokens"], np.cumsum(piece["lengths"])[:-1])
        texts |= {i: Text(ids[i], answer, prompts[i].category) for i, answer in zip(batch, answers, strict=True)}
    return [texts[i] for i in range(len(ids))]


def per_category(categories: Sequence[str], count: int) -> list[int]:
    """The numbers of the first `count` items of each category, in order: a sample of all kinds.

    Raises:
      DataError: a count below 1.
    """
    if count < 1:
        raise DataError(f"the count per category is {count}; expected at least 1.")
    taken: dict[str, int] = {}
    kept = []
    for i, category in enumerate(categories):
        taken[category] = taken.get(category, 0) + 1
        if taken[category] <= count:
            kept.append(i)
    return kept


def conversation_texts(conversations: Sequence[Conversation], category: str = "distilled") -> list[Text]:
    """Every assistant turn of at least two tokens, after all that stands before it."""
    parts = [(before, tokens) for item in conversations for before, tokens, _ in turns(item)]
    return [Text(before, tokens, category) for before, tokens in parts if len(tokens) > 1]
