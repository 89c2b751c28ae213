"""Text to tokens and back: tokenizers' `Tokenizer` with the model's chat template.

Made from a Hugging Face directory (`tokenizer.json`) or rebuilt from GGUF metadata.
"""

import functools
import json
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from datetime import date, datetime
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import tokenizers
from gguf import TokenType
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from specjax.checks import is_whole
from specjax.errors import CheckpointError, PromptError
from specjax.files import write_atomically


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
          PromptError: no text, or half a surrogate pair in it.
        """
        return self._encoded(text).ids

    def _encoded(self, text: str, *, add_special_tokens: bool = True) -> tokenizers.Encoding:
        if not isinstance(text, str):
            raise PromptError(f"the text is {text!r}; expected a string.")
        try:
            text.encode()
        except UnicodeEncodeError as error:  # a file or a command line that is not UTF-8
            raise PromptError(f"the text is no valid Unicode ({error}); is its source UTF-8?") from error
        return self.backend.encode(text, add_special_tokens=add_special_tokens)

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

    def render_chat(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> str:
        """The conversation as the text that the model was trained on.

        Args:
          messages: {"role": ..., "content": ...}, oldest first.
          add_generation_prompt: whether to end with the opening of the assistant's answer.

        Raises:
          PromptError: no messages, messages of another form, no chat template, or messages that the template refuses.
        """
        return _without_marks(self._marked(messages, add_generation_prompt))[0]

    def _marked(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
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
            if any(mark in (content or "") for mark in (_OPEN, _CLOSE)):
                raise PromptError(f"message {i} holds a Unicode noncharacter (U+FDD0 or U+FDD1); remove it.")
        try:
            return _template(self.chat_template).render(
                messages=[dict(m) for m in messages],
                add_generation_prompt=add_generation_prompt,
                strftime_now=lambda style: (self.today or datetime.now()).strftime(style),
                **self.special_tokens,
            )
        except jinja2.TemplateError as error:
            raise PromptError(f"the chat template refuses these messages: {error}") from error

    def turn_end(self) -> int | None:
        """The special token that the chat template ends the assistant's turn with; None where it writes none."""
        asked, answer = {"role": "user", "content": "x"}, "\ufdd2"  # a noncharacter: the template writes none
        if self.chat_template is None:
            return None
        try:
            text = self.render_chat([asked, {"role": "assistant", "content": answer}], add_generation_prompt=False)
        except PromptError:
            return None
        after = self._encoded(text.rpartition(answer)[2].lstrip(), add_special_tokens=False).ids
        return after[0] if after and after[0] in self.special_ids.values() else None

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """The ids of `render_chat(...)`. The template writes its own BOS; none is added. Raises as `render_chat`."""
        text = self.render_chat(messages, add_generation_prompt=add_generation_prompt)
        return self._encoded(text, add_special_tokens=False).ids

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[list[int], list[bool]]:
        """A whole conversation's ids, and for each whether the assistant says it: the loss mask.

        The template's own `{% generation %}` blocks decide, where it has them. Otherwise an assistant turn is what the
        template adds to the rendering that ends with the opening of the answer, up to and including the EOS.

        Raises:
          PromptError: as `render_chat`; a conversation that begins with the assistant; or a template without such
            blocks whose text changes when turns are added, so that no turn can be told apart.
        """
        text, spans = _without_marks(self._marked(messages, False))
        own = bool(spans)
        if not own:
            spans = self._turns(messages, text)
        encoding = self._encoded(text, add_special_tokens=False)
        said = [False] * len(encoding.ids)
        for begin, end in spans:
            inside = [i for i, (a, b) in enumerate(encoding.offsets) if a < end and b > begin and a < b]
            stops = [i for i in inside if encoding.ids[i] in self.eos_token_ids]
            for i in inside:  # the model never says the line break that templates put after the EOS
                said[i] = own or not stops or i <= stops[-1]
        return encoding.ids, said

    def _turns(self, messages: Sequence[Mapping[str, str]], text: str) -> list[tuple[int, int]]:
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if i == 0:
                raise PromptError("the conversation begins with the assistant; put what it answers before it.")
            before = self.render_chat(messages[:i])
            after = self.render_chat(messages[: i + 1], add_generation_prompt=False)
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
        """Reads `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`; None where the first is missing.

        Raises:
          CheckpointError: a `tokenizer.json` that tokenizers cannot read, or a damaged `tokenizer_config.json`.
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
        settings = directory / "tokenizer_config.json"
        try:
            config = json.loads(settings.read_text("utf-8")) if settings.exists() else {}
            config.items()
        except (ValueError, AttributeError) as error:
            raise CheckpointError(f"{settings} is not a JSON object ({error}); is the download complete?") from error
        template = config.get("chat_template")
        if isinstance(template, list):  # several by name
            template = next((t["template"] for t in template if t["name"] == "default"), None)
        jinja_file = directory / "chat_template.jinja"
        if jinja_file.exists():
            template = jinja_file.read_text("utf-8")
        special = {}
        for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
            value = config.get(name)
            if value is not None:
                special[name] = value["content"] if isinstance(value, Mapping) else value
        return cls(backend, chat_template=template, special_tokens=special, eos_token_ids=eos_token_ids)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], eos_token_ids: Sequence[int]) -> "Tokenizer | None":
        """Rebuilds the tokenizer that GGUF metadata describes (`tokenizer.ggml.*`); None where there is none.

        Raises:
          CheckpointError: a tokenizer model or pre-tokenizer that is not supported, or one of which parts are missing
            or do not fit one another.
        """
        kind, pre = metadata.get("tokenizer.ggml.model", "none"), metadata.get("tokenizer.ggml.pre")
        if kind == "none":
            return None
        if kind not in ("gpt2", "llama"):
            raise CheckpointError(
                f"tokenizer.ggml.model is {kind!r}; supported are 'gpt2' (byte-level BPE) and 'llama' (SentencePiece). "
                "Load the Hugging Face checkpoint of this model instead."
            )
        for part in ("tokens", "merges" if kind == "gpt2" else "scores"):
            if f"tokenizer.ggml.{part}" not in metadata:
                raise CheckpointError(f"the GGUF metadata lacks tokenizer.ggml.{part}, which tokenizer {kind!r} needs.")
        tokens: list[str] = metadata["tokenizer.ggml.tokens"]
        for part in ("token_type", *(["scores"] if kind == "llama" else [])):
            values = metadata.get(f"tokenizer.ggml.{part}", tokens)
            if not isinstance(values, Sequence) or len(values) != len(tokens):
                length = len(values) if isinstance(values, Sequence) else "no"
                raise CheckpointError(
                    f"tokenizer.ggml.{part} has {length} entries ({reprlib.repr(values)}); expected {len(tokens)}, one "
                    "for each of tokenizer.ggml.tokens. Convert the model again."
                )
        metadata = _without_padding(metadata)
        tokens = metadata["tokenizer.ggml.tokens"]
        backend = _byte_level(metadata, pre) if kind == "gpt2" else _sentencepiece(metadata)
        types = metadata.get("tokenizer.ggml.token_type", [TokenType.NORMAL] * len(tokens))
        for token, role in zip(tokens, types, strict=True):
            if role in (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED):
                backend.add_tokens([AddedToken(token, special=role != TokenType.USER_DEFINED, normalized=False)])
        special = {}
        for key in ("bos", "eos", "padding", "unknown"):
            if metadata.get(f"tokenizer.ggml.{key}_token_id") is not None:
                special[f"{key[:3]}_token"] = tokens[_special_id(metadata, key)]
        adds_bos = metadata.get("tokenizer.ggml.add_bos_token", kind == "llama" or pre in _LLAMA3)
        adds_eos = metadata.get("tokenizer.ggml.add_eos_token", False)
        before = [special["bos_token"]] if adds_bos and "bos_token" in special else []
        after = [special["eos_token"]] if adds_eos and "eos_token" in special else []
        if before or after:
            ids = [(token, tokens.index(token)) for token in dict.fromkeys(before + after)]
            backend.post_processor = processors.TemplateProcessing(single=[*before, "$A", *after], special_tokens=ids)
        return cls(
            backend,
            chat_template=metadata.get("tokenizer.chat_template"),
            special_tokens=special,
            eos_token_ids=eos_token_ids,
        )


PADDING = re.compile(r"\[PAD\d*\]|\[unused\d+\]|<\|?(reserved|extra|unused|dummy)[^<>]*>", re.IGNORECASE)


def _without_padding(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Without the rows at the end that a converter added so that their number is a round one: they are no tokens."""
    names = [f"tokenizer.ggml.{part}" for part in ("tokens", "token_type", "scores")]
    tokens, types = metadata[names[0]], metadata.get(names[1])
    end = len(tokens)
    while end and (tokens[end - 1] == f"[PAD{end - 1}]" or (types and types[end - 1] == TokenType.UNUSED)):
        end -= 1
    return {**metadata, **{name: metadata[name][:end] for name in names if name in metadata}}


