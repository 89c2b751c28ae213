"""Self-distillation data: the target answers prompts in batches, and its features are kept as it goes.

A batch is one `vmap` of the decoding round. The features that the heads will read are those the decoding computes
anyway, so that no second pass over the text is needed. Shards are written atomically and depend on their number alone:
a killed run goes on where it stopped.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from specjax import decode
from specjax.acceptance import Acceptance, Greedy, Sample
from specjax.config import ModelConfig
from specjax.drafters.base import NoDrafter
from specjax.errors import DataError
from specjax.loading.load import Model
from specjax.loading.tokenizer import Tokenizer
from specjax.model import PREFILL_CHUNK
from specjax.params import Params


@dataclass(frozen=True)
class Answers:
    """Assistant text with the features that predicted it, conversations end to end.

    Attributes:
      tokens: token ids [n].
      features: features[j] is the target's final-norm hidden state that predicted tokens[j], bfloat16 [n D].
      lengths: tokens per conversation; they sum to n.
    """

    tokens: Int[np.ndarray, "n"]
    features: Float[np.ndarray, "n D"]
    lengths: Int[np.ndarray, "c"]


_Carry = tuple[decode.State, Float[Array, "n B D"], Int[Array, ""]]


@functools.partial(jax.jit, static_argnames=("config", "acceptance", "max_new"))
def _answer(
    params: Params,
    config: ModelConfig,
    acceptance: Acceptance,
    max_new: int,
    tokens: Int[Array, "B S"],
    lengths: Int[Array, "B"],
    keys: jax.Array,
) -> tuple[Int[Array, "B S"], Int[Array, "B"], Float[Array, "n B D"]]:
    plan = (params, config, NoDrafter(), acceptance, config.eos_token_ids)
    state = jax.vmap(functools.partial(decode.start, *plan))(tokens, lengths, lengths + max_new, keys)
    step = jax.vmap(functools.partial(decode.round_, *plan))
    features = jnp.zeros((max_new, *state.features.shape), jnp.bfloat16)

    def body(carry: _Carry) -> _Carry:
        state, features, i = carry
        newest = state.features.astype(jnp.bfloat16)
        return step(state), jax.lax.dynamic_update_index_in_dim(features, newest, i, 0), i + 1

    # One condition for the whole batch: with one per member, vmap would copy every cache at every step. The loop goes
    # one round past the last member's end, so that the feature of its last token is kept too.
    def running(carry: _Carry) -> Bool[Array, ""]:
        state, _, i = carry
        return (i < max_new) & jnp.any(state.length - lengths > i)

    state, features, _ = jax.lax.while_loop(running, body, (state, features, jnp.int32(0)))
    return state.tokens, state.length - lengths, features


def answer(
    model: Model, prompts: Sequence[Sequence[int]], *, acceptance: Acceptance, max_new_tokens: int, key: jax.Array
) -> Answers:
    """Answers a batch of prompts, each exactly as `generate` would, and keeps the features.

    Args:
      prompts: token ids; all are padded to the longest, so batch prompts of like length together.

    Raises:
      DataError: no prompts.
    """
    if len(prompts) == 0:
        raise DataError("there are no prompts to answer; pass at least one.")
    longest = max(map(len, prompts))
    chunk = PREFILL_CHUNK
    tokens = np.zeros((len(prompts), -(-(longest + max_new_tokens) // chunk) * chunk), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    begin = np.array([len(p) for p in prompts], np.int32)
    out, counts, features = _answer(
        model.params,
        model.config,
        acceptance,
        max_new_tokens,
        jnp.asarray(tokens),
        jnp.asarray(begin),
        jax.random.split(key, len(prompts)),
    )
    out, counts, features = np.asarray(out), np.asarray(counts), np.asarray(features)
    return Answers(
        np.concatenate([row[b : b + n] for row, b, n in zip(out, begin, counts, strict=True)]),
        np.concatenate([features[:n, i] for i, n in enumerate(counts)]),
        counts,
    )


def user_turns(model: Model, count: int, *, key: jax.Array, max_tokens: int = 48) -> list[str]:
    """User messages that the model writes itself: its template's user turn, left open and sampled (T 1, top-k 50)."""
    tokenizer, marker = _tokenizer(model), "\x00"
    text = tokenizer.render_chat([{"role": "user", "content": marker}], add_generation_prompt=False)
    prefix = tokenizer.backend.encode(text[: text.index(marker)], add_special_tokens=False).ids
    sampled = answer(model, [prefix] * count, acceptance=Sample(1.0, top_k=50), max_new_tokens=max_tokens, key=key)
    ends = np.cumsum(sampled.lengths)
    pieces = np.split(sampled.tokens, ends[:-1])
    stops = set(model.config.eos_token_ids)
    # A turn cut off by the budget is no message: only finished ones are kept.
    return [tokenizer.decode(p[:-1].tolist()).strip() for p in pieces if len(p) > 3 and int(p[-1]) in stops]


def write_shards(
    model: Model,
    directory: Path,
    shards: int,
    prompts_for: Callable[[int], list[str]],
    *,
    max_new_tokens: int,
    progress: Callable[[int, int], None] = lambda shard, tokens: None,
) -> None:
    """Writes `shard_NNNNN.npz` files of greedy answers; existing shards are kept, so that a killed run resumes.

    Args:
      prompts_for: shard number -> user messages; must depend on nothing else.
      progress: called with (shard, its tokens) after each one.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        path = directory / f"shard_{shard:05d}.npz"
        if path.exists():
            continue
        chats = [_tokenizer(model).apply_chat_template([{"role": "user", "content": m}]) for m in prompts_for(shard)]
        made = answer(model, chats, acceptance=Greedy(), max_new_tokens=max_new_tokens, key=jax.random.key(0))
        partial = path.with_suffix(".tmp.npz")
        np.savez(
            partial,
            tokens=made.tokens,
            features=made.features.view(np.uint16),
            lengths=made.lengths,
            prompts=np.concatenate([np.asarray(chat, np.int32) for chat in chats]),
            prompt_lengths=np.array([len(chat) for chat in chats], np.int32),
        )
        partial.replace(path)
        progress(shard, len(made.tokens))


def read_shards(paths: Sequence[Path]) -> Answers:
    """Reads shards back, end to end.

    Raises:
      DataError: no shards.
    """
    if not paths:
        raise DataError("there are no data shards; run the distillation first.")
    loaded = []
    for path in paths:
        with np.load(path) as file:
            loaded.append(Answers(file["tokens"], file["features"].view(ml_dtypes.bfloat16), file["lengths"]))
    fields = [field.name for field in dataclasses.fields(Answers)]
    return Answers(**{name: np.concatenate([getattr(part, name) for part in loaded]) for name in fields})


def read_prompts(paths: Sequence[Path]) -> list[Int[np.ndarray, "p"]]:
    """The prompt of every conversation of `read_shards`, chat template included.

    Raises:
      DataError: a shard without prompts (written by an early version).
    """
    prompts: list[np.ndarray] = []
    for path in paths:
        with np.load(path) as file:
            if "prompts" not in file:
                raise DataError(f"{path} holds answers without their prompts; distil it again.")
            prompts += np.split(file["prompts"], np.cumsum(file["prompt_lengths"])[:-1])
    return prompts


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


def _tokenizer(model: Model) -> Tokenizer:
    if model.tokenizer is None:
        raise DataError(f"{model.config.name or 'the model'} has no tokenizer; distillation needs its chat template.")
    return model.tokenizer
