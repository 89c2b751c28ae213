"""Training checkpoints through Orbax (its v1 API; the only place that imports it)."""

from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from specjax.errors import CheckpointError


def save(directory: Path, step: int, state: Any, *, keep: int = 2) -> None:
    """Writes `state` (a pytree of arrays) as checkpoint `step`, atomically, and keeps the newest `keep`."""
    policy = ocp.training.preservation_policies.LatestN(keep)
    with ocp.training.Checkpointer(directory.absolute(), preservation_policy=policy) as checkpointer:
        checkpointer.save_pytree(step, state, overwrite=True)


def latest(directory: Path) -> int | None:
    """The newest complete checkpoint's step, or None where there is none."""
    if not directory.exists():
        return None
    with ocp.training.Checkpointer(directory.absolute()) as checkpointer:
        found = checkpointer.latest
    return None if found is None else int(found.step)


def restore(directory: Path, like: Any) -> Any:
    """Reads the newest checkpoint into the structure, shapes and dtypes of `like`.

    Raises:
      CheckpointError: no checkpoint, or one of another shape.
    """
    step = latest(directory)
    if step is None:
        raise CheckpointError(f"{directory} holds no checkpoint; train first, or name another directory.")
    with ocp.training.Checkpointer(directory.absolute()) as checkpointer:
        try:
            return checkpointer.load_pytree(step, jax.tree.map(_described, like))
        except (ValueError, KeyError) as error:
            raise CheckpointError(
                f"checkpoint {step} in {directory} does not fit this configuration: {error}"
            ) from error


def _described(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    # With the sharding of the array itself: Orbax aborts the process on the abstract one that JAX would infer.
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
