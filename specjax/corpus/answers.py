"""Self-distillation: the target answers prompts in batches, and its features are kept as it goes.

A batch is one `vmap` of the decoding round. The features that the heads will read are those the decoding computes
anyway, so that no second pass over the text is needed.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from specjax.acceptance import Acceptance, Sample
from specjax.decode import capacity_for
from specjax.drafters.base import NoDrafter
from specjax.errors import DataError, PromptError
from specjax.loading.load import Model
from specjax.loading.tokenizer import Tokenizer
from specjax.loop import Plan, State, decode_round, start
from specjax.target.config import ModelConfig
from specjax.target.model import PREFILL_CHUNK
from specjax.target.params import Params

TODAY = date(2026, 1, 1)  # to chat templates that write it, so that training text is the same whenever it is made


@dataclass(frozen=True)
class Answers:
    """Assistant text with the features that predicted it, conversations end to end.

    Attributes:
      tokens: token ids [n].
      features: features[j] is the target's final-norm hidden state that predicted tokens[j], bfloat16 [n D].
      lengths: tokens per conversation; they sum to n.
      source: a fingerprint of the text that they are of, its prompts included; a run is resumed with the same alone.
    """

    tokens: Int[np.ndarray, "n"]
    features: Float[np.ndarray, "n D"]
    lengths: Int[np.ndarray, "c"]
    source: str = ""


class _Carry(NamedTuple):
    state: State  # of B members
    begin: Int[Array, "B"]  # prompt lengths
    features: Float[Array, "n B D"]  # features[j] predicted the answers' token j
    step: Int[Array, ""]  # features kept so far, the same for all members

    @property
    def alive(self) -> Bool[Array, "B"]:
        """Members with tokens whose features are still to be kept: one round longer than they are decoded."""
        return self.state.length - self.begin > self.step


@functools.partial(jax.jit, static_argnames=("config", "acceptance", "max_new"))
def _begin(
    params: Params,
    config: ModelConfig,
    acceptance: Acceptance,
    max_new: int,
    tokens: Int[Array, "B S"],
    begin: Int[Array, "B"],
    limits: Int[Array, "B"],
    keys: jax.Array,
) -> _Carry:
    plan = Plan(params, NoDrafter(), config.eos_token_ids, config, acceptance)
    state = jax.vmap(functools.partial(start, plan))(tokens, begin, limits, keys)
    return _Carry(state, begin, jnp.zeros((max_new, *state.features.shape), jnp.bfloat16), jnp.int32(0))


@functools.partial(jax.jit, static_argnames=("config", "acceptance", "enough"), donate_argnames="carry")
def _segment(params: Params, config: ModelConfig, acceptance: Acceptance, enough: int, carry: _Carry) -> _Carry:
    """Decodes until at most `enough` members are alive."""
    plan = Plan(params, NoDrafter(), config.eos_token_ids, config, acceptance)
    step = jax.vmap(functools.partial(decode_round, plan))

    def body(carry: _Carry) -> _Carry:
        newest = carry.state.features.astype(jnp.bfloat16)
        features = jax.lax.dynamic_update_index_in_dim(carry.features, newest, carry.step, 0)
        return _Carry(step(carry.state), carry.begin, features, carry.step + 1)

    # One condition for the whole batch: with one per member, vmap would copy every cache at every step.
    return jax.lax.while_loop(lambda carry: jnp.sum(carry.alive) > enough, body, carry)


@jax.jit
def _pick(carry: _Carry, members: Int[Array, "b"]) -> _Carry:
    state, begin = jax.tree.map(lambda leaf: leaf[members], (carry.state, carry.begin))
    return _Carry(state, begin, carry.features[:, members], carry.step)


def answer(
    model: Model,
    prompts: Sequence[Sequence[int] | np.ndarray],
    *,
    acceptance: Acceptance,
    max_new_tokens: int,
    key: jax.Array,
    batch_size: int | None = None,
    smallest: int = 32,
) -> Answers:
    """Answers prompts, each exactly as `generate` would with its own of `split(key, len(prompts))`; keeps the features.

    Whenever half of a batch has ended, the others go on in a batch of half the size, so that one long answer does not
    keep many finished ones waiting.

    Args:
      prompts: token ids.
      batch_size: how many are decoded together, prompts of like length side by side; None: all, padded to the longest.
      smallest: batches are not halved below this; every size compiles once.

    Raises:
      DataError: no prompts, an empty one, or one that leaves no room in the model's context.
    """
    if len(prompts) == 0:
        raise DataError("there are no prompts to answer; pass at least one.")
    for i, prompt in enumerate(prompts):
        check_prompt(f"prompt {i}", len(prompt), model.config, max_new_tokens)
    keys = jax.random.split(key, len(prompts))
    parts: list[tuple[np.ndarray, np.ndarray] | None] = [None] * len(prompts)
    for members, size, width in _grouped(list(map(len, prompts)), batch_size, smallest):
        tokens = np.zeros((size, capacity_for(width, max_new_tokens, 0)), np.int32)
        begin = np.ones(size, np.int32)
        limits = np.full(size, 2, np.int32)  # of rows that fill up the batch: a prompt and an answer of one token
        for row, member in enumerate(members):
            begin[row] = len(prompts[member])
            tokens[row, : begin[row]] = prompts[member]
            limits[row] = begin[row] + max_new_tokens
        fill = np.resize(members, size)
        arrays = (jnp.asarray(tokens), jnp.asarray(begin), jnp.asarray(limits), keys[fill])
        carry = _begin(model.params, model.config, acceptance, max_new_tokens, *arrays)
        for row, part in _decoded(model, acceptance, carry, smallest):
            if row < len(members):
                parts[members[row]] = part
    done = [part for part in parts if part is not None]
    return Answers(
        np.concatenate([tokens for tokens, _ in done]),
        np.concatenate([features for _, features in done]),
        np.array([len(tokens) for tokens, _ in done], np.int32),
    )


def check_prompt(name: str, length: int, config: ModelConfig, max_new_tokens: int) -> None:
    """Raises DataError for an empty prompt, or one that leaves no room in the model's context."""
    room = config.max_positions - max_new_tokens
    if not 0 < length <= room:
        raise DataError(
            f"{name} has {length} tokens; with answers of up to {max_new_tokens} the model's context of "
            f"{config.max_positions} takes 1 to {room}. Shorten it or allow shorter answers."
        )


