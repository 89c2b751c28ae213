"""The target's features for conversations that have none: one teacher-forced pass each."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Float, Int

from specjax.corpus.conversation import Conversation
from specjax.errors import DataError
from specjax.loading.load import Model
from specjax.target import cache as kv
from specjax.target.config import ModelConfig
from specjax.target.model import forward
from specjax.target.params import Params

_CHUNK = 256  # tokens of a sequence in one forward pass


_BATCH = 4096  # tokens in one pass over several sequences


def check_budget(tokens: int, config: ModelConfig, budget_gb: float) -> None:
    """Refuses features that would take more room than they may.

    Raises:
      DataError: `tokens` features of the model's width in bfloat16 exceed the budget.
    """
    needed = tokens * config.hidden_size * 2 / 1e9
    if needed > budget_gb:
        raise DataError(
            f"features for up to {tokens:,} tokens of width {config.hidden_size} take {needed:.2f} GB, the budget is "
            f"{budget_gb:g} GB; use fewer or shorter conversations, raise feature_budget_gb, or fit with "
            "features computed on the fly, as experiments/train_medusa_on_the_fly.py does."
        )


def with_features(model: Model, data: Sequence[Conversation], *, budget_gb: float = 8.0) -> list[Conversation]:
    """The conversations with the features that predicted their answers' tokens, from one teacher-forced pass each.

    Sequences of like length go through the target together, `_CHUNK` tokens at a time. Conversations that have features
    keep them.

    Args:
      budget_gb: of all features together, in GB (1e9 bytes).

    Raises:
      DataError: features beyond the budget, an empty prompt or answer, or token ids outside the vocabulary.
    """
    check_budget(sum(len(item.answer) for item in data), model.config, budget_gb)
    missing = [i for i, item in enumerate(data) if item.features is None]
    classes: dict[int, list[int]] = {}
    for i in missing:
        item, vocab = data[i], model.config.vocab_size
        if not len(item.prompt) or not len(item.answer):
            raise DataError(
                f"conversation {i} has a prompt of {len(item.prompt)} and an answer of {len(item.answer)} tokens."
            )
        top = max(item.prompt.max(), item.answer.max())
        if top >= vocab or min(item.prompt.min(), item.answer.min()) < 0:
            raise DataError(
                f"conversation {i} has token id {top}, the model's vocabulary is {vocab}; it was made for another one."
            )
        classes.setdefault(max(64, 1 << (len(item) - 1).bit_length()), []).append(i)
    found = list(data)
    for width, members in sorted(classes.items()):
        size = max(1, _BATCH // width)
        for at in range(0, len(members), size):
            chosen = members[at : at + size]
            tokens = np.zeros((size, width), np.int32)
            for row, i in zip(tokens, chosen, strict=False):
                row[: len(data[i])] = np.concatenate([data[i].prompt, data[i].answer])
            features = np.asarray(_features(model.params, model.config, jnp.asarray(tokens)))
            for row, i in zip(features, chosen, strict=False):
                begin = len(data[i].prompt) - 1
                found[i] = dataclasses.replace(data[i], features=row[begin : begin + len(data[i].answer)].copy())
    return found


@functools.partial(jax.jit, static_argnames="config")
def _features(params: Params, config: ModelConfig, tokens: Int[Array, "B S"]) -> Float[Array, "B S D"]:
    def one(tokens: Int[Array, "S"]) -> Float[Array, "S D"]:
        if len(tokens) <= _CHUNK:
            return forward(params, config, tokens).features.astype(ml_dtypes.bfloat16)

        def step(cache: kv.KVCache, tokens: Int[Array, "T"]) -> tuple[kv.KVCache, Float[Array, "T D"]]:
            out = forward(params, config, tokens, cache=cache)
            return kv.write(cache, out.rows, _CHUNK), out.features.astype(ml_dtypes.bfloat16)

        _, features = jax.lax.scan(step, kv.zeros(config, len(tokens)), tokens.reshape(-1, _CHUNK))
        return features.reshape(len(tokens), -1)

    return jax.vmap(one)(tokens)
