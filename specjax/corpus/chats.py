"""Chats and prompts from JSONL files: ShareGPT's format, the `messages` format, and Spec-Bench's for prompts."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
    "tool": "tool",
}
_EXPECTED = (
    'expected {"messages": [{"role": "user", "content": "..."}, ...]} or '
    '{"conversations": [{"from": "human", "value": "..."}, ...]}'
)


class Chat(NamedTuple):
    """A line of a file.

    Attributes:
      where: "file:line".
      messages: role (system, user, assistant or tool), content, and what else the line says of each.
      tools: descriptions of functions, for templates that write them.
    """

    where: str
    messages: list[dict[str, Any]]
    tools: list[Any] | None = None


def read_chats(path: str | Path) -> list[Chat]:
    """Every line, in either format.

    Raises:
      DataError: a missing or empty file, or a line of another form; the message names it.
    """
    return [_chat(record, where) for where, record in _records(path)]


def read_conversations(
    path: str | Path, tokenizer: Tokenizer, *, max_tokens: int, report: Callable[[str], None] = lambda line: None
) -> list[Conversation]:
    """Chats as training text; every assistant turn is marked (`Tokenizer.encode_chat`).

    What follows the last assistant turn is left out. `"weight": 0` leaves a turn unlearned. The chat template gets what
    else a line says of its messages, and its tools; `report` is told how often that holds something that the template
    does not write. Chats of more than `max_tokens` tokens are cut at the end; those whose first answer would begin
    beyond are left out, and `report` is told how many were.

    Raises:
      DataError: as `read_chats`; a chat without an assistant turn, or that the chat template refuses or rewrites; or
        no chat with an answer within `max_tokens`.
    """
    found: list[Conversation] = []
    chats, cut = read_chats(path), 0
    for line in _unwritten(chats, tokenizer.chat_template or ""):
        report(f"{path}: {line}")
    for where, messages, tools in chats:
        if not any(message["role"] == "assistant" for message in messages):
            raise DataError(f"{where} has no assistant turn, so that there is nothing to learn; remove the line.")
        try:
            ids, said = tokenizer.encode_chat(messages, tools=tools)
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


def read_prompts(path: str | Path, report: Callable[[str], None] = lambda line: None) -> list[list[dict[str, Any]]]:
    """What to answer, each once: a file of Spec-Bench's format (its first turns), or chats up to their first answer.

    Prompts are without tools; `report` is told how many chats have some.

    Raises:
      DataError: a missing or empty file, a line of another form, or a chat that begins with the assistant.
    """
    _, first = next(_records(path))
    if isinstance(first, dict) and "turns" in first:
        asked = [[{"role": "user", "content": prompt.turns[0]}] for prompt in load_prompts(path)]
    else:
        asked, chats = [], read_chats(path)
        if equipped := sum(chat.tools is not None for chat in chats):
            report(f"{path}: {equipped} chats have tools, which are left out of their prompts")
        for where, messages, _ in chats:
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
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}:{number} is not JSON ({error}); {_EXPECTED}.") from error


def _unwritten(chats: Sequence[Chat], template: str) -> list[str]:
    """What the chats hold and the template does not write, as lines to report."""
    found = Counter(
        key for chat in chats for message in chat.messages for key in {*message} - {"role", "content", "weight"}
    )
    lines = [f"{count} turns have {key!r}" for key, count in sorted(found.items()) if key not in template]
    equipped = sum(chat.tools is not None for chat in chats)
    if equipped and "tools" not in template:
        lines.append(f"{equipped} chats have 'tools'")
    return [f"{line}, which the chat template does not write: it is left out" for line in lines]


def _chat(record: Any, where: str) -> Chat:
    if not isinstance(record, dict):
        raise DataError(f"{where} is {type(record).__name__}; {_EXPECTED}.")
    layouts = {"messages": ("role", "content"), "conversations": ("from", "value")}
    name = next((name for name in layouts if name in record), None)
    if name is None:
        raise DataError(f"{where} has the keys {sorted(record)}; {_EXPECTED}.")
    turns, keys = record[name], layouts[name]
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{where} has {name} {turns!r}; expected a list of at least one turn.")
    messages = [_message(turn, *keys, f"{where}, turn {i}") for i, turn in enumerate(turns)]
    return Chat(where, _after_the_system(record.get("system"), messages, where), _tools(record.get("tools"), where))


def _message(turn: Any, role: str, content: str, where: str) -> dict[str, Any]:
    said = turn if isinstance(turn, dict) else {}
    more = {key: value for key, value in said.items() if key not in (role, content) and value is not None}
    if not isinstance(said.get(role), str) or said[role] not in _ROLES:
        raise DataError(f"{where} has {role} {said.get(role)!r}; expected one of {sorted(_ROLES)}.")
    text = said.get(content)
    if not (isinstance(text, str) and text.strip()) and not (more.get("tool_calls") and text in ("", None)):
        raise DataError(f"{where} has {content} {text!r}; expected a text.")
    if more.get("weight", 1) not in (0, 1):
        raise DataError(f"{where} has weight {more['weight']!r}; expected 0, not to learn it, or 1.")
    return {**more, "role": _ROLES[said[role]], "content": text}


def _after_the_system(system: Any, messages: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    """The messages after the system prompt that stands beside them, where there is one."""
    if system is None or system == "":
        return messages
    if not isinstance(system, str):
        raise DataError(f"{where} has system {system!r}; expected a text.")
    if messages[0]["role"] == "system":
        if messages[0]["content"] != system:
            raise DataError(f"{where} has two system prompts, one beside its turns and one among them; remove one.")
        return messages
    return [{"role": "system", "content": system}, *messages]


def _tools(tools: Any, where: str) -> list[Any] | None:
    """Descriptions of functions, also as the JSON text that some files have."""
    found = tools
    if isinstance(tools, str):
        try:
            found = json.loads(tools) if tools.strip() else None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where} has tools that are no JSON ({error}); correct them, or remove them.") from error
    if found is not None and not isinstance(found, list):
        raise DataError(f"{where} has tools {tools!r}; expected a list of descriptions.")
    return found or None
