"""Requests: checked on the host, then decoded on the device.

`generate` runs jitted programs, the prefill's and a `lax.while_loop` of rounds, without touching the host in between;
`stream` drives the same round from Python and syncs once a round. `prefill`, `decode` and `summarise` are the parts,
for those who time or batch them. What is traced stands in `specjax.loop`.
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from specjax.acceptance import Acceptance, Greedy
from specjax.checks import check_implements, check_is, is_whole
from specjax.drafters.base import Drafter, NoDrafter
from specjax.errors import CheckpointError, ConfigError, PromptError
from specjax.loading.load import Model
from specjax.loop import Plan, State, decode_round, first_token, run_rounds
from specjax.target.config import ModelConfig
from specjax.target.model import PREFILL_CHUNK, embed, forward, read
from specjax.tree import Tree


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


class RequestOptions(TypedDict, total=False):
    """What a request may say, for `generate`, `generate_batch`, `stream` and `prefill` alike.

    Attributes:
      drafter: None decodes autoregressively (the baseline).
      acceptance: `Greedy()` by default. `Typical(...)` is not lossless.
      max_new_tokens: the budget, 0 or more; 128 by default.
      key: a PRNG key, needed by rules that sample; `generate_batch` takes one per prompt as `keys` in its place.
      eos_token_ids: stop tokens; by default the checkpoint's. `()` never stops early.
      capacity: cache slots; by default the next power of two that fits. Fix it to compile once over varied requests.
    """

    drafter: Drafter | None
    acceptance: Acceptance | None
    max_new_tokens: int
    key: jax.Array | None
    eos_token_ids: Sequence[int] | None
    capacity: int | None


_NO_TOKEN = -1  # a stop token that never comes
# The target reads a prompt in a program of its own: drafters share it, and the time that it takes to compile.
read_prompt = jax.jit(read, static_argnames="config")
_first_token = jax.jit(first_token, donate_argnames="cache")
_run_rounds = jax.jit(run_rounds)
_decode_round = jax.jit(decode_round, donate_argnames="state")  # streaming owns its state


@dataclass(frozen=True)
class Request:
    """Checked arguments: one plan, and arrays with a row per prompt.

    Attributes:
      new_tokens: the budget.
    """

    plan: Plan
    tokens: Int[np.ndarray, "B S"]
    lengths: Int[np.ndarray, "B"]
    new_tokens: int

    @property
    def limits(self) -> Int[np.ndarray, "B"]:
        """Where decoding ends, prompt included."""
        return self.lengths + np.int32(self.new_tokens)


def prefill(model: Model, prompt_ids: Sequence[int] | np.ndarray, **options: Unpack[RequestOptions]) -> State:
    """Checks the request, processes the prompt and commits the first token. The arguments are `generate`'s.

    Raises:
      PromptError: additionally to `generate`'s, a `max_new_tokens` of 0 (there is nothing to prefill for).
    """
    request = check_request(model, [prompt_ids], options)
    key = check_key(options.get("key"), request.plan.acceptance)
    if request.new_tokens == 0:
        raise PromptError("max_new_tokens is 0; a prefill commits one token already.")
    return _prefill(request, key)


def _prefill(request: Request, key: jax.Array) -> State:
    plan = request.plan
    tokens, length, limit = jnp.asarray(request.tokens[0]), jnp.int32(request.lengths[0]), jnp.int32(request.limits[0])
    features, cache = read_prompt(plan.params, plan.config, tokens, length)
    return _first_token(plan, tokens, length, limit, key, features, cache)


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
    return _run_rounds(plan_for(model, drafter, acceptance, eos_token_ids), state)


def plan_for(
    model: Model, drafter: Drafter, acceptance: Acceptance, eos_token_ids: Sequence[int] | None = None
) -> Plan:
    """What traced functions take, made ready on the host."""
    return Plan(model.params, drafter, _check_eos(model.config, eos_token_ids), model.config, acceptance).ready()


def summarise(state: State, plan: Plan | None = None) -> Generation:
    """Copies the result of a state to the host.

    Args:
      plan: what it was decoded with; to say after which layer the features were not finite, where they are not.

    Raises:
      CheckpointError: the target's features are not finite, so that the tokens mean nothing.
    """
    check_finite(state, plan)
    tokens, accepted, begin, end, rounds = jax.device_get(
        (state.tokens, state.accepted, state.prompt_length, state.length, state.rounds)
    )
    return Generation(np.asarray(tokens[begin:end]), np.asarray(accepted[:rounds]))


def generate(model: Model, prompt_ids: Sequence[int] | np.ndarray, **options: Unpack[RequestOptions]) -> Generation:
    """Decodes exactly `max_new_tokens` tokens, or up to and including the first EOS.

    Args:
      model: the target.
      prompt_ids: token ids, at least one.
      options: of `RequestOptions`: drafter, acceptance, max_new_tokens, key, eos_token_ids, capacity.

    Raises:
      PromptError: an empty or out-of-vocabulary prompt, a budget, key, stop token or capacity that is none, or
        a request beyond the model's or the draft model's context.
      CheckpointError: the target's features are not finite.
      ConfigError: an option that there is not; a drafter or an acceptance rule that lacks members of its protocol, or a
        class in its place; while tracing, a drafter that proposes in other shapes than its tree and the target's
        vocabulary have.
      SpecJaxError: whatever `drafter.check` finds.
    """
    request = check_request(model, [prompt_ids], options)
    key = check_key(options.get("key"), request.plan.acceptance)
    if request.new_tokens == 0:
        return nothing()
    return summarise(_run_rounds(request.plan, _prefill(request, key)), request.plan)


def stream(model: Model, prompt_ids: Sequence[int] | np.ndarray, **options: Unpack[RequestOptions]) -> Iterator[Round]:
    """`generate`, round by round: the same tokens for the same arguments, with one host sync per round.

    The first item is the prefill's token. Arguments and errors are `generate`'s; errors are raised by the call, before
    the first item is asked for. For text, and to end at stop strings, feed the rounds to a `TextStream`.
    """
    request = check_request(model, [prompt_ids], options)
    key = check_key(options.get("key"), request.plan.acceptance)
    return iter(()) if request.new_tokens == 0 else _stream(request, key)


def _stream(request: Request, key: jax.Array) -> Iterator[Round]:
    state, seen = _prefill(request, key), int(request.lengths[0])
    width = request.plan.drafter.tree.max_depth + 1
    while True:
        fresh = jax.lax.dynamic_slice(state.tokens, (seen,), (width,))
        fresh, length, confirmed, finished = jax.device_get((fresh, state.length, state.confirmed, state.finished))
        if finished:
            check_finite(state, request.plan)
        yield Round(np.asarray(fresh[: length - seen]), int(confirmed))
        if finished:
            return
        seen = int(length)
        state = _decode_round(request.plan, state)


_LOOKED_AT = 2048  # newest tokens among which the first bad layer is looked for


def check_finite(state: State, plan: Plan | None = None) -> None:
    """Raises CheckpointError where the target's features, by which decoding ended, are not finite; names the layer."""
    if bool(np.isfinite(np.asarray(state.features)).all()):
        return
    where = "" if plan is None else _first_bad_layer(plan, np.asarray(state.tokens[: int(state.length) - 1]))
    raise CheckpointError(
        f"the target's features are not finite{where}: its weights hold NaN or infinity, or overflow. "
        "load_model(SOURCE, check_finite=True) names the first bad tensor."
    )


