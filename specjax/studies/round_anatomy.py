"""A round taken apart: what was drafted, what the target said at every node, what was accepted."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from specjax import ops
from specjax.acceptance import Greedy
from specjax.decode import plan_for, prefill
from specjax.drafters.base import Drafter
from specjax.loading.load import Model
from specjax.loop import Plan, State, commit, draft_and_verify
from specjax.proposal import NO_DRAFT


@dataclass(frozen=True)
class RoundAnatomy:
    """One greedy round, on the host.

    Attributes:
      before: the tokens that were committed before it, prompt included; the last is the root [length].
      drafts: the token at every node, the root's first; -1 for a node without a draft [M].
      choices: the target's own choice after every node [M]; -1 for a node without a draft.
      accepted: the nodes of the accepted path, without the root.
      committed: the tokens that the round added: accepted drafts, then the target's own, cut at the end of decoding.
    """

    before: Int[np.ndarray, "length"]
    drafts: Int[np.ndarray, "M"]
    choices: Int[np.ndarray, "M"]
    accepted: tuple[int, ...]
    committed: Int[np.ndarray, "k"]


@jax.jit
def _round(plan: Plan, state: State) -> tuple[jax.Array, jax.Array, jax.Array, State]:
    found = draft_and_verify(plan, state)
    drafts = found.proposal.tokens
    choices = jnp.where(drafts == NO_DRAFT, NO_DRAFT, ops.top_token(found.logits))
    return drafts, choices, found.verdict.node, commit(plan, state, found)


def take_apart(
    model: Model, prompt_ids: Sequence[int] | np.ndarray, *, drafter: Drafter, max_new_tokens: int = 128
) -> Iterator[RoundAnatomy]:
    """The rounds of greedy `generate`, one by one, each with what happened in it.

    Slower than decoding: every round comes to the host.

    Raises:
      PromptError: what `generate` refuses about the request, and a `max_new_tokens` of 0.
      SpecJaxError: whatever `drafter.check` finds.
    """
    state: State = prefill(model, prompt_ids, drafter=drafter, max_new_tokens=max_new_tokens)
    plan = plan_for(model, drafter, Greedy())
    tree = plan.drafter.tree
    while not bool(state.finished):
        length = int(state.length)
        before = np.asarray(state.tokens[:length])
        drafts, choices, node, state = _round(plan, state)
        path = tuple(n for n in np.flatnonzero(tree.ancestors[int(node)]).tolist() if n)
        committed = np.asarray(state.tokens[length : int(state.length)])
        yield RoundAnatomy(before, np.asarray(drafts), np.asarray(choices), path, committed)