# Where words are cut before merging, by `tokenizer.ggml.pre`. GPT-2's own rule is built into `ByteLevel`.
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_WORDS = _LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
# By the names that llama.cpp knows for tokenizers of the architectures that can be loaded; cut one after the other.
_LLAMA3, _QWEN2 = ("llama-bpe", "llama3", "llama-v3"), ("qwen2", "deepseek-r1-qwen")
_CUTS = {
    "gpt-2": (_GPT2_WORDS,),
    "smollm": (r"\p{N}", _GPT2_WORDS),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2_WORDS, r"\p{N}+", r"[0-9][0-9][0-9]"),
    **dict.fromkeys(_LLAMA3, (_LLAMA3_WORDS,)),
    **dict.fromkeys(_QWEN2, (_QWEN2_WORDS,)),
}


def _pre_tokenizer(pre: str | None) -> pre_tokenizers.PreTokenizer:
    if pre not in _CUTS:
        *others, last = sorted(map(repr, _CUTS))
        raise CheckpointError(
            f"tokenizer.ggml.pre is {pre!r}; supported are {', '.join(others)} and {last}. Load the Hugging Face "
            "checkpoint of this model instead."
        )
    splits = [pre_tokenizers.Split(Regex(words), "isolated") for words in _CUTS[pre]]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _special_id(metadata: Mapping[str, Any], key: str, default: int | None = None) -> int:
    name, count = f"tokenizer.ggml.{key}_token_id", len(metadata["tokenizer.ggml.tokens"])
    token_id = metadata.get(name, default)
    if not is_whole(token_id) or not 0 <= token_id < count:
        raise CheckpointError(
            f"{name} is {token_id!r}; expected an id from 0 to {count - 1}, as tokenizer.ggml.tokens has {count} "
            "entries. Convert the model again."
        )
    return token_id


