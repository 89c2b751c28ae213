"""Acceptance rules: which drafts the target confirms, and the token it adds itself.

A rule is a frozen, hashable object (a static jit argument) called once a round with the target's logits at every node.
Each child is judged by its parent's distribution; a path stops at its first failure; the longest accepted path wins.
Everything is vectorised over the static tree: whether a path holds is one masked reduction over the ancestor mask, so
short paths need no padding token.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from specjax import ops
from specjax.errors import ConfigError
from specjax.proposal import NO_DRAFT, Proposal, Verdict
from specjax.sampling import Sampling, check_temperature, cooled
from specjax.tree import Tree


class Acceptance(Protocol):
    """`(logits [M V], proposal, tree, key) -> Verdict`, pure; `lossless`: the target's law is preserved."""

    lossless: ClassVar[bool]

    @property
    def needs_key(self) -> bool:
        """Whether the rule draws random numbers."""
        ...

    def __call__(self, logits: Float[Array, "M V"], proposal: Proposal, tree: Tree, key: jax.Array) -> Verdict: ...


def draw(logits: Float[Array, "V"], key: jax.Array) -> Int[Array, ""]:
    """One token from softmax(logits) by Gumbel noise: the one `jax.random.categorical` draws."""
    return ops.top_token(logits + jax.random.gumbel(key, logits.shape, logits.dtype))


def _on_accepted_path(passes: Bool[Array, "M"], tree: Tree) -> Bool[Array, "M"]:
    """Whether a node and all its ancestors pass; the root always does."""
    return jnp.all(passes.at[0].set(True) | ~jnp.asarray(tree.ancestors), axis=1)


def _deepest(accepted: Bool[Array, "M"], tree: Tree) -> Int[Array, ""]:
    # Nodes are in breadth-first order, so that the first maximum is on the first of the longest paths.
    return jnp.argmax(jnp.where(accepted, jnp.asarray(tree.depths), -1)).astype(jnp.int32)


def _parents(tree: Tree) -> Int[Array, "M"]:
    return jnp.asarray((0, *tree.parents[1:]), jnp.int32)


def _follow(chosen: Int[Array, "M"], tokens: Int[Array, "M"], tree: Tree) -> Verdict:
    """The verdict when the target's choice after every node is known: a draft holds if it is its parent's choice."""
    node = _deepest(_on_accepted_path(tokens == chosen[_parents(tree)], tree), tree)
    return Verdict(node, jnp.asarray(tree.depths)[node], chosen[node])


@dataclass(frozen=True)
class Greedy:
    """Accepts a draft that is the target's arg-max: the output is that of autoregressive greedy decoding."""

    lossless: ClassVar[bool] = True

    @property
    def needs_key(self) -> bool:
        """False: nothing is drawn."""
        return False

    def __call__(self, logits: Float[Array, "M V"], proposal: Proposal, tree: Tree, key: jax.Array) -> Verdict:
        return _follow(ops.top_token(logits), proposal.tokens, tree)


