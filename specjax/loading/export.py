"""Medusa heads for other engines: every published layout, with the config.json that its consumer needs."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save as serialised

from specjax.errors import CheckpointError, ConfigError
from specjax.files import write_atomically
from specjax.heads import Heads
from specjax.loading import torch_pickle
from specjax.loading.head_files import save_heads
from specjax.loading.head_layouts import LAYOUTS, HeadLayout
from specjax.loading.hf import save_hf
from specjax.loading.load import Model
from specjax.target.params import Params


@dataclass(frozen=True)
class Target:
    """A file format: the names of its tensors, its file, and which heads it can hold."""

    names: str  # of a row in LAYOUTS
    file: str
    projection: Literal["full", "shared", "any"]
    reduced: bool = False  # whether a reduced vocabulary can be said


TARGETS: Mapping[str, Target] = {
    "medusa": Target("medusa", "medusa_lm_head.pt", "full"),
    "medusa-v2": Target("medusa", "medusa_lm_head.safetensors", "shared"),
    "bundled": Target("bundled", "model.safetensors", "any"),
    "abyo": Target("abyo", "medusa_lm_head.safetensors", "full"),
    "vllm": Target("vllm", "model.safetensors", "any", reduced=True),
    "tensorrt-llm": Target("tensorrt-llm", "model.safetensors", "full"),
    "native": Target("", "heads.safetensors", "any", reduced=True),
}


def export_heads(
    directory: str | os.PathLike[str],
    heads: Heads,
    model: Model,
    target: str,
    *,
    base_model: str,
    copy_lm_head: bool = False,
    whole_vocabulary: bool = False,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Writes heads into a new or empty `directory` and gives the file. Values are kept bit for bit, in their dtype.

    Args:
      heads: trained on `model`.
      model: gives the LM head where the layout stores a copy (in the heads' dtype), and for "bundled" all its weights
        and its tokenizer: weights in bfloat16 if that holds every one of them, otherwise in their dtype.
      target: one of `TARGETS`.
      base_model: what the config names as the base: a repository or path that the consumer can load.
      copy_lm_head: gives heads that share the LM head one copy of it each, for layouts that cannot share.
      whole_vocabulary: lets heads that share the LM head over a reduced vocabulary propose any token: for layouts
        that know no reduced one. Drafts change, and what is accepted of them has to be measured again.
      metadata: kept by the native layout alone.

    Raises:
      ConfigError: an unknown layout, or heads that it cannot hold.
      CheckpointError: a directory that holds files already, or heads of another model.
    """
    if target not in TARGETS:
        raise ConfigError(f"no layout {target!r}; expected one of {', '.join(TARGETS)}.")
    if whole_vocabulary and heads.config.reduced_vocab_size is not None:
        heads = _over_the_whole_vocabulary(heads)
        metadata = {key: value for key, value in (metadata or {}).items() if key not in ("hits", "accuracy")}
    plan, config, directory = TARGETS[target], heads.config, Path(directory)
    vocab, width = model.params.unembedding.shape
    config.check_target(width, vocab, error=CheckpointError)
    shared = config.projection == "shared"
    if config.reduced_vocab_size is not None and not plan.reduced:
        raise ConfigError(
            f"the heads propose {config.reduced_vocab_size} of {vocab} tokens, which layout {target!r} cannot say; "
            "take vllm or native" + (", or let them propose any token (whole_vocabulary)." if shared else ".")
        )
    if plan.projection == "shared" and config.projection == "full":
        raise ConfigError(f"the heads have projections of their own, which layout {target!r} lacks; take medusa.")
    if plan.projection == "full" and config.projection == "shared" and not copy_lm_head:
        raise ConfigError(
            f"the heads share the LM head, layout {target!r} stores one projection per head; take medusa-v2, or store "
            "a copy of the LM head for each (copy_lm_head)."
        )
    if directory.exists() and any(directory.iterdir()):
        raise CheckpointError(f"{directory} is not empty; name a new directory.")
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / plan.file
    if target == "native":
        save_heads(file, heads, metadata)
        return file
    layout = next(one for one in LAYOUTS if one.name == plan.names)
    copied = config.projection == "full" or (copy_lm_head and target != "vllm")
    tensors = _tensors(layout, heads, model, projections=copied)
    extra = _config(target, heads, base_model, shared=not copied)
    if target == "bundled":
        save_hf(directory, _as_small_as_exact(model.params), model.config, beside=tensors, more=extra)
        if model.tokenizer is not None:
            model.tokenizer.save(directory)
        return file
    if target == "vllm":
        tensors |= _vllm_tensors(heads, model)
    if file.suffix == ".pt":
        torch_pickle.write(file, tensors)
    else:
        write_atomically(file, serialised(tensors, metadata={"format": "pt"}), error=CheckpointError)
    if extra:
        write_atomically(directory / "config.json", json.dumps(extra, indent=2) + "\n", error=CheckpointError)
    return file


