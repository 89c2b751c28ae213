"""Files that are there whole or not at all."""

import os
from pathlib import Path

from specjax.errors import DataError


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Writes a file that is there whole or not at all, even after a kill or a loss of power.

    Raises:
      DataError: it cannot be written, e.g. because the disk is full; what stood at `path` before is intact.
    """
    partial = path.with_name(path.name + ".tmp")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise DataError(
            f"cannot write {path} ({error.strerror or error}); what was written before is intact. Free some space or "
            "name another directory, then run the same command again: it goes on from there."
        ) from error
