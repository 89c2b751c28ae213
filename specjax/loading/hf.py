"""Hugging Face directories: `config.json`, `generation_config.json` and safetensors, read and written."""

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from jax.typing import DTypeLike

from specjax.errors import CheckpointError
from specjax.files import write_atomically
from specjax.loading import layout
from specjax.loading import safetensors as tensors
from specjax.loading.json_files import json_object
from specjax.target.config import ModelConfig
from specjax.target.families import config_from_hf, family_of
from specjax.target.params import Params


def load_hf(
    directory: str | os.PathLike[str], dtype: DTypeLike, *, check_finite: bool = False
) -> tuple[Params, ModelConfig]:
    """Reads a Hugging Face directory, tensor by tensor.

    Args:
      directory: holds config.json and either model.safetensors or an index and its shards; generation_config.json
        where there is one.
      dtype: of the parameters; the files may be float16, bfloat16 or float32.
      check_finite: whether to look for numbers that are none.

    Raises:
      CheckpointError: files missing or damaged, or tensors that do not fit; all of these are listed at once.
      ConfigError: an architecture or feature that the decoder does not compute.
    """
    directory = Path(directory)
    raw = json_object(directory / "config.json")
    if raw is None:
        raise CheckpointError(f"{directory} has no config.json; expected a Hugging Face model directory.")
    config = config_from_hf(raw, json_object(directory / "generation_config.json"))
    found = list(tensors.scan(tensors.files(directory)))
    config, names = _tied(config, {t.name: t for t in found}, str(directory))
    plan = layout.layout(config, names)

    def ignored(name: str) -> bool:
        # A buffer that old checkpoints hold, a tied head stored twice, and Medusa heads bundled beside their base.
        tied = config.tie_word_embeddings and name in _TIED
        return tied or name.endswith("rotary_emb.inv_freq") or name.startswith(("medusa_head.", "medusa_heads."))

    problems = layout.check(plan, ((t.name, t.shape) for t in found), ignored)
    problems += [
        f"dtype: {t.name} is {t.dtype}, expected one of {', '.join(tensors.DTYPES)}"
        for t in found
        if t.name in plan.shapes and t.dtype not in tensors.DTYPES
    ]
    layout.refuse(problems, str(directory))
    by_name = {t.name: t for t in found}

    def rows(name: str, start: int, stop: int) -> np.ndarray:
        return tensors.rows(by_name[name], start, stop)

    return layout.fill(plan, layout.finite(rows) if check_finite else rows, dtype), config


_TIED = ("model.embed_tokens.weight", "lm_head.weight")


def _tied(
    config: ModelConfig, found: Mapping[str, tensors.Stored], where: str
) -> tuple[ModelConfig, Mapping[str, str]]:
    """What a tied model's file has of embedding and LM head: either serves as both; if they differ, both count."""
    names = family_of(config).hf_names
    embed, head = (found.get(names[role]) for role in ("embed", "lm_head"))
    if not config.tie_word_embeddings or head is None:
        return config, names
    if embed is None:
        return config, {**names, "embed": names["lm_head"]}
    comparable = embed.shape == head.shape and {embed.dtype, head.dtype} <= tensors.DTYPES.keys()
    if not comparable or not tensors.equal(embed, head):  # what does not fit the model is refused later
        warnings.warn(
            f"{where} says tie_word_embeddings, but its {head.name} differs from its {embed.name}: both are used, as "
            "the file has them. If they should be one, remove the wrong one.",
            stacklevel=4,
        )
        return replace(config, tie_word_embeddings=False), names
    return config, names


def save_hf(
    directory: str | os.PathLike[str],
    params: Params,
    config: ModelConfig,
    *,
    beside: Mapping[str, np.ndarray] | None = None,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Writes a directory that transformers and `load_hf` read: config.json and one model.safetensors.

    Args:
      beside: further tensors for the file, such as Medusa heads.
      more: further entries for the config.

    Raises:
      CheckpointError: rotary scaling by `divisors`, which only GGUF files can express.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_hf_config(params, config) | dict(more or {}), indent=2)
    plan = layout.layout(config, family_of(config).hf_names)
    stored = {
        name: np.ascontiguousarray(plan.view(piece, np.asarray(leaf))).reshape(plan.shape(piece))
        for leaf, pieces in zip(jax.tree.leaves(params), plan.pieces, strict=True)
        for name, piece in pieces
    }
    whole = safetensors.numpy.save(stored | dict(beside or {}), metadata={"format": "pt"})
    write_atomically(directory / tensors.SINGLE, whole, error=CheckpointError)
    write_atomically(directory / "config.json", text + "\n", error=CheckpointError)


def _hf_config(params: Params, config: ModelConfig) -> dict[str, Any]:
    scaling = config.rope_scaling
    rope: dict[str, Any] = {"rope_type": "default"}
    if scaling is not None and scaling.kind == "divisors":
        raise CheckpointError(
            "rope_scaling 'divisors' cannot be written to config.json; replace it by the 'llama3' rule that it was "
            "computed from before saving."
        )
    if scaling is not None:
        rope = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling is not None and scaling.kind == "llama3":
        rope |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
        }
    window = config.sliding_window
    family, more = family_of(config), dict[str, Any]()
    if family.window == "asked":
        more = {"use_sliding_window": window is not None, "max_window_layers": 0 if window else config.num_layers}
    elif family.window == "never":
        more = {"attention_bias": False, "mlp_bias": False}
    return {
        "architectures": [family.causal_lm],
        "model_type": family.model_type,
        "dtype": params.dtype.name,
        "hidden_act": "silu",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if scaling is None else rope,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "max_position_embeddings": config.max_positions,
        "sliding_window": window,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids) or None,
        **more,
    }
