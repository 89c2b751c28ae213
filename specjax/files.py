"""Files that are there whole or not at all."""

import os
from pathlib import Path

from specjax.errors import DataError, SpecJaxError

_REMEDY = (
    "what was written before is intact. Free some space or name another directory, then run the same command again: it "
    "goes on from there."
)


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
