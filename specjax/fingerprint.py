"""What a model, heads or a text is recognised by."""

import hashlib
from typing import Any

import jax
import numpy as np


def fingerprint(tree: Any) -> str:
    """The first 16 hex digits of a SHA-256 over a pytree's structure, shapes and bytes."""
    leaves, structure = jax.tree.flatten(tree)
    digest = hashlib.sha256(str(structure).encode())
    for leaf in leaves:
        array = np.ascontiguousarray(np.asarray(leaf))
        digest.update(str((array.shape, array.dtype.name)).encode())
        digest.update(array.view(np.uint8).data)
    return digest.hexdigest()[:16]


def text_fingerprint(text: str) -> str:
    """The first 16 hex digits of the SHA-256 of `text`."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
