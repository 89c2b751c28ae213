"""The core: a round of speculative decoding, and the loops of rounds. Pure functions over one frozen state.

Everything here is traced; `specjax.decode` checks requests and jits. Autoregressive decoding is the same loop over a
tree of one node.
"""

import dataclasses
import functools
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from specjax import ops
from specjax.acceptance import Acceptance
from specjax.drafters.base import Context, Drafter
from specjax.errors import ConfigError
from specjax.proposal import NO_DRAFT, Proposal, Verdict
from specjax.target import cache as kv
from specjax.target.config import ModelConfig
from specjax.target.model import forward, read, unembed
from specjax.target.params import Params
from specjax.tree import Tree


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Plan:
    """What is decoded with, and how: the same for every prompt of a request.

    Attributes:
      params: the target's weights.
      drafter: prepared or not; `ready` prepares it.
      eos: stop tokens, as data: one program serves several lists of one length.
      config: the target (static).
      acceptance: the rule (static).
    """

    params: Params
    drafter: Drafter
    eos: tuple[Any, ...]
    config: ModelConfig = field(metadata={"static": True})
    acceptance: Acceptance = field(metadata={"static": True})

    def ready(self) -> "Plan":
        """With what the drafter computes once for all sequences."""
        return dataclasses.replace(self, drafter=self.drafter.prepare(self.params))


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


def decode_round(plan: Plan, state: State, *, batch_axis: str | None = None) -> State:
    """One round: draft, verify in one target forward, accept, commit. Pure and unbatched.

    On a finished state it commits nothing, so that a batch may go on until its last member is finished. The whole tree
    is drafted and verified, shapes being static, or the smallest of `drafter.subtrees` that holds all drafts; what
    exceeds the remaining budget is cut when committing.

    Args:
      batch_axis: the name of the axis that a `vmap` of this has: the members then read one subtree, which holds the
        drafts of all unfinished ones. Without the name, `vmap` makes each of them read every subtree.
    """
    plan = plan.ready()
    return commit(plan, state, draft_and_verify(plan, state, batch_axis=batch_axis))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class VerifiedDrafts:
    """What the first half of a round finds. Nodes outside the subtree that was read hold zeros."""

    key: jax.Array  # for the next round
    proposal: Proposal
    features: Float[Array, "M D"]
    rows: kv.Rows
    logits: Float[Array, "M V"]
    verdict: Verdict


def draft_and_verify(plan: Plan, state: State, *, batch_axis: str | None = None) -> VerifiedDrafts:
    """Drafts, verifies and accepts, as `decode_round` says; the plan is ready."""
    drafter, params, vocab = plan.drafter, plan.params, plan.config.vocab_size
    tree = drafter.tree
    key, draft_key, accept_key = jax.random.split(state.key, 3)
    with jax.named_scope("draft"):
        proposal = drafter.propose(params, state.draft, state.context, draft_key)
        proposal = checked_proposal(proposal, state.context.root, tree.size, vocab)
    with jax.named_scope("verify"):
        choices = subtree_choices(drafter, params.dtype, batched=batch_axis is not None)
        verify_nodes = functools.partial(_verify_nodes, plan, state.cache, proposal)
        branches = [functools.partial(verify_nodes, *choice) for choice in choices]
        # For every choice: is there a draft that it would miss?
        away = np.array([~np.isin(np.arange(tree.size), nodes) for nodes, _ in choices])
        misses = (jnp.any(away & (proposal.tokens != NO_DRAFT), axis=1) & ~state.finished).astype(jnp.int32)
        if batch_axis is not None:
            misses = jax.lax.pmax(misses, batch_axis)
        features, rows, logits = jax.lax.switch(jnp.argmin(misses).astype(jnp.int32), branches)
    with jax.named_scope("accept"):
        verdict = plan.acceptance(logits, proposal, tree, accept_key)
    return VerifiedDrafts(key, proposal, features, rows, logits, verdict)


