"""The core: a round of speculative decoding, and the loops of rounds. Pure functions over one frozen state.

Everything here is traced; `specjax.decode` checks requests and jits. Autoregressive decoding is the same loop over a
tree of one node.
"""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from specjax import cache as kv
from specjax.acceptance import Acceptance
from specjax.config import ModelConfig
from specjax.drafters.base import Context, Drafter
from specjax.errors import ConfigError
from specjax.model import fast_rows, forward, read, unembed
from specjax.params import Params
from specjax.proposal import NO_DRAFT, Proposal
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


def round_(
    params: Params,
    config: ModelConfig,
    drafter: Drafter,
    acceptance: Acceptance,
    eos: tuple[int, ...],
    state: State,
    *,
    batch_axis: str | None = None,
) -> State:
    """One round: draft, verify in one target forward, accept, commit. Pure and unbatched.

    On a finished state it commits nothing, so that a batch may go on until its last member is finished. The whole tree
    is drafted and verified, shapes being static, or the root alone where nothing was drafted; what exceeds the
    remaining budget is cut when committing.

    Args:
      batch_axis: the name of the axis that a `vmap` of this has: the members then read their roots alone when none of
        the unfinished ones has a draft. Without the name, `vmap` makes each of them read the tree and the root.
    """
    drafter, tree = drafter.prepare(params), drafter.tree
    key, draft_key, accept_key = jax.random.split(state.key, 3)
    with jax.named_scope("draft"):
        proposal = drafter.propose(params, state.draft, state.context, draft_key)
        proposal = sound(proposal, state.context.root, tree.size, config.vocab_size)
        drafted = jnp.maximum(proposal.tokens, 0)  # a node without a draft holds any token; no rule accepts it
    with jax.named_scope("verify"):
        # A batch has rows enough.
        width = tree.size if batch_axis is not None else fast_rows(tree.size, params.dtype)
        whole = functools.partial(verify, params, config, tree, state.cache, drafted, width)
        if drafter.abstains and tree.size > 1:
            root = functools.partial(_verify_root, params, config, tree, state.cache, drafted)
            some = jnp.any(proposal.tokens[1:] != NO_DRAFT) & ~state.finished
            if batch_axis is not None:
                some = jax.lax.pmax(some.astype(jnp.int32), batch_axis) > 0
            features, rows, logits = jax.lax.cond(some, whole, root)
        else:
            features, rows, logits = whole()
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
            cache=kv.write(state.cache, kv.gather(rows, path), count, after=verdict.next_token),
            features=features[verdict.node],
            key=key,
            rounds=state.rounds + jnp.where(state.finished, 0, 1),
            accepted=state.accepted.at[state.rounds].set(count - 1),
            confirmed=jnp.minimum(verdict.accepted, count),
        )
        draft = drafter.update(state.draft, state.context, verdict, path.shape[0])
        return dataclasses.replace(state, draft=draft)


def sound(proposal: Proposal, root: Int[Array, ""], size: int, vocab: int) -> Proposal:
    """The proposal around the true root; what is no token of the target's counts as no draft.

    Raises:
      ConfigError: a proposal for another tree or vocabulary (its shapes are static).
    """
    tokens, log_q = proposal.tokens, proposal.log_q
    if tokens.shape != (size,) or (log_q is not None and log_q.shape != (size, vocab)):
        laws = "" if log_q is None else f" and laws {log_q.shape}"
        raise ConfigError(
            f"the drafter proposed tokens of shape {tokens.shape}{laws}; its tree of {size} nodes and the target's "
            f"vocabulary of {vocab} need ({size},) and ({size}, {vocab})."
        )
    known = (tokens >= 0) & (tokens < vocab)
    return Proposal(jnp.where(known, tokens, NO_DRAFT).astype(jnp.int32).at[0].set(root), log_q)


_Verified = tuple[Float[Array, "M D"], kv.Rows, Float[Array, "M V"]]


def verify(
    params: Params, config: ModelConfig, tree: Tree, cache: kv.KVCache, tokens: Int[Array, "M"], size: int
) -> _Verified:
    """Features, keys and values, and logits of all nodes: the round's target forward, over `size` rows.

    Those past the tree's hold token 0, see themselves alone, and are dropped.
    """
    nodes, spare = tree.size, size - tree.size
    mask = np.eye(size, dtype=bool)
    mask[:nodes, :nodes] = tree.ancestors
    positions = cache.length + np.pad(tree.depths, (0, spare))
    out = forward(params, config, jnp.pad(tokens, (0, spare)), cache=cache, positions=positions, mask=mask)
    rows = kv.Rows(tuple(k[:, :, :nodes] for k in out.rows.k), tuple(v[:, :nodes] for v in out.rows.v))
    return out.features[:nodes], rows, unembed(params, out.features)[:nodes]


def _verify_root(
    params: Params, config: ModelConfig, tree: Tree, cache: kv.KVCache, tokens: Int[Array, "M"]
) -> _Verified:
    """The same for the root alone, at the price of an autoregressive step; zeros stand for the other nodes."""

    def padded(x: Array, axis: int) -> Array:
        return jnp.pad(x, [(0, tree.size - 1 if a == axis else 0) for a in range(x.ndim)])

    features, rows, logits = verify(params, config, Tree.chain(0), cache, tokens[:1], 1)
    rows = kv.Rows(tuple(padded(k, 2) for k in rows.k), tuple(padded(v, 1) for v in rows.v))
    return padded(features, 0), rows, padded(logits, 0)


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
    drafter = drafter.prepare(params)
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
    step = functools.partial(round_, params, config, drafter.prepare(params), acceptance, eos)
    return jax.lax.while_loop(lambda state: ~state.finished, step, state)


def batch_loop(
    params: Params, config: ModelConfig, drafter: Drafter, acceptance: Acceptance, eos: tuple[int, ...], states: State
) -> State:
    """Rounds for a batch of states, a leading axis B at every leaf, until the last of them is finished.

    Each member gets what `loop` gives it. There is one condition for the whole batch: with one per member, as `vmap` of
    `loop` has it, every cache would be copied at every step.
    """
    one = functools.partial(round_, params, config, drafter.prepare(params), acceptance, eos, batch_axis="batch")
    step = jax.vmap(one, axis_name="batch")
    return jax.lax.while_loop(lambda states: ~jnp.all(states.finished), step, states)