def _byte_level(metadata: Mapping[str, Any], pre: str | None) -> tokenizers.Tokenizer:
    vocab = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = []
    for pair in metadata["tokenizer.ggml.merges"]:
        a, space, b = pair.partition(" ")
        if not (space and a in vocab and b in vocab and a + b in vocab):
            raise CheckpointError(
                f"tokenizer.ggml.merges has {pair!r}; expected two of tokenizer.ggml.tokens with a space between them, "
                "which together make a third. Convert the model again."
            )
        merges.append((a, b))
    # Llama 3 takes a word that is in the vocabulary whole, whatever the merges say.
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=pre in _LLAMA3))
    if pre in _QWEN2:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _pre_tokenizer(pre)
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(metadata: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """SentencePiece BPE (Llama 1 and 2, Mistral): scores instead of merges, the best score merges first."""
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = []
    for token, i in vocab.items():
        cuts = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        merges += [(-scores[i], vocab[a], vocab[b], a, b) for a, b in cuts if a in vocab and b in vocab]
    unknown = tokens[_special_id(metadata, "unknown", 0)]
    pairs = [(a, b) for *_, a, b in sorted(merges)]
    backend = tokenizers.Tokenizer(models.BPE(vocab, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = [normalizers.Prepend("▁")] if metadata.get("tokenizer.ggml.add_space_prefix", True) else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return backend


def common_beginning(a: str, b: str) -> str:
    """The longest text that both begin with."""
    different = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return a[: next(different, min(len(a), len(b)))]


_OPEN, _CLOSE = "\ufdd0", "\ufdd1"  # noncharacters, which Unicode keeps for such internal use
_MESSAGE = "{'role': ..., 'content': ...}"


class _GenerationBlocks(jinja2.ext.Extension):
    """`{% generation %}`: what the template writes inside is the assistant's."""

    tags: ClassVar[set[str]] = {"generation"}  # type: ignore[misc]

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return f"{_OPEN}{caller()}{_CLOSE}"


def _without_marks(marked: str) -> tuple[str, list[tuple[int, int]]]:
    """The text, and where in it the marked spans are."""
    text, spans = "", []
    for part in marked.split(_OPEN):
        inside, closed, outside = part.partition(_CLOSE)
        if closed:
            spans.append((len(text), len(text) + len(inside)))
        text += inside + outside
    return text, spans


@functools.lru_cache(maxsize=8)
def _template(source: str) -> jinja2.Template:
    return _environment().from_string(source)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """transformers' dialect of jinja2; templates come with the checkpoint, so they run in the sandbox."""

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)  # jinja2's own filter escapes HTML

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationBlocks]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    return environment