def commit(plan: Plan, state: State, found: VerifiedDrafts) -> State:
    """The second half of a round: what was accepted goes into the text and the caches."""
    drafter, verdict = plan.drafter, found.verdict
    with jax.named_scope("commit"):
        drafted = jnp.maximum(found.proposal.tokens, 0)  # past the accepted ones there may be nodes without a draft
        path = jnp.asarray(drafter.tree.node_paths)[verdict.node]
        steps = jnp.arange(path.shape[0], dtype=jnp.int32)
        # The accepted drafts, then the target's own token; past that garbage.
        fresh = jnp.where(steps == verdict.accepted, verdict.next_token, drafted[jnp.roll(path, -1)])
        budget = jnp.where(state.finished, 0, state.limit - state.length)
        count, finished = _cut(fresh, verdict.accepted + 1, budget, plan.eos)
        features = found.features[verdict.node]
        state = dataclasses.replace(
            state,
            tokens=jax.lax.dynamic_update_slice(state.tokens, fresh, (state.length,)),
            length=state.length + count,
            finished=finished | ~_is_finite(features),
            cache=kv.write(state.cache, kv.gather(found.rows, path), count, after=verdict.next_token),
            features=features,
            key=found.key,
            rounds=state.rounds + jnp.where(state.finished, 0, 1),
            accepted=state.accepted.at[state.rounds].set(count - 1),
            confirmed=jnp.minimum(verdict.accepted, count),
        )
        draft = drafter.update(state.draft, state.context, verdict, path.shape[0])
        return dataclasses.replace(state, draft=draft)


def checked_proposal(proposal: Proposal, root: Int[Array, ""], size: int, vocab: int) -> Proposal:
    """The proposal around the true root; what is no token of the target's counts as no draft.

    Raises:
      ConfigError: a proposal for another tree or vocabulary (its shapes are static).
    """
    if not isinstance(proposal, Proposal):
        raise ConfigError(f"the drafter proposed a {type(proposal).__name__}; `propose` gives a Proposal of tokens.")
    tokens, log_q = proposal.tokens, proposal.log_q
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ConfigError(f"the drafter proposed tokens of {tokens.dtype}; they are whole numbers, NO_DRAFT for none.")
    if tokens.shape != (size,) or (log_q is not None and log_q.shape != (size, vocab)):
        laws = "" if log_q is None else f" and laws {log_q.shape}"
        raise ConfigError(
            f"the drafter proposed tokens of shape {tokens.shape}{laws}; its tree of {size} nodes and the target's "
            f"vocabulary of {vocab} need ({size},) and ({size}, {vocab})."
        )
    known = (tokens >= 0) & (tokens < vocab)
    return Proposal(jnp.where(known, tokens, NO_DRAFT).astype(jnp.int32).at[0].set(root), log_q)


_Nodes = tuple[Float[Array, "M D"], kv.Rows, Float[Array, "M V"]]


def verify(plan: Plan, tree: Tree, cache: kv.KVCache, tokens: Int[Array, "M"], size: int) -> _Nodes:
    """Features, keys and values, and logits of all nodes: the round's target forward, over `size` rows.

    Those past the tree's hold token 0, see themselves alone, and are dropped.
    """
    nodes, spare = tree.size, size - tree.size
    mask = np.eye(size, dtype=bool)
    mask[:nodes, :nodes] = tree.ancestors
    positions = cache.length + np.pad(tree.depths, (0, spare)).astype(np.int32)
    padded = jnp.pad(tokens, (0, spare))
    out = forward(plan.params, plan.config, padded, cache=cache, positions=positions, mask=mask)
    rows = kv.Rows(tuple(k[:, :, :nodes] for k in out.rows.k), tuple(v[:, :nodes] for v in out.rows.v))
    return out.features[:nodes], rows, unembed(plan.params, out.features)[:nodes]


def subtree_choices(drafter: Drafter, dtype: Any, *, batched: bool) -> list[tuple[tuple[int, ...], int]]:
    """The sets of nodes that a round may read, each with its number of rows: cheapest first, the whole tree last."""

    def rows(nodes: tuple[int, ...]) -> int:
        return len(nodes) if batched else ops.padded_rows(len(nodes), dtype)  # a batch has rows enough

    whole = tuple(range(drafter.tree.size))
    found = [whole]
    for nodes in sorted(drafter.subtrees, key=len, reverse=True):
        # One that is padded to as many rows as one that holds it would be a branch for nothing.
        if all(rows(nodes) < rows(other) for other in found if {*nodes} <= {*other}):
            found.append(nodes)
    return [(nodes, rows(nodes)) for nodes in sorted(found, key=rows)]


