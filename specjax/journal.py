"""Finished pieces of a run on disk: a second run goes on where the first was stopped or killed, and doubles nothing."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from specjax import run_settings, stopping
from specjax.environment import environment
from specjax.errors import CheckpointError, DataError
from specjax.files import read_arrays, write_arrays, write_atomically

DIRECTORY = "journal"  # of an experiment, in its output directory
Arrays = Mapping[str, np.ndarray]


class Pieces(NamedTuple):
    """The first pieces of some work, in order; `partial` says why they are not all, or is None."""

    done: list[dict[str, np.ndarray]]
    partial: str | None = None


@dataclass(frozen=True)
class Journal:
    """Where a run keeps the pieces that it has done.

    Attributes:
      directory: None: nothing is kept.
    """

    directory: Path | None = None

    @classmethod
    def open(cls, directory: Path, settings: Mapping[str, Any]) -> "Journal":
        """The journal in `directory`, begun there where there is none.

        Args:
          settings: all that the pieces depend on, as JSON takes it.

        Raises:
          CheckpointError: it was begun with other settings, or its files are damaged.
          DataError: it cannot be written.
        """
        file = directory / run_settings.FILE
        if file.exists():
            run_settings.check(file, settings)
        else:
            _make(directory)
            write_atomically(file, run_settings.as_json(settings))
        for left in directory.rglob("*.tmp"):  # by a kill
            left.unlink(missing_ok=True)
        return cls(directory)

    @classmethod
    def of(cls, config: Any, output_dir: Path, **also: Any) -> "Journal":
        """The journal of an experiment in its output directory; its pieces depend on config, machine and `also`.

        Raises:
          SpecJaxError: as `open`.
        """
        here = environment()
        machine = {name: here[name] for name in ("jax", "device", "cpu_count", "cpu_products", "xla_flags")}
        settings = {"config": asdict(config), "machine": machine | {"cpu": here["cpu"]["model"]}, **also}
        return cls.open(output_dir / DIRECTORY, settings)

    def part(self, name: str, settings: Mapping[str, Any]) -> "Journal":
        """A journal within this one, of work that depends on `settings` too.

        Raises:
          SpecJaxError: as `open`.
        """
        return self if self.directory is None else Journal.open(self.directory / name, settings)

    def pieces(
        self,
        name: str,
        count: int,
        make: Callable[[int], Arrays],
        *,
        progress: Callable[[int], None] = lambda number: None,
    ) -> Pieces:
        """Pieces 0 to count - 1 of the work `name`: those that are kept, then those that `make` makes now.

        Where a stop is asked for, no further one is begun.

        Args:
          progress: called with a piece's number when it is there.

        Raises:
          Stopped: before the first piece was there.
          CheckpointError: a kept piece is damaged.
          DataError: a piece cannot be written; those before are kept.
        """
        done: list[dict[str, np.ndarray]] = []
        for number in range(count):
            path = None if self.directory is None else self.directory / name / f"{number:06d}.npz"
            if path is not None and path.exists():
                done.append(read_arrays(path, _refusal(path)))
            else:
                if self.directory is not None and stopping.asked():
                    partial = stopping.reason(f"{number} of {count} {name}")
                    if not done:
                        raise stopping.Stopped(partial)
                    return Pieces(done, partial)
                done.append({key: np.asarray(value) for key, value in make(number).items()})
                if path is not None:
                    _make(path.parent)
                    write_arrays(path, done[-1])
            progress(number)
        return Pieces(done)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` gives, as JSON takes it; made at most once.

        Raises:
          Stopped: it was asked for before.
          CheckpointError: what is kept is damaged.
          DataError: it cannot be written.
        """
        if self.directory is None:
            return make()
        path = self.directory / f"{name}.json"
        if path.exists():
            try:
                return json.loads(path.read_text("utf-8"))
            except (OSError, ValueError, RecursionError) as error:
                raise _refusal(path)(str(error)) from error
        stopping.check(f"before {name}")
        made = make()
        _make(self.directory)
        write_atomically(path, json.dumps(made))
        return json.loads(json.dumps(made))  # as a second run reads it


NOWHERE = Journal()  # keeps nothing and never stops


def whole(pieces: Pieces) -> list[dict[str, np.ndarray]]:
    """All pieces, for work that a part of them is no use to.

    Raises:
      Stopped: they are not all.
    """
    if pieces.partial is not None:
        raise stopping.Stopped(pieces.partial)
    return pieces.done


def _make(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot make the directory {directory} ({error}); name another one.") from error


def _refusal(path: Path) -> Callable[[str], CheckpointError]:
    return lambda what: CheckpointError(
        f"{path} cannot be read ({what}); delete it, and the same command makes it anew."
    )
