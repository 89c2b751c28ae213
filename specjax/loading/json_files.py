"""The JSON files that lie beside weights."""

import json
from pathlib import Path
from typing import Any

from specjax.errors import CheckpointError


def json_object(path: Path) -> dict[str, Any] | None:
    """The object in a file, or None where there is no file.

    Raises:
      CheckpointError: a file that cannot be read, or that holds something else.
    """
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a JSON object ({error}); is the download complete?") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object ({type(content).__name__}); is the download complete?")
    return content