def _first_bad_layer(plan: Plan, tokens: np.ndarray) -> str:
    layers = plan.config.num_layers
    read_all = jax.jit(functools.partial(forward, config=plan.config, taps=tuple(range(layers))))
    shown = jnp.asarray(tokens[-_LOOKED_AT:])
    streams = [embed(plan.params, shown), *read_all(plan.params, tokens=shown).taps]
    bad = [i for i, stream in enumerate(streams) if not bool(jnp.isfinite(stream).all())]
    if not bad:
        return " after the final norm"
    return " after the embedding" if bad[0] == 0 else f" after layer {bad[0] - 1} (of 0 to {layers - 1})"


def nothing() -> Generation:
    """No tokens in no rounds."""
    return Generation(np.zeros(0, np.int32), np.zeros(0, np.int32))


def capacity_for(prompt: int, new: int, depth: int) -> int:
    """The fewest cache slots for `prompt` + `new` tokens and a tree of `depth`, in whole prefill chunks.

    A round writes a whole path at once, so that slots past the last token must exist: `depth` of them, and one more,
    because a draft model's cache is a token ahead and goes on writing while others of its batch are unfinished.
    """
    return math.ceil((prompt + new + depth + 1) / PREFILL_CHUNK) * PREFILL_CHUNK


def check_request(model: Model, prompts: Sequence[Sequence[int] | np.ndarray], options: Mapping[str, Any]) -> Request:
    """A request's arguments, checked on the host, with what stands for those that are not given; but for the key.

    Raises:
      SpecJaxError: as `generate`.
    """
    if unknown := options.keys() - RequestOptions.__annotations__:
        raise ConfigError(
            f"there is no option {min(unknown)!r} of a request; expected some of "
            f"{', '.join(RequestOptions.__annotations__)}."
        )
    check_is(model, Model, "the model", "load_model(SOURCE) gives one, load_draft(SOURCE) one and its token_map.")
    drafter, acceptance = _check_rules(options.get("drafter"), options.get("acceptance"))
    checked = [_check_prompt(prompt, model.config) for prompt in prompts]
    new = options.get("max_new_tokens", 128)
    if not is_whole(new) or new < 0:
        raise PromptError(f"max_new_tokens is {new!r}; expected a whole number, 0 or more.")
    drafter.check(model)
    check_is(drafter.tree, Tree, "the drafter's tree", "make one, such as Tree.chain(4) or Tree.parse(TEXT).")
    for nodes in drafter.subtrees:
        drafter.tree.subtree(nodes)
    _check_pytree(drafter)
    lengths = np.array([len(prompt) for prompt in checked], np.int32)
    slots = _slots(int(lengths.max()), new, drafter, model, options.get("capacity"))
    tokens = np.zeros((len(checked), slots), np.int32)
    for row, prompt in zip(tokens, checked, strict=True):
        row[: len(prompt)] = prompt
    return Request(plan_for(model, drafter, acceptance, options.get("eos_token_ids")), tokens, lengths, new)


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


def _check_pytree(drafter: Drafter) -> None:
    """A drafter is an argument of compiled functions: what it holds is arrays, or static."""
    name = type(drafter).__name__
    for path, leaf in jax.tree_util.tree_leaves_with_path(drafter):
        if leaf is drafter:
            raise ConfigError(
                f"{name} is no pytree; put @jax.tree_util.register_dataclass and @dataclass(frozen=True) above it."
            )
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic | int | float | complex):
            where = jax.tree_util.keystr(path)
            raise ConfigError(
                f"{name}{where} is a {type(leaf).__name__}, no array; what does not change while a program runs is "
                "static: field(metadata={'static': True})."
            )


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


def check_key(key: Any, acceptance: Acceptance, batch: int | None = None) -> jax.Array:
    """The key, or for a batch the keys; rules that draw nothing get some where none are given."""
    remedy = "key=jax.random.key(seed)" if batch is None else f"keys=jax.random.split(jax.random.key(seed), {batch})"
    if key is None:
        if acceptance.needs_key:
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
