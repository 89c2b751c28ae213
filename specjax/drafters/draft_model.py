"""A draft model (Leviathan et al. 2023; Chen et al. 2023): a small decoder drafts chains or, with siblings, trees."""

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from specjax.checks import check_is
from specjax.drafters.base import Context, DrafterBase
from specjax.errors import ConfigError, TreeError
from specjax.loading.gguf_tokenizer import PADDING
from specjax.loading.load import Model
from specjax.proposal import NO_DRAFT, Proposal, Verdict
from specjax.sampling import Sampling
from specjax.target import cache as kv
from specjax.target.model import forward, read, unembed
from specjax.target.params import Params
from specjax.tree import Tree


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DraftState:
    """The draft model after every committed token, the root included (unlike the target, which has yet to read it)."""

    cache: kv.KVCache
    features: Float[Array, "D"]  # at the root


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DraftModelDrafter(DrafterBase):
    """Any Llama or Qwen2 as a drafter, with a cache of its own.

    At temperature 0 a node of rank r holds its parent's r-th best token: a deterministic proposal. Above, siblings are
    drawn without replacement from the draft's warped distribution (Gumbel top-k), in the order of their ranks, and the
    proposal carries their laws. Every temperature is lossless under `Sample`, whatever the target's; equal ones accept
    most. The whole tree is drafted in every round, also where fewer tokens remain to be said.

    Attributes:
      draft: the model.
      tree: the topology (static); a round costs `tree.max_depth` forwards of the draft.
      temperature, top_k, top_p: how the draft samples (static).
      token_map: target id of every draft id [Vd], for drafts of a reduced vocabulary; -1 marks the row as which all
        other tokens are read. None: ids mean the same in both, up to the smaller vocabulary's end.
      to_draft: the draft id of every target id [V]; `prepare` fills it.

    Raises:
      ConfigError: no tree, or a sampling parameter outside its range.
    """

    draft: Model
    tree: Tree = field(metadata={"static": True})
    temperature: float = field(default=0.0, metadata={"static": True})
    top_k: int | None = field(default=None, metadata={"static": True})
    top_p: float = field(default=1.0, metadata={"static": True})
    token_map: Int[Array, "Vd"] | None = None
    to_draft: Int[Array, "V"] | None = None

    def __post_init__(self) -> None:
        check_is(self.tree, Tree, "the tree", "make one, such as Tree.chain(4) or Tree.parse(TEXT).")
        self.sampling  # noqa: B018  # checks it

    @property
    def sampling(self) -> Sampling:
        """How the draft draws."""
        return Sampling(self.temperature, self.top_k, self.top_p)

    @property
    def max_positions(self) -> int:
        """The draft's own context."""
        return self.draft.config.max_positions

    def check(self, target: Model) -> None:
        """Checks that draft and target speak of the same tokens.

        Raises:
          ConfigError: no model, vocabularies that differ in more than padding at the end, or a token map that does not
            fit.
          TreeError: more siblings than the draft has tokens.
        """
        check_is(self.draft, Model, "the draft", "load_draft(SOURCE) gives a Model and its token_map.")
        size, wanted = self.draft.config.vocab_size, target.config.vocab_size
        if self.to_draft is not None and self.to_draft.shape != (wanted,):
            raise ConfigError(
                f"this drafter was prepared for a target of {len(self.to_draft)} tokens, and this one has {wanted}; "
                "make it anew, and let `generate` prepare it."
            )
        if self.token_map is not None:
            ids = np.asarray(self.token_map)
            proposed = ids[ids >= 0]
            if ids.shape != (size,) or len(set(proposed.tolist())) != len(proposed) or (proposed >= wanted).any():
                raise ConfigError(
                    f"the token map has shape {ids.shape} and ids up to {ids.max(initial=-1)}; expected one distinct "
                    f"target id below {wanted} for each of the draft's {size} tokens, or -1."
                )
            if len(proposed) < wanted and (ids < 0).sum() != 1:
                raise ConfigError(
                    f"the token map names {len(proposed)} of the target's {wanted} tokens and has "
                    f"{(ids < 0).sum()} entries of -1; expected exactly one, the row that stands for all others."
                )
        elif self.to_draft is None:  # a prepared drafter has dropped its tokenizer
            self._check_tokenizers(target)
        if self.tree.child_table.shape[1] > min(size, wanted) or max(self.tree.ranks) >= min(size, wanted):
            raise TreeError(
                f"the tree asks for more siblings than the draft's vocabulary of {min(size, wanted)} holds."
            )

    def _check_tokenizers(self, target: Model) -> None:
        """Equal tokenizers may have vocabularies padded to different sizes; without both, only equal sizes will do."""
        mine, theirs = self.draft.tokenizer, target.tokenizer
        sizes = f"{self.draft.config.vocab_size} and {target.config.vocab_size}"
        if mine is not None and theirs is not None:
            shared = min(mine.vocab_size, theirs.vocab_size)
            differing = {
                (token, number)
                for token, number in set(mine.backend.get_vocab().items()) ^ set(theirs.backend.get_vocab().items())
                if number < shared or not PADDING.fullmatch(token)
            }
            if differing:
                token, number = min(differing, key=lambda pair: pair[1])
                raise ConfigError(
                    f"draft and target have different tokenizers: {len(differing)} entries differ, the first is token "
                    f"{token!r} with id {number}. Draft with a model of the target's family, or give a token_map."
                )
        elif self.draft.config.vocab_size != target.config.vocab_size:
            raise ConfigError(
                f"the vocabularies of draft and target have {sizes} entries, and without both tokenizers nobody can "
                "tell whether they differ in padding alone; load both with their tokenizers, or give a token_map."
            )

    def prepare(self, target: Params) -> "DraftModelDrafter":
        """Inverts the token map, and drops the tokenizer."""
        if self.to_draft is not None:
            return self
        size, wanted = self.draft.config.vocab_size, target.unembedding.shape[0]
        if self.token_map is None:
            to_draft = jnp.minimum(jnp.arange(wanted, dtype=jnp.int32), size - 1)
        else:
            rows, ids = jnp.arange(size, dtype=jnp.int32), self.token_map
            other = jnp.max(jnp.where(ids < 0, rows, 0))
            to_draft = jnp.full(wanted, other, jnp.int32).at[jnp.where(ids < 0, wanted, ids)].set(rows, mode="drop")
        return replace(self, draft=replace(self.draft, tokenizer=None), to_draft=to_draft)

    def init(self, target: Params, context: Context) -> DraftState:
        """Reads the prompt."""
        features, cache = read(self.draft.params, self.draft.config, self._read_as(context.tokens), context.length)
        return DraftState(cache, features)

    def _read_as(self, tokens: Int[Array, "n"]) -> Int[Array, "n"]:
        assert self.to_draft is not None, "call prepare first"
        return jnp.take(self.to_draft, tokens, mode="clip")

    def propose(self, target: Params, state: DraftState, context: Context, key: jax.Array) -> Proposal:
        """Depth by depth: the draft reads the nodes so far, each sees its ancestors, and their children are chosen."""
        tree, wanted = self.tree, target.unembedding.shape[0]
        tokens = jnp.reshape(context.root, (1,))  # of the nodes so far, in node order
        laws = [jnp.full((1, wanted), -jnp.inf, jnp.float32)]
        features = state.features[None]
        for depth in range(tree.max_depth):
            level = np.flatnonzero(tree.depths == depth)
            if depth:
                # The root is in the cache; everything below it is read anew, which for a small tree costs one forward.
                drafted = slice(1, tree.depths.searchsorted(depth, side="right"))
                out = forward(
                    self.draft.params,
                    self.draft.config,
                    self._read_as(jnp.maximum(tokens[1:], 0)),
                    cache=state.cache,
                    positions=state.cache.length + tree.depths[drafted] - 1,
                    mask=tree.ancestors[drafted, drafted],
                )
                features = out.features[level - 1]
            children = [
                (row, order, child) for row, n in enumerate(level) for order, child in enumerate(tree.children[n])
            ]
            rows, orders, nodes = (np.array(column) for column in zip(*children, strict=True))
            logits = self._target_logits(features, wanted)
            if self.temperature:
                chosen, law = self._draw(logits, int(orders.max()) + 1, jax.random.fold_in(key, depth))
                laws.append(law[rows, orders])
                picked = chosen[rows, orders]
            else:
                ranks = np.asarray(tree.ranks)[nodes]
                picked = jax.lax.top_k(logits, int(ranks.max()) + 1)[1].astype(jnp.int32)[rows, ranks]
            # A node without a draft has no children either.
            tokens = jnp.concatenate([tokens, jnp.where(tokens[level[rows]] == NO_DRAFT, NO_DRAFT, picked)])
        return Proposal(tokens, jnp.concatenate(laws) if self.temperature else None)

    def _draw(
        self, logits: Float[Array, "n V"], count: int, key: jax.Array
    ) -> tuple[Int[Array, "n k"], Float[Array, "n k V"]]:
        # `count` draws without replacement, and the law of each given those before it.
        logits = self.sampling.warp(logits)
        best, chosen = jax.lax.top_k(logits + jax.random.gumbel(key, logits.shape, logits.dtype), count)
        chosen = jnp.where(best == -jnp.inf, NO_DRAFT, chosen.astype(jnp.int32))  # fewer possible tokens than siblings
        laws = []
        for order in range(count):
            laws.append(jax.nn.log_softmax(logits, axis=-1))
            logits = jnp.where(jnp.arange(logits.shape[1], dtype=jnp.int32) == chosen[:, order, None], -jnp.inf, logits)
        return chosen, jnp.stack(laws, axis=1)

    def _target_logits(self, features: Float[Array, "n D"], wanted: int) -> Float[Array, "n V"]:
        # Over the target's vocabulary; what the draft cannot say is impossible.
        logits = unembed(self.draft.params, features)
        if self.token_map is not None:
            places = jnp.where(self.token_map < 0, wanted, self.token_map)
            return jnp.full((len(features), wanted), -jnp.inf, jnp.float32).at[:, places].set(logits, mode="drop")
        common = logits[:, :wanted]
        return jnp.pad(common, ((0, 0), (0, wanted - common.shape[1])), constant_values=-jnp.inf)

    def update(self, state: DraftState, context: Context, verdict: Verdict, longest: int) -> DraftState:
        """Reads the newly committed tokens. The window is as long as a round can be; what lies past them is garbage."""
        window = state.cache.length + jnp.arange(longest, dtype=jnp.int32)
        tokens = self._read_as(jnp.take(context.tokens, window, mode="clip"))
        out = forward(self.draft.params, self.draft.config, tokens, cache=state.cache)
        count = context.length - state.cache.length
        # A finished state of a batch commits nothing, and keeps its feature.
        features = jnp.where(count > 0, out.features[jnp.maximum(count - 1, 0)], state.features)
        return DraftState(kv.write(state.cache, out.rows, count), features)
