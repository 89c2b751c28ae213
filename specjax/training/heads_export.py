"""Fitted heads on disk."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from specjax.heads import Heads
from specjax.loading.head_files import save_heads

HEADS = "heads.safetensors"


def in_bfloat16(heads: Heads) -> Heads:
    """The heads as they are exported."""
    return Heads(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), heads.params), heads.token_map, heads.config)


def save_bfloat16(directory: Path, heads: Heads, metadata: Mapping[str, Any]) -> None:
    """Writes them as heads.safetensors."""
    save_heads(directory / HEADS, in_bfloat16(heads), metadata)
