"""Training checkpoints through Orbax (its v1 API; the only place that imports it)."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from specjax.errors import CheckpointError

_policies = ocp.training.preservation_policies


def save(directory: Path, step: int, state: Any, *, keep: int = 2, score: float | None = None) -> None:
    """Writes `state` (a pytree of arrays) as checkpoint `step`, atomically.

    Args:
      keep: the newest so many stay.
      score: of this checkpoint; the one with the highest stays as well, whatever its age.

    Raises:
      CheckpointError: the files cannot be written, e.g. on a full disk; the checkpoints before it stay as they were.
    """
    policy = _policies.AnyPreservationPolicy(
        [
            _policies.LatestN(keep),
            _policies.BestN(get_metric_fn=lambda m: m["score"], n=1, keep_checkpoints_without_metrics=False),
        ]
    )
    metrics = None if score is None else {"score": score}
    try:
        with ocp.training.Checkpointer(directory.absolute(), preservation_policy=policy) as checkpointer:
            checkpointer.save_pytree(step, state, overwrite=True, metrics=metrics)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint {step} cannot be written to {directory}: {error}; is the disk full? Make room and run again: "
            "the checkpoints before it are intact."
        ) from error


def latest(directory: Path) -> int | None:
    """The newest complete checkpoint's step, or None where there is none."""
    if not directory.exists():
        return None
    with ocp.training.Checkpointer(directory.absolute()) as checkpointer:
        found = checkpointer.latest
    return None if found is None else int(found.step)


def best(directory: Path) -> int | None:
    """The step of the complete checkpoint with the highest score, the newer on a tie; None where none has one."""
    if not directory.exists():
        return None
    with ocp.training.Checkpointer(directory.absolute()) as checkpointer:
        scored = [(c.metrics["score"], int(c.step)) for c in checkpointer.checkpoints if c.metrics]
    return max(scored)[1] if scored else None


def restore(directory: Path, like: Any, step: int | None = None) -> Any:
    """Reads checkpoint `step` (None: the newest) into the structure, shapes, dtypes and placement of `like`.

    Raises:
      CheckpointError: no checkpoint, one of another shape, or one that is damaged; the message names the one before.
    """
    step = latest(directory) if step is None else step
    if step is None:
        raise CheckpointError(f"{directory} holds no checkpoint; train first, or name another directory.")
    with ocp.training.Checkpointer(directory.absolute()) as checkpointer:
        try:
            return checkpointer.load_pytree(step, jax.tree.map(_described, like))
        except Exception as error:  # tensorstore's and Orbax's share no narrow base
            if _fits(checkpointer, step, like):
                raise CheckpointError(_damaged(checkpointer, directory, step)) from error
            raise CheckpointError(
                f"checkpoint {step} in {directory} does not fit this configuration: {error}"
            ) from error


def _fits(checkpointer: Any, step: int, like: Any) -> bool:
    """Whether what the checkpoint says of itself is what is asked for, or cannot be read: then its data is damaged."""
    try:
        found = checkpointer.pytree_metadata(step).metadata
        shapes = [(tuple(leaf.shape), np.dtype(leaf.dtype)) for leaf in jax.tree.leaves(found)]
    except Exception:
        return True
    wanted = [(tuple(np.shape(leaf)), np.dtype(leaf.dtype)) for leaf in jax.tree.leaves(like)]
    return not shapes or shapes == wanted


def _damaged(checkpointer: Any, directory: Path, step: int) -> str:
    before = [int(c.step) for c in checkpointer.checkpoints if int(c.step) < step]
    then = f"goes on from checkpoint {max(before)}" if before else "begins again"
    return (
        f"checkpoint {step} in {directory} is damaged: some of its files are missing or cannot be read. Remove the "
        f"folder {directory / str(step)}, and the same command {then}."
    )


def _described(leaf: jax.Array | np.ndarray) -> jax.ShapeDtypeStruct | np.ndarray:
    # With the sharding of the array itself: Orbax aborts the process on the abstract one that JAX would infer.
    return (
        leaf if isinstance(leaf, np.ndarray) else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    )
