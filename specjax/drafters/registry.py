"""Drafters by name: what `--drafter` and an experiment's methods take."""

import warnings
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from specjax.acceptance import Acceptance, Sample
from specjax.drafters.base import Drafter
from specjax.drafters.draft_model import DraftModelDrafter
from specjax.drafters.hybrid import HybridDrafter
from specjax.drafters.medusa import MedusaDrafter
from specjax.drafters.ngram import NgramDrafter
from specjax.errors import ConfigError
from specjax.fingerprint import fingerprint
from specjax.heads import Heads
from specjax.loading.head_files import heads_for
from specjax.loading.load import Model, load_draft
from specjax.tree import Tree

# Small ones: on a CPU a wide round costs more than it accepts. The medusa tree is cut to the number of heads.
DEFAULT_TREES = {"medusa": "paths:0,1,2,3,0.0", "ngram": "chain:4", "draft": "chain:4"}


def build_drafter(
    text: str,
    target: Model,
    *,
    tree: str | None = None,
    heads: str | None = None,
    draft_model: str | None = None,
    acceptance: Acceptance | None = None,
    ngram: Mapping[str, Any] | None = None,
) -> Drafter | None:
    """The drafter that `text` names, with its files loaded in the target's dtype.

    Args:
      text: "none", "medusa", "ngram", "draft" (a draft model), or several joined by "+": a hybrid, tried in that order.
      tree: what `Tree.parse` takes; for a hybrid one for each part, joined by "+". None: `DEFAULT_TREES`.
      heads: for medusa, as in `load_heads`.
      draft_model: for draft, as in `load_draft`.
      acceptance: a draft model samples as `Sample` does, and is greedy otherwise.
      ngram: for ngram, `NgramDrafter`'s arguments beside the tree.

    Raises:
      ConfigError: an unknown name, another number of trees than of parts, or heads or a draft model that are not named.
      SpecJaxError: what loading them or parsing the trees raises.
    """
    if text == "none":
        return None
    names = text.split("+")
    unknown = [name for name in names if name not in DEFAULT_TREES]
    if unknown:
        raise ConfigError(
            f"no drafter {unknown[0]!r}; expected none, or one or more of {', '.join(DEFAULT_TREES)}, joined by '+'."
        )
    trees = [None] * len(names) if tree is None else [Tree.parse(part) for part in tree.split("+")]
    if len(trees) != len(names):
        raise ConfigError(
            f"the drafter {text!r} has {len(names)} parts, the tree {tree!r} {len(trees)}; give one each."
        )
    parts = [
        _part(name, target, shape, heads, draft_model, acceptance, ngram or {})
        for name, shape in zip(names, trees, strict=True)
    ]
    return parts[0] if len(parts) == 1 else HybridDrafter(tuple(parts))


def _warn_of_other_heads(tree: Tree, loaded: Heads, name: str) -> None:
    table = tree.provenance.get("table")  # free-form
    searched = table.get("heads") if isinstance(table, dict) else None
    if searched is not None and searched != fingerprint((loaded.params, loaded.token_map)):
        warnings.warn(
            f"the tree {tree.name!r} of {tree.size} nodes was searched for other heads ({searched}) than {name}: it "
            "fits, but another may be faster. `specjax tree measure` and `specjax tree optimise` find one for these.",
            stacklevel=4,
        )


def _part(
    name: str,
    target: Model,
    tree: Tree | None,
    heads: str | None,
    draft_model: str | None,
    acceptance: Acceptance | None,
    ngram: Mapping[str, Any],
) -> Drafter:
    usual, dtype = Tree.parse(DEFAULT_TREES[name]), target.params.dtype
    if name == "ngram":
        return NgramDrafter(tree or usual, **ngram)
    if name == "medusa":
        if heads is None:
            raise ConfigError("the drafter medusa needs heads; name them (--heads).")
        loaded = heads_for(target, heads, dtype=dtype)
        if tree is not None:
            _warn_of_other_heads(tree, loaded, heads)
        deep = [path for path in usual.rank_paths if len(path) <= loaded.config.num_heads]
        return MedusaDrafter(loaded, tree or Tree.from_paths(deep))
    if draft_model is None:
        raise ConfigError("the drafter draft needs a draft model; name it (--draft-model).")
    draft, ids = load_draft(draft_model, dtype=dtype)
    token_map = None if ids is None else jnp.asarray(ids)
    if not isinstance(acceptance, Sample):
        return DraftModelDrafter(draft, tree or usual, token_map=token_map)
    sampling = (acceptance.temperature, acceptance.top_k, acceptance.top_p)
    return DraftModelDrafter(draft, tree or usual, *sampling, token_map)