def _grouped(lengths: list[int], batch_size: int | None, smallest: int) -> Iterator[tuple[list[int], int, int]]:
    """Batches: (which prompts, rows, prompt width). Widths and rows are of few kinds, so that few shapes compile."""
    if batch_size is None:
        yield list(range(len(lengths))), len(lengths), max(lengths)
        return
    classes: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        width = 2 * PREFILL_CHUNK
        while width < length:
            width *= 3
        classes.setdefault(width, []).append(i)
    for width, members in sorted(classes.items()):
        members.sort(key=lambda i: lengths[i])  # a batch is read up to its longest prompt
        for at in range(0, len(members), batch_size):
            chosen, size = members[at : at + batch_size], batch_size
            while size // 2 >= max(len(chosen), min(smallest, batch_size)):
                size //= 2
            yield chosen, size, width


def _decoded(
    model: Model, acceptance: Acceptance, carry: _Carry, smallest: int
) -> Iterator[tuple[int, tuple[np.ndarray, np.ndarray]]]:
    """(row, its tokens and features) as the rows of the batch end."""
    rows = np.arange(len(carry.begin))
    while len(rows):
        size = len(rows)
        half = size // 2 if size // 2 >= smallest else 0
        carry = _segment(model.params, model.config, acceptance, half, carry)
        alive = np.asarray(carry.alive)
        tokens, begin, end = jax.device_get((carry.state.tokens, carry.begin, carry.state.length))
        ended = np.flatnonzero(~alive & (rows >= 0))
        features = np.asarray(carry.features) if len(ended) else np.zeros(0)
        for i in ended:
            count = int(end[i] - begin[i])
            yield int(rows[i]), (tokens[i, begin[i] : end[i]], features[:count, i].copy())
        if not alive.any():
            return
        while half // 2 >= max(smallest, alive.sum()):
            half //= 2
        members = np.concatenate([np.flatnonzero(alive), np.flatnonzero(~alive)])[:half]  # ended ones fill it up
        rows = np.where(alive[members], rows[members], -1)
        carry = _pick(carry, jnp.asarray(members))


def user_turns(
    model: Model, count: int, *, key: jax.Array, max_tokens: int = 48, batch_size: int | None = None
) -> list[str]:
    """User messages that the model writes itself: its template's user turn, left open and sampled (T 1, top-k 50).

    `count` are begun; those that it does not end within `max_tokens` tokens are left out.

    Raises:
      DataError: a model without a tokenizer.
      PromptError: a tokenizer without a chat template, or one that does not write what the user says.
    """
    tokenizer, marker = chat_tokenizer(model), "\x00"
    text = tokenizer.render_chat([{"role": "user", "content": marker}], add_generation_prompt=False)
    if marker not in text:
        raise PromptError(
            "the chat template does not write the user's message, so that no turn can be left open for it."
        )
    prefix = tokenizer.backend.encode(text[: text.index(marker)], add_special_tokens=False).ids
    sampled = answer(
        model,
        [prefix] * count,
        acceptance=Sample(1.0, top_k=50),
        max_new_tokens=max_tokens,
        key=key,
        batch_size=batch_size,
    )
    ends = np.cumsum(sampled.lengths)
    pieces = np.split(sampled.tokens, ends[:-1])
    stops = set(model.config.eos_token_ids)
    # A turn cut off by the budget is no message: only finished ones are kept.
    return [tokenizer.decode(p[:-1].tolist()).strip() for p in pieces if len(p) > 3 and int(p[-1]) in stops]


def distinct(answers: Answers, *, without: Answers | None = None) -> Answers:
    """Each conversation's first occurrence, leaving out those that stand in `without`: no repeats, no leaks."""
    seen = set() if without is None else {tokens.tobytes() for tokens in _conversations(without)}
    keep = np.zeros(len(answers.lengths), bool)
    for i, tokens in enumerate(_conversations(answers)):
        keep[i] = tokens.tobytes() not in seen
        seen.add(tokens.tobytes())
    inside = np.repeat(keep, answers.lengths)
    return Answers(answers.tokens[inside], answers.features[inside], answers.lengths[keep])


def _conversations(answers: Answers) -> list[np.ndarray]:
    return np.split(answers.tokens, np.cumsum(answers.lengths)[:-1])


def chat_tokenizer(model: Model) -> Tokenizer:
    """The model's tokenizer.

    Raises:
      DataError: there is none.
    """
    if model.tokenizer is None:
        raise DataError(f"{model.config.name or 'the model'} has no tokenizer; its chat template is needed.")
    return model.tokenizer
