"""What a model, heads or a text is recognised by."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np


def fingerprint(tree: Any) -> str:
    """The first 16 hex digits of a SHA-256 over a pytree's names and its values as bfloat16, whatever its dtype.

    Weights that differ in their dtype alone are the same model; integers, such as a token map, count as they are.
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        array = np.asarray(leaf)
        if jnp.issubdtype(array.dtype, jnp.floating):
            array = array.astype(ml_dtypes.bfloat16)
        digest.update(str((jax.tree_util.keystr(path), array.shape, array.dtype.name)).encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()[:16]


def float_dtype(tree: Any) -> str:
    """The dtype of a pytree's floating-point leaves, by name; several are joined by a comma."""
    kinds = {jnp.dtype(leaf.dtype).name for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)}
    return ",".join(sorted(kinds))


def text_fingerprint(text: str) -> str:
    """The first 16 hex digits of the SHA-256 of `text`."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def arrays_fingerprint(*arrays: np.ndarray) -> str:
    """The first 16 hex digits of a SHA-256 over shapes, dtypes and values."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(str((array.shape, array.dtype.name)).encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()[:16]
