"""All that a training depends on, so that it goes on with the same settings and data, or not at all."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from specjax.fingerprint import fingerprint, float_dtype
from specjax.heads import Heads
from specjax.target.params import Params
from specjax.tree import Tree

FREE = ("keep", "checkpoint_every", "select", "remat")  # settings that no step depends on: they may change


def settings_of(config: Any) -> dict[str, Any]:
    """A config dataclass as a dict, without what may change between a run and its resumption."""
    return {name: value for name, value in asdict(config).items() if name not in FREE}


def of_head_run(
    config: Any, heads: Heads, target: Params, data: Mapping[str, Any], held_out: Mapping[str, Any], tree: Tree
) -> dict[str, Any]:
    """The `settings` of a run that fits heads; `data` and `held_out` are the texts' identities."""
    return {
        "training": settings_of(config),
        "heads": asdict(heads.config) | {"fingerprint": fingerprint((heads.params, heads.token_map))},
        "target": fingerprint(target),
        "target_dtype": float_dtype(target),  # of which the fingerprint knows nothing; the products depend on it
        "data": data,
        "held_out": held_out,
        "tree": [list(path) for path in tree.rank_paths],
    }