@dataclass(frozen=True)
class Sample:
    """Lossless sampling from the warped target, for every proposal and topology.

    Deterministic proposals: walking the siblings, accepting x with probability p(x) and renormalising after each
    rejection accepts child x with probability p(x) in all, and otherwise draws from p without the children. So does
    drawing once from p at every node and following the child that was drawn: the same law, exact by construction. Nodes
    of one depth share their random numbers, so that nodes of equal context (a hybrid may propose a path twice) choose
    alike; only one path is followed, hence the law of what is committed does not change.

    Stochastic proposals (`log_q`): speculative sampling from sibling to sibling (Leviathan et al. 2023; without
    replacement: Sequoia, Chen et al. 2024). Child x ~ q is accepted with probability min(1, p(x) / q(x)); after a
    rejection p becomes norm(max(0, p - q)); when no sibling is left the token comes from what remains of p.

    Raises:
      ConfigError: a parameter outside its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    lossless: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        self.sampling  # noqa: B018  # checks top-k and top-p

    @property
    def sampling(self) -> Sampling:
        """The description of what is drawn from."""
        return Sampling(self.temperature, self.top_k, self.top_p)

    @property
    def needs_key(self) -> bool:
        """True."""
        return True

    def __call__(self, logits: Float[Array, "M V"], proposal: Proposal, tree: Tree, key: jax.Array) -> Verdict:
        warped = self.sampling.warp(logits)
        if proposal.log_q is None or tree.max_depth == 0:
            noise = jax.random.gumbel(key, (tree.max_depth + 1, warped.shape[-1]), warped.dtype)
            return _follow(ops.top_token(warped + noise[tree.depths]), proposal.tokens, tree)
        return _walk_siblings(jax.nn.softmax(warped, axis=-1), proposal.tokens, jnp.exp(proposal.log_q), tree, key)


def _walk_siblings(
    p: Float[Array, "M V"], tokens: Int[Array, "M"], q: Float[Array, "M V"], tree: Tree, key: jax.Array
) -> Verdict:
    # Every node judges its children as if the walk came by, all nodes at once; the path through them is read off after.
    uniform_key, bonus_key = jax.random.split(key)
    uniform = jax.random.uniform(uniform_key, tokens.shape, p.dtype)
    chosen = jnp.full(tokens.shape, -1, jnp.int32)  # the child that each node goes on to
    for child in tree.child_table.T:  # the first children of all nodes, then the second ones, ...
        there = jnp.asarray(child >= 0) & (tokens[child] != NO_DRAFT) & (chosen < 0)
        x = jnp.maximum(tokens[child], 0)[:, None]
        p_x, q_x = (jnp.take_along_axis(law, x, axis=1)[:, 0] for law in (p, q[child]))
        accepted = there & (uniform[child] * q_x < p_x)
        residual = jnp.maximum(p - q[child], 0.0)
        mass = jnp.sum(residual, axis=1, keepdims=True)
        # No mass is left only where p equals q, and there nothing is rejected but by rounding: p may stay.
        rejected = there & ~accepted
        p = jnp.where(rejected[:, None] & (mass > 0), residual / jnp.where(mass > 0, mass, 1.0), p)
        chosen = jnp.where(accepted, child, chosen)
    passes = chosen[_parents(tree)] == jnp.arange(tree.size, dtype=jnp.int32)
    node = _deepest(_on_accepted_path(passes, tree), tree)
    return Verdict(node, jnp.asarray(tree.depths)[node], draw(jnp.log(p[node]), bonus_key))


@dataclass(frozen=True)
class Typical:
    """Typical acceptance (Medusa, section 2.3.1). **Not lossless**: it accepts any plausible token.

    With p = softmax(logits / temperature) and H = -sum p ln(p + 1e-5), rule `paper` accepts a draft x while
    p[x] > min(epsilon, delta * exp(-H)); rule `abyo` (the Rust system's) while p[x] >= max(epsilon, delta * exp(-H)).
    Among the longest accepted paths the one with the largest sum of ln p wins. The target's own token is its arg-max,
    as in the paper, or with `bonus="sample"` a draw from p.

    Raises:
      ConfigError: a parameter outside its range.
    """

    temperature: float = 0.7
    epsilon: float = 0.09
    delta: float = 0.3
    rule: Literal["paper", "abyo"] = "paper"
    bonus: Literal["greedy", "sample"] = "greedy"
    lossless: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        if not (0 <= self.epsilon <= 1 and self.delta >= 0):
            raise ConfigError(f"epsilon {self.epsilon}, delta {self.delta}; expected 0 <= epsilon <= 1 and delta >= 0.")
        if self.rule not in ("paper", "abyo") or self.bonus not in ("greedy", "sample"):
            raise ConfigError(
                f"rule {self.rule!r}, bonus {self.bonus!r}; expected 'paper' or 'abyo', 'greedy' or 'sample'."
            )

    @property
    def needs_key(self) -> bool:
        """Whether a PRNG key is consumed."""
        return self.bonus == "sample"

    def __call__(self, logits: Float[Array, "M V"], proposal: Proposal, tree: Tree, key: jax.Array) -> Verdict:
        tokens = proposal.tokens
        log_p = jax.nn.log_softmax(cooled(logits, self.temperature), axis=-1)
        p = jnp.exp(log_p)
        bar = self.delta * jnp.exp(jnp.sum(p * jnp.log(p + 1e-5), axis=-1))
        parents = _parents(tree)
        drafted = log_p[parents, tokens]
        if self.rule == "paper":
            passes = jnp.exp(drafted) > jnp.minimum(self.epsilon, bar)[parents]
        else:
            passes = jnp.exp(drafted) >= jnp.maximum(self.epsilon, bar)[parents]
        accepted = _on_accepted_path(passes & (tokens != NO_DRAFT), tree)
        depths, ancestors = jnp.asarray(tree.depths), jnp.asarray(tree.ancestors)
        longest = accepted & (depths == jnp.max(jnp.where(accepted, depths, 0)))
        score = jnp.sum(jnp.where(ancestors, drafted.at[0].set(0.0), 0.0), axis=1)
        node = jnp.argmax(jnp.where(longest, score, -jnp.inf)).astype(jnp.int32)
        if self.bonus == "sample":
            next_token = draw(cooled(logits[node], self.temperature), key)
        else:
            next_token = ops.top_token(logits[node])
        return Verdict(node, depths[node], next_token)


def acceptance_for(
    temperature: float | None = None, top_k: int | None = None, top_p: float = 1.0, *, typical: bool = False
) -> Greedy | Sample | Typical:
    """The rule that settings ask for, as the command line, experiments and text generation give them.

    Greedy at temperature 0 or none, and sampling above; or typical acceptance, which has one of its own for none.

    Raises:
      ConfigError: a parameter outside its range, or one that the rule does not have.
    """
    if typical:
        Sampling(1.0, top_k, top_p).refuse_warping("typical acceptance has none: choose one of the two")
        return Typical() if temperature is None else Typical(temperature)
    sampling = Sampling(temperature or 0.0, top_k, top_p)
    return Sample(sampling.temperature, top_k, top_p) if sampling.temperature else Greedy()
