"""What drafters hand to acceptance rules, and what these give back."""

from dataclasses import dataclass

import jax
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Verdict:
    """The outcome of a round: the deepest accepted node, its depth (accepted drafts), and the target's own token."""

    node: Int[Array, ""]
    accepted: Int[Array, ""]
    next_token: Int[Array, ""]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Proposal:
    """A filled tree. `tokens[0]` is the root; `NO_DRAFT` marks a node without a guess, which is never accepted.

    The loop sets the root itself, and takes ids outside the target's vocabulary for `NO_DRAFT`.

    `log_q[m]` is the law that node m's token was drawn from, given its earlier siblings (natural logarithm, over the
    target's vocabulary; row 0 is unused). It sums to 1 there: a draft that also says what the target cannot must be cut
    and renormalised before it draws. Whether a node has a draft may depend on its earlier siblings alone. None means a
    deterministic proposal: every law is one-hot.
    """

    tokens: Int[Array, "M"]
    log_q: Float[Array, "M V"] | None = None


NO_DRAFT = -1