def _over_the_whole_vocabulary(heads: Heads) -> Heads:
    if heads.config.projection != "shared":
        raise ConfigError("the heads have projections of their own, over their vocabulary alone; it cannot be widened.")
    return Heads(heads.params, None, replace(heads.config, reduced_vocab_size=None))


def _as_small_as_exact(params: Params) -> Params:
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    same = jax.tree.map(lambda a, b: bool((a == b.astype(a.dtype)).all()), params, half)
    return half if all(jax.tree.leaves(same)) else params


def _lm_head(heads: Heads, model: Model) -> np.ndarray:
    return np.asarray(model.params.unembedding).astype(next(iter(heads.params.values())).dtype)


def _tensors(layout: HeadLayout, heads: Heads, model: Model, *, projections: bool) -> dict[str, np.ndarray]:
    config, params = heads.config, {name: np.asarray(value) for name, value in heads.params.items()}
    tensors = {}
    for j in range(config.num_layers):
        for i in range(config.num_heads):
            # Ours are [in, out].
            tensors[layout.weight.format(i=i, j=j)] = np.ascontiguousarray(params[f"kernel_{j}"][i].T)
            tensors[layout.bias.format(i=i, j=j)] = np.ascontiguousarray(params[f"bias_{j}"][i])
    if projections:
        for i in range(config.num_heads):
            own = params.get(f"projection_{i}")
            matrix = _lm_head(heads, model) if own is None else own
            tensors[layout.projection.format(i=i, L=config.num_layers)] = np.ascontiguousarray(matrix)
    return tensors


def _vllm_tensors(heads: Heads, model: Model) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    ids = None if heads.token_map is None else np.asarray(heads.token_map)
    if heads.config.projection == "shared":
        matrix = _lm_head(heads, model)
        tensors["lm_heads.0.weight"] = np.ascontiguousarray(matrix if ids is None else matrix[ids])
    if ids is not None:
        tensors["token_map"] = ids.astype(np.int64)
    return tensors


def _config(target: str, heads: Heads, base_model: str, *, shared: bool) -> dict[str, Any]:
    config = heads.config
    counts = {"medusa_num_heads": config.num_heads, "medusa_num_layers": config.num_layers}
    match target:
        case "medusa" | "medusa-v2" | "bundled":
            named = counts | {"base_model_name_or_path": base_model}
            return named | ({"version": "2"} if shared else {})
        case "tensorrt-llm":
            return {"num_medusa_heads": config.num_heads, "num_medusa_layers": config.num_layers}
        case "vllm":
            # Without medusa_fc_bias vLLM drops the biases in silence; any other key with "num" and "heads" in it would
            # override num_heads.
            return {
                "model_type": "medusa",
                "architectures": ["MedusaModel"],
                "hidden_size": config.hidden_size,
                "vocab_size": config.vocab_size,
                "num_heads": config.num_heads,
                "num_hidden_layers": config.num_layers,
                "truncated_vocab_size": config.output_size,
                "original_lm_head": config.projection == "shared",
                "medusa_fc_bias": True,
            }
    return {}
