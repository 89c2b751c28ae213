"""The drafter protocol: anything that can fill a static tree with guesses fits the decoding loop."""

from dataclasses import dataclass
from typing import Any, Protocol, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from specjax.loading.load import Model
from specjax.proposal import Proposal, Verdict
from specjax.target.params import Params
from specjax.tree import Tree


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Context:
    """What a drafter may look at.

    `tokens[:length]` are committed; the newest of them is the root, the only one the target has not yet processed.
    `features` is the target's final-norm hidden state at the position that predicted the root. (Not so in
    `Drafter.init`, whose context is the prompt alone.)
    """

    tokens: Int[Array, "S"]
    length: Int[Array, ""]
    features: Float[Array, "D"]

    @property
    def root(self) -> Int[Array, ""]:
        """The newest committed token."""
        return self.tokens[self.length - 1]


class Drafter(Protocol):
    """Three pure functions over a pytree state, and the static tree they fill. Implementations are pytrees themselves.

    The functions are traced once; `target` are the target's parameters, which some drafters share. `init`, `propose`
    and `update` are called on what `prepare` gave. Their state is a sequence's own: a batch holds one for each member.
    What is the same for all sequences belongs into the prepared drafter. A drafter that lacks one of these members, or
    inherits its empty body from here, is refused.
    """

    @property
    def tree(self) -> Tree:
        """The topology that `propose` fills (static)."""
        ...

    @property
    def max_positions(self) -> int | None:
        """The longest sequence it can read, prompt and continuation together; None: any."""
        ...

    @property
    def subtrees(self) -> tuple[tuple[int, ...], ...]:
        """Sets of nodes outside which a round may have no draft (static); each holds its nodes' parents, so the root.

        In such a round the target reads these nodes alone; in a batch, where that holds for every member. Each set is
        a forward pass to compile. Empty: there is always a draft everywhere.
        """
        ...

    def check(self, target: Model) -> None:
        """Raises a `SpecJaxError` when this drafter cannot draft for that target. Called before tracing."""

    def prepare(self, target: Params) -> "Drafter":
        """This drafter with what it computes from the target once for all sequences. Idempotent.

        Called before tracing, so that it may also drop static fields that only `check` reads (a tokenizer is hashed by
        identity: kept, it would make equal requests compile anew).
        """
        ...

    def init(self, target: Params, context: Context) -> Any:
        """The state after the prompt; `update` tells the first token that the target commits to it.

        Here the target has processed all of `context.tokens[:length]`, and `features` is at the last of them.
        """

    def propose(self, target: Params, state: Any, context: Context, key: jax.Array) -> Proposal:
        """Fills the tree for the next round."""
        ...

    def update(self, state: Any, context: Context, verdict: Verdict, longest: int) -> Any:
        """The state after a round, or after the first token.

        Args:
          context: already holds the newly committed tokens.
          verdict: in this drafter's own nodes; the root where another part of a hybrid was followed.
          longest: the most tokens that can have been committed (static): 1 after the prompt, and after a round one
            more than the depth of the loop's tree, which for a part of a hybrid may exceed its own.
        """


class DrafterBase:
    """What most drafters have in common: no files, no state, any length, a guess everywhere. A subclass, a frozen
    dataclass registered as a pytree, gives `tree` and `propose`, and what else differs."""

    @property
    def max_positions(self) -> int | None:
        """Any length."""
        return None

    @property
    def subtrees(self) -> tuple[tuple[int, ...], ...]:
        """There is always a guess."""
        return ()

    def check(self, target: Model) -> None:
        """Fits every target."""

    def prepare(self, target: Params) -> Self:
        """Nothing to prepare."""
        return self

    def init(self, target: Params, context: Context) -> Any:
        """No state."""

    def update(self, state: Any, context: Context, verdict: Verdict, longest: int) -> Any:
        """No state."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NoDrafter(DrafterBase):
    """Drafts nothing: a tree of the root alone turns the speculative round into autoregressive decoding."""

    @property
    def tree(self) -> Tree:
        """The root alone."""
        return Tree.chain(0)

    def propose(self, target: Params, state: None, context: Context, key: jax.Array) -> Proposal:
        """The root."""
        return Proposal(jnp.reshape(context.root, (1,)))
