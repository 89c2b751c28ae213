"""One mesh for training, from one CPU to several hosts: a batch's rows over `data`, weights over `model`.

Every process runs the same program on the same batches in the same order, and puts those rows on its devices that they
are to hold; so the losses do not depend on how many processes there are. `jit` and its shardings do the rest.
"""

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Shaped

from specjax.errors import ConfigError, DataError
from specjax.files import write_atomically
from specjax.heads import Heads
from specjax.target.params import DEFAULT_SHARDING, ParamSpec, named_sharding
from specjax.training.optimiser import Optimiser

DATA, MODEL = "data", "model"
T = TypeVar("T")
_DONE = "done"


@dataclass(frozen=True)
class MeshConfig:
    """`data` x `model` devices. Each of the `data` groups takes its share of a batch's rows; within a group the
    weights are split `model` ways."""

    data: int | None = None  # None: all devices that `model` leaves
    model: int = 1

    def __post_init__(self) -> None:
        for name in (DATA, MODEL):
            value = getattr(self, name)
            if (name, value) != (DATA, None) and (not isinstance(value, int) or value < 1):
                raise ConfigError(f"the mesh's {name} is {value!r}; expected a positive number of devices.")

    def build(self) -> Mesh:
        """The mesh, over the devices of all processes.

        Raises:
          ConfigError: more devices than there are, or, among several processes, fewer (some would hold nothing).
        """
        devices = jax.devices()
        data = self.data or max(1, len(devices) // self.model)
        size = data * self.model
        if size > len(devices) or (jax.process_count() > 1 and size != len(devices)):
            raise ConfigError(
                f"a mesh of {data} x {self.model} needs {size} devices, {jax.process_count()} processes have "
                f"{len(devices)}; change data or model. On CPU, XLA_FLAGS=--xla_force_host_platform_device_count=N "
                "simulates N."
            )
        axes = (AxisType.Auto, AxisType.Auto)
        return jax.make_mesh((data, self.model), (DATA, MODEL), axis_types=axes, devices=devices[:size])


@dataclass(frozen=True)
class HostsConfig:
    """This process among several, each of which runs the same command with its own `process_id`."""

    coordinator: str | None = (
        None  # host:port of process 0; "auto": what the cluster says (Slurm, MPI, TPU); None: alone
    )
    processes: int | None = None
    process_id: int | None = None

    def __post_init__(self) -> None:
        given = (self.processes, self.process_id)
        if self.coordinator in (None, "auto"):
            if given != (None, None):
                raise ConfigError(f"{self}: processes and process_id go with a coordinator's host:port; set that too.")
        elif not re.fullmatch(r".+:\d+", self.coordinator or ""):
            raise ConfigError(f"coordinator is {self.coordinator!r}; expected host:port, 'auto' or None.")
        elif self.processes is None or self.process_id is None or not 0 <= self.process_id < self.processes:
            raise ConfigError(f"{self}: expected a number of processes, and a process_id from 0 up to below it.")

    def join(self) -> None:
        """Connects to the other processes (`jax.distributed`); does nothing when alone, or connected already.

        Raises:
          ConfigError: jax has started its devices already.
        """
        if self.coordinator is None or jax.distributed.is_initialized():
            return
        try:
            if self.coordinator == "auto":
                jax.distributed.initialize()
            else:
                jax.distributed.initialize(self.coordinator, self.processes, self.process_id)
        except (RuntimeError, ValueError) as error:
            raise ConfigError(f"{self} cannot be joined: {error}") from error
        # Now that all are here: a first collective fails where a process comes to it 30 seconds after another (Gloo).
        # Later ones wait longer, 70 seconds were tried; `first_alone` does not depend on them.
        multihost_utils.sync_global_devices("joined")


def first_alone(act: Callable[[], T], mark: Path) -> T | None:
    """Runs `act` in the first process, however long it takes; the others wait for the file `mark`, and get None.

    Args:
      mark: in a directory that all processes see; it is left behind. A process that is alone writes none.

    Raises:
      DataError: in the others, where `act` failed in the first one, which raises what it raised.
    """
    if jax.process_count() == 1:
        return act()
    first = jax.process_index() == 0
    if first:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.unlink(missing_ok=True)  # of a run that was stopped
    multihost_utils.sync_global_devices(f"before {mark.name}")
    done = None
    if first:
        outcome = _DONE
        try:
            done = act()
        except BaseException as error:
            outcome = f"{type(error).__name__}: {error}"
            raise
        finally:
            write_atomically(mark, outcome.encode())
    while not mark.exists():
        time.sleep(0.2)
    if (outcome := mark.read_text("utf-8")) != _DONE:
        raise DataError(f"the first process failed, so this one ends too ({outcome}).")
    multihost_utils.sync_global_devices(f"after {mark.name}")  # all have seen the mark
    return done


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def head_shardings(heads: Heads, mesh: Mesh, rules: Mapping[str, str] = DEFAULT_SHARDING) -> Any:
    """A `NamedSharding` for every parameter of `heads`, by the rules that `params.shardings` takes.

    Projections split like the LM head, over the vocabulary. A residual block's kernel is whole everywhere: it is small
    beside them, and its output is the next product's operand.

    Raises:
      ConfigError: a vocabulary that its mesh axis does not divide.
    """
    axes = {"kernel": ("C", "D", "D"), "bias": ("C", "D"), "projection": ("V", "D")}
    return {
        name: named_sharding(ParamSpec(leaf.shape, axes[name.rsplit("_", 1)[0]], "zeros"), mesh, rules)
        for name, leaf in heads.params.items()
    }


def optimiser_shardings(optimiser: Optimiser, params: Any, shardings: Any, mesh: Mesh) -> Any:
    """A `NamedSharding` for every array of the optimiser's state: moments and averages as the parameters, all else on
    every device.

    Args:
      params: arrays or their shapes.
      shardings: of the parameters, the same tree.
    """
    return optax.tree_utils.tree_map_params(
        optimiser,
        lambda _, sharding: sharding,
        jax.eval_shape(optimiser.init, params),
        shardings,
        transform_non_params=lambda _: replicated(mesh),
    )


def put(tree: Any, shardings: Any) -> Any:
    """Places arrays that every process holds whole."""
    # From NumPy: jax 0.10.2 makes a malformed array of one process's jax.Array and a sharding over several.
    return jax.tree.map(lambda leaf, sharding: jax.device_put(np.asarray(leaf), sharding), tree, shardings)


def put_rows(rows: Float[Array, "R D"] | None, on: Mesh) -> Float[Array, "R D"] | None:
    """An LM head's rows, split as the LM head is, over the vocabulary."""
    return None if rows is None else put(rows, named_sharding(ParamSpec(rows.shape, ("V", "D"), "zeros"), on))


def gather(tree: Any, mesh: Mesh) -> Any:
    """The arrays whole, as NumPy, in every process; all processes must call it."""
    whole = jax.jit(lambda tree: tree, out_shardings=replicated(mesh))(tree)
    return jax.tree.map(np.asarray, whole)


def put_batch(batch: Mapping[str, Shaped[np.ndarray, "B *rest"]], on: Mesh) -> dict[str, jax.Array]:
    """A batch with its rows over `data`; this process gives only the rows that its devices hold.

    Raises:
      ConfigError: rows that `data` does not divide.
    """
    rows = NamedSharding(on, PartitionSpec(DATA))
    count = len(next(iter(batch.values())))
    check_rows(count, on)
    held = np.zeros(count, bool)
    for index in rows.addressable_devices_indices_map((count,)).values():
        held[index] = True
    return {
        name: jax.make_array_from_process_local_data(rows, np.asarray(array)[held], np.shape(array))
        for name, array in batch.items()
    }


def check_rows(rows: int, on: Mesh) -> None:
    """Raises ConfigError where `data` does not divide a batch's rows."""
    if rows % on.shape[DATA]:
        raise ConfigError(
            f"a batch of {rows} rows does not divide over mesh axis {DATA!r} of size {on.shape[DATA]}; "
            "choose a multiple of it as batch_size."
        )
