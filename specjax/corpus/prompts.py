"""Evaluation prompts in Spec-Bench's format: one JSON object a line with `question_id`, `category` and `turns`."""

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from specjax.errors import DataError


@dataclass(frozen=True)
class Prompt:
    """A conversation's user turns; the first is what is decoded."""

    question_id: int
    category: str
    turns: tuple[str, ...]


def load_prompts(path: str | Path | None = None) -> list[Prompt]:
    """Reads prompts, by default the 50 that ship with specjax (chat, code, translation, long context, maths).

    Raises:
      DataError: a missing or empty file, or a line of another form; the message names it.
    """
    if path is None:
        text, name = (resources.files("specjax") / "data" / "prompts.jsonl").read_text("utf-8"), "prompts.jsonl"
    else:
        name = str(path)
        try:
            text = Path(path).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{name} cannot be read ({error}); expected a JSONL file of prompts.") from error
    lines = [
        (n, line)
        for n, line in enumerate(text.split("\n"), 1)  # not splitlines: U+2028 may stand in a string
        if line.strip()
    ]
    if not lines:
        raise DataError(f"{name} is empty; expected one JSON object a line.")
    return [_prompt(line, f"{name}:{n}") for n, line in lines]


def _prompt(line: str, where: str) -> Prompt:
    expected = 'expected {"question_id": 1, "category": "chat", "turns": ["..."]}'
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON ({error}); {expected}.") from error
    if not isinstance(record, dict):
        raise DataError(f"{where} is {type(record).__name__}; {expected}.")
    identifier, category, turns = (record.get(key) for key in ("question_id", "category", "turns"))
    if not isinstance(identifier, int) or isinstance(identifier, bool):
        raise DataError(f"{where} has question_id {identifier!r}; {expected}.")
    if not isinstance(category, str) or not category:
        raise DataError(f"{where} has category {category!r}; {expected}.")
    if not isinstance(turns, list) or not turns or not all(isinstance(t, str) and t.strip() for t in turns):
        raise DataError(f"{where} has turns {turns!r}; expected a list of at least one text.")
    return Prompt(identifier, category, tuple(turns))
