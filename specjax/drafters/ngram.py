"""N-gram drafting (prompt lookup, Saxena 2023; LLMA, Yang et al. 2023): the text so far proposes how it goes on.

No weights and no host: matches are found by comparing the token buffer with itself, in static shapes.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from specjax.checks import check_is, is_whole
from specjax.drafters.base import Context, DrafterBase
from specjax.errors import ConfigError
from specjax.proposal import NO_DRAFT, Proposal
from specjax.target.params import Params
from specjax.tree import Tree


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NgramDrafter(DrafterBase):
    """A node of rank r holds the r-th best continuation of its parent's context; a deterministic proposal.

    Continuations are what followed earlier occurrences of the context's last tokens, in the prompt or in the generated
    text: those after the longest match first, the most recent of them first, each token once. A node whose context
    occurs nowhere, or continues in too few ways, stays without a draft. What follows a short match is seldom the rest
    of the text, so a deep tree is filled after long ones alone (`reach`), and a round costs what it is likely to gain.

    Attributes:
      tree: the topology (static); a chain copies one earlier passage.
      max_n: matches are compared up to this many tokens back from the root.
      min_n: shorter matches propose nothing.
      reach: how many tokens ahead to draft after a match of 1, 2, ... tokens; after longer ones, and in any case after
        one of max_n tokens, the whole tree.

    Raises:
      ConfigError: no tree, not 1 <= min_n <= max_n, or a reach that is no tuple of positive whole numbers.
    """

    tree: Tree = field(metadata={"static": True})
    max_n: int = field(default=3, metadata={"static": True})
    min_n: int = field(default=1, metadata={"static": True})
    reach: tuple[int, ...] = field(default=(3, 7), metadata={"static": True})

    def __post_init__(self) -> None:
        check_is(self.tree, Tree, "the tree", "make one, such as Tree.chain(4) or Tree.parse(TEXT).")
        if not isinstance(self.reach, tuple | list) or not all(is_whole(depth) and depth > 0 for depth in self.reach):
            raise ConfigError(
                f"reach is {self.reach!r}; expected a tuple of positive whole numbers, () for always the whole tree."
            )
        object.__setattr__(self, "reach", tuple(self.reach))
        if not (is_whole(self.min_n) and is_whole(self.max_n) and 1 <= self.min_n <= self.max_n):
            raise ConfigError(
                f"min_n is {self.min_n!r} and max_n {self.max_n!r}; expected whole numbers, 1 <= min_n <= max_n."
            )

    @property
    def subtrees(self) -> tuple[tuple[int, ...], ...]:
        """The root alone, for text that repeats nothing, and the nodes within each reach."""
        depths = sorted({0, *self._reaches[self.min_n :]})
        within = (tuple(np.flatnonzero(self.tree.depths <= depth).tolist()) for depth in depths)
        return tuple(nodes for nodes in within if len(nodes) < self.tree.size)

    def propose(self, target: Params, state: None, context: Context, key: jax.Array) -> Proposal:
        """Looks the newest tokens up in what stands before them, then each draft below its parent's matches."""
        tree, text, last = self.tree, context.tokens, context.length - 1
        slots = jnp.arange(text.shape[0], dtype=jnp.int32)
        follower = jnp.roll(text, -1)  # follower[j] came after text[j]
        drafts = [jnp.reshape(context.root, (1,))]
        matched = self._matches(text, last)[None]  # [n S]: for the n nodes of a level, the match that ends at slot j
        reach = jnp.asarray(self._reaches, jnp.int32)[jnp.max(matched)]
        for depth in range(1, tree.max_depth + 1):
            nodes = np.flatnonzero(tree.depths == depth)
            above = np.array([tree.parents[n] for n in nodes]) - np.flatnonzero(tree.depths == depth - 1)[0]
            candidates = self._distinct(matched, follower, tree.max_rank_by_depth[depth - 1])
            drafted = candidates[above, np.array([tree.ranks[n] for n in nodes])]
            drafts.append(jnp.where(depth <= reach, drafted, NO_DRAFT))
            # A match goes on where the draft came next; elsewhere one of length 1 may begin.
            before = jnp.where(slots > 0, jnp.roll(matched[above], 1, axis=1), 0)
            matched = jnp.where((text == drafted[:, None]) & (slots < last), before + 1, 0)
        return Proposal(jnp.concatenate(drafts))

    def _matches(self, text: Int[Array, "S"], last: Int[Array, ""]) -> Int[Array, "S"]:
        # How many tokens, up to max_n, agree with the newest ones when compared backwards from slot j < last.
        slots = jnp.arange(text.shape[0], dtype=jnp.int32)
        running, length = slots < last, jnp.zeros(text.shape[0], jnp.int32)
        for back in range(self.max_n):
            running &= (jnp.roll(text, back) == jnp.take(text, last - back, mode="clip")) & (slots >= back)
            length += running.astype(jnp.int32)
        return length

    @property
    def _reaches(self) -> list[int]:
        # By the length of the longest match, 0 to max_n. Below min_n nothing is drafted, whatever the reach.
        short = [0, *self.reach][: self.max_n]
        return short + [self.tree.max_depth] * (self.max_n + 1 - len(short))

    def _distinct(self, matched: Int[Array, "n S"], follower: Int[Array, "S"], count: int) -> Int[Array, "n count"]:
        # The longest match wins, then the most recent; its follower's other occurrences are out for the next rank.
        size = matched.shape[1]
        score = jnp.where(matched >= self.min_n, matched * size + jnp.arange(size, dtype=jnp.int32), -1)
        picked = []
        for _ in range(count):
            best, at = jnp.max(score, axis=1), jnp.argmax(score, axis=1)
            token = jnp.where(best >= 0, follower[at], NO_DRAFT)
            picked.append(token)
            score = jnp.where(follower == token[:, None], -1, score)
        return jnp.stack(picked, axis=1)