def _verify_nodes(plan: Plan, cache: kv.KVCache, proposal: Proposal, nodes: tuple[int, ...], size: int) -> _Nodes:
    """`verify` for these nodes alone; zeros stand for the others."""
    tree = plan.drafter.tree
    tokens = jnp.maximum(proposal.tokens, 0)  # a node without a draft holds any token; no rule accepts it
    if len(nodes) == tree.size:
        return verify(plan, tree, cache, tokens, size)
    where = np.array(nodes)

    def spread(x: Array, axis: int) -> Array:
        shape = (*x.shape[:axis], tree.size, *x.shape[axis + 1 :])
        return jnp.zeros(shape, x.dtype).at[(slice(None),) * axis + (where,)].set(x)

    features, rows, logits = verify(plan, tree.subtree(nodes), cache, tokens[where], size)
    rows = kv.Rows(tuple(spread(k, 2) for k in rows.k), tuple(spread(v, 1) for v in rows.v))
    return spread(features, 0), rows, spread(logits, 0)


def _cut(
    fresh: Int[Array, "E1"], count: Int[Array, ""], budget: Int[Array, ""], eos: tuple[Any, ...]
) -> tuple[Int[Array, ""], Bool[Array, ""]]:
    """How many of the `count` fresh tokens to commit (up to the first EOS, within the budget), and whether it ends."""
    count = jnp.minimum(count, budget)
    stops = jnp.isin(fresh, jnp.asarray(eos, jnp.int32)) & (jnp.arange(fresh.shape[0], dtype=jnp.int32) < count)
    hit = jnp.any(stops)
    count = jnp.where(hit, jnp.argmax(stops).astype(jnp.int32) + 1, count)
    return count, hit | (count == budget)


def _is_finite(features: Float[Array, "D"]) -> Bool[Array, ""]:
    # Where they are not, no token means anything: decoding ends, and the host says why (`decode.summarise`).
    return jnp.all(jnp.isfinite(features))


def start(
    plan: Plan, tokens: Int[Array, "S"], prompt_length: Int[Array, ""], limit: Int[Array, ""], key: jax.Array
) -> State:
    """Prefill: processes the prompt in chunks and commits the first token. Pure and unbatched.

    Args:
      tokens: the prompt, padded to the capacity S, a multiple of `PREFILL_CHUNK`.
      prompt_length: the prompt's length, at least 1.
      limit: the length (prompt included) at which decoding ends, above `prompt_length`.
    """
    with jax.named_scope("prefill"):
        features, cache = read(plan.params, plan.config, tokens, prompt_length)
    return first_token(plan, tokens, prompt_length, limit, key, features, cache)


def first_token(
    plan: Plan,
    tokens: Int[Array, "S"],
    prompt_length: Int[Array, ""],
    limit: Int[Array, ""],
    key: jax.Array,
    features: Float[Array, "D"],
    cache: kv.KVCache,
) -> State:
    """`start` once the target has read the prompt, which it does in the same way whatever drafts."""
    plan = plan.ready()
    drafter = plan.drafter
    with jax.named_scope("prefill"):
        # Before the root is known, so that a `vmap` over keys reads the one prompt once.
        draft = drafter.init(plan.params, Context(tokens, prompt_length, features))
    key, accept_key = jax.random.split(key)
    logits = unembed(plan.params, features[None])
    root = plan.acceptance(logits, Proposal(tokens[:1]), Tree.chain(0), accept_key).next_token
    one = jnp.int32(1)
    _, finished = _cut(root[None], one, limit - prompt_length, plan.eos)
    state = State(
        tokens=tokens.at[prompt_length].set(root),
        length=prompt_length + 1,
        limit=limit,
        finished=finished | ~_is_finite(features),
        cache=cache,
        features=features,
        draft=draft,
        key=key,
        rounds=jnp.int32(0),
        accepted=jnp.zeros_like(tokens),
        confirmed=jnp.int32(0),
        prompt_length=prompt_length,
    )
    zero = jnp.int32(0)
    return dataclasses.replace(state, draft=drafter.update(draft, state.context, Verdict(zero, zero, root), 1))


def run_rounds(plan: Plan, state: State) -> State:
    """Rounds until the budget is spent or EOS is committed: one `lax.while_loop`. Pure and unbatched."""
    return jax.lax.while_loop(lambda state: ~state.finished, functools.partial(decode_round, plan.ready()), state)


def batch_rounds(plan: Plan, states: State) -> State:
    """Rounds for a batch of states, a leading axis B at every leaf, until the last of them is finished.

    Each member gets what `run_rounds` gives it. There is one condition for the whole batch: with one per member, as
    `vmap` of `run_rounds` has it, every cache would be copied at every step.
    """
    step = jax.vmap(functools.partial(decode_round, plan.ready(), batch_axis="batch"), axis_name="batch")
    return jax.lax.while_loop(lambda states: ~jnp.all(states.finished), step, states)
