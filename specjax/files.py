"""Files that are there whole or not at all, NumPy's, whatever is wrong with them, and folders for one run at a time."""

import fcntl
import io
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from specjax.errors import DataError, SpecJaxError

_REMEDY = (
    "what was written before is intact. Free some space or name another directory, then run the same command again: it "
    "goes on from there."
)


def read_arrays(
    path: str | Path, refuse: Callable[[str], SpecJaxError], wanted: Callable[[str], bool] = lambda name: True
) -> dict[str, np.ndarray]:
    """The arrays of an .npz file by name, or of an .npy file under the name "".

    Args:
      refuse: makes the error of what is wrong.
      wanted: which of them to read.

    Raises:
      SpecJaxError: a file that is missing, damaged or of another kind; pickled objects are never read.
    """
    try:
        found = np.load(path, allow_pickle=False)
        if isinstance(found, np.ndarray):
            return {"": found}
        with found as file:
            arrays = {name: file[name] for name in file.files if wanted(name)}
    except Exception as error:  # NumPy and zipfile raise what comes: TokenError, EOFError, BadZipFile, ...
        raise refuse(f"{type(error).__name__}: {error}") from error
    if strange := [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]:
        raise refuse(f"{strange[0]} is no array")
    return arrays


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes an .npz file, as `write_atomically`."""
    whole = io.BytesIO()
    np.savez(whole, **arrays)  # type: ignore[arg-type]  # numpy's stub takes the keywords for allow_pickle
    write_atomically(path, whole.getbuffer())


@contextmanager
def locked(directory: Path, name: str, remedy: str) -> Iterator[None]:
    """Holds `directory` for this process alone while inside; a process that is killed holds nothing any more.

    Args:
      name: of the lock; others may be held in the same directory.
      remedy: how the error ends.

    Raises:
      DataError: another process holds it, or the directory cannot be written.
    """
    file = directory / f".{name}.lock"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        while True:
            held = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(held), file.stat()):
                    break
            except FileNotFoundError:  # whoever held it ended between the two, and removed it
                pass
            except BlockingIOError:
                other = os.pread(held, 20, 0).decode(errors="replace") or "unknown"
                os.close(held)
                raise DataError(f"{directory} is in use by process {other}; {remedy}") from None
            os.close(held)
    except OSError as error:
        raise DataError(
            f"cannot make or write the directory {directory} ({error.strerror or error}); name another one."
        ) from error
    try:
        os.ftruncate(held, 0)
        os.pwrite(held, str(os.getpid()).encode(), 0)
        yield
    finally:
        file.unlink(missing_ok=True)
        os.close(held)


def write_atomically(
    path: Path,
    content: bytes | memoryview | str,
    *,
    error: type[SpecJaxError] = DataError,
    remedy: str = _REMEDY,
) -> None:
    """Writes a file that is there whole or not at all, even after a kill or a loss of power.

    Args:
      content: text is written as UTF-8.
      error: what is raised, with `remedy` as the end of its message.

    Raises:
      SpecJaxError: it cannot be written, e.g. because the disk is full; what stood at `path` before is intact.
    """
    partial = path.with_name(path.name + ".tmp")
    try:
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as failed:
        partial.unlink(missing_ok=True)
        raise error(f"cannot write {path} ({failed.strerror or failed}); {remedy}") from failed
