"""Decoding: one target forward a round, the whole loop on the device.

`generate` runs a jitted prefill and a jitted `lax.while_loop` of rounds without touching the host in between; `stream`
drives the same round from Python and syncs once a round. Autoregressive decoding is the same loop over a tree of one
node. `prefill`, `decode` and `summarise` are the parts, for those who time or batch them.
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
from jaxtyping import Array, Bool, Float, Int

from specjax import cache as kv
from specjax.acceptance import Acceptance, Greedy, Proposal
from specjax.config import ModelConfig
from specjax.drafters.base import Context, Drafter, NoDrafter
from specjax.errors import PromptError
from specjax.loading.load import Model
from specjax.model import PREFILL_CHUNK, forward, read, unembed
from specjax.params import Params
from specjax.tree import Tree


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """Everything a round reads and writes. Entries of `tokens` and `accepted` past their counts are garbage."""

    tokens: Int[Array, "S"]  # the prompt, then what was committed
    length: Int[Array, ""]  # committed tokens; the newest is the root, so the cache holds length - 1
    limit: Int[Array, ""]  # decoding ends at this length
    finished: Bool[Array, ""]
    cache: kv.KVCache
    features: Float[Array, "D"]  # target's final-norm hidden state at the position that predicted the root
    draft: Any  # the drafter's state
    key: jax.Array
    rounds: Int[Array, ""]
    accepted: Int[Array, "S"]  # drafts committed in each round
    confirmed: Int[Array, ""]  # drafts among the newest round's committed tokens (a cut round may end on one)
    prompt_length: Int[Array, ""]

    @property
    def context(self) -> Context:
        """What the drafter sees."""
        return Context(self.tokens, self.length, self.features)


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


def round_(
    params: Params, config: ModelConfig, drafter: Drafter, acceptance: Acceptance, eos: tuple[int, ...], state: State
) -> State:
    """One round: draft, verify in one target forward, accept, commit. Pure and unbatched.

    On a finished state it commits nothing, so that a batch may go on until its last member is finished.
    """
    tree = drafter.tree
    key, draft_key, accept_key = jax.random.split(state.key, 3)
    with jax.named_scope("draft"):
        proposal = drafter.propose(params, state.draft, state.context, draft_key)
        drafted = jnp.maximum(proposal.tokens, 0)  # a node without a draft holds any token; no rule accepts it
    with jax.named_scope("verify"):
        out = forward(
            params, config, drafted, cache=state.cache, positions=state.cache.length + tree.depths, mask=tree.ancestors
        )
        logits = unembed(params, out.features)
    with jax.named_scope("accept"):
        verdict = acceptance(logits, proposal, tree, accept_key)
    with jax.named_scope("commit"):
        path = jnp.asarray(tree.node_paths)[verdict.node]
        steps = jnp.arange(path.shape[0])
        # The accepted drafts, then the target's own token; past that garbage.
        fresh = jnp.where(steps == verdict.accepted, verdict.next_token, drafted[jnp.roll(path, -1)])
        budget = jnp.where(state.finished, 0, state.limit - state.length)
        count, finished = _cut(fresh, verdict.accepted + 1, budget, eos)
        state = dataclasses.replace(
            state,
            tokens=jax.lax.dynamic_update_slice(state.tokens, fresh, (state.length,)),
            length=state.length + count,
            finished=finished,
            cache=kv.write(state.cache, kv.gather(out.rows, path), count, after=verdict.next_token),
            features=out.features[verdict.node],
            key=key,
            rounds=state.rounds + jnp.where(state.finished, 0, 1),
            accepted=state.accepted.at[state.rounds].set(count - 1),
            confirmed=jnp.minimum(verdict.accepted, count),
        )
        return dataclasses.replace(state, draft=drafter.update(state.draft, state.context, verdict))


def _cut(
    fresh: Int[Array, "E1"], count: Int[Array, ""], budget: Int[Array, ""], eos: tuple[int, ...]
) -> tuple[Int[Array, ""], Bool[Array, ""]]:
    """How many of the `count` fresh tokens to commit (up to the first EOS, within the budget), and whether it ends."""
    count = jnp.minimum(count, budget)
    stops = jnp.isin(fresh, jnp.asarray(eos, jnp.int32)) & (jnp.arange(fresh.shape[0]) < count)
    hit = jnp.any(stops)
    count = jnp.where(hit, jnp.argmax(stops).astype(jnp.int32) + 1, count)
    return count, hit | (count == budget)


def start(
    params: Params,
    config: ModelConfig,
    drafter: Drafter,
    acceptance: Acceptance,
    eos: tuple[int, ...],
    tokens: Int[Array, "S"],
    prompt_length: Int[Array, ""],
    limit: Int[Array, ""],
    key: jax.Array,
) -> State:
    """Prefill: processes the prompt in chunks and commits the first token. Pure and unbatched.

    Args:
      tokens: the prompt, padded to the capacity S, a multiple of `PREFILL_CHUNK`.
      prompt_length: the prompt's length, at least 1.
      limit: the length (prompt included) at which decoding ends, above `prompt_length`.
    """
    with jax.named_scope("prefill"):
        features, cache = read(params, config, tokens, prompt_length)
    key, accept_key = jax.random.split(key)
    root = acceptance(unembed(params, features[None]), Proposal(tokens[:1]), Tree.chain(0), accept_key).next_token
    one = jnp.int32(1)
    _, finished = _cut(root[None], one, limit - prompt_length, eos)
    state = State(
        tokens=tokens.at[prompt_length].set(root),
        length=prompt_length + 1,
        limit=limit,
        finished=finished,
        cache=cache,
        features=features,
        draft=None,
        key=key,
        rounds=jnp.int32(0),
        accepted=jnp.zeros_like(tokens),
        confirmed=jnp.int32(0),
        prompt_length=prompt_length,
    )
    return dataclasses.replace(state, draft=drafter.init(params, state.context))


def loop(
    params: Params, config: ModelConfig, drafter: Drafter, acceptance: Acceptance, eos: tuple[int, ...], state: State
) -> State:
    """Rounds until the budget is spent or EOS is committed: one `lax.while_loop`. Pure and unbatched."""
    step = functools.partial(round_, params, config, drafter, acceptance, eos)
    return jax.lax.while_loop(lambda state: ~state.finished, step, state)


_STATIC = ("config", "acceptance")
_start = jax.jit(start, static_argnames=_STATIC)
_loop = jax.jit(loop, static_argnames=_STATIC)
_round = jax.jit(round_, static_argnames=_STATIC, donate_argnames="state")  # streaming owns its state


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
    drafter, acceptance = drafter or NoDrafter(), acceptance or Greedy()
    prompt = _check_prompt(prompt_ids, model.config)
    if max_new_tokens < 1:
        raise PromptError(f"max_new_tokens is {max_new_tokens}; a prefill commits one token already.")
    drafter.check(model)
    if acceptance.needs_key and key is None:
        raise PromptError(f"{acceptance} draws random numbers; pass key=jax.random.key(seed).")
    slots = _capacity(len(prompt), max_new_tokens, drafter.tree, model.config, capacity)
    tokens = np.zeros(slots, np.int32)
    tokens[: len(prompt)] = prompt
    return _start(
        model.params,
        model.config,
        drafter,
        acceptance,
        _eos(model.config, eos_token_ids),
        jnp.asarray(tokens),
        jnp.int32(len(prompt)),
        jnp.int32(len(prompt) + max_new_tokens),
        jax.random.key(0) if key is None else key,
    )


def decode(
    model: Model,
    state: State,
    *,
    drafter: Drafter | None = None,
    acceptance: Acceptance | None = None,
    eos_token_ids: Sequence[int] | None = None,
) -> State:
    """Runs a prefilled state to its end, on the device. Pass the drafter and acceptance that the prefill had."""
    eos = _eos(model.config, eos_token_ids)
    return _loop(model.params, model.config, drafter or NoDrafter(), acceptance or Greedy(), eos, state)


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
      PromptError: an empty or out-of-vocabulary prompt, a negative budget, or a request beyond the model's context.
      SpecJaxError: whatever `drafter.check` finds.
    """
    drafter, acceptance = drafter or NoDrafter(), acceptance or Greedy()
    if max_new_tokens == 0:
        _check_prompt(prompt_ids, model.config)
        return Generation(np.zeros(0, np.int32), np.zeros(0, np.int32))
    state = prefill(
        model,
        prompt_ids,
        drafter=drafter,
        acceptance=acceptance,
        max_new_tokens=max_new_tokens,
        key=key,
        eos_token_ids=eos_token_ids,
        capacity=capacity,
    )
    return summarise(decode(model, state, drafter=drafter, acceptance=acceptance, eos_token_ids=eos_token_ids))


