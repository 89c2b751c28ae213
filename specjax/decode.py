"""Requests: checked on the host, then decoded on the device.

`generate` runs jitted programs, the prefill's and a `lax.while_loop` of rounds, without touching the host in between;
`stream` drives the same round from Python and syncs once a round. `prefill`, `decode` and `summarise` are the parts,
for those who time or batch them. What is traced stands in `specjax.loop`.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from specjax.acceptance import Acceptance, Greedy
from specjax.checks import check_implements, check_is, is_whole
from specjax.drafters.base import Drafter, NoDrafter
from specjax.errors import ConfigError, PromptError
from specjax.loading.load import Model
from specjax.loop import State, batch_loop, begin, loop, round_, start
from specjax.target.cache import KVCache
from specjax.target.config import ModelConfig
from specjax.target.model import PREFILL_CHUNK, read
from specjax.target.params import Params

__all__ = [
    "Generation",
    "Round",
    "State",
    "batch_loop",
    "begin",
    "capacity_for",
    "decode",
    "generate",
    "generate_batch",
    "loop",
    "prefill",
    "read_prompt",
    "round_",
    "start",
    "stream",
    "summarise",
]


@dataclass(frozen=True)
class Generation:
    """A finished generation, on the host.

    Attributes:
      tokens: the new tokens [n], up to and including the first EOS.
      accepted_lengths: drafts committed in each round [rounds]; the first token comes from the prefill, not a round.
    """

    tokens: np.ndarray
    accepted_lengths: np.ndarray

    @property
    def rounds(self) -> int:
        """Target forwards after the prefill."""
        return len(self.accepted_lengths)

    @property
    def accepted_per_round(self) -> float:
        """Mean drafts committed per round: `tokens_per_round` - 1. NaN when there was no round."""
        return float(np.mean(self.accepted_lengths)) if self.rounds else math.nan

    @property
    def tokens_per_round(self) -> float:
        """Mean tokens committed per target forward, the target's own included (the literature's tau)."""
        return self.accepted_per_round + 1.0


@dataclass(frozen=True)
class Round:
    """One streamed step: `tokens` [k] are new; the first `accepted` of them are drafts that the target confirmed."""

    tokens: np.ndarray
    accepted: int


_STATIC = ("config", "acceptance")
_NO_TOKEN = -1  # a stop token that never comes
# The target reads a prompt in a program of its own: drafters share it, and the time that it takes to compile.
read_prompt = jax.jit(read, static_argnames="config")
_read_prompts = jax.jit(jax.vmap(read, in_axes=(None, None, 0, 0)), static_argnums=1)
_begin = jax.jit(begin, static_argnames="acceptance", donate_argnames="cache")
_loop = jax.jit(loop, static_argnames=_STATIC)
_round = jax.jit(round_, static_argnames=_STATIC, donate_argnames="state")  # streaming owns its state


@functools.partial(jax.jit, static_argnames=_STATIC, donate_argnames="caches")
def _batch(
    params: Params,
    config: ModelConfig,
    drafter: Drafter,
    acceptance: Acceptance,
    eos: tuple[int, ...],
    tokens: Int[Array, "B S"],
    lengths: Int[Array, "B"],
    limits: Int[Array, "B"],
    keys: jax.Array,
    features: Float[Array, "B D"],
    caches: KVCache,
) -> State:
    first = functools.partial(begin, params, drafter, acceptance, eos)
    states = jax.vmap(first)(tokens, lengths, limits, keys, features, caches)
    return batch_loop(params, config, drafter, acceptance, eos, states)


@dataclass(frozen=True)
class _Request:
    """Checked arguments. `plan` is what every traced function begins with; the arrays are per prompt."""

    plan: tuple[Params, ModelConfig, Drafter, Acceptance, tuple[int, ...]]
    tokens: np.ndarray  # [B S]
    lengths: np.ndarray  # [B]
    limits: np.ndarray  # [B]


def prefill(
    model: Model,
    prompt_ids: Sequence[int] | np.ndarray,
    *,
    drafter: Drafter | None = None,
    acceptance: Acceptance | None = None,
    max_new_tokens: int = 128,
    key: jax.Array | None = None,
    eos_token_ids: Sequence[int] | None = None,
    capacity: int | None = None,
) -> State:
    """Checks the request, processes the prompt and commits the first token. The arguments are `generate`'s.

    Raises:
      PromptError: additionally to `generate`'s, a `max_new_tokens` of 0 (there is nothing to prefill for).
    """
    request = _check(model, [prompt_ids], drafter, acceptance, max_new_tokens, eos_token_ids, capacity)
    if max_new_tokens == 0:
        raise PromptError("max_new_tokens is 0; a prefill commits one token already.")
    return _prefill(request, _check_key(key, acceptance))


def _prefill(request: _Request, key: jax.Array) -> State:
    params, config, *rules = request.plan
    tokens, length, limit = jnp.asarray(request.tokens[0]), jnp.int32(request.lengths[0]), jnp.int32(request.limits[0])
    features, cache = read_prompt(params, config, tokens, length)
    return _begin(params, *rules, tokens, length, limit, key, features, cache)


def decode(
    model: Model,
    state: State,
    *,
    drafter: Drafter | None = None,
    acceptance: Acceptance | None = None,
    eos_token_ids: Sequence[int] | None = None,
) -> State:
    """Runs a prefilled state to its end, on the device. Pass the drafter and acceptance that the prefill had."""
    drafter, acceptance = _check_rules(drafter, acceptance)
    ready = drafter.prepare(model.params)
    return _loop(model.params, model.config, ready, acceptance, _check_eos(model.config, eos_token_ids), state)


def summarise(state: State) -> Generation:
    """Copies the result of a state to the host."""
    tokens, accepted, begin, end, rounds = jax.device_get(
        (state.tokens, state.accepted, state.prompt_length, state.length, state.rounds)
    )
    return Generation(np.asarray(tokens[begin:end]), np.asarray(accepted[:rounds]))


def generate(
    model: Model,
    prompt_ids: Sequence[int] | np.ndarray,
    *,
    drafter: Drafter | None = None,
    acceptance: Acceptance | None = None,
    max_new_tokens: int = 128,
    key: jax.Array | None = None,
    eos_token_ids: Sequence[int] | None = None,
    capacity: int | None = None,
) -> Generation:
    """Decodes exactly `max_new_tokens` tokens, or up to and including the first EOS.

    Args:
      model: the target.
      prompt_ids: token ids, at least one.
      drafter: None decodes autoregressively (the baseline).
      acceptance: `Greedy()` by default. `Typical(...)` is not lossless.
      max_new_tokens: the budget, 0 or more.
      key: a PRNG key; needed by rules that sample.
      eos_token_ids: stop tokens; by default the checkpoint's. `()` never stops early.
      capacity: cache slots; by default the next power of two that fits. Fix it to compile once over varied requests.

    Raises:
      PromptError: an empty or out-of-vocabulary prompt, a budget, key, stop token or capacity that is none, or
        a request beyond the model's or the draft model's context.
      ConfigError: a drafter or an acceptance rule that lacks members of its protocol, or a class in its place; while
        tracing, a drafter that proposes in other shapes than its tree and the target's vocabulary have.
      SpecJaxError: whatever `drafter.check` finds.
    """
    request = _check(model, [prompt_ids], drafter, acceptance, max_new_tokens, eos_token_ids, capacity)
    key = _check_key(key, acceptance)
    if max_new_tokens == 0:
        return _nothing()
    return summarise(_loop(*request.plan, _prefill(request, key)))


def generate_batch(
    model: Model,
    prompts: Sequence[Sequence[int] | np.ndarray],
    *,
    drafter: Drafter | None = None,
    acceptance: Acceptance | None = None,
    max_new_tokens: int = 128,
    keys: jax.Array | None = None,
    eos_token_ids: Sequence[int] | None = None,
    capacity: int | None = None,
) -> list[Generation]:
    """`generate` for prompts of any lengths at once, by `vmap`: in float32 each member gets what it would get alone.

    In bfloat16 a batch takes other matrix products, whose rounding differs, so that near-ties can flip. A batch takes
    as many rounds as its slowest member. The arguments are `generate`'s, but for:

    Args:
      prompts: token ids, at least one prompt.
      keys: one PRNG key per prompt [B], `jax.random.split(key, B)`; needed by rules that sample.

    Raises:
      PromptError: no prompts, another number of keys, or what `generate` refuses about any of them.
      SpecJaxError: whatever `drafter.check` finds.
    """
    if len(prompts) == 0:
        raise PromptError("there are no prompts; pass at least one.")
    request = _check(model, prompts, drafter, acceptance, max_new_tokens, eos_token_ids, capacity)
    keys = _check_key(keys, acceptance, len(prompts))
    if max_new_tokens == 0:
        return [_nothing() for _ in prompts]
    tokens, lengths, limits = (jnp.asarray(x) for x in (request.tokens, request.lengths, request.limits))
    features, caches = _read_prompts(model.params, model.config, tokens, lengths)
    states = _batch(*request.plan, tokens, lengths, limits, keys, features, caches)
    slim = dataclasses.replace(states, cache=None, draft=None, features=None, key=None)  # type: ignore[arg-type]
    return [summarise(jax.tree.map(lambda leaf, i=i: leaf[i], slim)) for i in range(len(prompts))]


def stream(
    model: Model,
    prompt_ids: Sequence[int] | np.ndarray,
    *,
    drafter: Drafter | None = None,
    acceptance: Acceptance | None = None,
    max_new_tokens: int = 128,
    key: jax.Array | None = None,
    eos_token_ids: Sequence[int] | None = None,
    capacity: int | None = None,
) -> Iterator[Round]:
    """`generate`, round by round: the same tokens for the same arguments, with one host sync per round.

    The first item is the prefill's token. Arguments and errors are `generate`'s; errors are raised by the call, before
    the first item is asked for. For text, and to end at stop strings, feed the rounds to a `TextStream`.
    """
    request = _check(model, [prompt_ids], drafter, acceptance, max_new_tokens, eos_token_ids, capacity)
    key = _check_key(key, acceptance)
    return iter(()) if max_new_tokens == 0 else _stream(request, key)


def _stream(request: _Request, key: jax.Array) -> Iterator[Round]:
    state, seen, width = _prefill(request, key), int(request.lengths[0]), request.plan[2].tree.max_depth + 1
    while True:
        fresh = jax.lax.dynamic_slice(state.tokens, (seen,), (width,))
        fresh, length, confirmed, finished = jax.device_get((fresh, state.length, state.confirmed, state.finished))
        yield Round(np.asarray(fresh[: length - seen]), int(confirmed))
        if finished:
            return
        seen = int(length)
        state = _round(*request.plan, state)


def _nothing() -> Generation:
    return Generation(np.zeros(0, np.int32), np.zeros(0, np.int32))


def capacity_for(prompt: int, new: int, depth: int) -> int:
    """The fewest cache slots for `prompt` + `new` tokens and a tree of `depth`, in whole prefill chunks.

    A round writes a whole path at once, so that slots past the last token must exist: `depth` of them, and one more,
    because a draft model's cache is a token ahead and goes on writing while others of its batch are unfinished.
    """
    return math.ceil((prompt + new + depth + 1) / PREFILL_CHUNK) * PREFILL_CHUNK


def _check(
    model: Model,
    prompts: Sequence[Sequence[int] | np.ndarray],
    drafter: Drafter | None,
    acceptance: Acceptance | None,
    max_new_tokens: int,
    eos_token_ids: Sequence[int] | None,
    capacity: int | None,
) -> _Request:
    check_is(model, Model, "the model", "load_model(SOURCE) gives one, load_draft(SOURCE) one and its token_map.")
    drafter, acceptance = _check_rules(drafter, acceptance)
    checked = [_check_prompt(prompt, model.config) for prompt in prompts]
    if not is_whole(max_new_tokens) or max_new_tokens < 0:
        raise PromptError(f"max_new_tokens is {max_new_tokens!r}; expected a whole number, 0 or more.")
    drafter.check(model)
    for nodes in drafter.subtrees:
        drafter.tree.subtree(nodes)
    lengths = np.array([len(prompt) for prompt in checked], np.int32)
    tokens = np.zeros((len(checked), _slots(int(lengths.max()), max_new_tokens, drafter, model, capacity)), np.int32)
    for row, prompt in zip(tokens, checked, strict=True):
        row[: len(prompt)] = prompt
    eos = _check_eos(model.config, eos_token_ids)
    plan = (model.params, model.config, drafter.prepare(model.params), acceptance, eos)
    return _Request(plan, tokens, lengths, lengths + np.int32(max_new_tokens))


def _check_rules(drafter: Drafter | None, acceptance: Acceptance | None) -> tuple[Drafter, Acceptance]:
    """Both, or what stands for None. A class or a half-written implementation would fail somewhere inside tracing."""
    drafter = NoDrafter() if drafter is None else drafter
    acceptance = Greedy() if acceptance is None else acceptance
    check_implements(drafter, Drafter, "NgramDrafter(Tree.chain(4))")
    check_implements(acceptance, Acceptance, "Greedy()")
    try:
        hash(acceptance)
    except TypeError as error:
        raise ConfigError(f"{acceptance!r} is not hashable; make it a frozen dataclass, as Greedy is.") from error
    return drafter, acceptance


def _check_prompt(prompt_ids: Sequence[int] | np.ndarray, config: ModelConfig) -> np.ndarray:
    try:
        prompt = np.asarray(prompt_ids)
    except ValueError as error:  # lists of different lengths inside
        raise PromptError(f"the prompt is no flat sequence of token ids ({error}); pass one prompt's ids.") from error
    if prompt.ndim != 1 or prompt.size == 0:
        raise PromptError(f"the prompt has shape {prompt.shape}; expected a flat sequence of at least one token id.")
    if not np.issubdtype(prompt.dtype, np.integer):
        raise PromptError(
            f"the prompt holds {prompt.dtype} values; expected integer token ids (encode the text first)."
        )
    if prompt.min() < 0 or prompt.max() >= config.vocab_size:
        bad = prompt[(prompt < 0) | (prompt >= config.vocab_size)][0]
        raise PromptError(
            f"token id {bad} is outside the vocabulary [0, {config.vocab_size}); is the tokenizer the model's?"
        )
    return prompt.astype(np.int32)


def _slots(prompt: int, new: int, drafter: Drafter, model: Model, asked: int | None) -> int:
    for whose, context in (("model", model.config.max_positions), ("draft model", drafter.max_positions)):
        if context is not None and prompt + new > context:
            raise PromptError(
                f"{prompt} prompt tokens and max_new_tokens {new} exceed the {whose}'s context of {context}; "
                "shorten the prompt or lower max_new_tokens."
            )
    needed = capacity_for(prompt, new, drafter.tree.max_depth)
    if asked is None:
        return max(128, 1 << (needed - 1).bit_length())
    if not is_whole(asked) or asked < needed or asked % PREFILL_CHUNK:
        raise PromptError(
            f"capacity is {asked!r}; this request needs a multiple of {PREFILL_CHUNK}, at least {needed}."
        )
    return int(asked)


def _check_eos(config: ModelConfig, asked: Sequence[int] | None) -> tuple[int, ...]:
    if asked is None:
        return config.eos_token_ids
    ids = np.asarray(asked)
    if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
        raise PromptError(f"eos_token_ids is {asked!r}; expected a sequence of token ids, such as (2,) or ().")
    if ids.size and (ids.min() < 0 or ids.max() >= config.vocab_size):
        raise PromptError(
            f"eos_token_ids {ids.tolist()} leave the vocabulary [0, {config.vocab_size}); is the tokenizer the model's?"
        )
    # As many as the checkpoint's, filled up with what is no token: one program decodes with and without them.
    return (*ids.tolist(), *[_NO_TOKEN] * (len(config.eos_token_ids) - len(ids)))


def _check_key(key: Any, acceptance: Acceptance | None, batch: int | None = None) -> jax.Array:
    """The key, or for a batch the keys; rules that draw nothing get some where none are given."""
    remedy = "key=jax.random.key(seed)" if batch is None else f"keys=jax.random.split(jax.random.key(seed), {batch})"
    if key is None:
        if acceptance is not None and acceptance.needs_key:
            raise PromptError(f"{acceptance} draws random numbers; pass {remedy}.")
        return jax.random.key(0) if batch is None else jax.random.split(jax.random.key(0), batch)
    if isinstance(key, jax.Array) and key.dtype == jnp.uint32:  # as jax.random.PRNGKey makes them
        key = jax.random.wrap_key_data(key)
    shape = () if batch is None else (batch,)
    typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if not typed or key.shape != shape:
        given = f"of shape {key.shape}" if typed else f"{key!r}"
        raise PromptError(f"the PRNG key is {given}; pass {remedy}.")
    return key
