"""What a run was begun with, kept beside its checkpoints: it goes on with the same settings and data, or not at all."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from specjax.errors import CheckpointError
from specjax.training.data import Conversation

FILE = "settings.json"
FREE = ("keep", "checkpoint_every", "select")  # settings that no step depends on: they may change
_ROWS = 4096  # of features, evenly spread, that go into a fingerprint: they come from the text and the target


def settings_of(config: Any) -> dict[str, Any]:
    """A config dataclass as a dict, without what may change between a run and its resumption."""
    return {name: value for name, value in asdict(config).items() if name not in FREE}


def arrays_fingerprint(*arrays: np.ndarray) -> str:
    """The first 16 hex digits of a SHA-256 over shapes, dtypes and values; of floats, `_ROWS` rows stand for all."""
    digest = hashlib.sha256()
    for array in arrays:
        kept = array
        if not np.issubdtype(array.dtype, np.integer) and array.dtype != bool:
            kept = array[:: max(1, len(array) // _ROWS)]
        digest.update(str((array.shape, array.dtype.name)).encode())
        digest.update(np.ascontiguousarray(kept).view(np.uint8).data)
    return digest.hexdigest()[:16]


def text_identity(data: Sequence[Conversation]) -> dict[str, Any]:
    """How many conversations and tokens, and a fingerprint of prompts, answers, masks and features."""
    empty = np.zeros(0, np.int32)

    def end_to_end(parts: Iterator[np.ndarray]) -> np.ndarray:
        return np.concatenate([empty, *(np.asarray(part, np.int32) for part in parts)])

    parts = [
        end_to_end(np.array([len(item.prompt), len(item.answer)]) for item in data),
        end_to_end(item.prompt for item in data),
        end_to_end(item.answer for item in data),
        end_to_end(np.ones(len(item.answer)) if item.mask is None else item.mask for item in data),
    ]
    spread = data[:: max(1, len(data) // 64)]
    parts += [item.features for item in spread if item.features is not None]
    return {
        "conversations": len(data),
        "tokens": sum(map(len, data)),
        "fingerprint": arrays_fingerprint(*parts),
    }


def check(file: Path, settings: Mapping[str, Any]) -> None:
    """Compares a run's settings with those in `file`, that it was begun with.

    Raises:
      CheckpointError: they differ, or there is no such file, or a damaged one.
    """
    remedy = "go back to what the run was begun with, or name another --output-dir."
    try:
        begun = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{file}, which says what the checkpoints beside it were begun with, cannot be read ({error}); put it "
            "back, or name another --output-dir."
        ) from error
    before, now = dict(_flat(begun)), dict(_flat(json.loads(as_json(settings))))
    differing = [
        f"{name} {_short(before, name)} (now {_short(now, name)})"
        for name in [*before, *(name for name in now if name not in before)]
        if (name in before, before.get(name)) != (name in now, now.get(name))
    ]
    if differing:
        raise CheckpointError(f"the run in {file.parent} was begun with {'; '.join(differing)}: {remedy}")


def as_json(settings: Mapping[str, Any]) -> str:
    """The content of the file."""
    return json.dumps(settings, indent=1) + "\n"


def _short(settings: Mapping[str, Any], name: str) -> str:
    text = repr(settings[name]) if name in settings else "absent"
    return text if len(text) <= 60 else f"{text[:60]}..."


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _flat(part, f"{path}.{name}" if path else name)
    else:
        yield path, value