@functools.partial(jax.jit, static_argnames=_STATIC)
def _batch(
    params: Params,
    config: ModelConfig,
    drafter: Drafter,
    acceptance: Acceptance,
    eos: tuple[int, ...],
    tokens: Int[Array, "B S"],
    lengths: Int[Array, "B"],
    max_new: Int[Array, ""],
    keys: jax.Array,
) -> State:
    plan = (params, config, drafter, acceptance, eos)
    state = jax.vmap(functools.partial(start, *plan))(tokens, lengths, lengths + max_new, keys)
    # One condition for the whole batch: with one per member, vmap would copy every cache at every step.
    step = jax.vmap(functools.partial(round_, *plan))
    return jax.lax.while_loop(lambda state: ~jnp.all(state.finished), step, state)


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
    """`generate` for prompts of any lengths at once, by `vmap`: each member gets what it would get alone.

    A batch takes as many rounds as its slowest member. The arguments are `generate`'s, but for:

    Args:
      prompts: token ids, at least one prompt.
      keys: one PRNG key per prompt [B], `jax.random.split(key, B)`; needed by rules that sample.

    Raises:
      PromptError: no prompts, another number of keys, or what `generate` refuses about any of them.
      SpecJaxError: whatever `drafter.check` finds.
    """
    drafter, acceptance = drafter or NoDrafter(), acceptance or Greedy()
    checked = [_check_prompt(prompt, model.config) for prompt in prompts]
    if not checked:
        raise PromptError("there are no prompts; pass at least one.")
    if max_new_tokens < 0:
        raise PromptError(f"max_new_tokens is {max_new_tokens}; expected 0 or more.")
    if max_new_tokens == 0:
        return [Generation(np.zeros(0, np.int32), np.zeros(0, np.int32)) for _ in checked]
    drafter.check(model)
    if acceptance.needs_key and (keys is None or keys.shape != (len(checked),)):
        given = None if keys is None else keys.shape
        raise PromptError(
            f"{acceptance} draws random numbers for {len(checked)} prompts, keys have shape {given}; pass "
            f"keys=jax.random.split(jax.random.key(seed), {len(checked)})."
        )
    longest = max(map(len, checked))
    tokens = np.zeros(
        (len(checked), _capacity(longest, max_new_tokens, drafter.tree, model.config, capacity)), np.int32
    )
    for row, prompt in zip(tokens, checked, strict=True):
        row[: len(prompt)] = prompt
    state = _batch(
        model.params,
        model.config,
        drafter,
        acceptance,
        _eos(model.config, eos_token_ids),
        jnp.asarray(tokens),
        jnp.array([len(prompt) for prompt in checked], jnp.int32),
        jnp.int32(max_new_tokens),
        jax.random.split(jax.random.key(0), len(checked)) if keys is None else keys,
    )
    slim = dataclasses.replace(state, cache=None, draft=None, features=None, key=None)  # type: ignore[arg-type]
    return [summarise(jax.tree.map(lambda leaf, i=i: leaf[i], slim)) for i in range(len(checked))]


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

    The first item is the prefill's token. Arguments and errors are `generate`'s.
    """
    drafter, acceptance = drafter or NoDrafter(), acceptance or Greedy()
    if max_new_tokens == 0:
        _check_prompt(prompt_ids, model.config)
        return
    state = prefill(
        model,
        prompt_ids,
        drafter=drafter,
        acceptance=acceptance,
        max_new_tokens=max_new_tokens,
        key=key,
        eos_token_ids=eos_token_ids,
        capacity=capacity,
    )
    eos, width = _eos(model.config, eos_token_ids), drafter.tree.max_depth + 1
    seen = len(prompt_ids)
    while True:
        fresh = jax.lax.dynamic_slice(state.tokens, (seen,), (width,))
        fresh, length, confirmed, finished = jax.device_get((fresh, state.length, state.confirmed, state.finished))
        yield Round(np.asarray(fresh[: length - seen]), int(confirmed))
        if finished:
            return
        seen = int(length)
        state = _round(model.params, model.config, drafter, acceptance, eos, state)


def _check_prompt(prompt_ids: Sequence[int] | np.ndarray, config: ModelConfig) -> np.ndarray:
    prompt = np.asarray(prompt_ids)
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


def capacity_for(prompt: int, new: int, depth: int) -> int:
    """The fewest cache slots for `prompt` + `new` tokens and a tree of `depth`, in whole prefill chunks.

    A round writes a whole path at once, so that slots past the last token must exist: `depth` of them, and one more,
    because a draft model's cache is a token ahead and goes on writing while others of its batch are unfinished.
    """
    return math.ceil((prompt + new + depth + 1) / PREFILL_CHUNK) * PREFILL_CHUNK


def _capacity(prompt: int, new: int, tree: Tree, config: ModelConfig, asked: int | None) -> int:
    if prompt + new > config.max_positions:
        raise PromptError(
            f"{prompt} prompt tokens and max_new_tokens {new} exceed the model's context of {config.max_positions}; "
            "shorten the prompt or lower max_new_tokens."
        )
    needed = capacity_for(prompt, new, tree.max_depth)
    if asked is None:
        return max(128, 1 << (needed - 1).bit_length())
    if asked < needed or asked % PREFILL_CHUNK:
        raise PromptError(f"capacity is {asked}; this request needs a multiple of {PREFILL_CHUNK}, at least {needed}.")
    return asked


def _eos(config: ModelConfig, asked: Sequence[int] | None) -> tuple[int, ...]:
    return config.eos_token_ids if asked is None else tuple(int(token) for token in asked)
