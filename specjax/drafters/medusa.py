"""Medusa (Cai et al. 2024): heads that read the target's last feature fill the tree with their top-k tokens."""

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from specjax.checks import check_is
from specjax.drafters.base import Context, DrafterBase
from specjax.errors import TreeError
from specjax.heads import Heads, draft_projection, top_tokens
from specjax.loading.load import Model
from specjax.proposal import Proposal
from specjax.target.params import Params
from specjax.tree import Tree


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MedusaDrafter(DrafterBase):
    """A node at depth d with rank r holds head d's r-th best token (heads counted from 1): a deterministic proposal.

    Attributes:
      heads: with their weights.
      tree: the topology (static).
      projection: what heads without their own multiply by [R D]; `prepare` fills it.

    Raises:
      ConfigError: no tree.
    """

    heads: Heads
    tree: Tree = field(metadata={"static": True})
    projection: Float[Array, "R D"] | None = None

    def __post_init__(self) -> None:
        check_is(self.tree, Tree, "the tree", "make one, such as Tree.chain(4) or Tree.parse(TEXT).")

    def check(self, target: Model) -> None:
        """Checks that heads, tree and target fit each other.

        Raises:
          ConfigError: no heads, or heads of another width or vocabulary than the target's.
          TreeError: a tree deeper than there are heads, or wider than the vocabulary.
        """
        check_is(self.heads, Heads, "heads", "load them: load_heads(SOURCE, model.config).")
        self.heads.check(target.config)
        heads = self.heads.config
        if self.tree.max_depth > heads.num_heads:
            raise TreeError(
                f"the tree is {self.tree.max_depth} deep, but there are {heads.num_heads} heads; take a shallower one."
            )
        widest = max(self.tree.max_rank_by_depth, default=0)
        if widest > (heads.reduced_vocab_size or heads.vocab_size):
            raise TreeError(
                f"the tree asks for {widest} candidates at one depth, more than the heads' vocabulary holds."
            )

    def prepare(self, target: Params) -> "MedusaDrafter":
        """Leaves out the heads below the tree, takes the others apart, and restricts the target's LM head to what they
        say."""
        used, heads, projection = max(self.tree.max_depth, 1), self.heads, self.projection
        if used < heads.config.num_heads:
            heads = heads.first(used)
        if projection is None:
            projection = draft_projection(heads, target.unembedding)
        return replace(self, heads=heads.split(), projection=projection)

    def propose(self, target: Params, state: None, context: Context, key: jax.Array) -> Proposal:
        """Top-k tokens of every head, laid out over the tree."""
        if self.tree.max_depth == 0:
            return Proposal(jnp.reshape(context.root, (1,)))
        ranked = top_tokens(self.heads, self.projection, context.features, max(self.tree.max_rank_by_depth))
        head, rank = self.tree.depths[1:] - 1, np.asarray(self.tree.ranks[1:])
        return Proposal(jnp.concatenate([context.root[None], ranked[head, rank]]))
