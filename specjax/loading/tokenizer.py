"""Text to tokens and back: tokenizers' `Tokenizer` with the model's chat template.

Made from a Hugging Face directory (`tokenizer.json`) or rebuilt from GGUF metadata.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from datetime import date, datetime
from pathlib import Path
from typing import Any

import tokenizers

from specjax.errors import CheckpointError, PromptError
from specjax.files import write_atomically
from specjax.loading import chat_template, gguf_tokenizer, hf_tokenizer

_MESSAGE = "{'role': ..., 'content': ...}"


class Tokenizer:
    """A model's tokenizer and chat template. Compared and hashed by identity, so that it can sit in a static field."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
        eos_token_ids: Sequence[int] = (),
        today: date | None = None,
    ) -> None:
        """Wraps a `tokenizers.Tokenizer`.

        Args:
          backend: does the work.
          chat_template: a jinja2 template in transformers' dialect.
          special_tokens: what the template may ask for by name, e.g. {"bos_token": "<s>"}.
          eos_token_ids: the tokens that end an answer.
          today: what a template that writes the date (Llama 3.2's does) takes for today; None: the clock's.
        """
        self.backend = backend
        self.chat_template = chat_template
        self.special_tokens = dict(special_tokens or {})
        self.eos_token_ids = tuple(eos_token_ids)
        self.today = today

    def dated(self, today: date) -> "Tokenizer":
        """This tokenizer on a day of its own, so that a template that writes the date writes the same tomorrow."""
        return Tokenizer(
            self.backend,
            chat_template=self.chat_template,
            special_tokens=self.special_tokens,
            eos_token_ids=self.eos_token_ids,
            today=today,
        )

    @property
    def writes_the_date(self) -> bool:
        """Whether the chat template asks for today's date."""
        return self.chat_template is not None and "strftime_now" in self.chat_template

    @property
    def vocab_size(self) -> int:
        """One more than the highest id; a model's embedding may have more rows than this."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, after a BOS where this tokenizer adds one; special tokens in `text` count as such.

        Raises:
          PromptError: no text, half a surrogate pair in it, or a tokenizer that fails on it.
        """
        return self._encoded(text).ids

    def _encoded(
        self, text: str, *, add_special_tokens: bool = True, backend: tokenizers.Tokenizer | None = None
    ) -> tokenizers.Encoding:
        if not isinstance(text, str):
            raise PromptError(f"the text is {text!r}; expected a string.")
        try:
            text.encode()
        except UnicodeEncodeError as error:  # a file or a command line that is not UTF-8
            raise PromptError(f"the text is no valid Unicode ({error}); is its source UTF-8?") from error
        try:
            return (backend or self.backend).encode(text, add_special_tokens=add_special_tokens)
        except Exception as error:  # the library raises nothing narrower, e.g. for an unknown token that is none
            raise PromptError(f"this tokenizer cannot encode the text ({error}); is its file damaged?") from error

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`; special tokens such as the EOS are left out unless asked for."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def decode_certain(self, ids: Sequence[int]) -> str:
        """What `decode` gives of `ids` whatever tokens follow: the beginning of every longer text.

        Not so of a character that is not complete, and of a run of byte tokens, which a decoder that falls back to
        bytes turns into U+FFFD as a whole if it is not UTF-8 in the end.
        """
        text = self.decode(ids)
        if self._bad_byte is not None:
            text = common_beginning(text, self.decode([*ids, self._bad_byte]))
        return text.rstrip("\ufffd")

    @functools.cached_property
    def _bad_byte(self) -> int | None:
        # The token of a byte that no UTF-8 has, in a tokenizer that falls back to bytes.
        return self.backend.token_to_id("<0xFF>")

    @functools.cached_property
    def special_ids(self) -> dict[str, int]:
        """The tokens that `decode` leaves out, by what they are called."""
        added = self.backend.get_added_tokens_decoder()
        return {token.content: i for i, token in added.items() if token.special}

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Any] | None = None,
    ) -> str:
        """The conversation as the text that the model was trained on.

        Args:
          messages: {"role": ..., "content": ...}, oldest first, and what else the template reads, such as tool_calls.
          add_generation_prompt: whether to end with the opening of the assistant's answer.
          tools: descriptions of functions, for templates that write them.

        Raises:
          PromptError: no messages, messages of another form, no chat template, or messages that the template refuses.
        """
        return chat_template.without_marks(self._marked(messages, add_generation_prompt, tools))[0]

    def _marked(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, tools: Sequence[Any] | None
    ) -> str:
        """`render_chat`'s text, with marks around what the template's `{% generation %}` blocks write."""
        if self.chat_template is None:
            raise PromptError("this model has no chat template; encode a plain text prompt instead.")
        if isinstance(messages, str | Mapping) or not messages:
            raise PromptError(f"messages is {messages!r}; expected a list of at least one {_MESSAGE}.")
        for i, message in enumerate(messages):
            told = isinstance(message, Mapping) and isinstance(message.get("role"), str)
            content = message.get("content") if told else None
            # Only a message of something else, such as tool_calls, may lack a text.
            if not told or not (isinstance(content, str) or (content is None and {*message} - {"role", "content"})):
                raise PromptError(f"message {i} is {message!r}; expected {_MESSAGE}, both texts.")
            if _holds_a_mark(message):
                raise PromptError(f"message {i} holds a Unicode noncharacter (U+FDD0 or U+FDD1); remove it.")
        return chat_template.render(
            self.chat_template,
            messages,
            add_generation_prompt=add_generation_prompt,
            strftime_now=lambda style: (self.today or datetime.now()).strftime(style),
            tools=tools,
            special_tokens=self.special_tokens,
        )

    def turn_end(self) -> int | None:
        """The special token that the chat template ends the assistant's turn with; None where it writes none."""
        asked, answer = {"role": "user", "content": "x"}, "\ufdd2"  # a noncharacter: the template writes none
        if self.chat_template is None:
            return None
        try:
            text = self.render_chat([asked, {"role": "assistant", "content": answer}], add_generation_prompt=False)
            after = self._encoded(text.rpartition(answer)[2].lstrip(), add_special_tokens=False).ids
        except PromptError:
            return None
        return after[0] if after and after[0] in self.special_ids.values() else None

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Any] | None = None,
    ) -> list[int]:
        """The ids of `render_chat(...)`. The template writes its own BOS; none is added. Raises as `render_chat`."""
        text = self.render_chat(messages, add_generation_prompt=add_generation_prompt, tools=tools)
        return self._encoded(text, add_special_tokens=False).ids

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Any] | None = None
    ) -> tuple[list[int], list[bool]]:
        """A whole conversation's ids, and for each whether the assistant says it: the loss mask.

        The template's own `{% generation %}` blocks decide, where it has them. Otherwise an assistant turn is what the
        template adds to the rendering that ends with the opening of the answer, up to and including the EOS. A turn of
        `"weight": 0` is not said.

        Raises:
          PromptError: as `render_chat`; a conversation that begins with the assistant; or a template without such
            blocks whose text changes when turns are added, so that no turn can be told apart.
        """
        text, spans = chat_template.without_marks(self._marked(messages, False, tools))
        own = bool(spans)
        if not own:
            spans = self._turns(messages, text, tools)
        turns = [message for message in messages if message["role"] == "assistant"]
        if any("weight" in turn for turn in turns):
            if len(spans) != len(turns):
                raise PromptError(
                    f"the chat template marks {len(spans)} spans for {len(turns)} assistant turns, so that their "
                    "weights cannot be told apart; leave weight out."
                )
            spans = [span for span, turn in zip(spans, turns, strict=True) if turn.get("weight", 1)]
        encoding = self._encoded(text, add_special_tokens=False, backend=self._untrimmed)
        said = [False] * len(encoding.ids)
        for begin, end in spans:
            inside = [i for i, (a, b) in enumerate(encoding.offsets) if a < end and b > begin and a < b]
            stops = [i for i in inside if encoding.ids[i] in self.eos_token_ids]
            for i in inside:  # the model never says the line break that templates put after the EOS
                said[i] = own or not stops or i <= stops[-1]
        return encoding.ids, said

    @functools.cached_property
    def _untrimmed(self) -> tokenizers.Tokenizer:
        # Post-processors may trim spaces off the offsets, after which a token of spaces has none.
        copy = tokenizers.Tokenizer.from_str(self.backend.to_str())
        copy.post_processor = None
        return copy

    def _turns(
        self, messages: Sequence[Mapping[str, Any]], text: str, tools: Sequence[Any] | None
    ) -> list[tuple[int, int]]:
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if i == 0:
                raise PromptError("the conversation begins with the assistant; put what it answers before it.")
            before = self.render_chat(messages[:i], tools=tools)
            after = self.render_chat(messages[: i + 1], add_generation_prompt=False, tools=tools)
            if not (after.startswith(before) and text.startswith(after)):
                raise PromptError(
                    f"the chat template writes the conversation differently once message {i} is added, so that the "
                    "assistant's words cannot be told apart; put {% generation %} ... {% endgeneration %} around them "
                    "in the template."
                )
            spans.append((len(before), len(after)))
        return spans

    def save(self, directory: Path) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json`, as `from_hf` and transformers read them."""
        self.backend.save(str(directory / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **self.special_tokens}
        if self.chat_template is not None:
            settings["chat_template"] = self.chat_template
        write_atomically(
            directory / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n", error=CheckpointError
        )

    @classmethod
    def from_hf(cls, directory: Path, eos_token_ids: Sequence[int]) -> "Tokenizer | None":
        """Reads `tokenizer.json` and the files beside it (`hf_tokenizer.read`); None where the first is missing.

        Raises:
          CheckpointError: files that cannot be read, or that contradict each other.
        """
        made = hf_tokenizer.read(directory)
        if made is None:
            return None
        backend, special, template = made
        return cls(backend, chat_template=template, special_tokens=special, eos_token_ids=eos_token_ids)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], eos_token_ids: Sequence[int]) -> "Tokenizer | None":
        """Rebuilds the tokenizer that GGUF metadata describes (`tokenizer.ggml.*`); None where there is none.

        Raises:
          CheckpointError: a tokenizer model or pre-tokenizer that is not supported, or one of which parts are missing
            or do not fit one another.
        """
        made = gguf_tokenizer.read(metadata)
        if made is None:
            return None
        backend, special = made
        return cls(
            backend,
            chat_template=hf_tokenizer.template_in(
                metadata.get("tokenizer.chat_template"), "the GGUF metadata's tokenizer.chat_template"
            ),
            special_tokens=special,
            eos_token_ids=eos_token_ids,
        )


def _holds_a_mark(value: Any) -> bool:
    """Somewhere in what a template may print."""
    if isinstance(value, str):
        return chat_template.OPEN in value or chat_template.CLOSE in value
    if isinstance(value, Mapping):
        return any(map(_holds_a_mark, (*value.keys(), *value.values())))
    return isinstance(value, list | tuple) and any(map(_holds_a_mark, value))


def common_beginning(a: str, b: str) -> str:
    """The longest text that both begin with."""
    different = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return a[: next(different, min(len(a), len(b)))]
