"""The drafter protocol: anything that can fill a static tree with guesses fits the decoding loop."""

from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from specjax.acceptance import Proposal, Verdict
from specjax.loading.load import Model
from specjax.params import Params
from specjax.tree import Tree


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Context:
    """What a drafter may look at.

    `tokens[:length]` are committed; the newest of them is the root, the only one the target has not yet processed.
    `features` is the target's final-norm hidden state at the position that predicted the root.
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

    The functions are traced once; `target` are the target's parameters, which some drafters share.
    """

    @property
    def tree(self) -> Tree:
        """The topology that `propose` fills (static)."""
        ...

    def check(self, target: Model) -> None:
        """Raises a `SpecJaxError` when this drafter cannot draft for that target. Called before tracing."""

    def init(self, target: Params, context: Context) -> Any:
        """The drafter's state after the prompt."""

    def propose(self, target: Params, state: Any, context: Context, key: jax.Array) -> Proposal:
        """Fills the tree for the next round."""
        ...

    def update(self, state: Any, context: Context, verdict: Verdict) -> Any:
        """The state after a round; `context` already holds the newly committed tokens."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NoDrafter:
    """Drafts nothing: a tree of the root alone turns the speculative round into autoregressive decoding."""

    @property
    def tree(self) -> Tree:
        """The root alone."""
        return Tree.chain(0)

    def check(self, target: Model) -> None:
        """Fits every target."""

    def init(self, target: Params, context: Context) -> None:
        """No state."""

    def propose(self, target: Params, state: None, context: Context, key: jax.Array) -> Proposal:
        """The root."""
        return Proposal(jnp.reshape(context.root, (1,)))

    def update(self, state: None, context: Context, verdict: Verdict) -> None:
        """No state."""
