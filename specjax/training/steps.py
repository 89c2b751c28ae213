"""Steps over a checkpointed input pipeline, resumable at any step with the same losses, bit for bit.

Everything that the next step depends on (parameters, optimiser state, position in the data) goes into one Orbax
checkpoint, written atomically. What a kill loses are the steps since then, which are done again from the same data.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import grain
import jax
import numpy as np
from jax.experimental import multihost_utils

from specjax import run_settings, stopping
from specjax.errors import CheckpointError, DataError
from specjax.files import write_atomically
from specjax.loading import checkpoint

Step = Callable[[Any, Any], tuple[Any, dict[str, jax.Array]]]
LOG = "log.jsonl"
_DISK_SECONDS = 10.0  # in which a file written on one host is there on the others


class Monitor(Protocol):
    """Follows a run."""

    def step(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """After every step; reading the metrics waits for it."""
        ...

    def logged(self, records: list[dict[str, Any]]) -> None:
        """After the log has been written: its new records."""
        ...


class Finished(NamedTuple):
    """The final state, and the log: a record for every step (`step`, `loss`, ...) and for every evaluation (`eval`).

    Of a run that was asked to stop the last record is an evaluation of where it stopped; if no checkpoint was due, it
    is marked `stopped`, and a run that goes on forgets it.
    """

    state: Any
    log: list[dict[str, Any]]


def run_steps(
    step: Step,
    begin: Callable[[], Any],
    batches: grain.IterDataset,
    *,
    steps: int,
    directory: Path,
    checkpoint_every: int,
    settings: Mapping[str, Any] | None = None,
    evaluate: Callable[[Any], dict[str, Any]] | None = None,
    report: Callable[[dict[str, Any]], None] = lambda record: None,
    score: Callable[[dict[str, Any]], float] | None = None,
    keep: int = 2,
    per_step: Mapping[str, float] | None = None,
    monitor: Monitor | None = None,
    place: Callable[[Any], Any] = lambda batch: batch,
) -> Finished:
    """Runs `step` until `steps` are done, resuming from the newest checkpoint in `directory` where there is one.

    Where a stop is asked for, it saves the step that it has come to, and ends. Several processes (`jax.distributed`)
    all call this with the same `directory`; the first one writes the log, and they stop together, at a checkpoint.

    Args:
      step: `(state, batch) -> (state, metrics)`, jitted; may donate the state. Metrics are arrays; `loss` is a scalar.
      begin: makes the state, a pytree of arrays of the shape, dtype and sharding that checkpoints have. It is the run's
        own: nothing else holds it, so that a step may donate it and there is no second one.
      batches: dicts of NumPy arrays, in a fixed order.
      checkpoint_every: steps between checkpoints; there is one at the end too. Losses are checked and logged then.
      settings: what the run depends on, the data too, as JSON takes it (`run_settings`): a run is resumed only with the
        settings that it was begun with. None: nobody checks.
      evaluate: gives an `eval` record before the first step and at every checkpoint.
      report: called with every evaluation's record.
      score: of an `eval` record; the checkpoint with the highest one stays beside the newest `keep`.
      per_step: amounts by name that a step works off, e.g. tokens; the log has them by the second.
      monitor: follows the run.
      place: puts a batch on the devices where the step wants it.

    Raises:
      DataError: data that ends early, or a loss that is not finite; the last checkpoint, where there is one, is of
        before.
      CheckpointError: a checkpoint of other settings, of another shape, or beyond `steps`; processes with other
        settings, checkpoints or disk than the first; a full disk, with the last checkpoint intact.
    """
    directory.mkdir(parents=True, exist_ok=True)
    checkpoints, iterator = directory / "checkpoints", iter(batches)
    state = begin()
    _check_hosts(checkpoints, settings)
    first = checkpoint.latest(checkpoints)
    log: list[dict[str, Any]] = []
    if settings is not None and first is None:
        _begin(directory / run_settings.FILE, run_settings.as_json(settings))
    if first is not None:
        if settings is not None:
            run_settings.check(directory / run_settings.FILE, settings)
        if first > steps:
            raise CheckpointError(
                f"{checkpoints} is at step {first}, past the {steps} that are asked for; ask for more, or name "
                "another directory."
            )
        saved = checkpoint.restore(checkpoints, {"state": state, "input": _as_arrays(iterator.get_state())})
        state = saved["state"]
        iterator.set_state(jax.tree.map(int, saved["input"]))
        if not (directory / LOG).is_file():
            raise CheckpointError(
                f"{directory / LOG} is missing beside a checkpoint of step {first}; put it back, or name another "
                "directory."
            )
        lines = (directory / LOG).read_text("utf-8").splitlines()
        log = [r for r in map(json.loads, lines) if r["step"] <= first and not r.get("stopped")]
    elif evaluate is not None:
        log = [{"step": 0, "eval": evaluate(state)}]
        report(log[0])
    _write_log(directory, log)
    if monitor is not None:
        monitor.logged(log)
    newest, done, pending, began = first, first or 0, [], time.perf_counter()
    while done < steps:
        try:
            batch = next(iterator)
        except StopIteration:
            raise DataError(f"the data ended after {done} of {steps} steps; allow more epochs.") from None
        state, metrics = step(state, place(batch))
        done += 1
        pending.append(metrics)
        if monitor is not None:
            monitor.step(done, metrics)
        due = done % checkpoint_every == 0 or done == steps
        stop = done < steps and _stop(due)
        if not due and not stop:
            continue
        records = _records(jax.device_get(pending), done - len(pending) + 1)
        # Saved only when it is known to be good: a loss says nothing yet of the update that followed it.
        for name in ("loss", "gradient_norm"):
            bad = next((r for r in records if not math.isfinite(r.get(name, 0.0))), None)
            if bad is not None:
                what = f"the {name.replace('_', ' ')} of step {bad['step']} is {bad[name]}"
                if newest is None:
                    raise DataError(f"{what}; nothing had been saved. Lower the learning rate and begin again.")
                raise DataError(
                    f"{what}; the last state that was saved is step {newest}'s, in {checkpoints}. Lower the learning "
                    "rate and name another --output-dir: this one's run goes on with its own settings only."
                )
        rate = len(pending) / (time.perf_counter() - began)
        amounts = {f"{name}_per_second": rate * amount for name, amount in (per_step or {}).items()}
        records[-1] |= {"steps_per_second": rate, **amounts}
        value = None
        if evaluate is not None and due:
            records.append({"step": done, "eval": evaluate(state)})
            value = None if score is None else score(records[-1]["eval"])
            report(records[-1])
        log += records
        # The log first: after a kill in between, resuming drops what the checkpoint does not cover.
        _write_log(directory, log)
        whole = {"state": state, "input": _as_arrays(iterator.get_state())}
        checkpoint.save(checkpoints, done, whole, keep=keep, score=value)
        newest = done
        if monitor is not None:
            monitor.logged(records)
        if stop:
            if evaluate is not None and not due:
                log.append({"step": done, "eval": evaluate(state), "stopped": True})
                report(log[-1])
                _write_log(directory, log)
            break
        pending, began = [], time.perf_counter()
    return Finished(state, log)


def _stop(due: bool) -> bool:
    # Of several processes each may learn of it at another step.
    if jax.process_count() == 1:
        return stopping.asked() is not None
    return due and bool(multihost_utils.process_allgather(np.bool_(stopping.asked() is not None)).any())


def _check_hosts(checkpoints: Path, settings: Mapping[str, Any] | None) -> None:
    # In every process alike: one that stopped alone would leave the others waiting for it. By the directories' names:
    # Orbax itself waits for all processes where it finds a directory.
    if jax.process_count() == 1:
        return
    mark = hashlib.sha256(run_settings.as_json(settings or {}).encode()).digest()
    marks = multihost_utils.process_allgather(np.frombuffer(mark, np.uint8))
    there = [int(path.name) for path in checkpoints.glob("*") if path.name.isdigit()]
    begun = multihost_utils.process_allgather(np.int32(max(there, default=-1)))
    if (marks != marks[0]).any():
        others = np.flatnonzero((marks != marks[0]).any(1)).tolist()
        raise CheckpointError(
            f"processes {others} have other settings, text, heads or target than process 0; give all of them the same "
            "arguments, and data.directory (or data.chats), the model and start_from on a disk that all of them see."
        )
    if (begun != begun[0]).any():
        raise CheckpointError(
            f"the processes find checkpoints of steps {begun.tolist()} (-1: none) in {checkpoints}; give all of them "
            "one --output-dir, on a disk that all of them see."
        )


def _begin(file: Path, settings: str) -> None:
    """Writes the settings; of several processes the first one does, and all of them see them, or none goes on."""
    if jax.process_count() == 1:
        _write(file, settings)
        return
    # Directories of one name on disks of their own are all empty when a run begins: only a file tells them apart. Every
    # process takes part in every exchange, whatever fails: one that stopped alone would leave the others waiting.
    failed = None
    try:
        _write(file, settings)
    except CheckpointError as error:
        failed = error
    if multihost_utils.process_allgather(np.bool_(failed is not None)).any():
        raise failed or CheckpointError(f"process 0 cannot write {file}; its message says why.")
    patience = time.monotonic() + _DISK_SECONDS
    while not (seen := _holds(file, settings)) and time.monotonic() < patience:
        time.sleep(0.1)
    everywhere = multihost_utils.process_allgather(np.bool_(seen))
    if not everywhere.all():
        raise CheckpointError(
            f"processes {np.flatnonzero(~everywhere).tolist()} do not see what process 0 wrote to {file.parent}; give "
            "all of them one --output-dir, on a disk that all of them see."
        )


def _holds(file: Path, text: str) -> bool:
    try:
        return file.read_text("utf-8") == text
    except (OSError, ValueError):  # not there yet, or replaced while it is read
        return False


def best_state(directory: Path, like: Any, batches: grain.IterDataset) -> Any:
    """The state of the checkpoint with the highest score in `directory`, placed as `like`.

    Raises:
      CheckpointError: no checkpoint has a score, or it is of another shape.
    """
    checkpoints = directory / "checkpoints"
    step = checkpoint.best(checkpoints)
    if step is None:
        raise CheckpointError(f"no checkpoint in {checkpoints} has a score; evaluate while training, or take the last.")
    whole = {"state": like, "input": _as_arrays(iter(batches).get_state())}
    return checkpoint.restore(checkpoints, whole, step)["state"]


def _as_arrays(position: Any) -> Any:
    return jax.tree.map(lambda n: np.asarray(n, np.int32), position)  # of the host: each process has the same


def _records(metrics: list[dict[str, np.ndarray]], first: int) -> list[dict[str, Any]]:
    return [{"step": first + i, **{k: np.asarray(v).tolist() for k, v in m.items()}} for i, m in enumerate(metrics)]


def _write_log(directory: Path, log: list[dict[str, Any]]) -> None:
    _write(directory / LOG, "".join(json.dumps(record) + "\n" for record in log))


def _write(file: Path, text: str) -> None:
    if jax.process_index() == 0:
        remedy = "is the disk full? Make room and run again: the last checkpoint is intact."
        write_atomically(file, text, error=CheckpointError, remedy=remedy)
