"""One training run, whatever is trained: mesh, optimiser, step, evaluation, checkpoints, resumption and selection."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from specjax.checks import check_implements
from specjax.training import mesh
from specjax.training.objective import Batch, Moment, Objective, Select
from specjax.training.optimiser import Optimiser, State, build
from specjax.training.steps import Monitor, best_state, run_steps

Step = Callable[[State, Batch, Any], tuple[State, dict[str, Array]]]


class Trained(NamedTuple):
    """What the objective's `trained` made of the selected checkpoint (averaged parameters where there are any, whole in
    every process), and the log of `run_steps`."""

    result: Any
    log: list[dict[str, Any]]


def step_of(objective: Objective, optimiser: Optimiser, steps: int, shards: int = 1) -> Step:
    """The training step, pure: (state, batch, constants) -> (state, metrics).

    Metrics are the loss, what the objective's loss gives beside it, the gradient's norm and the learning rate.
    """
    dropout = jax.random.key(objective.settings.seed + 1)

    def step(state: State, batch: Batch, constants: Any) -> tuple[State, dict[str, Array]]:
        moment = Moment(jax.random.fold_in(dropout, state["step"]), state["step"] / steps, shards)

        def loss(params: Any) -> tuple[Float[Array, ""], dict[str, Array]]:
            return objective.loss(params, constants, batch, moment)

        (value, parts), gradients = jax.value_and_grad(loss, has_aux=True)(state["params"])
        state, metrics = optimiser.update(state, gradients)
        return state, {"loss": value, **parts, **metrics}

    return step


def train(
    objective: Objective,
    directory: Path,
    *,
    on: Mesh | None = None,
    report: Callable[[dict[str, Any]], None] = lambda record: None,
    monitor: Monitor | None = None,
) -> Trained:
    """Trains, evaluating before the first step and at every checkpoint; a later call resumes from `directory`.

    A step's record has the step's metrics (`step_of`), an evaluation's the objective's `record` as `eval`. Several
    processes call it with the same objective and one directory that all of them see.

    Args:
      on: the mesh; None: one device.
      report: called with every evaluation's record.
      monitor: follows the run (`monitor.RunMonitor`).

    Raises:
      ConfigError: an objective that lacks something of the protocol, shapes that do not fit each other, or rows or a
        dimension that the mesh does not divide.
      DataError: text without labels, of another vocabulary or too little of it; a loss that is not finite (the last
        checkpoint stays as it was).
      TreeError: a tree that the objective cannot be judged by.
      CheckpointError: a full disk, or a directory in which a run of other settings, target, data or tree was begun.
    """
    check_implements(objective, Objective, "CachedMedusa(heads=..., ...)", inherited=("steps_per_epoch", "factors"))
    on = mesh.MeshConfig(1, 1).build() if on is None else on
    settings = objective.settings
    objective.check(on)
    steps, shards, everywhere = objective.steps, on.shape[mesh.DATA], mesh.replicated(on)
    optimiser = build(settings, steps, objective.factors)
    shapes = jax.eval_shape(objective.initial)
    shardings = mesh.optimiser_shardings(optimiser, shapes, objective.shardings(on), on)
    constants = objective.constants(on)
    step = jax.jit(
        step_of(objective, optimiser, steps, shards), donate_argnums=0, out_shardings=(shardings, everywhere)
    )

    @functools.partial(jax.jit, out_shardings=everywhere)
    def judge(state: State, batch: Batch, constants: Any) -> dict[str, Array]:
        return objective.judge(optimiser.evaluated(state), constants, batch, shards)

    def begin() -> State:
        # Copied: steps donate the state, and the objective keeps its heads.
        return mesh.put(jax.tree.map(np.array, optimiser.init(objective.initial())), shardings)

    def evaluate(state: State) -> dict[str, Any]:
        batches = objective.held_out_batches(shards)
        return objective.record([jax.device_get(judge(state, mesh.put_batch(b, on), constants)) for b in batches])

    batches = objective.batches()
    final, log = run_steps(
        lambda state, batch: step(state, batch, constants),
        begin,
        batches,
        steps=steps,
        directory=directory,
        checkpoint_every=settings.checkpoint_every or objective.steps_per_epoch,
        settings=objective.identity(),
        evaluate=evaluate,
        report=report,
        score=lambda found: found[objective.score],
        keep=settings.keep,
        per_step=objective.amounts,
        monitor=monitor,
        place=functools.partial(mesh.put_batch, on=on),
    )
    newest = selected(log, settings.select, objective.score) is selected(log, "last")
    chosen = final if newest else best_state(directory, final, batches)
    whole = mesh.gather(jax.jit(optimiser.evaluated)(chosen), on)
    return Trained(objective.trained(jax.tree.map(jnp.asarray, whole)), log)


def evaluate(objective: Objective, params: Any) -> dict[str, Any]:
    """The record of parameters that no run is training, on one device."""
    on = mesh.MeshConfig(1, 1).build()
    judge, constants = jax.jit(functools.partial(objective.judge, shards=1)), objective.constants(on)
    return objective.record([jax.device_get(judge(params, constants, b)) for b in objective.held_out_batches(1)])


def selected(log: Sequence[dict[str, Any]], select: Select, score: str = "tokens_per_round") -> dict[str, Any]:
    """The log's evaluation of the checkpoint that `select` names; best: by `score`, the newest on a tie."""
    evaluations = [entry for entry in log if "eval" in entry]
    if select == "last":
        return evaluations[-1]
    # The evaluation before the first step has no checkpoint.
    return max(evaluations[1:], key=lambda entry: (entry["eval"][score], entry["step"]))
