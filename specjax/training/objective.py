"""What differs between the drafters that are trained; `run.train` is what all of them share.

An objective is a frozen dataclass of what a run depends on: the target, the text, the settings and what is trained. A
new drafter's training is one file with one objective.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import grain
import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from specjax.errors import ConfigError
from specjax.training.optimiser import OptimiserConfig

Batch = Mapping[str, Array]  # rows first, of one number; on the host NumPy arrays
HostBatch = Mapping[str, np.ndarray]
Select = Literal["best", "last"]  # which checkpoint a run gives; best: by its score on held-out text


@dataclass(frozen=True)
class RunConfig(OptimiserConfig):
    """What every run is told; a step is `batch_size` rows, whatever the objective's rows are."""

    epochs: int = 2
    batch_size: int = 8
    seed: int = 0
    checkpoint_every: int | None = None  # steps between checkpoints and evaluations; None: once an epoch
    keep: int = 2  # newest checkpoints; the best one stays as well
    select: Select = "last"  # which checkpoint counts in the end

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = ("epochs", "batch_size", "checkpoint_every", "keep")
        if min(1 if (value := getattr(self, name)) is None else value for name in sizes) < 1:
            raise ConfigError(f"{self}: expected epochs, batch_size, checkpoint_every and keep of at least 1.")
        if self.select not in ("best", "last"):
            raise ConfigError(f"select is {self.select!r}; expected 'best' or 'last'.")


class Moment(NamedTuple):
    """What a loss may know of the step that it is computed in.

    Attributes:
      key: for dropout, of this step; None: none.
      done: share of the run's steps that are over, [0, 1).
      shards: groups of a batch's rows that are computed side by side, the mesh's `data`.
    """

    key: jax.Array | None
    done: Float[Array, ""]
    shards: int = 1


class Objective(Protocol):
    """One kind of training, as `run.train` calls it; subclasses say what differs. What is traced is pure.

    Attributes:
      settings: a `RunConfig`.
      score: the number of an evaluation's record by which the best checkpoint is chosen: the higher, the better.
      factors: of the learning rate, for some of the parameters' top-level names.
    """

    settings: Any
    score: ClassVar[str]
    factors: Mapping[str, float] | None = None

    @property
    def steps(self) -> int:
        """Batches in a whole run, in whole updates. Raises DataError for too few."""

    @property
    def steps_per_epoch(self) -> int:
        """After how many steps there is a checkpoint, where the settings do not say."""
        return max(1, self.steps // self.settings.epochs)

    @property
    def amounts(self) -> Mapping[str, float]:
        """What a step works off, by name, with `tokens` among them: the log has them by the second."""

    def check(self, on: Mesh) -> None:
        """Refuses, before anything is placed or compiled, what cannot be trained; may warn of text that is cut."""

    def identity(self) -> dict[str, Any]:
        """What the run depends on, as JSON takes it: it is resumed with the same alone."""

    def initial(self) -> Any:
        """The float32 parameters before the first step."""

    def shardings(self, on: Mesh) -> Any:
        """A `NamedSharding` for every parameter."""

    def constants(self, on: Mesh) -> Any:
        """What losses read and nothing changes, such as the frozen target, placed on the mesh: arguments of the step,
        as an array over several processes cannot be a constant of a compiled function."""

    def batches(self) -> grain.IterDataset:
        """The batches of all epochs, in an order that the seed fixes."""

    def loss(
        self, params: Any, constants: Any, batch: Batch, moment: Moment
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The loss of a batch, and what the log is to have beside it."""

    def held_out_batches(self, shards: int) -> Iterable[HostBatch]:
        """Every held-out row once, in batches of one shape whose rows `shards` divides."""

    def judge(self, params: Any, constants: Any, batch: Batch, shards: int) -> dict[str, Array]:
        """What a held-out batch says of the parameters."""

    def record(self, found: Sequence[HostBatch]) -> dict[str, Any]:
        """An evaluation for the log, from what `judge` gave of every held-out batch, in order."""

    def trained(self, params: Any) -> Any:
        """What training was for (heads, a draft), from the parameters that were selected."""

    def export(self, directory: Path, trained: Any, metadata: Mapping[str, Any]) -> None:
        """Writes it."""
