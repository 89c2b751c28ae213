"""The tokenizer of a Hugging Face directory: `tokenizer.json`, and what older files beside it say of special tokens."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from specjax.checks import is_whole
from specjax.errors import CheckpointError
from specjax.loading.json_files import json_object

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_IDS = 10**9
_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")
_MORE = ("additional_special_tokens", "extra_special_tokens")


def read(directory: Path) -> tuple[tokenizers.Tokenizer, dict[str, str], str | None] | None:
    """The tokenizer, the special tokens that a chat template may ask for by name, and the template; None without files.

    Tokens that only `added_tokens.json`, `special_tokens_map.json` or `tokenizer_config.json` name are added, with
    their ids. What `tokenizer_config.json` says of a special token wins over the map.

    Raises:
      CheckpointError: a file that cannot be read, an entry of a wrong type, or files that contradict each other.
    """
    file = directory / "tokenizer.json"
    if not file.exists():
        return None
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing narrower
        raise CheckpointError(f"{file} cannot be read by tokenizers {tokenizers.__version__}: {error}") from error
    backend.no_truncation()  # limits that were in force when the file was written
    backend.no_padding()
    sides = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    settings, listed, numbered = (json_object(directory / name) or {} for name in sides)
    _add_numbered(backend, numbered, settings, directory)
    special = {}
    for name in _NAMES:
        said = _text(settings.get(name), name, "tokenizer_config.json")
        mapped = _text(listed.get(name), name, "special_tokens_map.json")
        if (token := mapped if said is None else said) is not None:
            special[name] = token
    known = [token for name, token in special.items() if name in ("bos_token", "eos_token") or _has(backend, token)]
    for source, entries in (("tokenizer_config.json", settings), ("special_tokens_map.json", listed)):
        known += _more(entries, source)
    for token in dict.fromkeys(known):
        _add(backend, AddedToken(token, special=True, normalized=False), None, directory)
    template = settings.get("chat_template")
    jinja = directory / "chat_template.jinja"
    if jinja.exists():
        try:
            template = jinja.read_text("utf-8")
        except ValueError as error:
            raise CheckpointError(f"{jinja} is not UTF-8 ({error}); convert it, or remove it.") from error
    return backend, special, template_in(template, f"{directory / 'tokenizer_config.json'}: chat_template")


def template_in(found: Any, where: str) -> str | None:
    """A chat template out of a file: a text, or several by name, of which the default one counts.

    Raises:
      CheckpointError: anything else.
    """
    if isinstance(found, list):
        pairs = [(t.get("name"), t.get("template")) for t in found if isinstance(t, Mapping)]
        if len(pairs) != len(found):
            raise CheckpointError(f"{where} is {found!r}; expected a text, or a list of names with templates.")
        found = next((template for name, template in pairs if name == "default"), None)
    if found is not None and not isinstance(found, str):
        raise CheckpointError(f"{where} is {found!r}; expected a text, or a list of names with templates.")
    return found


def _text(value: Any, name: str, source: str) -> str | None:
    """A token: its text, or an object with it."""
    told = value.get("content") if isinstance(value, Mapping) else value
    if value is not None and not isinstance(told, str):
        raise CheckpointError(f"{source} has {name} {value!r}; expected a text, or an object with its content.")
    if isinstance(told, str) and any("\ud800" <= letter <= "\udfff" for letter in told):
        raise CheckpointError(f"{source} has {name} {value!r}, half a surrogate pair; expected valid Unicode.")
    return told


def _more(entries: Mapping[str, Any], source: str) -> Iterator[str]:
    for name in _MORE:
        found = entries.get(name) or []
        values = found.values() if isinstance(found, Mapping) and "content" not in found else found
        for value in values if isinstance(values, Iterable) and not isinstance(values, str | Mapping) else [values]:
            token = _text(value, name, source)
            if token:
                yield token


def _has(backend: tokenizers.Tokenizer, token: str) -> bool:
    return backend.token_to_id(token) is not None


def _add_numbered(
    backend: tokenizers.Tokenizer, added: Mapping[str, Any], settings: Mapping[str, Any], directory: Path
) -> None:
    """Adds what has a number of its own, in its order: `added_tokens.json` and the settings' `added_tokens_decoder`."""
    numbered: dict[int, AddedToken] = {}
    decoder = settings.get("added_tokens_decoder") or {}
    if not isinstance(decoder, Mapping):
        raise CheckpointError(f"tokenizer_config.json has added_tokens_decoder {decoder!r}; expected an object.")
    for token, number in added.items():
        if not is_whole(number) or not 0 <= number < _IDS or _text(token, "the token", "added_tokens.json") == "":
            raise CheckpointError(f"added_tokens.json gives {token!r} the id {number!r}; expected a whole number.")
        # As it is in the tokenizer, or else special: what such files list are markers.
        numbered[number] = AddedToken(token, special=True, normalized=False)
    for text, entry in decoder.items():
        content = _text(entry, f"added_tokens_decoder {text}", "tokenizer_config.json")
        if not text.isdecimal() or len(text) > 9 or content is None:
            raise CheckpointError(
                f"tokenizer_config.json has added_tokens_decoder {text!r}: {entry!r}; expected an id with a token."
            )
        flags = entry if isinstance(entry, Mapping) else {}
        said = {name: bool(flags.get(name, False)) for name in ("special", "lstrip", "rstrip", "single_word")}
        numbered[int(text)] = AddedToken(content, normalized=bool(flags.get("normalized", False)), **said)
    for number in sorted(numbered):
        _add(backend, numbered[number], number, directory)


def _add(backend: tokenizers.Tokenizer, token: AddedToken, number: int | None, directory: Path) -> None:
    """Makes `token` one that is never cut, with the id `number` (None: any)."""
    here, there = backend.token_to_id(token.content), None if number is None else backend.id_to_token(number)
    if number is not None and ((here is not None and here != number) or there not in (None, token.content)):
        raise CheckpointError(
            f"the files in {directory} contradict each other: they give {token.content!r} the id {number}, and "
            f"tokenizer.json has {there!r} there and {token.content!r} at {here}. Are they of one model?"
        )
    already = backend.get_added_tokens_decoder().get(here) if here is not None else None
    if already is not None and (already.special or not token.special):
        return
    if already is not None and number is not None:
        return  # tokenizer.json says more precisely what it is
    backend.add_tokens([token]) if not token.special else backend.add_special_tokens([token])
    made = backend.token_to_id(token.content)
    if number is not None and made != number:
        raise CheckpointError(
            f"the files in {directory} give {token.content!r} the id {number}, but with tokenizer.json its id is "
            f"{made}: ids between are missing. Are the files of one model?"
        )
