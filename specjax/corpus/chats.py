"""Chats and prompts from JSONL files: ShareGPT's format, the `messages` format, and Spec-Bench's for prompts."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from specjax.corpus.conversation import Conversation
from specjax.corpus.prompts import load_prompts
from specjax.errors import DataError, PromptError
from specjax.loading.tokenizer import Tokenizer

_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
}
_EXPECTED = (
    'expected {"messages": [{"role": "user", "content": "..."}, ...]} or '
    '{"conversations": [{"from": "human", "value": "..."}, ...]}'
)


def read_chats(path: str | Path) -> list[tuple[str, list[dict[str, str]]]]:
    """(where, messages) of every line, in either format; `where` is "file:line", the roles system, user, assistant.

    Raises:
      DataError: a missing or empty file, or a line of another form; the message names it.
    """
    return [(where, _messages(record, where)) for where, record in _records(path)]


def read_conversations(
    path: str | Path, tokenizer: Tokenizer, *, max_tokens: int, report: Callable[[str], None] = lambda line: None
) -> list[Conversation]:
    """Chats as training text; every assistant turn is marked (`Tokenizer.encode_chat`).

    What follows the last assistant turn is left out. Chats of more than `max_tokens` tokens are cut at the end; those
    whose first answer would begin beyond are left out, and `report` is told how many were.

    Raises:
      DataError: as `read_chats`; a chat without an assistant turn, or that the chat template refuses or rewrites; or
        no chat with an answer within `max_tokens`.
    """
    found: list[Conversation] = []
    chats, cut = read_chats(path), 0
    for where, messages in chats:
        if not any(message["role"] == "assistant" for message in messages):
            raise DataError(f"{where} has no assistant turn, so that there is nothing to learn; remove the line.")
        try:
            ids, said = tokenizer.encode_chat(messages)
        except PromptError as error:
            raise DataError(f"{where}: {error}") from error
        tokens, mask = np.array(ids[:max_tokens], np.int32), np.array(said[:max_tokens], bool)
        at = np.flatnonzero(mask)
        if len(at) and at[0] > 0:
            cut += any(said[max_tokens:])
            begin, end = at[0], at[-1] + 1
            found.append(Conversation(tokens[:begin], tokens[begin:end], mask=mask[begin:end]))
    if found and (cut or len(found) < len(chats)):
        report(
            f"of {len(chats)} chats in {path}, {cut} have answers beyond {max_tokens} tokens, which are cut, "
            f"and {len(chats) - len(found)} have none before that and are left out"
        )
    if not found:
        raise DataError(f"no chat in {path} has an answer within its first {max_tokens} tokens; raise max_tokens.")
    return found


def read_prompts(path: str | Path) -> list[list[dict[str, str]]]:
    """What to answer, each once: a file of Spec-Bench's format (its first turns), or chats up to their first answer.

    Raises:
      DataError: a missing or empty file, a line of another form, or a chat that begins with the assistant.
    """
    _, first = next(_records(path))
    if isinstance(first, dict) and "turns" in first:
        asked = [[{"role": "user", "content": prompt.turns[0]}] for prompt in load_prompts(path)]
    else:
        asked = []
        for where, messages in read_chats(path):
            roles = [message["role"] for message in messages]
            asked.append(messages[: roles.index("assistant") if "assistant" in roles else len(roles)])
            if not asked[-1] or asked[-1][-1]["role"] != "user":
                raise DataError(f"{where} has no user turn before the first answer; remove the line.")
    return list({json.dumps(messages): messages for messages in asked}.values())


def _records(path: str | Path) -> Iterator[tuple[str, Any]]:
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}); expected a JSONL file, UTF-8.") from error
    if not text.strip():
        raise DataError(f"{path} is empty; expected one JSON object a line.")
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: U+2028 may stand in a string
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}:{number} is not JSON ({error}); {_EXPECTED}.") from error


def _messages(record: Any, where: str) -> list[dict[str, str]]:
    if not isinstance(record, dict):
        raise DataError(f"{where} is {type(record).__name__}; {_EXPECTED}.")
    layouts = {"messages": ("role", "content"), "conversations": ("from", "value")}
    name = next((name for name in layouts if name in record), None)
    if name is None:
        raise DataError(f"{where} has the keys {sorted(record)}; {_EXPECTED}.")
    turns, (role, content) = record[name], layouts[name]
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{where} has {name} {turns!r}; expected a list of at least one turn.")
    messages = []
    for i, turn in enumerate(turns):
        found = (turn.get(role), turn.get(content)) if isinstance(turn, dict) else (None, None)
        if not isinstance(found[0], str) or found[0] not in _ROLES:
            raise DataError(f"{where}, turn {i} has {role} {found[0]!r}; expected one of {sorted(_ROLES)}.")
        if not isinstance(found[1], str) or not found[1].strip():
            raise DataError(f"{where}, turn {i} has {content} {found[1]!r}; expected a text.")
        messages.append({"role": _ROLES[found[0]], "content": found[1]})
    return messages
