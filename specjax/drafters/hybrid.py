"""Hybrid drafting: one static tree whose branches come from different drafters."""

import functools
import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from specjax.checks import check_implements
from specjax.drafters.base import Context, Drafter
from specjax.errors import ConfigError
from specjax.loading.load import Model
from specjax.proposal import NO_DRAFT, Proposal, Verdict
from specjax.target.params import Params
from specjax.tree import Tree


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class HybridDrafter:
    """The parts' trees side by side below one root, for instance an n-gram chain beside a Medusa tree.

    Siblings are tried part by part. Two parts may propose the same path: then `Greedy` gives the same tokens and
    `Sample` the same law as ever. (`Typical` is lossy: its output depends on what is drafted.)

    Raises:
      ConfigError: no parts, or one drafter in place of a tuple of them.
    """

    parts: tuple[Drafter, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.parts, tuple | list):
            raise ConfigError(f"the parts of a hybrid are a {type(self.parts).__name__}; give a tuple of drafters.")
        if not self.parts:
            raise ConfigError("a hybrid has no parts; give at least one drafter.")
        object.__setattr__(self, "parts", tuple(self.parts))

    @property
    def tree(self) -> Tree:
        """The merged topology: each part keeps its shape, its ranks at depth 1 come after those of the parts before."""
        return _merge(tuple(part.tree for part in self.parts))[0]

    @property
    def max_positions(self) -> int | None:
        """The shortest of the parts'."""
        return min((n for n in (part.max_positions for part in self.parts) if n is not None), default=None)

    @property
    def subtrees(self) -> tuple[tuple[int, ...], ...]:
        """Every part's, beside each of the other parts' or all of their nodes.

        Of parts with so many that there would be more than eight combinations, the first and the whole tree.
        """
        tree, places = _merge(tuple(part.tree for part in self.parts))
        choices = [(*part.subtrees, tuple(range(part.tree.size))) for part in self.parts]
        if math.prod(map(len, choices)) > 8:  # each is a forward pass to compile
            choices = [(sets[0], sets[-1]) for sets in choices]
        sets = (
            {int(place[node]) for place, nodes in zip(places, chosen, strict=True) for node in nodes}
            for chosen in itertools.product(*choices)
        )
        return tuple(dict.fromkeys(tuple(sorted(nodes)) for nodes in sets if len(nodes) < tree.size))

    def check(self, target: Model) -> None:
        """Whatever the parts raise; ConfigError when one is no drafter."""
        for part in self.parts:
            check_implements(part, Drafter, "NgramDrafter(Tree.chain(4))")
            part.check(target)

    def prepare(self, target: Params) -> "HybridDrafter":
        """The parts, prepared."""
        return HybridDrafter(tuple(part.prepare(target) for part in self.parts))

    def init(self, target: Params, context: Context) -> tuple[Any, ...]:
        """The parts' states."""
        return tuple(part.init(target, context) for part in self.parts)

    def propose(self, target: Params, state: tuple[Any, ...], context: Context, key: jax.Array) -> Proposal:
        """Every part fills its branches. Beside sampled ones, deterministic drafts are drawn from one-hot laws."""
        tree, places = _merge(tuple(part.tree for part in self.parts))
        keys = jax.random.split(key, len(self.parts))
        proposals = [p.propose(target, s, context, k) for p, s, k in zip(self.parts, state, keys, strict=True)]
        tokens = jnp.full(tree.size, NO_DRAFT, jnp.int32)
        for place, proposal in zip(places, proposals, strict=True):
            tokens = tokens.at[place].set(proposal.tokens)
        if all(proposal.log_q is None for proposal in proposals):
            return Proposal(tokens)
        log_q = jnp.full((tree.size, target.unembedding.shape[0]), -jnp.inf, jnp.float32)
        for place, proposal in zip(places, proposals, strict=True):
            log_q = log_q.at[place].set(_laws(proposal, log_q.shape[1]))
        return Proposal(tokens, log_q)

    def update(self, state: tuple[Any, ...], context: Context, verdict: Verdict, longest: int) -> tuple[Any, ...]:
        """Every part learns what was committed, with the verdict in its own nodes."""
        tree, places = _merge(tuple(part.tree for part in self.parts))
        states = []
        for part, place, inner in zip(self.parts, places, state, strict=True):
            own = np.zeros(tree.size, np.int32)  # the root stands for the other parts' nodes
            own[place] = np.arange(len(place))
            node = jnp.asarray(own)[verdict.node]
            mine = replace(verdict, node=node, accepted=jnp.asarray(part.tree.depths)[node])
            states.append(part.update(inner, context, mine, longest))
        return tuple(states)


def _laws(proposal: Proposal, vocab: int) -> Float[Array, "M V"]:
    if proposal.log_q is not None:
        return proposal.log_q
    own = jnp.arange(vocab, dtype=jnp.int32) == proposal.tokens[:, None]
    return jnp.where(own, jnp.float32(0), jnp.float32(-jnp.inf))


@functools.lru_cache(maxsize=64)
def _merge(trees: tuple[Tree, ...]) -> tuple[Tree, tuple[np.ndarray, ...]]:
    """The merged tree and, for every part, where its nodes stand in it."""
    paths: list[list[tuple[int, ...]]] = []
    offset = 0
    for tree in trees:
        paths.append([(path[0] + offset, *path[1:]) for path in tree.rank_paths])
        offset += tree.max_rank_by_depth[0] if tree.max_depth else 0
    merged = Tree.from_paths([path for part in paths for path in part], name="+".join(t.name or "tree" for t in trees))
    node = {path: i + 1 for i, path in enumerate(merged.rank_paths)}
    return merged, tuple(np.array([0, *(node[path] for path in part)], np.int32) for part in paths)
