"""What a run was begun with, kept beside what it made: it goes on with the same settings and data, or not at all."""

import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from specjax.errors import CheckpointError

FILE = "settings.json"
_ABSENT = object()


def check(file: Path, settings: Mapping[str, Any]) -> None:
    """Compares a run's settings with those in `file`, that it was begun with.

    Raises:
      CheckpointError: they differ, or there is no such file, or a damaged one.
    """
    try:
        begun = json.loads(file.read_text("utf-8"))
        if not isinstance(begun, dict):
            raise ValueError("it holds no settings")
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{file}, which says what was begun beside it, is missing: an older version began the run, or the file was "
            "removed; name another --output-dir."
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file}, which says what was begun beside it, cannot be read ({error}); put it "
            "back, or name another --output-dir."
        ) from error
    before, now = dict(_flat(begun)), dict(_flat(json.loads(as_json(settings))))
    differing = [
        _difference(name, before.get(name, _ABSENT), now.get(name, _ABSENT))
        for name in [*before, *(name for name in now if name not in before)]
        if before.get(name, _ABSENT) != now.get(name, _ABSENT)
    ]
    if differing:
        asked = any(name not in before and not any(_within(name, other) for other in before) for name in now)
        older = " (what is absent, an older version did not ask for)" if asked else ""
        raise CheckpointError(
            f"the run in {file.parent} was begun with {'; '.join(differing)}: go back to what the run was begun with, "
            f"or name another --output-dir{older}."
        )


def as_json(settings: Mapping[str, Any]) -> str:
    """The content of the file."""
    return json.dumps(settings, indent=1) + "\n"


def _within(one: str, other: str) -> bool:
    """Whether one of two settings is a part of the other, which was or is None: neither is new."""
    return one.startswith(f"{other}.") or other.startswith(f"{one}.")


def _difference(name: str, before: Any, now: Any) -> str:
    if isinstance(before, list) and isinstance(now, list):
        pairs = itertools.zip_longest(before, now, fillvalue=_ABSENT)
        return next(_difference(f"{name}[{i}]", *pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
    texts = ["absent" if value is _ABSENT else repr(value) for value in (before, now)]
    short = [text if len(text) <= 60 else f"{text[:60]}..." for text in texts]
    was, has = short if short[0] != short[1] else texts
    return f"{name} {was} (now {has})"


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _flat(part, f"{path}.{name}" if path else name)
    else:
        yield path, value
