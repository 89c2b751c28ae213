"""The training loop: steps over a checkpointed input pipeline, resumable at any step with the same losses, bit for bit.

Everything that the next step depends on (parameters, optimiser state, position in the data) goes into one Orbax
checkpoint, written atomically. What a kill loses are the steps since then, which are done again from the same data.
"""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from specjax.errors import CheckpointError, DataError
from specjax.loading import checkpoint

Step = Callable[[Any, Any], tuple[Any, dict[str, jax.Array]]]
LOG = "log.jsonl"


class Trained(NamedTuple):
    """The final state, and the log: a record for every step (`step`, `loss`, ...) and for every evaluation (`eval`)."""

    state: Any
    log: list[dict[str, Any]]


def fit(
    step: Step,
    state: Any,
    batches: grain.IterDataset,
    *,
    steps: int,
    directory: Path,
    checkpoint_every: int,
    evaluate: Callable[[Any], dict[str, Any]] | None = None,
    report: Callable[[dict[str, Any]], None] = lambda record: None,
    place: Callable[[Any], Any] = lambda batch: batch,
) -> Trained:
    """Runs `step` until `steps` are done, resuming from the newest checkpoint in `directory` where there is one.

    Args:
      step: `(state, batch) -> (state, metrics)`, jitted; may donate the state. Metrics are arrays; `loss` is a scalar.
      state: a pytree of arrays, of the shape and dtype that checkpoints have. It is left intact.
      batches: dicts of NumPy arrays, in a fixed order.
      checkpoint_every: steps between checkpoints; there is one at the end too. Losses are checked and logged then.
      evaluate: gives an `eval` record before the first step and at every checkpoint.
      report: called with every evaluation's record.
      place: applied to every batch before its step, such as to spread it over a mesh. Several processes may run the
        loop together on one directory: each calls `step`, `evaluate` and `report`, and process 0 writes the log.

    Raises:
      DataError: data that ends early, or a loss that is not finite; the last checkpoint then holds the state before.
      CheckpointError: a checkpoint of another shape, or beyond `steps`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    checkpoints, iterator = directory / "checkpoints", iter(batches)
    state = jax.tree.map(jnp.array, state)  # a step may donate its state: keep the caller's
    first = checkpoint.latest(checkpoints)
    log: list[dict[str, Any]] = []
    if first is not None:
        if first > steps:
            raise CheckpointError(
                f"{checkpoints} is at step {first}, past the {steps} that are asked for; ask for more, or name "
                "another directory."
            )
        saved = checkpoint.restore(checkpoints, {"state": state, "input": _as_arrays(iterator.get_state(), state)})
        state = saved["state"]
        iterator.set_state(jax.tree.map(int, saved["input"]))
        lines = (directory / LOG).read_text("utf-8").splitlines()
        log = [record for record in map(json.loads, lines) if record["step"] <= first]
    elif evaluate is not None:
        log = [{"step": 0, "eval": evaluate(state)}]
        report(log[0])
    _write_log(directory, log)
    done, pending, began = first or 0, [], time.perf_counter()
    while done < steps:
        try:
            batch = next(iterator)
        except StopIteration:
            raise DataError(f"the data ended after {done} of {steps} steps; allow more epochs.") from None
        state, metrics = step(state, place(batch))
        done += 1
        pending.append(metrics)
        if done % checkpoint_every and done < steps:
            continue
        records = _records(jax.device_get(pending), done - len(pending) + 1)
        # Saved only when it is known to be good.
        bad = next((r for r in records if not math.isfinite(r["loss"])), None)
        if bad is not None:
            raise DataError(
                f"the loss of step {bad['step']} is {bad['loss']}; lower the learning rate. The last good state is "
                f"in {checkpoints}."
            )
        records[-1]["steps_per_second"] = len(pending) / (time.perf_counter() - began)
        if evaluate is not None:
            records.append({"step": done, "eval": evaluate(state)})
            report(records[-1])
        log += records
        # The log first: after a kill in between, resuming drops what the checkpoint does not cover.
        _write_log(directory, log)
        checkpoint.save(checkpoints, done, {"state": state, "input": _as_arrays(iterator.get_state(), state)})
        pending, began = [], time.perf_counter()
    return Trained(state, log)


def _as_arrays(position: Any, state: Any) -> Any:
    # On the state's devices: several processes can only save together what lies on all of them.
    where = jax.tree.leaves(state)[0].sharding
    if isinstance(where, NamedSharding):
        where = NamedSharding(where.mesh, PartitionSpec())
    return jax.tree.map(lambda n: jax.device_put(np.asarray(n, np.int32), where), position)


def _records(metrics: list[dict[str, np.ndarray]], first: int) -> list[dict[str, Any]]:
    return [{"step": first + i, **{k: np.asarray(v).tolist() for k, v in m.items()}} for i, m in enumerate(metrics)]


def _write_log(directory: Path, log: list[dict[str, Any]]) -> None:
    if jax.process_index() != 0:
        return
    partial = directory / (LOG + ".tmp")
    partial.write_text("".join(json.dumps(record) + "\n" for record in log), "utf-8")
    partial.replace(directory / LOG)
